"""Stopping at the first number that is none."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from dia2_jax.errors import NonFiniteError
from dia2_jax.typing import Array, Int
from train.task import Metrics

#: Steps that may be under way at once. The device never idles, and the batches and memory of a
#: hundred steps are not piled up between two log lines.
_AHEAD = 2


class FiniteWatch:
    """Remembers, on the device, the first step with a metric that is NaN or infinite.

    Nothing is read from the device until :meth:`read`, so steps go on being dispatched.
    """

    def __init__(self) -> None:
        self._first: Int[Array, " 2"] | np.ndarray = np.array([-1, -1], np.int32)
        self._names: list[str] = []
        self._under_way: deque[Metrics] = deque()

    def add(self, step: int, metrics: Metrics) -> None:
        """Look at the metrics of a step that has been dispatched."""
        if not self._names:
            # Twice, which changes nothing: the second time compiles for a result that lies on the
            # mesh, so that no later step does.
            self._first = _first_bad(self._first, np.int32(step), dict(metrics))
        self._names = _ordered(metrics)
        self._first = _first_bad(self._first, np.int32(step), dict(metrics))
        self._under_way.append(metrics)
        if len(self._under_way) > _AHEAD:
            jax.block_until_ready(self._under_way.popleft())

    def check(self) -> None:
        """Raise NonFiniteError if any step so far had a metric that is no number."""
        step, index = (int(x) for x in np.asarray(self._first))
        if step >= 0:
            raise NonFiniteError(
                f"step {step}: {self._names[index]} is NaN or infinite; nothing was saved since "
                "the last good checkpoint. Resume from it with a lower learning rate or a tighter "
                "clip, or look at the data of that step"
            )

    def read(self, metrics: Metrics) -> dict[str, float]:
        """The metrics of the last step as numbers, after :meth:`check`."""
        self.check()
        return {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}


def require_finite(step: int, values: Mapping[str, float]) -> None:
    """Raise NonFiniteError if one of these numbers is none."""
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise NonFiniteError(
            f"step {step}: {', '.join(bad)} is NaN or infinite, so the weights are of no use; "
            "resume from the last good checkpoint with a lower learning rate"
        )


def _ordered(metrics: Metrics) -> list[str]:
    """Losses first: one of them is the cause where several metrics of a step are no numbers."""
    return sorted(metrics, key=lambda name: ("loss" not in name, name))


@jax.jit
def _first_bad(first: Int[Array, " 2"], step: Int[Array, ""], metrics: Metrics) -> Int[Array, " 2"]:
    good = jnp.stack([jnp.isfinite(metrics[name]).all() for name in _ordered(metrics)])
    here = jnp.stack([step, jnp.argmin(good).astype(jnp.int32)])
    return jnp.where((first[0] < 0) & ~good.all(), here, first)
