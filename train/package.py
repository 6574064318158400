"""Make of an exported checkpoint the folder that ships inside the package as ``nano``.

python -m train.package runs/nano/export dia2_jax/nano --defaults nano.json --card card.md
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import click
import jax.numpy as jnp

from dia2_jax import Dia2, hub
from dia2_jax.checkpoint import staged_folder
from dia2_jax.config import config_to_dict, load_dia2_config
from dia2_jax.convert import dia2, mimi_hf
from dia2_jax.convert.load import export_params, load_weights
from dia2_jax.convert.models import (
    abstract_dia2,
    abstract_mimi,
    mimi_layout,
    mimi_table,
    read_mimi_config,
)
from dia2_jax.convert.rules import Table
from dia2_jax.errors import CheckpointError, ConfigError
from dia2_jax.generation.defaults import read_defaults, write_defaults
from train.command import EXPORT_EPILOG, Program, note
from train.export import check_out

CARD = "README.md"


def package_model(
    model: str | Path,
    out: Path,
    *,
    mimi: str | Path | None = None,
    defaults: Path | None = None,
    card: Path | None = None,
    limit: float = 25.0,
) -> dict[str, int]:
    """Write a model and its codec, weights rounded to bfloat16, as one folder that needs no other.

    Rounding is to nearest, ties to even. The folder appears whole or not at all; it was loaded
    once before it does.

    Args:
      model: folder or repository, in the published layout or as ``dia2-jax convert`` wrote it.
      out: the folder; what is there is replaced.
      mimi: the codec, if not the model's.
      defaults: a ``dia2_generation.json``, if not the model's; without either the library's
        settings are written.
      card: a README for the folder, if not the model's.
      limit: of the size of all files, in millions of bytes.

    Returns:
      Bytes of every file, by name.

    Raises:
      CheckpointError: larger than the limit, which lists the sizes; or unreadable weights.
      HubError, ConfigError: a file that is missing, or cannot be read.
    """
    files = hub.resolve(model, mimi=mimi)
    settings = read_defaults(files.generation if defaults is None else defaults)
    beside = files.config.parent / CARD
    text = card if card is not None else beside if beside.is_file() else None
    with staged_folder(out) as staged:
        shutil.copyfile(files.config, staged / hub.CONFIG)
        config = load_dia2_config(files.config)
        _write_rounded(
            files.weights, dia2.TABLE, dia2.TABLE, abstract_dia2(config)[1], staged / hub.WEIGHTS
        )
        for name in (hub.TOKENIZER, *hub.TOKENIZER_EXTRAS):
            source = files.tokenizer.parent / name
            if source.is_file():
                shutil.copyfile(source, staged / name)
        _write_codec(files.mimi, staged / "mimi")
        if config.assets is not None and config.assets.mimi:
            # A codec that the config names would come before the folder beside it.
            (staged / hub.MANIFEST).write_text('{"mimi": "mimi"}\n', encoding="utf-8")
        write_defaults(staged / hub.GENERATION, settings)
        if text is not None:
            shutil.copyfile(text, staged / CARD)
        sizes = {
            path.relative_to(staged).as_posix(): path.stat().st_size
            for path in sorted(staged.rglob("*"))
            if path.is_file()
        }
        total = sum(sizes.values())
        if total > limit * 1e6:
            raise CheckpointError(
                f"{out}: {total / 1e6:.2f} MB in all, the limit is {limit:g} MB (--limit); make "
                f"the model or the codec narrower. The files:\n{describe_sizes(sizes)}"
            )
        Dia2.from_pretrained(staged)
    return sizes


def describe_sizes(sizes: dict[str, int]) -> str:
    """One line a file, and the sum."""
    lines = [f"  {size / 1e6:8.3f} MB  {name}" for name, size in sizes.items()]
    return "\n".join([*lines, f"  {sum(sizes.values()) / 1e6:8.3f} MB  in all"])


def _write_rounded(weights: Path, table: Table, written: Table, abstract: Any, file: Path) -> None:
    """Weights that `table` reads, in the layout `written`, as bfloat16."""
    params, source = load_weights(weights, table, abstract)
    export_params(params, written, file, source, dtype=jnp.bfloat16)


def _write_codec(files: hub.MimiFiles, folder: Path) -> None:
    """A codec of either layout, in the one that `config.json` describes."""
    layout, config = mimi_layout(files.weights), read_mimi_config(files.config)
    folder.mkdir()
    if layout == mimi_hf.LAYOUT and files.config is not None:
        shutil.copyfile(files.config, folder / hub.CONFIG)
    else:
        document = json.dumps(config_to_dict(config), indent=2)
        (folder / hub.CONFIG).write_text(document + "\n", encoding="utf-8")
    _write_rounded(
        files.weights,
        mimi_table(layout, config),
        mimi_table(mimi_hf.LAYOUT, config),
        abstract_mimi(config)[1],
        folder / hub.WEIGHTS,
    )


_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(cls=Program, epilog=EXPORT_EPILOG)
@click.argument("model", metavar="MODEL")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--mimi", metavar="DIR|FILE|REPO", help="The codec, if not the model's.")
@click.option("--defaults", type=_FILE, help="A dia2_generation.json, if not the model's.")
@click.option("--card", type=_FILE, help="A README for OUT, if not the model's.")
@click.option(
    "--limit",
    type=click.FloatRange(min=0, min_open=True),
    metavar="MB",
    default=25.0,
    show_default=True,
    help="Of the size of all files.",
)
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint that OUT holds.")
def main(
    model: str,
    out: Path,
    mimi: str | None,
    defaults: Path | None,
    card: Path | None,
    limit: float,
    overwrite: bool,
) -> None:
    """Write the checkpoint MODEL to the folder OUT as it can be shipped.

    Weights in bfloat16, tokenizer, codec, generation defaults and model card: all that
    `dia2-jax generate -m OUT` needs, and nothing else.
    """
    check_out(out, overwrite)
    if Path(model).resolve() == out.resolve():
        raise ConfigError(f"{out}: is the model itself; choose another folder")
    sizes = package_model(model, out, mimi=mimi, defaults=defaults, card=card, limit=limit)
    note(f"{out}:\n{describe_sizes(sizes)}")


if __name__ == "__main__":
    main()
