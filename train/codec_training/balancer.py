"""The loss balancer of Défossez et al. (2022), section 3.4: weights that mean shares.

Each loss's gradient with respect to the output waveform is divided by the running mean of its
norm; a weight is then the share of the gradient that its loss makes up, whatever its scale.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from flax import struct

from dia2_jax.typing import Array, Float


@struct.dataclass
class Balance:
    """Running means, uncorrected, of what the balancer has seen.

    Attributes:
      norms: by loss, the decayed sum of gradient norms.
      weights: by loss, the decayed count behind it (a loss may start late).
    """

    norms: dict[str, Float[Array, ""]]
    weights: dict[str, Float[Array, ""]]

    @classmethod
    def start(cls, names: tuple[str, ...]) -> Balance:
        """Nothing seen of any loss."""
        return cls({name: jnp.zeros(()) for name in names}, {name: jnp.zeros(()) for name in names})


def balance(
    gradients: Mapping[str, Float[Array, "B W"]],
    weights: Mapping[str, float],
    state: Balance,
    decay: float,
) -> tuple[Float[Array, "B W"], Balance]:
    """One gradient of the waveform, in which loss i has the norm ``weight_i / sum of weights``.

    ``sum_i weight_i / sum(weights) * g_i / <|g_i|>``, where ``<|g_i|>`` is the running mean over
    steps of the mean norm over rows, corrected for its start.

    Args:
      gradients: of each loss with respect to the waveform; losses that are off may be missing.
      weights: by loss, positive; only those of `gradients` are counted.
      state: the running means.
      decay: of the running means.
    """
    norms, counts = dict(state.norms), dict(state.weights)
    whole = sum(weights[name] for name in gradients)
    total = jnp.zeros(())
    for name, gradient in gradients.items():
        norm = jnp.mean(jnp.sqrt(jnp.sum(jnp.square(gradient), axis=1)))
        norms[name] = decay * norms[name] + (1 - decay) * norm
        counts[name] = decay * counts[name] + (1 - decay)
        typical = norms[name] / counts[name]
        total = total + weights[name] / whole * gradient / (typical + 1e-12)
    return total, Balance(norms, counts)
