"""Our side of the latency measurements: a model in this process, its start, frames and stream."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from flax import nnx

from dia2_jax import hub
from dia2_jax.allocator import use_one_arena
from dia2_jax.compilation_cache import CompileWatch, enable_compilation_cache
from dia2_jax.config import load_dia2_config
from dia2_jax.convert.models import abstract_dia2, abstract_mimi, load_dia2, load_mimi
from dia2_jax.generation.defaults import read_defaults
from dia2_jax.generation.machine import QueueBuilder
from dia2_jax.generation.rows import Rows
from dia2_jax.generation.sampling import RowSettings, rank_bound
from dia2_jax.generation.session import Session
from dia2_jax.generation.settings import GenerationConfig
from dia2_jax.generation.state import GenerationState, initial_state
from dia2_jax.generation.step import Programs, StepOptions
from dia2_jax.mimi.codec import Mimi
from dia2_jax.mimi.runtime import Codec
from dia2_jax.nn.kernels import kernels_here
from dia2_jax.text.script import Entry
from dia2_jax.text.tokenizer import Tokenizer
from eval import latency_rows
from eval.latency_cadences import Schedule
from eval.latency_listener import AUDIBLE, Chunk, Take
from eval.latency_machine import (
    AnonymousPeak,
    anonymous_bytes,
    memory,
    read_bandwidth,
    return_freed_memory,
    versions,
)
from eval.latency_models import (
    Source,
    frame_cache_bytes,
    frame_weight_bytes,
    random_params,
    synthetic_tokenizer,
)
from eval.latency_process import MeasurementError
from eval.latency_stream import Client, speak

_GB = 1e9
#: Seconds that a session waits for its text before it is listened to as by a client: long enough
#: for everything that spins for a while to sleep.
REST_S = 0.2
#: Frames run on from a chosen position before the state jumps back to it.
SPAN = 32


class Ours:
    """A model with both guidance rows, driven through the parts that the engine uses.

    Args:
      source: name in configs/, or checkpoint folder.
      dtype: of weights and activations; int8 is of weights, with float32 activations.
      chunk_frames: frames in a chunk of streamed audio.
      cache: keep compiled programs on disk, as a user's process does.
    """

    def __init__(
        self, source: str, dtype: str = "float32", chunk_frames: int = 1, cache: bool = False
    ) -> None:
        use_one_arena()  # as the commands do
        if cache:
            enable_compilation_cache()
        jax.devices()  # starts the backend, so that its memory is not taken for the model's
        self._import_s = time.time() - psutil.Process().create_time()
        self._source, self._int8 = Source.of(source), dtype == "int8"
        self._dtype = jnp.dtype(jnp.float32 if self._int8 else dtype)
        self._chunk_frames = chunk_frames
        self._settings = GenerationConfig()
        self._state: GenerationState | None = None
        self._position = self._left = 0
        self._anonymous_peak = 0

    # ----------------------------------------------------------------------------------- start

    def load(self) -> dict[str, Any]:
        """Load the checkpoint, or make random weights. Call it first.

        ``anonymous_added_gb`` is the peak while loading, over what the process had before.
        """
        start = time.perf_counter()
        with AnonymousPeak() as peak:
            if self._source.folder is None:
                self._make()
            else:
                self._read()
            jax.block_until_ready(self._programs.params)
        seconds = time.perf_counter() - start
        size = self._weights_bytes()
        added = None
        if peak.peak is not None and peak.before is not None:
            added = peak.peak - peak.before
            self._anonymous_peak = peak.peak
        return {
            "import_s": self._import_s,
            "load_s": seconds,
            "weights_gb": size / _GB,
            "anonymous_added_gb": None if added is None else added / _GB,
            "anonymous_over_weights": None if added is None else added / size,
        }

    def _weights_bytes(self) -> int:
        """Of the model and the codec."""
        held = (self._programs.params, nnx.state(self._codec.mimi))
        return sum(leaf.nbytes for leaf in jax.tree.leaves(held))

    def _read(self) -> None:
        assert self._source.folder is not None
        files = hub.resolve(self._source.folder)
        config = load_dia2_config(files.config)
        self._settings = read_defaults(files.generation)
        self._tokenizer = Tokenizer.from_file(files.tokenizer, config.data)
        model, _ = load_dia2(config, files.weights, dtype=self._dtype, int8=self._int8)
        self._programs = Programs(model)
        self._set_codec(load_mimi(files.mimi)[0])

    def _make(self) -> None:
        config = self._source.dia2_config()
        self._tokenizer = synthetic_tokenizer(config)
        kind = self._dtype
        graph, abstract = abstract_dia2(config, dtype=kind, param_dtype=kind, int8=self._int8)
        self._programs = Programs(nnx.merge(graph, random_params(abstract)))
        graph, abstract = abstract_mimi(self._source.mimi_config())
        self._set_codec(nnx.merge(graph, random_params(abstract)))
        # Making weights up leaves behind what nobody has who loads some.
        return_freed_memory()

    def _set_codec(self, mimi: Mimi) -> None:
        self._codec = Codec(mimi)
        self._config = self._programs.config
        self._frame_s = self._codec.samples_per_frame / self._codec.sample_rate

    def prepare(self) -> dict[str, Any]:
        """Everything that a first utterance needs, once: open a session, a frame, a chunk.

        ``ready_s`` runs from having the weights to having done it; it holds one execution of
        each. A voice prefix needs one program more, which is not in here.
        """
        with AnonymousPeak() as peak, CompileWatch() as watch:
            start = time.perf_counter()
            session = self._session()
            session.feed(self._script(SPAN))
            session.close()
            opened = time.perf_counter()
            if not session.step():
                raise MeasurementError("the first frame did not run")
            framed = time.perf_counter()
            self._decode_once(self._chunk_frames)
            ready = time.perf_counter()
            session.cancel()
        self._anonymous_peak = max(self._anonymous_peak, peak.peak or 0)
        return {
            "ready_s": ready - start,
            "session_s": opened - start,
            "first_frame_s": framed - opened,
            "first_chunk_s": ready - framed,
            **watch.seconds,
            **watch.counts,
        }

    # ---------------------------------------------------------------------------------- stream

    def stream(self, frames: int) -> dict[str, Any]:
        """A session from its text to its sound, until ``frames`` frames of audio are out."""
        frames = max(frames, 2 * self._chunk_frames)
        session = self._session()
        pieces: list[tuple[float, int]] = []
        settled = highest = 0
        with CompileWatch() as watch:
            start = time.perf_counter()
            session.feed(self._script(frames))
            session.close()
            for chunk in session:
                pieces.append((time.perf_counter() - start, chunk.pcm.size))
                if len(pieces) == 1:
                    computed = session.frames_computed
                if len(pieces) * self._chunk_frames <= frames // 10 + self._chunk_frames:
                    settled = anonymous_bytes() or 0
                highest = max(highest, anonymous_bytes() or 0)
                if len(pieces) * self._chunk_frames >= frames:
                    break
        session.cancel()
        self._anonymous_peak = max(self._anonymous_peak, highest)
        if len(pieces) < 2:
            raise MeasurementError(
                f"the speech ended after {len(pieces)} chunks: choose a smaller --chunk-frames"
            )
        first, last = pieces[0][0], pieces[-1][0]
        audio = sum(size for _, size in pieces[1:]) / self._codec.sample_rate
        return {
            "first_audio_ms": first * 1e3,
            "first_audio_frames": computed,
            "chunk_frames": self._chunk_frames,
            "x_realtime": audio / (last - first),
            "programs_compiled": watch.counts["programs"],
            "growth_mb": (highest - settled) / 1e6 if settled else None,
        }

    def listen(
        self,
        schedules: Sequence[Schedule],
        chunk_frames: int | None = None,
        heard: bool = False,
        client: bool = False,
    ) -> list[Take]:
        """A session for each schedule, fed in real time; the seed is the index.

        Args:
          schedules: how the texts arrive.
          chunk_frames: the side's own, if None.
          heard: stop each take with its first audible chunk.
          client: as a command or server does it: each session waits a while for its text, and
            what it says is written into a pipe that another process reads.
        """
        chunk_frames = self._chunk_frames if chunk_frames is None else chunk_frames
        self._decode_once(chunk_frames)

        def enough(chunk: Chunk) -> bool:
            return heard and chunk.level > AUDIBLE

        takes = []
        with Client() if client else contextlib.nullcontext() as reader:
            outside: dict[str, Any] = {"rest": REST_S, "deliver": reader.take} if reader else {}
            for seed, schedule in enumerate(schedules):
                session = self._session(seed, chunk_frames)
                takes.append(speak(session, schedule, until=enough, **outside))
                session.cancel()
        return takes

    def batch(self, count: int, frames: int) -> dict[str, Any]:
        """``count`` rows that speak together, with what it took; see ``latency_rows``.

        ``compile_s`` is what JAX spent on programs for this number of rows, before the rest.
        """
        chunk_frames = self._chunk_frames
        frames = max(frames, 2 * chunk_frames)

        def run(frames: int) -> latency_rows.BatchTake:
            return latency_rows.speak_together(
                self._rows(range(count)),
                self._codec,
                self._script(frames),
                frames=frames,
                chunk_frames=chunk_frames,
            )

        with AnonymousPeak() as peak:
            with CompileWatch() as watch:
                run(2 * chunk_frames)
            batch = run(frames)
        changes = latency_rows.change_places(
            self._rows(range(count)), self._settings, self._script(2)
        )
        return {
            **latency_rows.summed_up(batch),
            **changes,
            "compile_s": sum(watch.seconds.values()),
            "anonymous_peak_gb": None if peak.peak is None else peak.peak / _GB,
        }

    def _session(self, seed: int = 0, chunk_frames: int | None = None) -> Session:
        chunk_frames = self._chunk_frames if chunk_frames is None else chunk_frames
        return Session(self._rows([seed]), self._codec, chunk_frames=chunk_frames)

    def _rows(self, seeds: Sequence[int]) -> Rows:
        count = len(seeds)
        settings, frame_rate = [self._settings] * count, 1 / self._frame_s
        return Rows(
            self._programs,
            self._tokenizer,
            settings,
            list(seeds),
            [None] * count,
            frame_rate=frame_rate,
        )

    def _script(self, frames: int) -> str:
        """Enough words for that many frames of audio: a word takes at least two."""
        context = self._config.runtime.max_context_steps
        steps = min(frames + self._config.data.max_delay + SPAN, context)
        return "word " * (steps // 2 + 1)

    # ---------------------------------------------------------------------------------- frames

    def seek(self, position: int) -> None:
        """Put the session at ``position``: what is timed next attends over that many steps.

        Keys and values before it are zeros. A frame's cost depends on how many there are.
        """
        context = self._config.runtime.max_context_steps
        if not 0 <= position < context:
            raise MeasurementError(
                f"--at {position}: outside this model's context of {context} steps"
            )
        self._position = position
        self._left = 0

    def frames(self, count: int) -> list[float]:
        """Milliseconds of each of ``count`` frames, host round trip included.

        After SPAN frames, or at the end of the context, the state jumps back to the position
        (not timed).
        """
        times = []
        for _ in range(count):
            if self._left == 0:
                self._rewind()
            assert self._state is not None
            start = time.perf_counter()
            self._state, output, _ = self._programs.step(
                self._state, self._queue, self._row_settings, self._options
            )
            seen = jax.device_get(output)
            times.append((time.perf_counter() - start) * 1e3)
            if not (seen.advanced[0] and seen.finite[0]):
                raise MeasurementError(
                    f"the frame at step {int(seen.frame[0])} did not run, or was not finite"
                )
            self._left -= 1
        return times

    def _rewind(self) -> None:
        ids, context = self._tokenizer.ids, self._config.runtime.max_context_steps
        if self._state is None:
            ahead = self._config.data.second_stream_ahead
            queue = QueueBuilder(context + 1, ahead)
            token = self._tokenizer.encode("word")[0]
            queue.append([Entry((token,), "word")] * (context + 1))
            queue.close()
            self._queue = jax.tree.map(lambda x: jnp.asarray(x)[None], queue.arrays())
            self._row_settings = RowSettings.of([self._settings])
            bound = rank_bound([self._settings])
            self._options = StepOptions(ids=ids, guided=True, bound=bound)
            self._state = self._initial_state()
            # On the host, because the state's own arrays are given away with every step.
            self._start = jax.device_get(self._state.machine)
        self._state = dataclasses.replace(
            self._state,
            machine=jax.tree.map(lambda x: jnp.array(x, copy=True), self._start),
            frame=jnp.full(1, self._position, jnp.int32),
            done=jnp.zeros(1, bool),
        )
        self._left = min(SPAN, context - self._position)

    def _initial_state(self) -> GenerationState:
        return initial_state(
            self._programs.model(),
            ids=self._tokenizer.ids,
            seeds=[0],
            initial_padding=[self._settings.initial_padding],
            guided=True,
        )

    def decode(self, count: int) -> list[float]:
        """Milliseconds a frame of ``count`` chunks through the streaming codec."""
        state = self._codec.init_decode_state(1)
        codes, times = self._codes(self._chunk_frames), []
        for _ in range(count):
            start = time.perf_counter()
            wave, state = self._codec.decode_step(codes, state)
            np.asarray(wave)
            times.append((time.perf_counter() - start) * 1e3 / self._chunk_frames)
        return times

    def _decode_once(self, chunk_frames: int) -> None:
        state = self._codec.init_decode_state(1)
        np.asarray(self._codec.decode_step(self._codes(chunk_frames), state)[0])

    def _codes(self, chunk_frames: int) -> np.ndarray:
        data = self._config.data
        shape = (1, data.codebooks, chunk_frames)
        return np.random.default_rng(0).integers(0, data.depth_vocab_size, shape, np.int32)

    # ------------------------------------------------------------------------------------ costs

    def costs(self, position: int) -> dict[str, float]:
        """What the frame at ``position`` reads, in GB."""
        here = kernels_here()
        kernel = here.int8 if self._int8 else here.float32 and self._dtype == jnp.float32
        cache = frame_cache_bytes(
            self._config, position, self._dtype.itemsize, int8=self._int8, blocks=not kernel
        )
        return {
            "frame_ms_of_audio": self._frame_s * 1e3,
            "weights_gb": frame_weight_bytes(self._config, self._programs.params) / _GB,
            "cache_gb": cache / _GB,
        }

    def memory(self) -> dict[str, Any]:
        """Memory of this process; ``anonymous_peak_gb`` while loading, compiling and now.

        ``caches_gb`` are the decoder's and the codec's of one session, allocated whole.
        """

        def gigabytes(tree: Any) -> float:
            return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) / _GB

        now = memory()
        caches = jax.eval_shape(
            lambda: (self._initial_state().cache, self._codec.init_decode_state(1))
        )
        parts = {"weights_gb": self._weights_bytes() / _GB, "caches_gb": gigabytes(caches)}
        if now["anonymous_gb"] is None:
            return {**now, **parts, "anonymous_peak_gb": None, "rest_gb": None}
        peak = max(self._anonymous_peak / _GB, now["anonymous_gb"])
        rest = peak - sum(parts.values())
        return {**now, **parts, "anonymous_peak_gb": peak, "rest_gb": rest}

    def bandwidth(self, gigabytes: float) -> dict[str, float]:
        """See ``latency_machine.read_bandwidth``."""
        return read_bandwidth(gigabytes)

    def about(self) -> dict[str, Any]:
        """Versions and settings that the numbers depend on."""
        return {
            "versions": versions("dia2-jax", "jax", "jaxlib", "flax", "numpy"),
            "backend": jax.default_backend(),
            "kernels": kernels_here().reason,
            "context_steps": self._config.runtime.max_context_steps,
            "sample_rate": self._codec.sample_rate,
            "samples_per_frame": self._codec.samples_per_frame,
        }
