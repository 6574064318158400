"""Layers that the decoder and the depformer share."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from dia2_jax.config import ACTIVATIONS
from dia2_jax.nn.linear import Embedding, Linear
from dia2_jax.typing import Array, Float, Int

_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),  # the error-function form, as published
    "relu": jax.nn.relu,
    "linear": lambda x: x,
}


def activation(name: str) -> Callable[[Array], Array]:
    """The function a config's activation name stands for (``swiglu`` is ``silu``, ...)."""
    return _FUNCTIONS[ACTIVATIONS[name.lower()]]


class GatedMLP(nnx.Module):
    """``wo(act0(gate) * act1(up))`` with one fused ``wi`` = [gate; up]."""

    def __init__(
        self,
        width: int,
        hidden: int,
        activations: tuple[str, ...],
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.wi = Linear(width, 2 * hidden, param_dtype=param_dtype, rngs=rngs)
        self.wo = Linear(hidden, width, param_dtype=param_dtype, rngs=rngs)
        self.activations = activations
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        gate, up = jnp.split(self.wi(x).astype(self.dtype), 2, axis=-1)
        first, second = (activation(name) for name in self.activations)
        return self.wo(first(gate) * second(up)).astype(self.dtype)


class MultiStreamEmbedding(nnx.Module):
    """One text table read by two streams, each through its own projection.

    The second stream contributes only where it is not pad.
    """

    def __init__(
        self,
        entries: int,
        width: int,
        pad_id: int,
        *,
        low_rank: int | None = None,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        base = low_rank or width
        self.embedding = Embedding(entries, base, param_dtype=param_dtype, rngs=rngs)
        self.main_proj = Linear(base, width, param_dtype=param_dtype, rngs=rngs)
        self.second_proj = Linear(base, width, param_dtype=param_dtype, rngs=rngs)
        self.pad_id = pad_id

    def __call__(self, main: Int[Array, "*B"], second: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        """Summed embedding of both streams, float32."""
        first = self.main_proj(self.embedding(main))
        other = self.second_proj(self.embedding(second))
        return first + jnp.where((second != self.pad_id)[..., None], other, 0.0)
