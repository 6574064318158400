"""Make a checkpoint larger without changing what it computes, to be trained on from there.

python -m train.grow MODEL SHAPE OUT

Layers are added, gated MLPs widened, and stages of the depformer that shared a set of weights get
sets of their own. What is new begins as random weights are, but for the maps through which it
would reach the residual stream, which begin as zero (as in Net2Net, Chen et al. 2016, and LLaMA
Pro, Wu et al. 2024).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import click
import numpy as np

from dia2_jax import checkpoint
from dia2_jax.config import Dia2Config, load_dia2_config
from dia2_jax.convert.models import abstract_dia2
from dia2_jax.errors import ConfigError
from dia2_jax.typing import ArrayLike
from train.command import EXPORT_EPILOG, Program, note
from train.dia2_config import ModelSource
from train.export import check_out
from train.shapes import read_shape_file
from train.starting_point import export_model, find_start, fresh_param, initial_params

#: Maps from a branch back into the residual stream.
_OUTPUTS = ("o_proj", "out_proj", "wo")


def grow(
    params: Mapping[str, ArrayLike], old: Dia2Config, new: Dia2Config, *, seed: int = 0
) -> dict[str, np.ndarray]:
    """Parameters of the shape ``new`` that compute what ``params`` of the shape ``old`` do.

    Args:
      params: flat, float32.
      seed: of what is random.

    Raises:
      ConfigError: the shapes differ in what cannot be kept, or ``new`` is smaller.
    """
    _check(old, new)
    abstract = checkpoint.flatten_tree(abstract_dia2(new)[1])[0]
    return {
        path: _parameter(path, fresh_param(path, leaf, seed), params.get(_source(path, old, new)))
        for path, leaf in abstract.items()
    }


def _parameter(path: str, fresh: np.ndarray, source: ArrayLike | None) -> np.ndarray:
    output = any(f".{name}." in path for name in _OUTPUTS)
    if source is None:  # of a layer that was not there
        return np.zeros_like(fresh) if output else fresh
    kept = np.asarray(source)
    if kept.shape == fresh.shape:
        return kept
    if output:  # [width, hidden] of an MLP
        grown = np.zeros_like(fresh)
        grown[:, : kept.shape[1]] = kept
        return grown
    for half, was in zip(np.split(fresh, 2), np.split(kept, 2), strict=True):  # [gate; up]
        half[: len(was)] = was
    return fresh


def _source(path: str, old: Dia2Config, new: Dia2Config) -> str:
    """The parameter that this one goes on from: itself, or that of the set its stages shared."""
    parts = path.split(".")
    for name in ("in_proj", "out_proj", "depformer_in"):
        if name in parts[:-1] and parts[0] == "depformer":
            place = parts.index(name) + 1
            stage = new.schedule.index(int(parts[place]))
            parts[place] = str(old.schedule[stage])
    return ".".join(parts)


def _check(old: Dia2Config, new: Dia2Config) -> None:
    """Whether ``new`` is ``old`` with more of what can be added."""
    for part in ("decoder", "depformer"):
        was, wanted = getattr(old.model, part), getattr(new.model, part)
        for name in ("n_layer", "n_hidden"):
            if getattr(wanted, name) < getattr(was, name):
                raise ConfigError(
                    f"model.{part}.{name}: {getattr(wanted, name)} is less than the "
                    f"{getattr(was, name)} of the checkpoint, which can only grow"
                )
    fixed = {
        part: dataclasses.replace(
            getattr(new.model, part),
            n_layer=getattr(old.model, part).n_layer,
            n_hidden=getattr(old.model, part).n_hidden,
        )
        for part in ("decoder", "depformer")
    }
    for name in [field.name for field in dataclasses.fields(old.model)]:
        wanted = fixed.get(name, getattr(new.model, name))
        if wanted != getattr(old.model, name):
            raise ConfigError(
                f"model.{name}: only n_layer and n_hidden can grow; the checkpoint has "
                f"{getattr(old.model, name)}"
            )
    if new.data != old.data:
        different = [
            field.name
            for field in dataclasses.fields(old.data)
            if getattr(new.data, field.name) != getattr(old.data, field.name)
        ]
        raise ConfigError(f"data: differs from the checkpoint's in {', '.join(different)}")
    sets: dict[int, int] = {}
    for stage, (was, wanted) in enumerate(zip(old.schedule, new.schedule, strict=True)):
        if sets.setdefault(wanted, was) != was:
            raise ConfigError(
                f"runtime.weights_schedule: stage {stage} shares set {wanted} with a stage that "
                "has other weights in the checkpoint; sets can be split and not joined"
            )


@click.command(cls=Program, epilog=EXPORT_EPILOG)
@click.argument("model", metavar="MODEL")
@click.argument("shape", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True, help="Of what is random.")
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint that OUT holds.")
def main(model: str, shape: Path, out: Path, seed: int, overwrite: bool) -> None:
    """Write MODEL to the folder OUT in a larger SHAPE (config.json or YAML).

    It computes what it did. More layers, wider MLPs (n_hidden) and more sets of weights for the
    depformer's stages (weights_schedule) are what can be larger.
    """
    check_out(out, overwrite)
    start = find_start(ModelSource(start=model))
    wanted = read_shape_file(shape, load_dia2_config, "SHAPE")
    old = checkpoint.flatten_tree(abstract_dia2(start.config)[1])[0]
    params = initial_params(start, old, seed)
    grown = grow(params, start.config, wanted, seed=seed)
    larger = dataclasses.replace(start, config=wanted, weights=None, config_file=None)
    with export_model(larger, grown, out):
        pass
    counts = [sum(np.size(value) for value in each.values()) for each in (params, grown)]
    note(f"{out}: {counts[1]:,} parameters instead of {counts[0]:,}")


if __name__ == "__main__":
    main()
