"""Write the weights of a training run, finished or not, in the published layout.

python -m train.export RUN OUT --step best
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dia2_jax.errors import ConfigError
from train.command import EXPORT_EPILOG, Program, note
from train.task import Task


def task_of(name: str, raw: dict[str, Any], where: str) -> Task:
    """The task that a run was started with, from its saved configuration, fit to be exported.

    On the devices that there are, and for Dia2 without the data, which may lie on the machine that
    trained.
    """
    from dia2_jax.config.reading import validate

    raw = {**raw, "mesh": {}}
    if name == "codec":
        from train.codec_training.config import CodecConfig
        from train.codec_training.task import CodecTask

        return CodecTask(validate(CodecConfig, raw, where))
    from train.dia2_config import Dia2TrainingConfig
    from train.dia2_task import Dia2Task

    # Weights over all devices; rows need not divide over them, as there are none.
    raw["mesh"] = {"data": 1, "fsdp": -1}
    return Dia2Task(validate(Dia2TrainingConfig, raw, where), name, data=False)


def replaceable(out: Path) -> bool:
    """Whether a folder is empty, or holds a checkpoint in the published layout."""
    return out.is_dir() and ((out / "config.json").is_file() or not any(out.iterdir()))


def check_out(out: Path, overwrite: bool, kind: str = "checkpoint") -> None:
    """Whether a checkpoint may be written to a folder.

    Raises:
      ConfigError: it exists and is not to be replaced, or is nothing that may be (no ``kind``).
    """
    if out.exists() and not overwrite:
        raise ConfigError(f"{out}: exists; choose another folder or pass --overwrite")
    if out.exists() and not replaceable(out):
        raise ConfigError(f"{out}: is no {kind}, so it is not replaced; choose another")


@click.command(cls=Program, epilog=EXPORT_EPILOG)
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--step",
    metavar="N|best",
    help="Which checkpoint: the one after step N, or of the best validation metric (run.best of "
    "its configuration); the newest by default.",
)
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint that OUT holds.")
def main(run: Path, out: Path, step: str | None, overwrite: bool) -> None:
    """Write the weights of a checkpoint of RUN to the folder OUT, in the published layout.

    OUT then works wherever a published checkpoint does: `dia2-jax generate -m OUT`, `dia2-jax
    convert OUT`, upstream's runtime. A run that ended has done this itself, to RUN/export.
    """
    from dia2_jax.checkpoint import flatten_tree
    from train.checkpoints import load_for_export

    if step not in (None, "best") and not step.isdigit():
        raise ConfigError(f"--step {step!r}: expected a number of steps, or best")
    check_out(out, overwrite, "exported checkpoint")
    wanted: Any = int(step) if step is not None and step.isdigit() else step
    nested, metadata = load_for_export(run, wanted, parts=("step", "params", "ema", "codebooks"))
    # A task's parameters are a flat dict of dotted names.
    state = {
        part: flatten_tree(value)[0] if isinstance(value, dict) else value
        for part, value in nested.items()
    }
    task = task_of(metadata["task_name"], metadata["config"], f"{run}: its configuration")
    task.export(state, out)
    note(f"{out}: the weights after step {metadata['step']}")


if __name__ == "__main__":
    main()
