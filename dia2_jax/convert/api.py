"""Whole folders from one form to another: what `dia2-jax convert` does.

A Dia2 folder keeps its config and tokenizer files as they are and has its weights (and those
of a codec inside it) rewritten; a codec alone also goes from one published layout to the
other. The destination appears whole or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np

from dia2_jax import checkpoint, hub
from dia2_jax.config import MimiConfig, config_to_dict
from dia2_jax.convert import dia2, mimi_hf, mimi_kyutai
from dia2_jax.convert.folder import read_dia2_folder
from dia2_jax.convert.load import SourceInfo, export_params, load_weights, save_orbax
from dia2_jax.convert.models import (
    abstract_dia2,
    abstract_mimi,
    holds_int8,
    layout_of,
    mimi_layout,
    mimi_table,
    read_mimi_config,
)
from dia2_jax.convert.safetensors_io import DTYPES, dtype_name, open_safetensors
from dia2_jax.errors import CheckpointError, Dia2Error

#: Forms a folder can be written in. ``published`` is the layout the weights were published in;
#: ``hf`` and ``kyutai`` name one of the codec's two.
Form = Literal["published", "orbax", "hf", "kyutai"]

#: Files that are copied as they are where a folder has them.
_CARRIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
    "merges.txt", "added_tokens.json", "preprocessor_config.json", "generation_config.json",
    hub.GENERATION, "README.md", "LICENSE", "NOTICE",
)  # fmt: skip


@dataclass(frozen=True)
class Conversion:
    """What :func:`convert` did.

    Attributes:
      kind: ``dia2`` or ``mimi``.
      layout: published layout the weights have or had, e.g. ``mimi-hf``.
      form: the form written.
      tensors: number of published tensors.
      destination: the folder written.
    """

    kind: str
    layout: str
    form: str
    tensors: int
    destination: Path


def convert(
    source: str | Path,
    destination: str | Path,
    to: Form = "published",
    dtype: Any | None = None,
    *,
    force: bool = False,
) -> Conversion:
    """Write the model or codec at `source` to the folder `destination` in another form.

    There and back gives the same bytes: config and tokenizer files verbatim, and every tensor
    with its name, shape, dtype and values (one file, where the source had shards). A tokenizer
    or codec that manifest or config name inside `source` comes along to the same place; a
    repository id stays a name.

    Args:
      source: a folder (published Dia2, one written by this function, a codec in either
        layout, the run folder of a finished training) or a safetensors file of a codec.
      destination: a folder that is new or empty.
      to: see :data:`Form`; ``hf`` and ``kyutai`` are for a codec alone.
      dtype: store floating tensors in this dtype instead of the source's (of the model; a
        codec inside a Dia2 folder stays as it is). ``int8`` rounds the weights of linear maps,
        with a scale for each output, and leaves the rest as it is: a layout of our own
        (``dia2-int8``), which ``Dia2.from_pretrained`` reads, upstream does not, and nothing
        leads back from.
      force: replace what `destination` holds.

    Raises:
      CheckpointError: weights that cannot be read or do not fit their config, int8 of a codec or
        another dtype of int8 weights, a part of the model that is named outside `source`, or a
        destination that is not empty.
      ConfigError: a config that cannot be read, or has no equal in the other layout.
      HubError: a file that `source` should hold and does not.
    """
    source, destination = Path(source), Path(destination).absolute()
    if to not in get_args(Form):
        raise CheckpointError(f"unknown form {to!r}; known: {', '.join(get_args(Form))}")
    source = _finished_run(source)
    _check_destination(source, destination, force)
    kind = _kind(source)
    if kind == "dia2" and to in ("hf", "kyutai"):
        raise CheckpointError(
            f"{source} is a Dia2 model; {to!r} is a layout of the codec: convert "
            f"{source / 'mimi'} alone"
        )
    if kind == "mimi" and dtype is not None and np.dtype(dtype) == np.int8:
        raise CheckpointError(
            f"{source} is a codec, whose weights stay in floating point; int8 is for a Dia2 model"
        )
    with checkpoint.staged_folder(destination) as staged:
        if kind == "dia2":
            result = _convert_dia2(source, staged, to, dtype)
        else:
            result = _convert_mimi(hub.resolve_mimi(source), staged, to, dtype)
    return dataclasses.replace(result, destination=destination)


def _finished_run(source: Path) -> Path:
    """What a training run exported, if `source` is its folder; else `source`."""
    if not ((source / "checkpoints").is_dir() and (source / "config.yaml").is_file()):
        return source
    if not (source / "export").is_dir():
        raise CheckpointError(
            f"{source} is a training run that has not ended, so it has no export folder yet: "
            f"`python -m train.export {source} OUT` writes one from a checkpoint"
        )
    return source / "export"


def _check_destination(source: Path, destination: Path, force: bool) -> None:
    if destination.is_file():
        raise CheckpointError(f"{destination} is a file; name a folder")
    resolved, target = source.resolve(), destination.resolve()
    if target == resolved or target in resolved.parents:
        raise CheckpointError(f"{destination} holds the source; name another folder")
    if destination.is_dir() and any(destination.iterdir()) and not force:
        raise CheckpointError(
            f"{destination} is not empty; name another folder, or replace it with force (--force)"
        )


def _kind(source: Path) -> str:
    """``dia2`` or ``mimi``, from the config, else from the tensor names."""
    if not source.exists():
        raise CheckpointError(f"{source}: no such file or folder")
    if checkpoint.is_orbax(source):
        raise CheckpointError(
            f"{source} holds weights only; name the folder around it, which has the config"
        )
    if source.is_dir() and hub.read_manifest(_manifest_of(source)):
        return "dia2"  # a codec has none
    config = source / hub.CONFIG
    if source.is_dir() and config.is_file():
        try:
            keys = json.loads(config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{config}: not valid JSON ({error})") from None
        if isinstance(keys, dict) and {"data", "model"} <= keys.keys():
            return "dia2"
        return "mimi"
    weights = hub.find_weights(source) if source.is_dir() else source
    if weights is not None and checkpoint.is_orbax(weights):
        return "mimi"  # a Dia2 folder has its config
    if layout_of(open_safetensors(source).specs) in (dia2.LAYOUT, dia2.INT8_LAYOUT):
        raise CheckpointError(
            f"{source}: a Dia2 model without its config.json; name the folder that holds both"
        )
    return "mimi"


def _convert_dia2(source: Path, staged: Path, to: str, dtype: Any | None) -> Conversion:
    parts, config = read_dia2_folder(source)
    _copy(parts.config, staged / parts.config.relative_to(source))
    _copy_carried(source, staged)
    if parts.tokenizer is not None:
        _copy(parts.tokenizer, staged / parts.tokenizer.relative_to(source))
        _copy_carried(parts.tokenizer.parent, (staged / parts.tokenizer.relative_to(source)).parent)
    weights = parts.weights
    stored, int8 = holds_int8(weights), dtype is not None and np.dtype(dtype) == np.int8
    if stored and dtype is not None and not int8:
        raise CheckpointError(
            f"{weights}: holds int8 weights, and what rounding took of them is gone; convert the "
            "checkpoint that they were made from"
        )
    dtype, table = None if int8 else dtype, dia2.INT8_TABLE if stored else dia2.TABLE
    _, abstract = abstract_dia2(config, int8=stored or int8)
    params, info = load_weights(weights, table, abstract, _memory_dtype(to, dtype))
    if int8 and not stored:
        table, info = dia2.INT8_TABLE, _rounded(info, params)
    # What an Orbax folder must remember to become the published folder again.
    manifest = _manifest_of(source)
    text = None if manifest is None else manifest.read_text("utf-8")
    origin: dict[str, Any] = {
        "weights": _single_name(weights.relative_to(source)),
        "manifest": text,
    }
    if checkpoint.is_orbax(weights):
        origin = _origin(weights)
        if _but_weights(text) != _but_weights(origin["manifest"]):  # edited since
            content = {**parts.manifest, "weights": origin["weights"]}
            origin["manifest"] = json.dumps(content, indent=2) + "\n"
    if to == "orbax":
        written: str = hub.ORBAX
        save_orbax(
            staged / written,
            params,
            _recorded(info, dtype),
            {"config": _read_json(parts.config), **origin},
        )
    else:
        written = origin["weights"]
        (staged / written).parent.mkdir(parents=True, exist_ok=True)
        export_params(params, table, staged / written, info, dtype=dtype)
    _write_manifest(staged, origin["manifest"], written)
    if parts.mimi is not None:
        _place_codec(parts.mimi, staged / parts.mimi.relative_to(source), to)
    return Conversion("dia2", table.layout, to, len(info.dtypes), staged)


def _place_codec(mimi: Path, target: Path, to: str) -> None:
    """The codec inside a model, in the same place of the new folder."""
    if mimi.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        _convert_mimi(hub.resolve_mimi(mimi), target, to, None)
        return
    # A manifest or config names this very file, so it stays the file that it is in every form.
    if target.exists():
        raise CheckpointError(
            f"{mimi}: the model's weights are to have this name; rename the codec"
        )
    files = hub.resolve_mimi(mimi)
    beside = hub.shards(mimi) if mimi.suffix == ".json" else []
    for name in (mimi.name, *beside, *([files.config.name] if files.config else [])):
        _copy(mimi.parent / name, target.parent / name)


def _convert_mimi(files: hub.MimiFiles, staged: Path, to: str, dtype: Any | None) -> Conversion:
    config, layout = read_mimi_config(files.config), mimi_layout(files.weights)
    _, abstract = abstract_mimi(config)
    table = mimi_table(layout, config)
    params, info = load_weights(files.weights, table, abstract, _memory_dtype(to, dtype))
    beside = files.weights.parent
    _copy_carried(beside, staged)
    target = {"hf": mimi_hf.LAYOUT, "kyutai": mimi_kyutai.LAYOUT}.get(to, layout)
    # Beside Kyutai's config the published one stays, so that the way back finds it as it was.
    for name in (hub.CONFIG, hub.KYUTAI_CONFIG)[: 1 if target == mimi_hf.LAYOUT else 2]:
        if (beside / name).is_file() and _same_config(beside / name, config):
            _copy(beside / name, staged / name)
    _write_config(staged, target, config)
    if to == "orbax":
        origin: dict[str, Any] = {
            "weights": _single_name(Path(files.weights.name)),
            "manifest": None,
        }
        if checkpoint.is_orbax(files.weights):
            origin = _origin(files.weights)
        save_orbax(
            staged / hub.ORBAX,
            params,
            _recorded(info, dtype),
            {"config": config_to_dict(config), **origin},
        )
    else:
        name = _single_name(Path(files.weights.name))
        if checkpoint.is_orbax(files.weights):
            name = _origin(files.weights)["weights"]
        export_params(params, mimi_table(target, config), staged / name, info, dtype=dtype)
    return Conversion("mimi", target, to, len(info.dtypes), staged)


def _write_config(staged: Path, layout: str, config: MimiConfig) -> None:
    """The config of a layout, where no verbatim one was copied."""
    if layout == mimi_hf.LAYOUT and not (staged / hub.CONFIG).is_file():
        _write_json(staged / hub.CONFIG, config_to_dict(config))
    if layout == mimi_kyutai.LAYOUT and not (staged / hub.KYUTAI_CONFIG).is_file():
        _write_json(staged / hub.KYUTAI_CONFIG, mimi_kyutai.config_to_kyutai(config))


def _same_config(path: Path, config: MimiConfig) -> bool:
    """Whether a file describes the codec `config`, whatever its bookkeeping says."""
    try:
        other = read_mimi_config(path)
    except Dia2Error:
        return False  # such as the language model's config beside Kyutai's codec
    names = [field.name for field in dataclasses.fields(MimiConfig) if field.name != "bookkeeping"]
    derived = ("frames_per_second", "attention_head_dim")
    compared = [name for name in names if name not in ("frame_rate", "head_dim", "codebook_dim")]
    return all(getattr(other, n) == getattr(config, n) for n in (*compared, *derived))


def _memory_dtype(to: str, dtype: Any | None) -> Any:
    # A cast happens while loading into Orbax and while writing a file, never twice.
    return "source" if dtype is None or to != "orbax" else dtype


def _recorded(info: SourceInfo, dtype: Any | None) -> SourceInfo:
    """The record to keep with weights that were cast on request: what they are now."""
    if dtype is None:
        return info
    kind = dtype_name(np.dtype(dtype))
    return dataclasses.replace(
        info,
        dtypes={
            name: kind if jnp.issubdtype(DTYPES[old], jnp.floating) else old
            for name, old in info.dtypes.items()
        },
    )


def _rounded(info: SourceInfo, params: Any) -> SourceInfo:
    """The record to keep with weights that were rounded to int8: a new file's, in our layout."""
    leaves, _ = checkpoint.flatten_tree(params)
    names = sorted(leaves)
    dtypes = {name: dtype_name(np.dtype(leaves[name].dtype)) for name in names}
    return SourceInfo(dia2.INT8_LAYOUT, dtypes, info.metadata)


def _single_name(weights: Path) -> str:
    """The file that weights are written to: their own, or the usual one for shards."""
    if weights.suffix == ".safetensors":
        return weights.as_posix()
    return (weights.parent / hub.WEIGHTS).as_posix()


def _manifest_of(source: Path) -> Path | None:
    return source / hub.MANIFEST if (source / hub.MANIFEST).is_file() else None


def _origin(orbax: Path) -> dict[str, Any]:
    """What an Orbax folder remembers of the published one: name of its weights, manifest."""
    document = checkpoint.read_metadata(orbax)
    name = document["weights"]
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise CheckpointError(f"{orbax}: its weights' file {name!r} would lie outside the folder")
    return {"weights": name, "manifest": document["manifest"]}


def _but_weights(manifest: str | None) -> dict[str, Any]:
    content = {} if manifest is None else json.loads(manifest)
    return {key: value for key, value in content.items() if key != "weights"}


def _write_manifest(staged: Path, text: str | None, weights: str) -> None:
    if text is None:
        return
    manifest = json.loads(text)
    if manifest.get("weights") not in (None, weights):
        text = json.dumps({**manifest, "weights": weights}, indent=2) + "\n"
    (staged / hub.MANIFEST).write_text(text, encoding="utf-8")


def _copy_carried(source: Path, destination: Path) -> None:
    for name in _CARRIED:
        if (source / name).is_file():
            _copy(source / name, destination / name)


def _copy(source: Path, destination: Path) -> None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, destination)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
