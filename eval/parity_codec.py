"""Parity of the codec: decode, latents, encode, whole and in pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import numpy as np
from flax import nnx

from dia2_jax.mimi.runtime import StreamingDecoder, StreamingEncoder
from eval.parity_checks import Checks
from eval.parity_folder import Golden

#: The format's ragged take: this many first samples of ``audio``.
RAGGED_SAMPLES = 24_517
#: Sizes of the pieces that streams are fed, over and over; none divides the other.
_PIECES = (1, 3, 2, 7)


def check_codec(golden: Golden, checks: Checks) -> None:
    """``codec.npz``."""
    arrays = golden.arrays("codec")
    if arrays is None:
        checks.absent("codec", "no codec.npz")
        return
    parts: dict[str, tuple[tuple[str, ...], Callable[..., None]]] = {
        "decode": (("codes", "decoded"), _decode),
        "latents": (("audio", "latents"), _latents),
        "encode": (("audio", "encoded"), _encode),
        "encode ragged": (("audio", "encoded_ragged"), _encode_ragged),
        "roundtrip": (("encoded", "roundtrip"), _roundtrip),
    }
    known = {key for keys, _ in parts.values() for key in keys}
    for name in sorted(set(arrays) - known):
        checks.unread(f"codec: {name}", "unknown array")
    for name, (keys, check) in parts.items():
        missing = [key for key in keys if key not in arrays]
        if missing:
            checks.absent(f"codec: {name}", f"no {', '.join(missing)}")
            continue
        with checks.guard(f"codec: {name}"):
            check(golden, checks, *(arrays[key] for key in keys))
    with checks.guard("codec: frame rate"):
        codec = golden.codec
        rate = codec.sample_rate / codec.samples_per_frame
        checks.equal("codec: frame rate", [("frames a second", rate, golden.frame_rate)])


def _decode(golden: Golden, checks: Checks, codes: np.ndarray, decoded: np.ndarray) -> None:
    codec, batch = golden.codec, codes[None].astype(np.int32)
    recorded = decoded.reshape(1, -1)
    checks.close("codec: decode", codec.decode(batch), recorded)
    graph, params = nnx.split(codec.mimi)
    whole = jax.jit(lambda params, codes: nnx.merge(graph, params).decode(codes))(params, batch)
    checks.close("codec: decode in one pass", whole, recorded)
    stream = StreamingDecoder(codec)
    pieces = [stream.push(batch[:, :, start:stop]) for start, stop in _cuts(batch.shape[2], 1)]
    checks.close("codec: decode streamed", np.concatenate(pieces, axis=1), recorded)


def _latents(golden: Golden, checks: Checks, audio: np.ndarray, latents: np.ndarray) -> None:
    ours = golden.codec.encode_latents(audio.reshape(1, -1))[0]
    checks.close("codec: latents", ours.T, latents)


def _encode(golden: Golden, checks: Checks, audio: np.ndarray, encoded: np.ndarray) -> None:
    codec, wave, count = golden.codec, audio.reshape(1, -1), len(encoded)
    checks.same("codec: encode", codec.encode(wave, codebooks=count)[0], encoded)
    stream = StreamingEncoder(codec, codebooks=count)
    # Pieces that are no whole number of frames.
    unit = codec.samples_per_frame * 2 // 3 + 1
    pieces = [stream.push(wave[:, a:b]) for a, b in _cuts(wave.shape[1], unit)]
    streamed = np.concatenate([*pieces, stream.close()], axis=2)[0]
    checks.same("codec: encode streamed", streamed, encoded)


def _encode_ragged(golden: Golden, checks: Checks, audio: np.ndarray, encoded: np.ndarray) -> None:
    wave = audio.reshape(1, -1)
    if wave.shape[1] < RAGGED_SAMPLES:
        raise ValueError(f"audio has {wave.shape[1]} samples, fewer than {RAGGED_SAMPLES}")
    codec, count = golden.codec, len(encoded)
    cut = codec.encode(wave[:, :RAGGED_SAMPLES], codebooks=count)[0]
    checks.same("codec: encode ragged", cut, encoded)
    # The same take as one row of a longer batch, whose rest must not be heard.
    lengths = np.array([RAGGED_SAMPLES])
    row = codec.encode(wave, lengths, codebooks=count)[0, :, : encoded.shape[1]]
    checks.same("codec: encode ragged, as a row", row, encoded)


def _roundtrip(golden: Golden, checks: Checks, encoded: np.ndarray, decoded: np.ndarray) -> None:
    ours = golden.codec.decode(encoded[None].astype(np.int32))
    checks.close("codec: roundtrip", ours, decoded.reshape(1, -1))


def _cuts(total: int, unit: int) -> Iterator[tuple[int, int]]:
    start, index = 0, 0
    while start < total:
        stop = min(total, start + _PIECES[index % len(_PIECES)] * unit)
        yield start, stop
        start, index = stop, index + 1
