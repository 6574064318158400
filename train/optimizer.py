"""The optimiser: an optax chain from a config, its schedule, the EMA of parameters, accumulation.

Memory of AdamW a trainable parameter, in bytes: 4 for the fp32 master, 4 + 4 for the two moments,
4 for the gradient while a step runs; 4 more with an EMA and 4 more for the running sum while
gradients are accumulated. The 2B model trained in full (1.92 billion parameters) thus holds 23 GB
between steps and 31 GB within one (38 GB with an EMA), before activations; all of it shards with
the parameters. SGD keeps no moments (8 bytes less).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import lax
from pydantic.dataclasses import dataclass

from dia2_jax.config.reading import STRICT, require, require_positive
from dia2_jax.errors import ConfigError
from dia2_jax.typing import Array
from train.trainable import EMBEDDINGS, matches, select

Schedule = Callable[[Any], Array]
Params = dict[str, Array]
Tree = TypeVar("Tree")


@dataclass(frozen=True, config=STRICT)
class ScheduleConfig:
    """How the learning rate moves; shares are of the peak, steps are 0-based.

    Every kind first rises linearly over ``warmup_steps``: step s uses ``(s + 1) / warmup_steps`` of
    the peak, so no step is spent at zero. Then

    - ``constant`` stays at the peak;
    - ``cosine`` falls along half a cosine from the peak to ``final_share`` at the end of the run;
    - ``wsd`` (warm-up, stable, decay) stays at the peak and falls in its last ``decay_steps`` (or
      ``decay_share`` of the run's steps) as ``1 - sqrt(progress)`` to ``final_share``. That shape
      did best in Hägele et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed
      Training Durations". A checkpoint of the stable part can be decayed later, by a run with
      more or fewer steps.

    The final share would be reached at step ``steps``, one after the last.
    """

    kind: Literal["constant", "cosine", "wsd"] = "cosine"
    warmup_steps: int = 0
    decay_steps: int | None = None
    decay_share: float | None = None
    final_share: float = 0.0

    def __post_init__(self) -> None:
        require(self.warmup_steps >= 0, "warmup_steps", "must not be negative")
        require(0 <= self.final_share <= 1, "final_share", "must lie in 0 ... 1")
        given = [name for name in ("decay_steps", "decay_share") if getattr(self, name) is not None]
        if self.kind == "wsd":
            require(len(given) == 1, "kind", "wsd needs one of decay_steps and decay_share")
            require_positive(self, *given)
            require(
                self.decay_share is None or self.decay_share <= 1, "decay_share", "is at most 1"
            )
        elif given:
            require(False, given[0], f"is read by kind wsd only, and kind is {self.kind}")
        if self.kind == "constant":
            require(self.final_share == 0, "final_share", "is not read by kind constant")


@dataclass(frozen=True, config=STRICT)
class OptimizerConfig:
    """The optimiser of a run.

    Attributes:
      name: ``adamw``, or ``sgd`` without momentum, which reads neither betas nor epsilon.
      learning_rate: the schedule's peak.
      betas: decay of the first and second moment.
      epsilon: added to the root of the second moment.
      weight_decay: decoupled; a step takes ``learning_rate * weight_decay`` of a parameter away.
      decay_vectors: also decay norms, biases and scales (arrays of fewer than two axes).
      decay_embeddings: also decay tables that are looked up (and codebooks).
      no_decay: patterns of further parameters that are not decayed.
      clip: largest global norm of the gradient; null clips nothing.
      schedule: of the learning rate.
      ema_decay: of the exponential moving average of the parameters; 0 keeps none.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    decay_vectors: bool = False
    decay_embeddings: bool = False
    no_decay: tuple[str, ...] = ()
    clip: float | None = 1.0
    schedule: ScheduleConfig = ScheduleConfig()
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        require_positive(self, "learning_rate", "epsilon")
        require(
            all(0 <= beta < 1 for beta in self.betas), "betas", "must lie in 0 ... 1 (excluded)"
        )
        require(0 <= self.weight_decay < math.inf, "weight_decay", "must not be negative")
        if self.clip is not None:
            require_positive(self, "clip")
        require(0 <= self.ema_decay < 1, "ema_decay", "must lie in 0 ... 1 (excluded)")


def make_schedule(config: OptimizerConfig, steps: int) -> Schedule:
    """The learning rate of a 0-based step (a number or a traced scalar), for a run of `steps`.

    Raises:
      ConfigError: the warm-up and the decay do not fit into the run.
    """
    kind, peak, schedule = config.schedule.kind, config.learning_rate, config.schedule
    warmup, final = schedule.warmup_steps, schedule.final_share
    if steps < 1:
        raise ConfigError(f"steps: a run has at least one step, got {steps}")
    if kind == "cosine":
        start = warmup
    elif kind == "wsd":
        share = schedule.decay_share or 0.0
        start = steps - (schedule.decay_steps or max(1, round(share * steps)))
    else:
        start = steps
    if warmup > min(start, steps):
        raise ConfigError(
            f"schedule: {warmup} warm-up steps and a decay from step {start} on do not fit into "
            f"{steps} steps; shorten one of them"
        )

    def learning_rate(step: Any) -> Array:
        step = jnp.asarray(step, jnp.float32)
        share = jnp.minimum(1.0, (step + 1) / warmup) if warmup else jnp.float32(1)
        if kind != "constant":
            progress = jnp.clip((step - start) / max(1, steps - start), 0, 1)
            fall = jnp.sqrt(progress) if kind == "wsd" else (1 - jnp.cos(jnp.pi * progress)) / 2
            share = share * (1 - (1 - final) * fall)
        return peak * share

    return learning_rate


def decay_mask(config: OptimizerConfig, params: Mapping[str, Any]) -> dict[str, bool]:
    """Which parameters weight decay applies to.

    Raises:
      ConfigError: a pattern of ``no_decay`` matches nothing.
    """
    exempt = set(select(params, config.no_decay, "no_decay"))
    return {
        path: path not in exempt
        and (config.decay_vectors or len(leaf.shape) >= 2)
        and (config.decay_embeddings or not matches(path, EMBEDDINGS))
        for path, leaf in params.items()
    }


def make_optimizer(
    config: OptimizerConfig, steps: int, params: Mapping[str, Any]
) -> tuple[optax.GradientTransformation, Schedule]:
    """Clip by global norm, AdamW or SGD, decoupled decay, schedule; all by optax.

    The state's leaves are arrays shaped like a parameter, or scalars (:func:`map_state`).

    Args:
      config: of the optimiser.
      steps: of the whole run; cosine and wsd end there.
      params: the trainable parameters only (arrays or ``jax.ShapeDtypeStruct``), float32.

    Returns:
      The transformation (``init(params)``, ``update(gradients, state, params)``) and the schedule
      from step to learning rate, for logging.

    Raises:
      ConfigError: a schedule that does not fit, a pattern without a match, parameters of lower
        precision than float32 (small updates would be rounded away).
    """
    low = [path for path, leaf in params.items() if leaf.dtype not in (jnp.float32, jnp.float64)]
    if low:
        raise ConfigError(
            f"{len(low)} trainable parameters are not float32 ({', '.join(low[:3])}): keep float32 "
            "masters and cast them for the computation"
        )
    schedule = make_schedule(config, steps)
    parts = [] if config.clip is None else [optax.clip_by_global_norm(config.clip)]
    if config.name == "adamw":
        first, second = config.betas
        parts.append(optax.scale_by_adam(b1=first, b2=second, eps=config.epsilon))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, decay_mask(config, params)))
    parts.append(optax.scale_by_learning_rate(schedule))
    return optax.chain(*parts), schedule


