"""Linear maps and embeddings, with weights in the published orientation.

Weights stay ``[out, in]`` as PyTorch stores them: conversion is then a renaming,
and it is the order in which a matrix-vector product reads memory once.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from dia2_jax.nn.kernels import FLOAT32_ROWS, product_float32, use_float32
from dia2_jax.nn.one_of import OneOf
from dia2_jax.nn.platform import on_cpu
from dia2_jax.nn.quantized import project_int8
from dia2_jax.sharding import constrain
from dia2_jax.typing import Array, Float, Int

#: Up to this many rows a product is bound by reading the weights, not by arithmetic.
_FEW_ROWS = 32


def exact(dtype: DTypeLike) -> lax.Precision | None:
    """Matmul precision for operands of ``dtype``: float32 means float32 on every platform.

    TPUs and recent GPUs otherwise round float32 operands to bfloat16 or TF32.
    """
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def project(x: Float[Array, "*B D"], weight: Float[Array, "F D"] | OneOf) -> Float[Array, "*B F"]:
    """``x @ weight.T``, accumulated and returned in float32.

    When both operands are bfloat16 their products are exact in float32, so reading them as they
    are equals upstream's "cast to fp32, then project". Otherwise both are widened first.

    With few rows on a CPU the product is a kernel's, where there is one. XLA's ordinary dot repacks
    the whole weight matrix on every call; one that has the weights on the left and a batch axis
    over halves of the outputs reads them once and in order (`eval/SPEED.md`).
    """
    if isinstance(weight, OneOf):
        return weight.apply(project, x)
    if x.dtype != weight.dtype:
        x, weight = x.astype(jnp.float32), weight.astype(jnp.float32)
    precision = exact(x.dtype)
    outputs, inputs = weight.shape
    batch = x.shape[:-1]
    rows = x.reshape(-1, inputs)
    few = rows.shape[0] <= _FEW_ROWS and x.dtype == jnp.float32 and on_cpu()
    if few and rows.shape[0] <= FLOAT32_ROWS and use_float32():
        return _few_rows(rows, weight).reshape(*batch, outputs)
    if few and rows.shape[0] > 1 and outputs % 2 == 0:
        halves = weight.reshape(2, outputs // 2, inputs)
        both = jnp.broadcast_to(rows, (2, *rows.shape))
        y = jnp.einsum("nFD,nBD->nFB", halves, both, precision=precision)
        return y.reshape(outputs, -1).T.reshape(*batch, outputs)
    y = jnp.einsum(
        "BD,FD->BF", rows, weight, precision=precision, preferred_element_type=jnp.float32
    )
    return y.reshape(*batch, outputs)


@jax.custom_jvp
def _few_rows(rows: Float[Array, "B D"], weight: Float[Array, "F D"]) -> Float[Array, "B F"]:
    return product_float32(rows, weight)


@_few_rows.defjvp
def _few_rows_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    """XLA's operations, which it can transpose into gradients."""
    (rows, weight), (rows_dot, weight_dot) = primals, tangents
    product = partial(jnp.einsum, "BD,FD->BF", precision=exact(jnp.float32))
    return _few_rows(rows, weight), product(rows_dot, weight) + product(rows, weight_dot)


def fan_in_init(key: Array | None, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Truncated-normal initial values of variance 1 / fan-in for an ``[out, in]`` weight.

    Without a key the shape is all that is wanted: zeros, which are traced a hundred times as fast.
    """
    if key is None:
        return jnp.zeros(shape, dtype)
    init = jax.nn.initializers.variance_scaling(
        1.0, "fan_in", "truncated_normal", in_axis=-1, out_axis=-2
    )
    return init(key, shape, dtype)


def table_init(key: Array | None, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Normal initial values of standard deviation 0.02; without a key zeros."""
    return jnp.zeros(shape, dtype) if key is None else 0.02 * jax.random.normal(key, shape, dtype)


class Linear(nnx.Module):
    """``y = x @ weight.T (+ bias)`` in float32, whatever the dtype of ``x``.

    Attributes:
      weight: ``[F, D]``; int8 after :meth:`make_int8`.
      weight_scale: ``[F]`` float32 of an int8 weight, else None.
      bias: ``[F]`` or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = False,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.weight = nnx.Param(
            fan_in_init(rngs.params(), (out_features, in_features), param_dtype)
        )
        self.weight_scale: nnx.Param[Array] | None = None
        self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype)) if use_bias else None

    def make_int8(self) -> None:
        """Hold the weight as int8 from now on; its values are to be filled in."""
        shape = self.weight.shape
        self.weight = nnx.Param(jnp.zeros(shape, jnp.int8))
        self.weight_scale = nnx.data(nnx.Param(jnp.zeros(shape[:1], jnp.float32)))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        if self.weight_scale is None:
            y = project(x, self.weight[...])
        else:
            y = project_int8(x, self.weight[...], self.weight_scale[...])
        return y if self.bias is None else y + self.bias[...].astype(jnp.float32)


class Embedding(nnx.Module):
    """A table of V rows of width D, looked up by id."""

    def __init__(
        self, entries: int, width: int, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        self.weight = nnx.Param(table_init(rngs.params(), (entries, width), param_dtype))

    def __call__(self, ids: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        # Rows are looked up in a table whose width is whole: split over fsdp, every device would
        # first compute its part of the row for all rows of the batch.
        return constrain(self.weight[...], "V .")[ids]
