"""Layers that the decoder and the depformer share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from dia2_jax.config import ACTIVATIONS
from dia2_jax.nn.kernels import kernels_here
from dia2_jax.nn.kernels.layers import AttentionWeights, LayerWeights, Matrix, use_layers
from dia2_jax.nn.linear import Embedding, Linear
from dia2_jax.nn.norm import RMSNorm
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


def layer_weights(
    norms: tuple[RMSNorm, RMSNorm, RMSNorm, RMSNorm],
    sets: list[tuple[tuple[Linear, ...], Linear]],
    mlp: GatedMLP,
) -> LayerWeights | None:
    """A layer as the kernel reads it, or None if that is not what the kernel computes.

    Args:
      norms: of attention, queries, keys and the MLP.
      sets: of every weight set the projections before attention, and the one behind it.
      mlp: the MLP.
    """

    def matrix(linear: Linear) -> Matrix:
        scale = linear.weight_scale
        return Matrix(linear.weight[...], None if scale is None else scale[...])

    linears = [linear for inward, outward in sets for linear in (*inward, outward)]
    # What adapts a Linear takes its place and computes more.
    plain = [type(each) is Linear and each.bias is None for each in (*linears, mlp.wi, mlp.wo)]
    gates = tuple(ACTIVATIONS[name.lower()] for name in mlp.activations)
    if not all(plain) or gates != ("silu", "linear") or mlp.dtype != jnp.float32:
        return None
    attention_norm, query_norm, key_norm, mlp_norm = (norm.weight[...] for norm in norms)
    return LayerWeights(
        attention_norm=attention_norm,
        query_norm=query_norm,
        key_norm=key_norm,
        mlp_norm=mlp_norm,
        sets=tuple(
            AttentionWeights(tuple(map(matrix, inward)), matrix(outward))
            for inward, outward in sets
        ),
        wi=matrix(mlp.wi),
        wo=matrix(mlp.wo),
    )


class _Weighted(Protocol):
    def weights(self) -> LayerWeights | None: ...


def weights_for_kernel(
    layers: Iterable[_Weighted], rows: int, cache: Any
) -> list[LayerWeights] | None:
    """Of all layers, where a step of so many rows is to be the kernel's; else None."""
    if not kernels_here().float32:
        return None
    weights = [layer.weights() for layer in layers]
    usable = [each for each in weights if each is not None]
    return usable if len(usable) == len(weights) and use_layers(rows, usable, cache) else None


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
