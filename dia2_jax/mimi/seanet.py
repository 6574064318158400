"""SEANet: the convolutional ends of the codec (Tagliasacchi et al., 2020; Défossez et al., 2022).

The encoder takes a 24 kHz waveform to 25 feature steps a second, the decoder goes back.
Both are causal and both stream.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx, struct
from jax.typing import DTypeLike

from dia2_jax.config import MimiConfig
from dia2_jax.nn.conv import CausalConv1d, CausalConvTranspose1d, ConvState, mask_steps
from dia2_jax.typing import Array, Float, Int


def elu(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Exponential linear unit. ``exp(x) - 1`` vectorises on the CPU where ``expm1`` does not;
    it differs by less than 6e-8."""
    return jnp.where(x > 0, x, jnp.exp(jnp.minimum(x, 0)) - 1)


@struct.dataclass
class ResidualState:
    """Past of a residual block: that of its dilated convolution (the others see one step)."""

    dilated: ConvState


class ResidualBlock(nnx.Module):
    """``x + pointwise(elu(dilated(elu(x))))`` through a narrower middle."""

    def __init__(
        self,
        config: MimiConfig,
        width: int,
        dilation: int,
        *,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        hidden = width // config.compress
        self.dilated = CausalConv1d(
            width,
            hidden,
            config.residual_kernel_size,
            dilation=dilation,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.pointwise = CausalConv1d(hidden, width, 1, param_dtype=param_dtype, rngs=rngs)
        self.shortcut = (
            CausalConv1d(width, width, 1, param_dtype=param_dtype, rngs=rngs)
            if config.use_conv_shortcut
            else None
        )

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The whole sequence."""
        return self.step(x, self.init_state(x.shape[0], x.dtype))[0]

    def init_state(self, batch: int, dtype: DTypeLike = jnp.float32) -> ResidualState:
        """An empty past for ``batch`` streams."""
        return ResidualState(dilated=self.dilated.init_state(batch, dtype))

    def step(
        self, x: Float[Array, "B T D"], state: ResidualState
    ) -> tuple[Float[Array, "B T D"], ResidualState]:
        """The next T steps."""
        hidden, dilated = self.dilated.step(elu(x), state.dilated)
        y = self.pointwise(elu(hidden))
        skip = x if self.shortcut is None else self.shortcut(x)
        return skip + y, ResidualState(dilated=dilated)


def _residuals(
    config: MimiConfig, width: int, *, param_dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.List[ResidualBlock]:
    return nnx.List(
        ResidualBlock(
            config, width, config.dilation_growth_rate**i, param_dtype=param_dtype, rngs=rngs
        )
        for i in range(config.num_residual_layers)
    )


@struct.dataclass
class StageState:
    """Past of one stage.

    Attributes:
      residuals: one state a residual block.
      resample: of the strided (encoder) or transposed (decoder) convolution.
    """

    residuals: tuple[ResidualState, ...]
    resample: ConvState


class EncoderStage(nnx.Module):
    """Residual blocks at one rate, then a strided convolution that doubles the width."""

    def __init__(
        self,
        config: MimiConfig,
        width: int,
        stride: int,
        *,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.residuals = _residuals(config, width, param_dtype=param_dtype, rngs=rngs)
        self.down = CausalConv1d(
            width, 2 * width, 2 * stride, stride=stride, param_dtype=param_dtype, rngs=rngs
        )

    def init_state(self, batch: int, dtype: DTypeLike = jnp.float32) -> StageState:
        """An empty past for ``batch`` streams."""
        return StageState(
            residuals=tuple(block.init_state(batch, dtype) for block in self.residuals),
            resample=self.down.init_state(batch, dtype),
        )

    def step(
        self,
        x: Float[Array, "B T D"],
        state: StageState,
        lengths: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B Y F"], StageState]:
        """The next T steps (a multiple of the stride), of which ``lengths`` are real."""
        residuals = []
        for block, past in zip(self.residuals, state.residuals, strict=True):
            x, past = block.step(x, past)
            residuals.append(past)
        # A ragged end is zeros at the input of every strided layer, not in the waveform.
        y, resample = self.down.step(mask_steps(elu(x), lengths), state.resample)
        return y, StageState(residuals=tuple(residuals), resample=resample)


class DecoderStage(nnx.Module):
    """A transposed convolution that halves the width, then residual blocks at the new rate."""

    def __init__(
        self,
        config: MimiConfig,
        width: int,
        stride: int,
        *,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.up = CausalConvTranspose1d(
            width, width // 2, 2 * stride, stride=stride, param_dtype=param_dtype, rngs=rngs
        )
        self.residuals = _residuals(config, width // 2, param_dtype=param_dtype, rngs=rngs)

    def init_state(self, batch: int, dtype: DTypeLike = jnp.float32) -> StageState:
        """An empty past for ``batch`` streams."""
        return StageState(
            residuals=tuple(block.init_state(batch, dtype) for block in self.residuals),
            resample=self.up.init_state(batch, dtype),
        )

    def step(
        self, x: Float[Array, "B T D"], state: StageState
    ) -> tuple[Float[Array, "B Y F"], StageState]:
        """The next T steps."""
        x, resample = self.up.step(elu(x), state.resample)
        residuals = []
        for block, past in zip(self.residuals, state.residuals, strict=True):
            x, past = block.step(x, past)
            residuals.append(past)
        return x, StageState(residuals=tuple(residuals), resample=resample)


@struct.dataclass
class SeanetState:
    """Past of a SEANet encoder or decoder: its first convolution, its stages, its last one."""

    first: ConvState
    stages: tuple[StageState, ...]
    last: ConvState


class SeanetEncoder(nnx.Module):
    """Waveform ``[B, W, 1]`` to features ``[B, ceil(W / hop), D]``; hop = product of ratios."""

    def __init__(
        self, config: MimiConfig, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        self.strides = tuple(reversed(config.upsampling_ratios))
        width = config.num_filters
        self.first = CausalConv1d(
            config.audio_channels, width, config.kernel_size, param_dtype=param_dtype, rngs=rngs
        )
        self.stages = nnx.List(
            EncoderStage(config, width * 2**i, stride, param_dtype=param_dtype, rngs=rngs)
            for i, stride in enumerate(self.strides)
        )
        self.last = CausalConv1d(
            width * 2 ** len(self.strides),
            config.hidden_size,
            config.last_kernel_size,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(
        self, x: Float[Array, "B W 1"], lengths: Int[Array, " B"] | None = None
    ) -> Float[Array, "B T D"]:
        """The whole waveform. Row b counts up to ``lengths[b]``; steps beyond are undefined."""
        hop = 1
        for stride in self.strides:
            hop *= stride
        ragged = -x.shape[1] % hop
        if ragged:
            lengths = jnp.full((x.shape[0],), x.shape[1]) if lengths is None else lengths
            x = jnp.pad(x, ((0, 0), (0, ragged), (0, 0)))
        return self.step(x, self.init_state(x.shape[0], x.dtype), lengths)[0]

    def init_state(self, batch: int, dtype: DTypeLike = jnp.float32) -> SeanetState:
        """An empty past for ``batch`` streams."""
        return SeanetState(
            first=self.first.init_state(batch, dtype),
            stages=tuple(stage.init_state(batch, dtype) for stage in self.stages),
            last=self.last.init_state(batch, dtype),
        )

    def step(
        self,
        x: Float[Array, "B W 1"],
        state: SeanetState,
        lengths: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], SeanetState]:
        """The next W samples, a multiple of the hop, of which ``lengths[b]`` are real."""
        x, first = self.first.step(x, state.first)
        stages = []
        for stage, past, stride in zip(self.stages, state.stages, self.strides, strict=True):
            x, past = stage.step(x, past, lengths)
            stages.append(past)
            lengths = None if lengths is None else -(-lengths // stride)
        x, last = self.last.step(elu(x), state.last)
        return x, SeanetState(first=first, stages=tuple(stages), last=last)


class SeanetDecoder(nnx.Module):
    """Features ``[B, T, D]`` to a waveform ``[B, T * hop, 1]``."""

    def __init__(
        self, config: MimiConfig, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        ratios = config.upsampling_ratios
        width = config.num_filters * 2 ** len(ratios)
        self.first = CausalConv1d(
            config.hidden_size, width, config.kernel_size, param_dtype=param_dtype, rngs=rngs
        )
        self.stages = nnx.List(
            DecoderStage(config, width // 2**i, stride, param_dtype=param_dtype, rngs=rngs)
            for i, stride in enumerate(ratios)
        )
        self.last = CausalConv1d(
            config.num_filters,
            config.audio_channels,
            config.last_kernel_size,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B W 1"]:
        """The whole sequence."""
        return self.step(x, self.init_state(x.shape[0], x.dtype))[0]

    def init_state(self, batch: int, dtype: DTypeLike = jnp.float32) -> SeanetState:
        """An empty past for ``batch`` streams."""
        return SeanetState(
            first=self.first.init_state(batch, dtype),
            stages=tuple(stage.init_state(batch, dtype) for stage in self.stages),
            last=self.last.init_state(batch, dtype),
        )

    def step(
        self, x: Float[Array, "B T D"], state: SeanetState
    ) -> tuple[Float[Array, "B W 1"], SeanetState]:
        """The next T steps, any T."""
        x, first = self.first.step(x, state.first)
        stages = []
        for stage, past in zip(self.stages, state.stages, strict=True):
            x, past = stage.step(x, past)
            stages.append(past)
        x, last = self.last.step(elu(x), state.last)
        return x, SeanetState(first=first, stages=tuple(stages), last=last)