def map_state(function: Callable[[str | None, Any], Any], state: Any, params: Any) -> Any:
    """A tree like the optimiser's `state`, with ``function(path, leaf)`` in place of each leaf.

    `path` is the parameter that the leaf mirrors, or None for counters. So the state's shardings
    are ``map_state(lambda path, _: replicated if path is None else of_param[path], state, params)``
    with ``state = jax.eval_shape(optimizer.init, params)``.
    """

    def visit(keys: tuple[Any, ...], leaf: Any) -> Any:
        name = getattr(keys[-1], "key", None) if keys else None
        mirrors = name in params and leaf.shape == params[name].shape
        return function(name if mirrors else None, leaf)

    return jax.tree_util.tree_map_with_path(visit, state)


def state_paths(state: Any, params: Mapping[str, Any]) -> dict[str, str | None]:
    """Each leaf of the optimiser's state by key path, and the parameter it mirrors (or None)."""
    paths: dict[str, str | None] = {}
    mirrors: list[str | None] = []
    map_state(lambda path, leaf: mirrors.append(path), state, params)
    for (keys, _), path in zip(jax.tree_util.tree_leaves_with_path(state), mirrors, strict=True):
        paths[jax.tree_util.keystr(keys)] = path
    return paths


def ema_update(ema: Params, params: Params, decay: float, step: int | Array) -> Params:
    """The moving average after a step, with its start corrected for bias.

    The average starts as a copy of the parameters. The weight of new values at 0-based step s is
    ``(1 - decay) / (1 - decay ** (s + 1))``: 1 at the first step, 1/2 at the second, falling to
    ``1 - decay``. This is the average of an accumulator that starts at zero, divided by
    ``1 - decay ** (s + 1)`` as Adam does with its moments, but kept in its corrected form: it is
    usable at every step, and weights from before the run never count.

    Args:
      ema: flat dict, float32.
      params: the trainable parameters after the step.
      decay: 0 < decay < 1.
      step: 0-based, of the step that made `params`.
    """
    # 1 - decay ** t by expm1: in float32 the plain form loses three digits at 0.9999.
    corrected = -jnp.expm1((jnp.asarray(step, jnp.float32) + 1) * math.log(decay))
    weight = jnp.minimum(1.0, (1 - decay) / corrected)
    return {
        path: mean + weight * (params[path].astype(mean.dtype) - mean) for path, mean in ema.items()
    }


