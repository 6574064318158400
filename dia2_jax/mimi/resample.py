"""Between 25 feature steps and 12.5 code frames a second: stride 2 down, grouped stride 2 up."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx, struct
from jax.typing import DTypeLike

from dia2_jax.config import MimiConfig
from dia2_jax.nn.conv import CausalConv1d, ConvState, GroupedConvTranspose1d
from dia2_jax.typing import Array, Bool, Float, Int

#: Feature steps of one code frame, and the kernel of both directions.
STRIDE = 2
KERNEL = 2 * STRIDE


@struct.dataclass
class DownsampleState:
    """Past of the downsampling convolution.

    Attributes:
      conv: its last inputs.
      started: whether the row was fed at all; the first step repeats into the past before it.
    """

    conv: ConvState
    started: Bool[Array, " B"]


class Downsample(nnx.Module):
    """Strided convolution whose input is continued by repetition at both ends.

    Before the beginning stands the first step, after an odd end the last one (every other
    convolution of the codec sees zeros there).
    """

    def __init__(
        self, config: MimiConfig, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        width = config.hidden_size
        self.conv = CausalConv1d(
            width,
            width,
            KERNEL,
            stride=STRIDE,
            use_bias=False,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(
        self, x: Float[Array, "B T D"], lengths: Int[Array, " B"] | None = None
    ) -> Float[Array, "B Y D"]:
        """The whole sequence: ``ceil(T / 2)`` frames."""
        if x.shape[1] % STRIDE:
            x = jnp.pad(x, ((0, 0), (0, 1), (0, 0)), mode="edge")
        return self.step(x, self.init_state(x.shape[0], x.dtype), lengths)[0]

    def init_state(self, batch: int, dtype: DTypeLike = jnp.float32) -> DownsampleState:
        """An empty past for ``batch`` streams."""
        return DownsampleState(
            conv=self.conv.init_state(batch, dtype), started=jnp.zeros((batch,), bool)
        )

    def step(
        self,
        x: Float[Array, "B T D"],
        state: DownsampleState,
        lengths: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B Y D"], DownsampleState]:
        """The next T steps, an even number, of which ``lengths[b]`` are real."""
        if lengths is not None:
            previous = jnp.concatenate([x[:, :1], x[:, :-1]], axis=1)
            beyond = jnp.arange(x.shape[1]) >= lengths[:, None]
            x = jnp.where(beyond[..., None], previous, x)
        tail = jnp.where(state.started[:, None, None], state.conv.tail, x[:, :1])
        y, conv = self.conv.step(x, ConvState(tail=tail))
        return y, DownsampleState(conv=conv, started=jnp.ones_like(state.started))


class Upsample(GroupedConvTranspose1d):
    """Grouped transposed convolution; the published codec has one channel a group."""

    def __init__(
        self, config: MimiConfig, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        super().__init__(
            config.hidden_size,
            config.hidden_size,
            KERNEL,
            stride=STRIDE,
            groups=config.upsample_groups,
            param_dtype=param_dtype,
            rngs=rngs,
        )
