"""Training configurations: YAML files with ``a.b=c`` overrides, read strictly, and the parts of
them that every program shares (``run`` and ``mesh``).

A program's configuration is a frozen pydantic dataclass with ``run: RunConfig``,
``mesh: MeshConfig`` and parts of its own. Relative paths in it count from the working directory.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from pydantic.dataclasses import dataclass

from dia2_jax.config.reading import STRICT, require, require_positive, validate
from dia2_jax.errors import ConfigError

Config = TypeVar("Config")

#: The most that a numpy seed sequence and a JAX key take alike.
_SEEDS = 2**32


@dataclass(frozen=True, config=STRICT)
class WandbConfig:
    """Weights & Biases. ``online`` without an API key logs to the run folder, as ``offline``."""

    mode: Literal["online", "offline", "disabled"] = "disabled"
    project: str = "dia2-jax"
    name: str | None = None


@dataclass(frozen=True, config=STRICT)
class HooksConfig:
    """What watches a run: a progress bar, ``log.jsonl``, ``curve.png``, Weights & Biases."""

    progress: bool = True
    jsonl: bool = True
    curve: bool = True
    wandb: WandbConfig = WandbConfig()


@dataclass(frozen=True, config=STRICT)
class RunConfig:
    """Length, intervals and keeping of a run. Intervals are in steps; 0 means never.

    Attributes:
      folder: where the run is kept; resuming is asked for on the command line.
      steps: optimiser steps in all.
      seed: everything random is a function of it and the step.
      save_minutes: a checkpoint is also saved when the last one is this old; 0 means never.
      keep: how many of the newest checkpoints are kept.
      best: a validation metric, lower is better: an evaluation that improves on it saves a
        checkpoint, and the best one is kept beside the newest.
    """

    folder: str
    steps: int
    seed: int = 0
    log_every: int = 10
    evaluate_every: int = 0
    sample_every: int = 0
    save_every: int = 1000
    save_minutes: float = 0
    keep: int = 2
    best: str | None = None
    hooks: HooksConfig = HooksConfig()

    def __post_init__(self) -> None:
        require(self.folder.strip() != "", "folder", "must name a folder")
        require_positive(self, "steps", "log_every", "keep")
        require(0 <= self.seed < _SEEDS, "seed", f"must be in 0 … 2**32 - 1, got {self.seed}")
        for name in ("evaluate_every", "sample_every", "save_every", "save_minutes"):
            value = getattr(self, name)
            require(0 <= value < math.inf, name, f"must be 0 (never) or an interval, got {value}")
        require(
            self.best is None or self.evaluate_every > 0,
            "best",
            f"{self.best!r} is never measured: set evaluate_every too",
        )
        require(
            self.best is None or self.best.startswith("validation/"),
            "best",
            f"{self.best!r} is no validation metric, such as validation/loss",
        )


@dataclass(frozen=True, config=STRICT)
class MeshConfig:
    """Devices along each axis of the mesh; -1 on one axis takes what the others leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
        for name, size in sizes.items():
            require(size == -1 or size > 0, name, f"must be positive, or -1 for the rest: {size}")
        rest = [name for name, size in sizes.items() if size == -1]
        require(len(rest) <= 1, " and ".join(rest), "only one axis can be -1")


class TrainingConfig(Protocol):
    """What the loop needs of a program's configuration."""

    @property
    def run(self) -> RunConfig: ...

    @property
    def mesh(self) -> MeshConfig: ...


def read_config(kind: type[Config], path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The YAML file at ``path`` with ``a.b=c`` overrides, as a ``kind``.

    Override values are read as YAML (``run.steps=20``, ``data.rows=[a,b]``, ``run.best=null``);
    lists replace lists. ``${run.folder}`` in a value stands for another value.

    Raises:
      ConfigError: names the file and everything that is wrong with it.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    where = str(path)
    malformed = [text for text in overrides if "=" not in text or text.startswith("=")]
    if malformed:
        raise ConfigError(f"override {malformed[0]!r}: expected NAME=VALUE, such as run.steps=20")
    try:
        loaded = OmegaConf.load(path)
        if not OmegaConf.is_dict(loaded):
            raise ConfigError(f"{where}: expected names and values, got a list")
        merged = OmegaConf.merge(loaded, OmegaConf.from_dotlist(list(overrides)))
        raw: Any = OmegaConf.to_container(merged, resolve=True)
        json.dumps(raw)
    except FileNotFoundError:
        raise ConfigError(f"{where}: no such config file") from None
    except ConfigError:
        raise
    except IsADirectoryError:
        raise ConfigError(f"{where}: is a folder, not a config file") from None
    except (YAMLError, OmegaConfBaseException, OSError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{where}: cannot be read with its overrides ({reason})") from None
    if overrides:
        where += f" with {' '.join(overrides)}"
    return validate(kind, raw, where)


def config_to_dict(config: Any) -> dict[str, Any]:
    """A configuration as JSON values, every default written out."""
    return dict(json.loads(json.dumps(dataclasses.asdict(config))))


def flat(raw: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a nested dict by dotted name; an empty dict is a value."""
    result: dict[str, Any] = {}
    for name, value in raw.items():
        if isinstance(value, dict) and value:
            result.update(flat(value, f"{prefix}{name}."))
        else:
            result[prefix + name] = value
    return result
