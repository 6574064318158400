"""Speed and memory of the codec: whole and streamed, side by side with transformers' Mimi.

Run it as ``python -m eval.latency --codec``; the keys of its report are listed there.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from eval.latency_machine import AnonymousPeak, anonymous_bytes, memory, versions
from eval.latency_models import Source, random_params, write_config
from eval.latency_process import Side
from eval.latency_statistics import alternate, ratio, summary

_MB = 1e6
#: Seconds of streaming after which memory must not grow any more.
_SETTLED_S = 10.0


class OurCodec:
    """Our codec in this process, with the weights of a folder, or random ones.

    Args:
      source: name in configs/ (of a codec, or of a model for its codec), or checkpoint folder.
      cache: keep compiled programs on disk, as a user's process does.
    """

    def __init__(self, source: str, cache: bool = False) -> None:
        from flax import nnx

        from dia2_jax.compilation_cache import enable_compilation_cache
        from dia2_jax.convert.models import abstract_mimi, load_mimi
        from dia2_jax.mimi.runtime import Codec

        if cache:
            enable_compilation_cache()
        where = Source.of(source)
        if where.folder is None:
            self._config = where.mimi_config()
            graph, abstract = abstract_mimi(self._config)
            self._codec = Codec(nnx.merge(graph, random_params(abstract)))
        else:
            mimi, self._config, _ = load_mimi(where.mimi_files())
            self._codec = Codec(mimi)

    def export(self, folder: str) -> None:
        """Write weights and config as transformers reads them."""
        from flax import nnx

        from dia2_jax.convert import mimi_hf
        from dia2_jax.convert.load import export_params

        table = mimi_hf.make_table(self._config)
        params = nnx.state(self._codec.mimi)
        export_params(params, table, Path(folder) / "model.safetensors")
        write_config(self._config, Path(folder) / "config.json")

    def shapes(self) -> dict[str, int]:
        """What inputs must look like."""
        return {
            "sample_rate": self._codec.sample_rate,
            "samples_per_frame": self._codec.samples_per_frame,
            "codebooks": self._codec.codebooks,
            "codebook_size": self._config.codebook_size,
        }

    def inputs(self, wave: np.ndarray, codes: np.ndarray) -> dict[str, float]:
        """What is encoded, ``[1, W]``, and decoded, ``[1, C, T]``, from now on.

        Returns:
          Seconds of the first run of each kind, which compiles it.
        """
        self._wave, self._codes = wave, codes.astype(np.int32)
        return {
            "first_encode_s": _seconds(self.encoded),
            "first_decode_s": _seconds(self.decoded),
            "first_stream_1_s": _seconds(lambda: self._stream(1, 1)),
            "first_stream_8_s": _seconds(lambda: self._stream(8, 8)),
        }

    def encoded(self) -> np.ndarray:
        """``[1, C, T]`` codes of the whole waveform."""
        return self._codec.encode(self._wave)

    def decoded(self) -> np.ndarray:
        """``[1, W]`` waveform of all codes."""
        return self._codec.decode(self._codes)

    def encode(self, count: int) -> list[float]:
        """Milliseconds of each of ``count`` whole encodes."""
        return [_seconds(self.encoded) * 1e3 for _ in range(count)]

    def decode(self, count: int) -> list[float]:
        """Milliseconds of each of ``count`` whole decodes."""
        return [_seconds(self.decoded) * 1e3 for _ in range(count)]

    def stream(self, chunk_frames: int, count: int) -> list[float]:
        """Milliseconds a frame of each of ``count`` streamed decodes of all codes."""
        frames = self._codes.shape[2] // chunk_frames * chunk_frames
        return [
            _seconds(lambda: self._stream(chunk_frames, frames)) * 1e3 / frames
            for _ in range(count)
        ]

    def _stream(self, chunk_frames: int, frames: int) -> None:
        state = self._codec.init_decode_state(1)
        for start in range(0, frames, chunk_frames):
            chunk = self._codes[:, :, start : start + chunk_frames]
            wave, state = self._codec.decode_step(chunk, state)
            np.asarray(wave)

    def long_stream(self, frames: int) -> dict[str, float | None]:
        """Decode a long stream one frame at a time, and watch anonymous memory.

        ``stream_growth_mb`` is its highest value after the first 10 s of audio, over its value
        there; for a stream shorter than that, over the value after its first frame.
        """
        settled = round(_SETTLED_S * self._codec.sample_rate / self._codec.samples_per_frame)
        settled = settled if settled < frames else 1
        state = self._codec.init_decode_state(1)
        base, peak = None, 0
        start = time.perf_counter()
        for frame in range(frames):
            index = frame % self._codes.shape[2]
            wave, state = self._codec.decode_step(self._codes[:, :, index : index + 1], state)
            np.asarray(wave)
            if frame + 1 == settled:
                base = anonymous_bytes()
            if frame + 1 >= settled and frame % 10 == 0:
                peak = max(peak, anonymous_bytes() or 0)
        audio = frames * self._codec.samples_per_frame / self._codec.sample_rate
        growth = None if base is None else max(peak, anonymous_bytes() or 0) - base
        return {
            "stream_audio_s": audio,
            "stream_x_realtime": audio / (time.perf_counter() - start),
            "stream_growth_mb": None if growth is None else growth / _MB,
        }

    def whole_peak(self) -> dict[str, float | None]:
        """Anonymous memory that a whole encode and a whole decode take while they run."""
        result: dict[str, float | None] = {}
        for name, run in (("encode", self.encoded), ("decode", self.decoded)):
            with AnonymousPeak(0.001) as peak:
                run()
            known = peak.peak is not None and peak.before is not None
            added = peak.peak - peak.before if known else None  # type: ignore[operator]
            result[f"{name}_added_mb"] = None if added is None else added / _MB
        return result

    def memory(self) -> dict[str, float | None]:
        """Memory of this process."""
        return memory()

    def about(self) -> dict[str, Any]:
        """Versions that the numbers depend on."""
        return {"versions": versions("dia2-jax", "jax", "jaxlib", "flax", "numpy")}


def measure(
    ours: Side,
    start_theirs: Callable[[str], Side] | None,
    *,
    seconds: float,
    repeats: int,
    stream_seconds: float,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """All codec figures; keys are listed in ``eval.latency``.

    Args:
      ours: an :class:`OurCodec`.
      start_theirs: makes a ``TransformersMimi`` from a folder of weights; None for ours alone.
      seconds: length of the take that is encoded and decoded.
      repeats: measurements of each kind.
      stream_seconds: length of the stream that memory is watched over.
      progress: told what comes next.
    """
    shapes = ours.call("shapes")
    generator = np.random.default_rng(0)
    frames = max(round(seconds * shapes["sample_rate"] / shapes["samples_per_frame"]), 8)
    samples = frames * shapes["samples_per_frame"]
    wave = generator.normal(0, 0.1, (1, samples)).astype(np.float32)
    codes = generator.integers(0, shapes["codebook_size"], (1, shapes["codebooks"], frames))
    audio_s = samples / shapes["sample_rate"]
    progress("compiling")
    report: dict[str, Any] = {
        "take": {"audio_s": audio_s, "frames": frames, "codebooks": shapes["codebooks"]},
        "compile": ours.call("inputs", wave, codes),
        **ours.call("about"),
    }
    theirs: Side | None = None
    try:
        if start_theirs is not None:
            progress("starting transformers with the same weights")
            with tempfile.TemporaryDirectory() as folder:
                ours.call("export", folder)
                theirs = start_theirs(folder)
            theirs.call("inputs", wave, codes)
        report |= _compare(ours, theirs, repeats, audio_s, frames, progress)
    finally:
        if theirs is not None:
            theirs.close()
    progress(f"streaming {stream_seconds:.0f} s of audio")
    long = round(stream_seconds * shapes["sample_rate"] / shapes["samples_per_frame"])
    report["memory"] = {**ours.call("long_stream", max(long, 2)), **ours.call("whole_peak")}
    report["memory"] |= ours.call("memory")
    return report


def _compare(
    ours: Side,
    theirs: Side | None,
    repeats: int,
    audio_s: float,
    frames: int,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Whole and streamed figures, all kinds in turns."""
    report: dict[str, Any] = {}
    kinds = {
        "encode": lambda n: ours.call("encode", n),
        "decode": lambda n: ours.call("decode", n),
        "stream_1": lambda n: ours.call("stream", 1, n),
        "stream_8": lambda n: ours.call("stream", 8, n),
    }
    if theirs is not None:
        there = theirs  # not None, also inside the functions
        kinds |= {
            "their_encode": lambda n: there.call("encode", n),
            "their_decode": lambda n: there.call("decode", n),
        }
        progress("comparing results")
        report["agreement"] = _agreement(ours, theirs)
    order = ["encode", "their_encode", "decode", "their_decode", "stream_1", "stream_8"]
    progress("measuring in turns")
    times = alternate({name: kinds[name] for name in order if name in kinds}, repeats, 1)
    for name in ("encode", "decode"):
        spread = summary(times[name])
        report[name] = {**spread, "x_realtime": audio_s * 1e3 / spread["p50_ms"]}
    for name in ("stream_1", "stream_8"):
        spread = summary(times[name])
        report[name] = {
            **{f"{key}_per_frame" if key != "count" else key: v for key, v in spread.items()},
            "x_realtime": audio_s * 1e3 / frames / spread["p50_ms"],
        }
    per_frame = report["decode"]["p50_ms"] / frames
    report["stream_8_over_whole"] = per_frame / report["stream_8"]["p50_ms_per_frame"]
    if theirs is not None:
        report["transformers"] = {
            "encode": summary(times["their_encode"]),
            "decode": summary(times["their_decode"]),
            "memory": theirs.call("memory"),
            **theirs.call("about"),
        }
        report["ratio_encode"] = ratio(times["encode"], times["their_encode"])
        report["ratio_decode"] = ratio(times["decode"], times["their_decode"])
    return report


def _agreement(ours: Side, theirs: Side) -> dict[str, float]:
    """That both sides computed the same: a comparison of two different things says nothing."""
    left, right = ours.call("decoded"), theirs.call("decoded")
    noise = float(np.mean((left - right) ** 2))
    power = float(np.mean(right**2))
    equal = float(np.mean(ours.call("encoded") == theirs.call("encoded")))
    return {
        "decode_snr_db": 10 * float(np.log10(power / max(noise, 1e-30))),
        "encode_equal_share": equal,
    }


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
