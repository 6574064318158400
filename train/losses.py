"""What the decoder and the depformer are trained to predict, and how wrong they are.

Every loss is a sum over the tokens of a batch divided by how many of them the **global** batch
holds. The denominators are arguments, so that the gradients of micro-batches, or of the shards
of a mesh, add up to those of the large batch.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from pydantic.dataclasses import dataclass

from dia2_jax.config.reading import STRICT, require
from dia2_jax.model.dia2 import Dia2Model
from dia2_jax.sharding import constrain
from dia2_jax.typing import Array, Float, Int

Batch = dict[str, Array]
Sums = dict[str, Array]


@dataclass(frozen=True, config=STRICT)
class LossConfig:
    """Weights of the losses.

    The total is ``action_weight * action + (m * code + (C - 1) * depth) / (m + C - 1)`` with m =
    ``first_codebook_multiplier``: the mean of all codebooks in which the first counts m times
    (100 in moshi-finetune).

    Attributes:
      action_weight: of the action loss.
      action_padding_weight: of a step whose target is to pad, against 1 of one that takes a word
        (0.5 in moshi-finetune).
      overruled_action_weight: of the steps in which the machine does not listen to the action.
      first_codebook_multiplier: m above.
      depth: ``pooled`` takes one mean over all tokens of codebooks 1 on, ``per_codebook`` the mean
        of each codebook's own; they differ where delays hide some codebooks of a frame.
      label_smoothing: share of the target spread over the vocabulary.
      z_loss: weight of ``logsumexp(logits) ** 2``, which keeps logits from drifting.
    """

    action_weight: float = 1.0
    action_padding_weight: float = 0.5
    overruled_action_weight: float = 0.0
    first_codebook_multiplier: float = 100.0
    depth: Literal["pooled", "per_codebook"] = "pooled"
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        for name in (
            "action_weight",
            "action_padding_weight",
            "overruled_action_weight",
            "first_codebook_multiplier",
            "z_loss",
        ):
            require(0 <= getattr(self, name) < math.inf, name, "must be finite and at least 0")
        require(0 <= self.label_smoothing < 1, "label_smoothing", "must be in [0, 1)")


def action_weights(batch: Batch, config: LossConfig) -> Float[Array, "B L"]:
    """Weight of every step's action."""
    listened = jnp.where(batch["action_free"], 1.0, config.overruled_action_weight)
    worth = jnp.where(batch["action"] == 1, 1.0, config.action_padding_weight)
    return jnp.where(batch["action_known"], listened * worth, 0.0)


def token_counts(batch: Batch, config: LossConfig) -> Sums:
    """The denominators: summed over all micro-batches of a step, they are those of the loss."""
    return {
        "action": action_weights(batch, config).sum(),
        "action_free": batch["action_free"].sum(dtype=jnp.float32),
        "taken_free": (batch["action_free"] & (batch["action"] == 1)).sum(dtype=jnp.float32),
        "code": batch["code_known"].sum(dtype=jnp.float32),
        "depth": batch["depth_known"].sum(axis=(0, 1), dtype=jnp.float32),
    }


def cross_entropy(
    logits: Float[Array, "*B V"], targets: Int[Array, "*B"], *, smoothing: float, z_loss: float
) -> Float[Array, "*B"]:
    """``-log softmax(logits)[target]`` of every token, with the two optional terms."""
    total = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    if smoothing:
        picked = (1 - smoothing) * picked + smoothing * logits.mean(axis=-1)
    loss = total - picked
    return loss + z_loss * jnp.square(total) if z_loss else loss


