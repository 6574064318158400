"""What a run will take of every device, computed before anything is compiled or loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from train.command import note
from train.flops import projection_shapes, training_flops
from train.processes import is_leader

if TYPE_CHECKING:
    from train.dia2_task import Dia2Task


@dataclass(frozen=True)
class Plan:
    """Memory of one device in bytes, and work of one step of all devices.

    Attributes:
      trainable, frozen: parameters of the whole model that train and that do not.
      memory: bytes of one device by what holds them.
      flops: of an optimiser step, all devices together (``train.flops``).
      frames: frames of an optimiser step.
      seconds: of audio in an optimiser step.
    """

    trainable: int
    frozen: int
    memory: dict[str, int]
    flops: float
    frames: int
    seconds: float


def estimate(task: Dia2Task) -> Plan:
    """The plan of a task on its mesh; nothing is loaded or compiled."""
    state, config = task.abstract_state(), task.config
    rows, steps = config.data.rows, config.data.max_steps
    depth_frames = min(steps, max(1, math.ceil(config.data.depth_share * steps)))
    masters = _held(state["params"])
    memory = {
        "masters": masters,
        "frozen weights": _held(task.frozen),
        "optimizer": _held(state["optimizer"]),
        "ema": _held(state.get("ema", {})),
        "gradients": masters * (2 if config.microbatches > 1 else 1),
    }
    flops = training_flops(
        task.start.config,
        rows=rows,
        steps=steps,
        depth_frames=depth_frames,
        trained=task.trainable,
        shapes=projection_shapes(task.start.config),
        lora_rank=None if config.lora is None else config.lora.rank,
    )
    return Plan(
        trainable=_count(task.trainable.values()),
        frozen=_count(task.frozen.values()),
        memory=memory,
        flops=flops,
        frames=rows * steps,
        seconds=rows * steps / task.recordings.pace.frame_rate,
    )


def print_plan(task: Dia2Task) -> None:
    """Print the plan of a task, on standard error of the first process."""
    if not is_leader():
        return
    plan = estimate(task)
    note(f"parameters  {plan.trainable:,} train, {plan.frozen:,} do not")
    for name, size in plan.memory.items():
        note(f"{name:<16}{size / 1e9:10.3f} GB a device")
    note(f"step        {plan.flops:.3g} FLOPs, {plan.frames:,} frames")


def _count(leaves: Iterable[Any]) -> int:
    return sum(math.prod(leaf.shape) for leaf in leaves)


def _held(tree: Any) -> int:
    """Bytes of one device's part of abstract arrays with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )
