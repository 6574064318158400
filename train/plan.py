"""What a run will take of every device, computed before anything is compiled or loaded.

Parameters, their gradients and the optimiser's state are counted exactly, from the shapes and
shardings that the run will use. Activations are a model of what the backward pass finds kept, in
bytes for each position of a transformer layer (D width, N and K query and key-value heads x head
dimension, h heads, F hidden width, T positions of a row, c bytes of the compute dtype):

- ``none``: ``c (4 D + 3 N + 3 K + 2 F) + 4 (2 h T + 3 F)``: both inputs and norms of the two
  halves; q and k before and after their norms, v and the attended values; gate and up. Float32
  are the activated gate, its derivative, their product and two squares of attention. The depformer
  holds more (`_DEPFORMER`), since its stages are sorted by weight set and back.
- ``dots``: ``c D + 4 (N + 2 K + D + 2 F)``: the input, and what products with weights gave.
- ``full``: ``c D``: the input.

With the latter two, one layer at a time is computed again, and its ``none`` comes on top. Outside
the layers there are four widths a position, the logits with their softmax and gradient, and with
bfloat16 compute a copy of every weight.

On a CPU the policies save nothing: XLA's CPU compiler removes the barriers that they rest on, so
``none`` is expected for every policy there. Estimates are held within a quarter of XLA's analysis
at small shapes (tests/train/test_plan.py); no accelerator was at hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from dia2_jax import sharding
from train.command import note
from train.peak import measure_local_peak
from train.processes import is_leader

if TYPE_CHECKING:
    from train.dia2_task import Dia2Task

#: Published dense bfloat16 peaks, operations a second of one device, by part of its name in JAX.
PEAKS: Mapping[str, float] = {
    "H100": 989e12,
    "A100": 312e12,
    "TPU v5p": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v4": 275e12,
}
#: Values that ``none`` keeps of a position of a layer: widths D, query heads N, key-value heads K,
#: hidden widths F in the compute dtype and in float32, squares of attention. Counted, then
#: fitted to XLA's analysis of two small shapes (one term of the decoder's, all of the depformer's).
_DECODER = (4, 3, 3, 2, 3, 2)
_DEPFORMER = (7, 9, 6, 2, 4, 2)
#: Share of a published peak on which the computed step time rests.
UTILISATION = 0.4
#: The same of a CPU's measured fp32 peak: configs/pretrain_small.yaml reaches 0.56 on 2 cores.
CPU_UTILISATION = 0.5


@dataclass(frozen=True)
class Plan:
    """Memory of one device in bytes, and work of one step of all devices.

    Attributes:
      trainable, frozen: parameters of the whole model that train and that do not.
      state: bytes that stay between steps, by what holds them.
      working: bytes while a step runs, likewise.
      flops: of an optimiser step, all devices together (`train.flops`).
      frames: of a step, padding included.
      seconds: of audio in a step.
    """

    trainable: int
    frozen: int
    state: dict[str, int]
    working: dict[str, int]
    flops: float
    frames: int
    seconds: float

    @property
    def total(self) -> int:
        """The peak of one device, as if gradients and activations were all there at once."""
        return sum(self.state.values()) + sum(self.working.values())


def estimate(task: Dia2Task) -> Plan:
    """The plan of a task on its mesh, for a batch of the greatest length."""
    state, config = task.abstract_state(), task.config
    batch = abstract_batch(task)
    rows, steps = batch["code"].shape
    masters = _held(state["params"])
    weights = 0
    if config.compute != "float32":
        weights = (masters + _held(task.frozen)) * np.dtype(config.compute).itemsize // 4
    return Plan(
        trainable=_count(task.trainable.values()),
        frozen=_count(task.frozen.values()),
        state={
            "masters": masters,
            "frozen weights": _held(task.frozen),
            "optimizer": _held(state["optimizer"]),
            "ema": _held(state.get("ema", {})),
            "batch": _held(batch),
        },
        working={
            "weights in compute dtype": weights,
            "accumulated gradients": masters if config.microbatches > 1 else 0,
            "gradients": masters,
            "activations": activations(task),
        },
        flops=task.flops(rows=rows, steps=steps, depth_frames=batch["depth_index"].shape[1]),
        frames=rows * steps,
        seconds=rows * steps / task.recordings.pace.frame_rate,
    )


def activations(task: Dia2Task) -> int:
    """Bytes of one device that the backward pass of one micro-batch finds kept."""
    config, mesh = task.config, task.mesh
    model, data = task.start.config.model, task.start.config.data
    batch = abstract_batch(task)
    rows, steps = batch["code"].shape
    frames, stages = batch["depth_index"].shape[1], data.codebooks - 1
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * config.microbatches
    positions, deep = rows * steps // parts, rows * frames * stages // parts
    remat = "none" if mesh.devices.flat[0].platform == "cpu" else config.remat
    compute = np.dtype(config.compute).itemsize
    split = mesh.shape["tensor"]

    decoder, depformer = model.decoder, model.depformer
    total = 0
    for kept, shape, where, row in (
        (_DECODER, decoder, positions, steps),
        (_DEPFORMER, depformer, deep, stages),
    ):
        sizes = dict(
            width=shape.n_embd,
            queries=shape.gqa_query_heads * shape.gqa_head_dim // split,
            keys=shape.kv_heads * shape.gqa_head_dim // split,
            heads=shape.gqa_query_heads // split or 1,
            hidden=shape.n_hidden // split,
            row=row,
            compute=compute,
        )
        total += shape.n_layer * where * layer_bytes(remat, kept, **sizes)
        if remat != "none":
            total += where * layer_bytes("none", kept, **sizes)
    # Inputs, and what follows the last layer: sums of embeddings, the norm, logits.
    total += positions * (compute * 4 * decoder.n_embd + 4 * 3 * data.audio_vocab_size // split)
    inner = compute * 4 * depformer.n_embd + 4 * 2 * data.audio_vocab_size // split
    return total + deep * inner + deep // max(stages, 1) * compute * decoder.n_embd


def layer_bytes(
    remat: str,
    kept: tuple[int, ...],
    *,
    width: int,
    queries: int,
    keys: int,
    heads: int,
    hidden: int,
    row: int,
    compute: int,
) -> int:
    """Bytes that one layer keeps of one position under a policy (the formulas of this module)."""
    if remat == "full":
        return compute * width
    if remat == "dots":
        return compute * width + 4 * (queries + 2 * keys + width + 2 * hidden)
    halves = kept[0] * width + kept[1] * queries + kept[2] * keys + kept[3] * hidden
    return compute * halves + 4 * (kept[4] * hidden + kept[5] * heads * row)


def abstract_batch(task: Dia2Task) -> dict[str, jax.ShapeDtypeStruct]:
    """The longest batch of a task, over all processes (see `dia2_jax.data.batch.collate`)."""
    data, books = task.config.data, task.start.config.data.codebooks
    rows, steps = data.rows, data.max_steps
    frames = min(steps, max(1, math.ceil(data.depth_share * steps)))
    integer, boolean = np.dtype(np.int32), np.dtype(bool)
    shapes: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {
        "tokens": ((rows, 2 + books, steps), integer),
        "action": ((rows, steps), integer),
        "action_known": ((rows, steps), boolean),
        "action_free": ((rows, steps), boolean),
        "code": ((rows, steps), integer),
        "code_known": ((rows, steps), boolean),
        "depth_index": ((rows, frames), integer),
        "depth_codes": ((rows, frames, books), integer),
        "depth_known": ((rows, frames, books - 1), boolean),
        "depth_text": ((rows, frames, 2), integer),
    }
    return {
        name: jax.ShapeDtypeStruct(
            shape, kind, sharding=sharding.batch_sharding(task.mesh, rows, len(shape))
        )
        for name, (shape, kind) in shapes.items()
    }


def lower(task: Dia2Task) -> jax.stages.Lowered:
    """The training step, traced with arrays that have a shape and a place but no values."""
    return task._step.lower(task.abstract_state(), task.frozen, abstract_batch(task))


def compiled_bytes(task: Dia2Task) -> int | None:
    """The peak of one device as XLA's memory analysis has it; compiles, and loads no weight.

    None where the compiler of this platform gives no analysis.
    """
    found = lower(task).compile().memory_analysis()
    if found is None:
        return None
    return int(
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
        + found.temp_size_in_bytes
    )


def print_plan(task: Dia2Task, *, xla: bool = False) -> None:
    """Print the plan of a task on standard error of the first process.

    Args:
      task: what will be trained.
      xla: also compile the step, and print XLA's own memory analysis beside the estimate.
    """
    plan = estimate(task)
    compiled = compiled_bytes(task) if xla else None  # in every process, as a run compiles
    if is_leader():
        note("\n".join(table(plan, task, compiled)))


def table(plan: Plan, task: Dia2Task, compiled: int | None = None) -> list[str]:
    """The lines of a printed plan."""
    config, devices = task.config, task.mesh.devices
    sizes = " x ".join(f"{name} {size}" for name, size in task.mesh.shape.items())
    lines = [
        f"plan: {devices.size} devices ({sizes}), compute {config.compute}, remat {config.remat}, "
        f"microbatches {config.microbatches}",
        f"  parameters   {plan.trainable:,} train, {plan.frozen:,} frozen",
        f"  a step       {plan.flops:.3g} FLOPs, {plan.frames:,} frames, "
        f"{plan.seconds / 3600:.3f} h of audio at most",
    ]
    lines += step_time(plan, task)
    held = {name: size for name, size in (plan.state | plan.working).items() if size}
    lines += [f"  {name:<26}{_shown(size)}" for name, size in held.items()]
    lines.append(f"  {'a device at its peak':<26}{_shown(plan.total)} (estimated)")
    if compiled is not None:
        share = plan.total / compiled
        lines.append(f"  {'':<26}{_shown(compiled)} (XLA's analysis; estimate {share:.2f} of it)")
    return lines


def step_time(plan: Plan, task: Dia2Task) -> list[str]:
    """The line of the step time to expect; none for a device whose peak is not known."""
    devices = task.mesh.devices
    kind = devices.flat[0].device_kind
    if devices.flat[0].platform == "cpu":
        # Of this process: only the first one prints a plan. The others' CPUs count as equal.
        peak = measure_local_peak() * jax.process_count()
        share, what = CPU_UTILISATION, "the fp32 matmul peak measured here,"
        unit = f"{peak / 1e9:.0f} GFLOP/s"
    else:
        one = next((peak for name, peak in PEAKS.items() if name in kind), None)
        if one is None:
            return []
        peak, share, what = one * devices.size, UTILISATION, f"{kind}'s bfloat16 peak of"
        unit = f"{one / 1e12:.0f} TFLOP/s"
    seconds = plan.flops / (peak * share)
    return [f"  step time    {seconds:.3g} s (computed: {share:.0%} of {what} {unit})"]


def _shown(size: int) -> str:
    return f"{size / 1e9:8.2f} GB" if size >= 1e9 else f"{size / 1e6:8.2f} MB"


def _count(leaves: Iterable[Any]) -> int:
    return sum(math.prod(leaf.shape) for leaf in leaves)


def _held(tree: Any) -> int:
    """Bytes of one device's part of abstract arrays with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )
