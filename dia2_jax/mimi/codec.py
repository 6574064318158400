"""Mimi as one module: waveform to codes and back, whole or chunk by chunk.

**Sample-count rule.** A frame is ``samples_per_frame`` samples (1,920 at 24 kHz in the
published codec). W samples encode to ``ceil(W / samples_per_frame)`` frames; T frames decode to
exactly ``T * samples_per_frame`` samples, of which those beyond W continue a ragged end.

**Causality.** Frame t depends on samples before ``(t + 1) * samples_per_frame`` only, and a
frame's samples on codes up to that frame only, so every past is finite and a stream needs
neither look-ahead nor a delay.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx, struct
from jax.typing import DTypeLike

from dia2_jax.config import MimiConfig
from dia2_jax.mimi.resample import STRIDE, Downsample, DownsampleState, Upsample
from dia2_jax.mimi.rvq import SplitQuantizer
from dia2_jax.mimi.seanet import SeanetDecoder, SeanetEncoder, SeanetState
from dia2_jax.mimi.transformer import Transformer, TransformerState
from dia2_jax.nn.conv import ConvState
from dia2_jax.typing import Array, Float, Int


@struct.dataclass
class EncodeState:
    """Everything the encoder remembers of its streams; constant size."""

    seanet: SeanetState
    transformer: TransformerState
    downsample: DownsampleState


@struct.dataclass
class DecodeState:
    """Everything the decoder remembers of its streams; constant size."""

    upsample: ConvState
    transformer: TransformerState
    seanet: SeanetState


class Mimi(nnx.Module):
    """The codec's weights and its pure functions.

    Functions here can be traced and differentiated; :class:`~dia2_jax.mimi.runtime.Codec` runs
    them compiled on inputs of any length.

    Attributes:
      sample_rate: samples per second.
      samples_per_frame: samples of one code frame.
      codebooks: number of codebooks C.
      codebook_size: entries V of each.
    """

    def __init__(
        self, config: MimiConfig, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        self.sample_rate = config.sampling_rate
        self.samples_per_frame = config.samples_per_frame
        self.codebooks = config.num_quantizers
        self.codebook_size = config.codebook_size
        self.encoder = SeanetEncoder(config, param_dtype=param_dtype, rngs=rngs)
        self.encoder_transformer = Transformer(config, param_dtype=param_dtype, rngs=rngs)
        self.downsample = Downsample(config, param_dtype=param_dtype, rngs=rngs)
        self.quantizer = SplitQuantizer(config, param_dtype=param_dtype, rngs=rngs)
        self.upsample = Upsample(config, param_dtype=param_dtype, rngs=rngs)
        self.decoder_transformer = Transformer(config, param_dtype=param_dtype, rngs=rngs)
        self.decoder = SeanetDecoder(config, param_dtype=param_dtype, rngs=rngs)

    def frames_for(self, samples: int) -> int:
        """How many frames ``samples`` samples encode to."""
        return -(-samples // self.samples_per_frame)

    def samples_for(self, frames: int) -> int:
        """How many samples ``frames`` frames decode to."""
        return frames * self.samples_per_frame

    def encode_latents(
        self, wave: Float[Array, "B W"], lengths: Int[Array, " B"] | None = None
    ) -> Float[Array, "B T D"]:
        """Features before quantisation, one a frame.

        Row b counts up to ``lengths[b]`` samples and is worth ``ceil(lengths[b] /
        samples_per_frame)`` frames; what follows is undefined.
        """
        x = self.encoder(wave[..., None], lengths)
        x = self.encoder_transformer(x)
        return self.downsample(x, self._feature_lengths(lengths))

    def encode(
        self,
        wave: Float[Array, "B W"],
        lengths: Int[Array, " B"] | None = None,
        codebooks: int | None = None,
    ) -> Int[Array, "B C T"]:
        """Codes of a whole waveform; ``codebooks`` keeps the first few only."""
        return self.quantizer.encode(self.encode_latents(wave, lengths), codebooks=codebooks)

    def decode_latents(self, x: Float[Array, "B T D"]) -> Float[Array, "B W"]:
        """Waveform of quantised (or not) features."""
        return self.decoder(self.decoder_transformer(self.upsample(x)))[..., 0]

    def decode(self, codes: Int[Array, "B C T"]) -> Float[Array, "B W"]:
        """Waveform of the codes of the first C codebooks, not clamped to +-1."""
        return self.decode_latents(self.quantizer.decode(codes))

    def init_encode_state(self, batch: int, dtype: DTypeLike = jnp.float32) -> EncodeState:
        """The state of ``batch`` streams that have heard nothing."""
        return EncodeState(
            seanet=self.encoder.init_state(batch, dtype),
            transformer=self.encoder_transformer.init_state(batch, dtype),
            downsample=self.downsample.init_state(batch, dtype),
        )

    def init_decode_state(self, batch: int, dtype: DTypeLike = jnp.float32) -> DecodeState:
        """The state of ``batch`` streams that have said nothing."""
        return DecodeState(
            upsample=self.upsample.init_state(batch, dtype),
            transformer=self.decoder_transformer.init_state(batch, dtype),
            seanet=self.decoder.init_state(batch, dtype),
        )

    def encode_latents_step(
        self,
        wave: Float[Array, "B W"],
        state: EncodeState,
        lengths: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], EncodeState]:
        """Features of the next W samples, a whole number of frames.

        The last chunk of a ragged take is filled up to a whole frame (with anything) and says in
        ``lengths`` how much of it is real; the stream ends there.
        """
        x, seanet = self.encoder.step(wave[..., None], state.seanet, lengths)
        x, transformer = self.encoder_transformer.step(x, state.transformer)
        x, downsample = self.downsample.step(x, state.downsample, self._feature_lengths(lengths))
        return x, EncodeState(seanet=seanet, transformer=transformer, downsample=downsample)

    def encode_step(
        self,
        wave: Float[Array, "B W"],
        state: EncodeState,
        lengths: Int[Array, " B"] | None = None,
        *,
        half_norms: tuple[tuple[Array, ...], tuple[Array, ...]] | None = None,
        codebooks: int | None = None,
    ) -> tuple[Int[Array, "B C T"], EncodeState]:
        """Codes of the next W samples, a whole number of frames (see encode_latents_step).

        ``half_norms`` is ``quantizer.half_norms()``, to be computed once for a whole stream.
        """
        x, state = self.encode_latents_step(wave, state, lengths)
        return self.quantizer.encode(x, half_norms, codebooks), state

    def decode_step(
        self, codes: Int[Array, "B C T"], state: DecodeState
    ) -> tuple[Float[Array, "B W"], DecodeState]:
        """Waveform of the next T frames, ``T * samples_per_frame`` samples."""
        x, upsample = self.upsample.step(self.quantizer.decode(codes), state.upsample)
        x, transformer = self.decoder_transformer.step(x, state.transformer)
        x, seanet = self.decoder.step(x, state.seanet)
        return x[..., 0], DecodeState(upsample=upsample, transformer=transformer, seanet=seanet)

    def _feature_lengths(self, lengths: Int[Array, " B"] | None) -> Int[Array, " B"] | None:
        return None if lengths is None else -(-lengths // (self.samples_per_frame // STRIDE))
