"""What teaches the semantic codebooks meaning: a linear head that predicts targets a frame.

Défossez et al. (2024) let the first codebook's features point where a speech encoder's do
(``cosine``). Where a distribution a frame is known, such as which phonemes it holds, predicting it
does the same job at no cost (``histogram``).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dia2_jax.nn.linear import fan_in_init, project
from dia2_jax.typing import Array, Float
from train.codec_training.config import SemanticConfig

#: Paths of the head among the parameters; it is trained with the codec and never exported.
WEIGHT, BIAS = "semantic_head.weight", "semantic_head.bias"


def make_head(key: Array, inner: int, width: int) -> dict[str, Array]:
    """The head's parameters: a map from the quantiser's inner width to that of the targets."""
    return {
        WEIGHT: fan_in_init(key, (width, inner), jnp.float32),
        BIAS: jnp.zeros((width,), jnp.float32),
    }


def semantic_loss(
    params: dict[str, Array],
    features: Float[Array, "B T D"],
    targets: Float[Array, "B T K"],
    real: Float[Array, "B T"],
    kind: str,
) -> Float[Array, ""]:
    """Mean over frames that have a target; 0 where none has.

    ``cosine``: one minus the cosine to the target. ``histogram``: cross-entropy to the target,
    scaled to a sum of 1, minus the target's own entropy, so that 0 is perfect (KL divergence);
    frames whose target is all zero have none.
    """
    predicted = project(features, params[WEIGHT]) + params[BIAS]
    if kind == "cosine":
        dot = jnp.sum(predicted * targets, axis=-1)
        lengths = jnp.sum(jnp.square(predicted), axis=-1) * jnp.sum(jnp.square(targets), axis=-1)
        loss = 1 - dot * jax.lax.rsqrt(lengths + 1e-8)
    else:
        total = targets.sum(axis=-1, keepdims=True)
        share = targets / jnp.maximum(total, 1e-8)
        real = real * (total[..., 0] > 0)
        known = jnp.log(jnp.where(share > 0, share, 1.0))
        loss = jnp.sum(share * (known - jax.nn.log_softmax(predicted, axis=-1)), axis=-1)
    return jnp.sum(loss * real) / jnp.maximum(real.sum(), 1)


def check_width(config: SemanticConfig, found: int) -> None:
    """Refuses targets of another width than the configuration says.

    Raises:
      ConfigError: names both.
    """
    from dia2_jax.errors import ConfigError

    if config.width not in (None, found):
        raise ConfigError(
            f"semantic.width: is {config.width}, the targets of the data have {found}"
        )
