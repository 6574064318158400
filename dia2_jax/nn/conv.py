"""Causal convolutions over channels-last sequences, whole and streaming.

All of them reduce to one kernel: a stride-1 causal convolution over rows of features. A
strided convolution whose kernel is a multiple of its stride is that over folded blocks of
``stride`` steps; a transposed one produces all ``stride`` outputs of an input step as one
wide row. Weights are stored in the order these products read them, which differs from the
published order by a transposition (see each class).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax import lax
from jax.typing import DTypeLike

from dia2_jax.nn.linear import project
from dia2_jax.typing import Array, Float, Int

#: From this many steps a direct convolution beats gathering windows for a matrix product
#: (XLA's CPU backend, two cores); below it the weights are what is being read.
_DIRECT_STEPS = 480


@struct.dataclass
class ConvState:
    """What a causal convolution remembers.

    Attributes:
      tail: the last inputs that later windows still cover, oldest first; zeros at the start.
    """

    tail: Float[Array, "B P D"]


def causal_windows(
    x: Float[Array, "B P D"], weight: Float[Array, "F K D"], dilation: int = 1
) -> Float[Array, "B T F"]:
    """Valid cross-correlation along time: ``y[t] = sum_k weight[:, k] @ x[t + k * dilation]``.

    ``P = T + (K - 1) * dilation``: the caller prepends the past. Runs as a direct convolution
    or as one matrix product over gathered windows, whichever is faster at these shapes.
    """
    outputs, taps, inputs = weight.shape
    steps = x.shape[1] - (taps - 1) * dilation
    if taps > 1 and inputs > 1 and steps >= _DIRECT_STEPS:
        return lax.conv_general_dilated(
            x,
            weight,
            window_strides=(1,),
            padding="VALID",
            rhs_dilation=(dilation,),
            dimension_numbers=("NWC", "OWI", "NWC"),
            precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        )
    shifted = [x[:, k * dilation : k * dilation + steps] for k in range(taps)]
    windows = shifted[0] if taps == 1 else jnp.concatenate(shifted, axis=-1)
    return project(windows, weight.reshape(outputs, taps * inputs)).astype(x.dtype)


def conv_init(key: Array | None, shape: tuple[int, ...], fan_in: int, dtype: DTypeLike) -> Array:
    """Normal initial values of variance 2 / fan-in (He et al., 2015); without a key zeros."""
    if key is None:
        return jnp.zeros(shape, dtype)
    return jax.random.normal(key, shape, dtype) * (2.0 / fan_in) ** 0.5


class CausalConv1d(nnx.Module):
    """Causal convolution, dilated or strided, with zeros before the beginning.

    ``T`` input steps give ``ceil(T / stride)`` output steps; output t sees inputs up to
    ``(t + 1) * stride - 1``.

    Attributes:
      weight: ``[F, K, D]``; the published ``[F, D, K]`` with its last two axes swapped.
      bias: ``[F]`` or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        use_bias: bool = True,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        if stride > 1 and (kernel_size % stride or dilation > 1):
            raise ValueError(
                f"kernel_size {kernel_size} must be a multiple of stride {stride} and undilated"
            )
        self.stride = stride
        self.dilation = dilation
        #: Past inputs a window covers besides the block it ends in.
        self.history = (kernel_size - 1) * dilation + 1 - stride
        shape = (out_features, kernel_size, in_features)
        self.weight = nnx.Param(
            conv_init(rngs.params(), shape, kernel_size * in_features, param_dtype)
        )
        self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype)) if use_bias else None

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B Y F"]:
        """The whole sequence; a ragged end is filled up with zeros to a whole stride."""
        ragged = -x.shape[1] % self.stride
        if ragged:
            x = jnp.pad(x, ((0, 0), (0, ragged), (0, 0)))
        return self.step(x, self.init_state(x.shape[0], x.dtype))[0]

    def init_state(self, batch: int, dtype: DTypeLike = jnp.float32) -> ConvState:
        """An empty past for ``batch`` streams."""
        features = self.weight.shape[-1]
        return ConvState(tail=jnp.zeros((batch, self.history, features), dtype))

    def step(
        self, x: Float[Array, "B T D"], state: ConvState
    ) -> tuple[Float[Array, "B Y F"], ConvState]:
        """The next T steps, T a multiple of the stride."""
        weight = self.weight[...].astype(x.dtype)
        if self.history:
            x = jnp.concatenate([state.tail, x], axis=1)
        batch, steps, features = x.shape
        tail = x[:, steps - self.history :]
        if self.stride > 1:
            x = x.reshape(batch, steps // self.stride, self.stride * features)
            weight = weight.reshape(weight.shape[0], -1, self.stride * features)
        y = causal_windows(x, weight, self.dilation)
        if self.bias is not None:
            y = y + self.bias[...].astype(y.dtype)
        return y, ConvState(tail=tail)


class CausalConvTranspose1d(nnx.Module):
    """Causal transposed convolution whose kernel is a multiple ``M`` of its stride ``R``.

    ``T`` input steps give ``T * R`` output steps: everything the last inputs would add beyond
    that is cut off, so no output waits for a later input. Output block t is the sum over the
    last M inputs, which makes it a stride-1 convolution with R * F outputs.

    Attributes:
      weight: ``[R, F, M, D]``, inputs oldest first; see :func:`from_published_transpose`.
      bias: ``[F]`` or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int,
        *,
        stride: int,
        use_bias: bool = True,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        if kernel_size % stride:
            raise ValueError(f"kernel_size {kernel_size} must be a multiple of stride {stride}")
        self.stride = stride
        self.history = kernel_size // stride - 1
        shape = (stride, out_features, kernel_size // stride, in_features)
        self.weight = nnx.Param(
            conv_init(rngs.params(), shape, in_features * kernel_size // stride, param_dtype)
        )
        self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype)) if use_bias else None

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B Y F"]:
        """The whole sequence."""
        return self.step(x, self.init_state(x.shape[0], x.dtype))[0]

    def init_state(self, batch: int, dtype: DTypeLike = jnp.float32) -> ConvState:
        """An empty past for ``batch`` streams."""
        features = self.weight.shape[-1]
        return ConvState(tail=jnp.zeros((batch, self.history, features), dtype))

    def step(
        self, x: Float[Array, "B T D"], state: ConvState
    ) -> tuple[Float[Array, "B Y F"], ConvState]:
        """The next T steps, any T."""
        stride, outputs, taps, features = self.weight.shape
        weight = self.weight[...].astype(x.dtype).reshape(stride * outputs, taps, features)
        batch, steps, _ = x.shape
        if self.history:
            x = jnp.concatenate([state.tail, x], axis=1)
        y = causal_windows(x, weight).reshape(batch, steps * stride, outputs)
        if self.bias is not None:
            y = y + self.bias[...].astype(y.dtype)
        return y, ConvState(tail=x[:, x.shape[1] - self.history :])


class GroupedConvTranspose1d(nnx.Module):
    """:class:`CausalConvTranspose1d` whose G groups of channels do not mix; without a bias.

    Attributes:
      weight: ``[D, F / G, M * R]`` as published.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int,
        *,
        stride: int,
        groups: int,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        if kernel_size % stride:
            raise ValueError(f"kernel_size {kernel_size} must be a multiple of stride {stride}")
        self.stride = stride
        self.groups = groups
        self.history = kernel_size // stride - 1
        shape = (in_features, out_features // groups, kernel_size)
        fan_in = in_features // groups * kernel_size // stride
        self.weight = nnx.Param(conv_init(rngs.params(), shape, fan_in, param_dtype))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B Y F"]:
        """The whole sequence."""
        return self.step(x, self.init_state(x.shape[0], x.dtype))[0]

    def init_state(self, batch: int, dtype: DTypeLike = jnp.float32) -> ConvState:
        """An empty past for ``batch`` streams."""
        return ConvState(tail=jnp.zeros((batch, self.history, self.weight.shape[0]), dtype))

    def step(
        self, x: Float[Array, "B T D"], state: ConvState
    ) -> tuple[Float[Array, "B Y F"], ConvState]:
        """The next T steps, any T."""
        features, width, kernel = self.weight.shape
        taps = kernel // self.stride
        weight = self.weight[...].astype(x.dtype)
        weight = weight.reshape(self.groups, features // self.groups, width, taps, self.stride)
        batch, steps, _ = x.shape
        x = jnp.concatenate([state.tail, x], axis=1)
        grouped = x.reshape(batch, x.shape[1], self.groups, features // self.groups)
        y = jnp.zeros((batch, steps, self.stride, self.groups, width), x.dtype)
        for tap in range(taps):
            # Kernel block `tap` spreads the input of `tap` steps ago.
            first = self.history - tap
            seen = grouped[:, first : first + steps]
            y = y + jnp.einsum(
                "BTGD,GDFR->BTRGF", seen, weight[..., tap, :], precision=lax.Precision.HIGHEST
            )
        y = y.reshape(batch, steps * self.stride, self.groups * width)
        return y, ConvState(tail=x[:, x.shape[1] - self.history :])


def from_published_transpose(weight: Float[Array, "D F K"], stride: int) -> Float[Array, "R F M D"]:
    """Published transposed-convolution weights in the order of :class:`CausalConvTranspose1d`."""
    inputs, outputs, kernel = weight.shape
    blocks = weight.reshape(inputs, outputs, kernel // stride, stride)
    return blocks[:, :, ::-1].transpose(3, 1, 2, 0)


def to_published_transpose(weight: Float[Array, "R F M D"]) -> Float[Array, "D F K"]:
    """Inverse of :func:`from_published_transpose`; exact."""
    stride, outputs, taps, inputs = weight.shape
    blocks = weight.transpose(3, 1, 2, 0)[:, :, ::-1]
    return blocks.reshape(inputs, outputs, taps * stride)


def mask_steps(x: Float[Array, "B T D"], lengths: Int[Array, " B"] | None) -> Float[Array, "B T D"]:
    """Zeros from step ``lengths[b]`` of row b on; ``x`` itself where no lengths are given."""
    if lengths is None:
        return x
    inside = jnp.arange(x.shape[1]) < lengths[:, None]
    return jnp.where(inside[..., None], x, jnp.zeros((), x.dtype))
