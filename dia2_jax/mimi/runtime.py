"""Running the codec: compiled once, for takes of any length and streams of any chunking.

:class:`Codec` takes a :class:`~dia2_jax.mimi.codec.Mimi` apart once and keeps compiled steps.
Whole takes go through the very same steps in segments, so memory does not grow with the take
and a handful of compiled shapes serve every length.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from dia2_jax.errors import AudioError, SessionError
from dia2_jax.mimi.codec import DecodeState, EncodeState, Mimi
from dia2_jax.typing import Array, ArrayLike, Float, Int

#: Frames of a segment of a whole take. The last one is filled up: one shape is one program to
#: compile, and larger ones are no faster (their activations leave the processor's caches).
SEGMENT = 16

#: Frames quantised at a time in a whole take: enough that reading the codebooks does not dominate.
QUANTIZED = 64


class _Compiled(NamedTuple):
    half_norms: Callable[..., Any]
    init_encode: Callable[..., EncodeState]
    init_decode: Callable[..., DecodeState]
    latents_step: Callable[..., Any]
    quantize: Callable[..., Any]
    decode_step: Callable[..., Any]


@functools.lru_cache(maxsize=8)
def _compile(graphdef: nnx.GraphDef[Mimi], treedef: Any) -> _Compiled:
    """Jitted functions of the weights' leaves; shared by all codecs of one shape."""

    def module(leaves: list[Array]) -> Mimi:
        return nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))

    def half_norms(leaves: list[Array]) -> Any:
        return module(leaves).quantizer.half_norms()

    def init_encode(leaves: list[Array], batch: int) -> EncodeState:
        return module(leaves).init_encode_state(batch)

    def init_decode(leaves: list[Array], batch: int) -> DecodeState:
        return module(leaves).init_decode_state(batch)

    def latents_step(
        leaves: list[Array], wave: Array, lengths: Array, state: EncodeState
    ) -> tuple[Array, EncodeState]:
        return module(leaves).encode_latents_step(wave, state, lengths)

    def quantize(leaves: list[Array], norms: Any, features: Array, codebooks: int) -> Array:
        return module(leaves).quantizer.encode(features, norms, codebooks)

    def decode_step(
        leaves: list[Array], codes: Array, state: DecodeState
    ) -> tuple[Array, DecodeState]:
        return module(leaves).decode_step(codes, state)

    return _Compiled(
        half_norms=jax.jit(half_norms),
        # One compiled program each; made one by one, a state is dozens of small ones.
        init_encode=jax.jit(init_encode, static_argnums=1),
        init_decode=jax.jit(init_decode, static_argnums=1),
        # In two, so that features and any number of codebooks share the large program.
        latents_step=jax.jit(latents_step, donate_argnums=3),
        quantize=jax.jit(quantize, static_argnums=3),
        decode_step=jax.jit(decode_step, donate_argnums=2),
    )


class Codec:
    """A Mimi ready to run. Weights are those the module held when this was made.

    ``encode`` and ``decode`` take and return host arrays. ``encode_step`` and ``decode_step`` run
    compiled and return device arrays without waiting for them; the state given to them is
    donated, so only the returned one may be used afterwards.
    """

    def __init__(self, mimi: Mimi) -> None:
        graphdef, params = nnx.split(mimi)
        self._leaves, treedef = jax.tree.flatten(params)
        self._run = _compile(graphdef, treedef)
        self.mimi = mimi

    @functools.cached_property
    def _half_norms(self) -> Any:
        return self._run.half_norms(self._leaves)

    @property
    def sample_rate(self) -> int:
        """Samples per second."""
        return self.mimi.sample_rate

    @property
    def samples_per_frame(self) -> int:
        """Samples of one code frame."""
        return self.mimi.samples_per_frame

    @property
    def codebooks(self) -> int:
        """Number of codebooks C of the checkpoint."""
        return self.mimi.codebooks

    def init_encode_state(self, batch: int = 1) -> EncodeState:
        """The state of ``batch`` streams that have heard nothing."""
        return self._run.init_encode(self._leaves, batch)

    def init_decode_state(self, batch: int = 1) -> DecodeState:
        """The state of ``batch`` streams that have said nothing."""
        return self._run.init_decode(self._leaves, batch)

    def encode_step(
        self,
        wave: Float[ArrayLike, "B W"],
        state: EncodeState,
        lengths: Int[ArrayLike, " B"] | None = None,
        codebooks: int | None = None,
    ) -> tuple[Int[Array, "B C T"], EncodeState]:
        """Codes of the next chunk, a whole number of frames; compiled once a chunk size.

        ``lengths`` are the real samples of each row in the last chunk of a ragged take.

        Raises:
          AudioError: on a chunk that is not a whole number of frames, or too many codebooks.
        """
        if wave.ndim != 2 or wave.shape[1] == 0 or wave.shape[1] % self.samples_per_frame:
            raise AudioError(
                f"encode_step: needs a chunk [batch, samples] of whole frames of "
                f"{self.samples_per_frame} samples, got {wave.shape}; StreamingEncoder takes any"
            )
        if lengths is None:
            lengths = np.full((wave.shape[0],), wave.shape[1], np.int32)
        count = self._count(codebooks)
        features, state = self._run.latents_step(self._leaves, wave, lengths, state)
        return self._run.quantize(self._leaves, self._half_norms, features, count), state

    def decode_step(
        self, codes: Int[ArrayLike, "B C T"], state: DecodeState
    ) -> tuple[Float[Array, "B W"], DecodeState]:
        """Waveform of the next T frames; compiled once a (B, C, T). Codes are not checked."""
        return self._run.decode_step(self._leaves, codes, state)

    def encode(
        self,
        wave: Float[ArrayLike, "B W"],
        lengths: Int[ArrayLike, " B"] | None = None,
        codebooks: int | None = None,
    ) -> Int[np.ndarray, "B C T"]:
        """Codes of whole takes, ``T = ceil(W / samples_per_frame)``.

        Row b of ``lengths`` counts that many samples and is worth ``ceil(lengths[b] /
        samples_per_frame)`` frames (what follows is undefined); by default all W.

        Raises:
          AudioError: on an empty or misshapen waveform, or too many codebooks.
        """
        count = self._count(codebooks)
        features = self.encode_latents(wave, lengths)
        frames = features.shape[1]
        features = np.pad(features, ((0, 0), (0, -frames % QUANTIZED), (0, 0)))
        pieces = [
            self._run.quantize(
                self._leaves, self._half_norms, features[:, start : start + QUANTIZED], count
            )
            for start in range(0, frames, QUANTIZED)
        ]
        return np.concatenate([np.asarray(piece) for piece in pieces], axis=2)[:, :, :frames]

    def encode_latents(
        self, wave: Float[ArrayLike, "B W"], lengths: Int[ArrayLike, " B"] | None = None
    ) -> Float[np.ndarray, "B T D"]:
        """Features before quantisation of whole takes; arguments as in :meth:`encode`."""
        host, counts = self._take(wave, lengths)
        pieces = []
        state = self.init_encode_state(host.shape[0])
        for chunk, left in self._chunks(host, counts):
            features, state = self._run.latents_step(self._leaves, chunk, left, state)
            pieces.append(features)
        whole = np.concatenate([np.asarray(piece) for piece in pieces], axis=1)
        return whole[:, : self.mimi.frames_for(host.shape[1])]

    def decode(self, codes: Int[ArrayLike, "B C T"]) -> Float[np.ndarray, "B W"]:
        """Waveforms of whole takes, ``W = T * samples_per_frame``, not clamped to +-1.

        Raises:
          AudioError: on misshapen codes, too many codebooks, or ids outside the codebooks (a
            frame that holds a special id must not be decoded: it sounds as a burst).
        """
        host = self._checked(codes)
        frames = host.shape[2]
        host = np.pad(host, ((0, 0), (0, 0), (0, -frames % SEGMENT)))
        state = self.init_decode_state(host.shape[0])
        pieces = []
        for start in range(0, frames, SEGMENT):
            wave, state = self.decode_step(host[:, :, start : start + SEGMENT], state)
            pieces.append(wave)
        # Joined on the host: on the device every number of segments would be a program.
        whole = [np.zeros((host.shape[0], 0), np.float32), *map(np.asarray, pieces)]
        return np.concatenate(whole, axis=1)[:, : self.mimi.samples_for(frames)]

    def _count(self, codebooks: int | None) -> int:
        count = self.codebooks if codebooks is None else codebooks
        if not 1 <= count <= self.codebooks:
            raise AudioError(f"codebooks: asked for {count}, this codec has 1 to {self.codebooks}")
        return count

    def _take(
        self, wave: Float[ArrayLike, "B W"], lengths: Int[ArrayLike, " B"] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """A waveform on the host and the length of each row, both checked."""
        host = np.asarray(wave, np.float32)
        if host.ndim != 2 or 0 in host.shape:
            raise AudioError(f"encode: needs a waveform [batch, samples > 0], got {host.shape}")
        batch, samples = host.shape
        counts = np.full((batch,), samples) if lengths is None else np.asarray(lengths)
        if counts.shape != (batch,) or counts.min() < 1 or counts.max() > samples:
            raise AudioError(
                f"encode: lengths must be {batch} numbers from 1 to {samples}, got {counts}"
            )
        return host, counts

    def _chunks(
        self, wave: np.ndarray, lengths: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Segments of the waveform, filled up, each with its rows' real lengths."""
        span = self.mimi.samples_for(SEGMENT)
        for start in range(0, wave.shape[1], span):
            chunk = wave[:, start : start + span]
            chunk = np.pad(chunk, ((0, 0), (0, span - chunk.shape[1])))
            yield chunk, np.clip(lengths - start, 0, span).astype(np.int32)

    def _checked(self, codes: Int[ArrayLike, "B C T"]) -> np.ndarray:
        host = np.asarray(codes)
        if host.ndim != 3 or not np.issubdtype(host.dtype, np.integer):
            raise AudioError(
                f"decode: needs integer codes [batch, codebooks, frames], got {host.dtype} "
                f"{host.shape}"
            )
        self._count(host.shape[1])
        entries = self.mimi.codebook_size
        if host.size and (host.min() < 0 or host.max() >= entries):
            bad = np.argwhere((host < 0) | (host >= entries))[0]
            raise AudioError(
                f"decode: code {host[tuple(bad)]} at row {bad[0]}, codebook {bad[1]}, frame "
                f"{bad[2]} is outside 0..{entries - 1}; cut frames that hold special ids"
            )
        return host.astype(np.int32)


class StreamingEncoder:
    """Samples in, codes out, whatever the size of the pieces; equal to the whole encode.

    Buffers up to one frame. Pieces are encoded frame by frame or in runs of one size, so that
    pieces of irregular size compile nothing new.
    """

    def __init__(self, codec: Codec, batch: int = 1, codebooks: int | None = None) -> None:
        self._codec = codec
        self._codebooks = codec._count(codebooks)
        self._state = codec.init_encode_state(batch)
        self._pending = np.zeros((batch, 0), np.float32)
        self._closed = False

    def push(self, wave: Float[ArrayLike, "B W"]) -> Int[np.ndarray, "B C T"]:
        """Codes of the frames that this piece completes; possibly none."""
        if self._closed:
            raise SessionError("push after close: this stream has ended, make a new encoder")
        piece = np.asarray(wave, np.float32)
        if piece.ndim != 2 or piece.shape[0] != self._pending.shape[0]:
            raise AudioError(
                f"push: needs samples [{self._pending.shape[0]}, any], got {piece.shape}"
            )
        pending = np.concatenate([self._pending, piece], axis=1)
        frame = self._codec.samples_per_frame
        pieces = []
        for start, size in runs(pending.shape[1] // frame):
            chunk = pending[:, start * frame : (start + size) * frame]
            codes, self._state = self._codec.encode_step(
                chunk, self._state, codebooks=self._codebooks
            )
            pieces.append(np.asarray(codes))
        self._pending = pending[:, pending.shape[1] // frame * frame :].copy()
        return self._join(pieces)

    def close(self) -> Int[np.ndarray, "B C T"]:
        """The last frame if samples are left over, ended as the whole encode ends it."""
        if self._closed:
            raise SessionError("close after close: this stream has already ended")
        self._closed = True
        batch, left = self._pending.shape
        if not left:
            return self._join([])
        chunk = np.pad(self._pending, ((0, 0), (0, self._codec.samples_per_frame - left)))
        codes, self._state = self._codec.encode_step(
            chunk, self._state, np.full((batch,), left, np.int32), self._codebooks
        )
        return np.asarray(codes)

    def _join(self, pieces: list[np.ndarray]) -> np.ndarray:
        empty = np.zeros((self._pending.shape[0], self._codebooks, 0), np.int32)
        return np.concatenate([empty, *pieces], axis=2)


class StreamingDecoder:
    """Codes in, samples out, in pieces of any number of frames; equal to the whole decode."""

    def __init__(self, codec: Codec, batch: int = 1) -> None:
        self._codec = codec
        self._batch = batch
        self._state = codec.init_decode_state(batch)

    def push(self, codes: Int[ArrayLike, "B C T"]) -> Float[np.ndarray, "B W"]:
        """The samples of these frames."""
        host = self._codec._checked(codes)
        if host.shape[0] != self._batch:
            raise AudioError(
                f"push: this stream has {self._batch} rows, got codes of shape {host.shape}"
            )
        pieces = [np.zeros((self._batch, 0), np.float32)]
        for start, size in runs(host.shape[2]):
            wave, self._state = self._codec.decode_step(
                host[:, :, start : start + size], self._state
            )
            pieces.append(np.asarray(wave))
        return np.concatenate(pieces, axis=1)


def runs(frames: int) -> Iterator[tuple[int, int]]:
    """``(start, size)`` of runs that cover ``frames`` exactly; each is a SEGMENT or 1 long."""
    start = 0
    for size in (SEGMENT, 1):
        while frames - start >= size:
            yield start, size
            start += size