def dia2_loss(
    model: Dia2Model, batch: Batch, counts: Sums, config: LossConfig
) -> tuple[Array, Sums]:
    """Loss of a (micro-)batch against the counts of the whole one, and the sums of its metrics.

    Args:
      batch: see ``dia2_jax.data.batch.collate``.
      counts: :func:`token_counts` of the global batch.

    Returns:
      The loss, and sums that add up over micro-batches (:func:`metrics` reads them).
    """
    terms = {"smoothing": config.label_smoothing, "z_loss": config.z_loss}
    out = model.transformer(batch["tokens"])
    weights = action_weights(batch, config)
    action = weights * cross_entropy(out.action, batch["action"], **terms)
    known = batch["code_known"]
    code = known * cross_entropy(constrain(out.cb0, "B T V"), batch["code"], **terms)

    rows, frames, books = batch["depth_codes"].shape
    index = batch["depth_index"][..., None]
    hidden = jnp.take_along_axis(out.hidden, index, axis=1).reshape(rows * frames, -1)
    codes = batch["depth_codes"].reshape(rows * frames, books)
    text = batch["depth_text"].reshape(rows * frames, 2)
    logits = model.depformer(codes[:, :-1], hidden, (text[:, 0], text[:, 1]))
    deep = batch["depth_known"].reshape(rows * frames, books - 1)
    depth = (deep * cross_entropy(logits, codes[:, 1:], **terms)).sum(axis=0)

    pick = out.action.argmax(axis=-1) == batch["action"]
    taken = batch["action_free"] & (batch["action"] == 1)
    sums = {
        "action": action.sum(),
        "action_right": (pick & batch["action_free"]).sum(dtype=jnp.float32),
        "taken_right": (pick & taken).sum(dtype=jnp.float32),
        "code": code.sum(),
        "code_right": (known & (out.cb0.argmax(axis=-1) == batch["code"])).sum(dtype=jnp.float32),
        "depth": depth,
        "depth_right": (deep & (logits.argmax(axis=-1) == codes[:, 1:])).sum(
            axis=0, dtype=jnp.float32
        ),
    }
    return total_loss(sums, counts, config), sums


def total_loss(sums: Sums, counts: Sums, config: LossConfig) -> Array:
    """The weighted total of the losses (see :class:`LossConfig`)."""
    books, m = sums["depth"].shape[0], config.first_codebook_multiplier
    action, code, depth = _means(sums, counts, config)
    audio = (m * code + books * depth) / max(m + books, 1e-9)
    return config.action_weight * action + audio


def _means(sums: Sums, counts: Sums, config: LossConfig) -> tuple[Array, Array, Array]:
    depth = counts["depth"]
    if config.depth == "pooled":
        mean_depth = sums["depth"].sum() / jnp.maximum(depth.sum(), 1)
    else:
        mean_depth = (sums["depth"] / jnp.maximum(depth, 1)).sum() / jnp.maximum(
            (depth > 0).sum(), 1
        )
    return (
        sums["action"] / jnp.maximum(counts["action"], 1e-9),
        sums["code"] / jnp.maximum(counts["code"], 1),
        mean_depth,
    )


#: Codebooks whose accuracy is reported together, first and last of each group.
_GROUPS = ((1, 3), (4, 7), (8, 15), (16, 31))


def metrics(sums: Sums, counts: Sums, config: LossConfig) -> dict[str, Any]:
    """Losses in nats and accuracies (shares) of a whole batch.

    ``accuracy/word`` is the share of taken words that the action foresaw, among the steps in which
    the machine listens; ``accuracy/code_a_b`` is over codebooks a to b.
    """
    action, code, depth = _means(sums, counts, config)
    result = {
        "loss": total_loss(sums, counts, config),
        "loss/action": action,
        "loss/code_0": code,
        "loss/depth": depth,
        "accuracy/action": sums["action_right"] / jnp.maximum(counts["action_free"], 1),
        "accuracy/word": sums["taken_right"] / jnp.maximum(counts["taken_free"], 1),
        "accuracy/code_0": sums["code_right"] / jnp.maximum(counts["code"], 1),
    }
    for first, last in _GROUPS:
        right = sums["depth_right"][first - 1 : last]
        if right.size:
            name = f"accuracy/code_{first}_{first + right.size - 1}"
            result[name] = right.sum() / jnp.maximum(counts["depth"][first - 1 : last].sum(), 1)
    return result