def split_batch(batch: Tree, parts: int) -> Tree:
    """Microbatches of a batch: arrays ``[B, ...]`` become ``[parts, B / parts, ...]``.

    Microbatch m takes rows m, m + parts, ...: a batch sharded over its rows then stays where it
    is, while microbatches of neighbouring rows would each lie on a few devices.

    Raises:
      ConfigError: the rows do not divide.
    """

    def split(leaf: Array) -> Array:
        rows = leaf.shape[0]
        if rows % parts:
            raise ConfigError(f"a batch of {rows} rows does not divide into {parts} microbatches")
        return leaf.reshape(rows // parts, parts, *leaf.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def accumulate(
    loss_and_grad: Callable[[Params, Any], tuple[Any, Params]], params: Params, microbatches: Any
) -> tuple[Any, Params]:
    """Sum of losses and gradients over microbatches: those of the large batch.

    Equal up to float32 rounding, provided that `loss_and_grad` divides by counts of the whole
    batch (close over them, or put them into every microbatch) and that random masks are keyed by
    row. A mean over the microbatch would weight tokens of sparse microbatches more.

    Args:
      loss_and_grad: of parameters and a microbatch, as ``jax.value_and_grad`` makes it; the first
        result may be any tree of sums (a loss and metrics).
      params: what the gradient is of.
      microbatches: a tree of arrays with a leading axis of microbatches (:func:`split_batch`).

    Returns:
      The summed first result and the summed gradients, accumulated in at least float32. One
      microbatch is computed directly, without a loop.
    """
    leaves = jax.tree.leaves(microbatches)
    count = leaves[0].shape[0]
    first = jax.tree.map(lambda leaf: leaf[0], microbatches)
    if count == 1:
        return jax.tree.map(_widen, loss_and_grad(params, first))
    shapes = jax.eval_shape(loss_and_grad, params, first)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, _wide(leaf.dtype)), shapes)

    def add(total: Any, microbatch: Any) -> tuple[Any, None]:
        part = loss_and_grad(params, microbatch)
        return jax.tree.map(lambda sum_, leaf: sum_ + leaf.astype(sum_.dtype), total, part), None

    return lax.scan(add, zeros, microbatches)[0]


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.floating) else dtype


def _widen(leaf: Array) -> Array:
    return leaf.astype(_wide(leaf.dtype))
