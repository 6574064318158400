"""Dia2: the one place where model, codec, text and generation meet.

from dia2_jax import Dia2, GenerationConfig

model = Dia2.from_pretrained()  # nano, which is installed with the package
result = model.generate("[S1] Hello there. [S2] Hi, how are you?")

for chunk in model.stream(words_of_an_llm()):
    play(chunk.pcm)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dia2_jax import hub
from dia2_jax.compilation_cache import enable_compilation_cache
from dia2_jax.config import Dia2Config, MimiConfig, load_dia2_config
from dia2_jax.convert.models import holds_int8, load_dia2, load_mimi
from dia2_jax.errors import CheckpointError, ConfigError, ScriptError
from dia2_jax.generation.defaults import read_defaults
from dia2_jax.generation.prefix import PrefixPlan, plan_prefix
from dia2_jax.generation.rows import Row, Rows
from dia2_jax.generation.session import Chunk, Session
from dia2_jax.generation.settings import GenerationConfig
from dia2_jax.generation.step import Programs
from dia2_jax.generation.trace import ActionStream, watch
from dia2_jax.mimi.codec import Mimi
from dia2_jax.mimi.runtime import Codec
from dia2_jax.model.dia2 import Dia2Model
from dia2_jax.text.timing import WordTime
from dia2_jax.text.tokenizer import Tokenizer
from dia2_jax.typing import Float, Int
from dia2_jax.voice import Voice, Voices, codec_fingerprint, prefix_turns, prepare_voice

__all__ = ["ActionStream", "Chunk", "Dia2", "Result", "Session"]

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "int8": jnp.int8}


@dataclass(frozen=True)
class Result:
    """One finished generation.

    Attributes:
      codes: ``[C, T]`` int32 Mimi codes, 12.5 frames a second in the published codec.
      waveform: ``[W]`` float32 samples within +-1.
      sample_rate: samples per second.
      words: (text, seconds from the start of the waveform) of every word.
      truncated: the model's context ended before the speech did.
    """

    codes: Int[np.ndarray, "C T"]
    waveform: Float[np.ndarray, " W"]
    sample_rate: int
    words: list[tuple[str, float]]
    truncated: bool


class Dia2:
    """A Dia2 model with its tokenizer and codec, ready to speak.

    Attributes:
      config, mimi_config: the published configs.
      tokenizer: of the checkpoint.
      codec: Mimi.
      defaults: settings of everything that is given none; change one of them with
        ``dataclasses.replace(model.defaults, cfg_scale=3.0)``.
    """

    def __init__(
        self,
        config: Dia2Config,
        model: Dia2Model,
        tokenizer: Tokenizer,
        mimi_config: MimiConfig,
        mimi: Mimi,
        defaults: GenerationConfig | None = None,
    ) -> None:
        data = config.data
        if data.codebooks > mimi_config.num_quantizers:
            raise CheckpointError(
                f"the model predicts {data.codebooks} codebooks but the codec has "
                f"{mimi_config.num_quantizers}: give the codec that belongs to this model"
            )
        special = {data.audio_pad, data.audio_bos}
        largest = max(code for code in range(data.audio_vocab_size) if code not in special)
        if largest >= mimi_config.codebook_size:
            raise CheckpointError(
                f"the model predicts codes up to {largest} but the codec's "
                f"codebooks have {mimi_config.codebook_size} entries: give the codec that belongs "
                "to this model"
            )
        self.config, self.mimi_config = config, mimi_config
        self.tokenizer = tokenizer
        self.defaults = GenerationConfig() if defaults is None else defaults
        #: Of the weights: ``float32``, ``bfloat16`` or ``int8``.
        self.dtype = "int8" if model.transformer.int8 else jnp.dtype(model.transformer.dtype).name
        self.codec = Codec(mimi)
        self._programs = Programs(model)
        self._fingerprint: str | None = None

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path | None = None,
        *,
        dtype: str | DTypeLike | None = None,
        mimi: str | Path | None = None,
        revision: str | None = None,
    ) -> Dia2:
        """Load a checkpoint in the published layout, or one that ``dia2-jax convert`` wrote.

        Args:
          path_or_repo: a folder, a Hugging Face repository such as ``nari-labs/Dia2-1B``, or
            ``"nano"`` (as is no argument at all): the small model inside the package, where
            ``"./nano"`` is a folder of that name.
          dtype: ``"float32"`` (upstream's numbers), ``"bfloat16"`` (half the memory; made for
            accelerators) or ``"int8"`` (for CPUs). Weights are held and activations computed in
            the first two; ``int8`` holds the weights of linear maps as int8, which are rounded
            while a checkpoint in floating point is read, and computes the rest in float32.
            Logits are float32, and so is the codec. By default int8 where the checkpoint holds
            that, else float32.
          mimi: the codec's folder or repository (or ``"nano"``), where it is not the one the
            checkpoint names.
          revision: of the repository.

        Raises:
          HubError: a file is missing; says which, and how to get it.
          ConfigError, CheckpointError: a file does not say what it should.
        """
        kind = _dtype(dtype)
        enable_compilation_cache()
        files = hub.resolve(path_or_repo, mimi=mimi, revision=revision)
        config, defaults = load_dia2_config(files.config), read_defaults(files.generation)
        tokenizer = Tokenizer.from_file(files.tokenizer, config.data)
        int8 = kind == jnp.int8 if kind is not None else holds_int8(files.weights)
        held = jnp.float32 if int8 or kind is None else kind
        model, _ = load_dia2(config, files.weights, dtype=held, int8=int8)
        codec, mimi_config, _ = load_mimi(files.mimi)
        return cls(config, model, tokenizer, mimi_config, codec, defaults)

    @property
    def sample_rate(self) -> int:
        """Samples per second of the output."""
        return self.codec.sample_rate

    @property
    def frame_rate(self) -> float:
        """Frames per second: steps of the model, columns of codes."""
        return self.mimi_config.frames_per_second

    @property
    def max_context_steps(self) -> int:
        """Steps that the model can take in one session, prefix included."""
        return self.config.runtime.max_context_steps

    @overload  # to a type checker a string is a sequence of strings as well
    def generate(  # type: ignore[overload-overlap]
        self,
        script: str,
        config: GenerationConfig | None = ...,
        *,
        voices: Voices = ...,
        seed: int = ...,
        progress: Callable[[int], None] | None = ...,
    ) -> Result: ...

    @overload
    def generate(
        self,
        script: Sequence[str],
        config: GenerationConfig | Sequence[GenerationConfig] | None = ...,
        *,
        voices: Any = ...,
        seed: int | Sequence[int] = ...,
        progress: Callable[[int], None] | None = ...,
    ) -> list[Result]: ...

    def generate(
        self,
        script: str | Sequence[str],
        config: GenerationConfig | Sequence[GenerationConfig] | None = None,
        *,
        voices: Any = None,
        seed: int | Sequence[int] = 0,
        progress: Callable[[int], None] | None = None,
    ) -> Result | list[Result]:
        """Speak one script, or a batch of scripts.

        A string is **one** script, its newlines are white space. A list is a **batch**: every
        string is a script of its own, all are generated together, and each equals what it would
        be alone. (Upstream joins a list into one script; join it yourself with ``"\\n".join``.)

        Args:
          script: text with ``[S1]`` / ``[S2]`` speaker tags, ``<break time="0.5s"/>`` pauses and
            sound tags such as ``(laughs)``.
          config: settings; one for all scripts, or one each; :attr:`defaults` if not given.
          voices: recordings to go on from (see :data:`dia2_jax.voice.Voices`); one value for all
            scripts, or a list with a list or mapping for each script.
          seed: one for all scripts, or one each; the same seed gives the same codes.
          progress: called after every frame with the number of frames computed.

        Raises:
          ScriptError: nothing to speak.
          PrefixError: the voices cannot be used.
          NonFiniteError: the model produced NaN.
        """
        scripts = [script] if isinstance(script, str) else list(script)
        if any(not isinstance(text, str) for text in scripts):
            raise ConfigError("script: must be a string, or a list of strings for a batch")
        if not scripts:
            return []
        count = len(scripts)
        configs = _each(
            self.defaults if config is None else config, count, GenerationConfig, "config"
        )
        seeds = _each(seed, count, object, "seed")
        each_voices = voices if _per_script(voices) else [voices] * count
        if len(each_voices) != count:
            raise ConfigError(f"voices: {len(each_voices)} values for {count} scripts")
        plans = [self._plan(v, c) for v, c in zip(each_voices, configs, strict=True)]
        rows = self._rows(configs, seeds, plans)
        for index, text in enumerate(scripts):
            rows.feed(index, text)
            try:
                rows.close(index)
            except ScriptError as error:
                if isinstance(script, str):
                    raise
                raise ScriptError(f"script {index} of the batch: {error}") from None
        frames = 0
        while rows.refresh():
            rows.step()
            frames += 1
            if progress is not None:
                progress(frames)
        rows.cancel()
        results = [self._result(row) for row in rows.rows]
        return results[0] if isinstance(script, str) else results

    def trace(
        self,
        script: str,
        config: GenerationConfig | None = None,
        *,
        voices: Voices = None,
        seed: int = 0,
    ) -> tuple[Result, ActionStream]:
        """:meth:`generate` of one script, and what the word machine did in every step of it."""
        config = self.defaults if config is None else config
        rows = self._rows([config], [seed], [self._plan(voices, config)], trace=True)
        actions = watch(rows, script)
        return self._result(rows.rows[0]), actions

    def session(
        self,
        config: GenerationConfig | None = None,
        *,
        voices: Voices = None,
        seed: int = 0,
        chunk_frames: int = 1,
    ) -> Session:
        """A streaming session: feed text, iterate over chunks (see :class:`Session`).

        Args:
          config, voices, seed: as in :meth:`generate`.
          chunk_frames: frames in a chunk, 80 ms each in the published codec. Larger chunks cost
            less, the first one comes later.
        """
        if not isinstance(chunk_frames, int | np.integer) or chunk_frames < 1:
            raise ConfigError(f"chunk_frames: must be a whole number >= 1, got {chunk_frames!r}")
        config = self.defaults if config is None else config
        if not isinstance(config, GenerationConfig):
            raise ConfigError(f"config: must be a GenerationConfig, got {config!r}")
        rows = self._rows([config], [seed], [self._plan(voices, config)])
        return Session(rows, self.codec, chunk_frames=chunk_frames)

    def stream(
        self,
        text: str | Iterable[str],
        config: GenerationConfig | None = None,
        *,
        voices: Voices = None,
        seed: int = 0,
        chunk_frames: int = 1,
    ) -> Iterator[Chunk]:
        """Chunks of audio while the text is still being written.

        Args:
          text: a script, or an iterable of its pieces (an LLM's tokens). The next piece is asked
            for only when nothing more can be computed from those before.
          config, voices, seed, chunk_frames: as in :meth:`session`.

        Raises:
          ConfigError, PrefixError: at once; what is wrong with the text, while iterating.
        """
        session = self.session(config, voices=voices, seed=seed, chunk_frames=chunk_frames)
        return _stream(session, [text] if isinstance(text, str) else text)

    def warm_up(
        self,
        config: GenerationConfig | None = None,
        *,
        voices: Voices = None,
        chunk_frames: int = 1,
    ) -> None:
        """Compile what a session of these arguments runs, so that its first audio comes sooner.

        It costs a frame of a throw-away session, whose memory is given back.
        """
        config = self.defaults if config is None else config
        silence = np.zeros((1, self.config.data.codebooks, chunk_frames), np.int32)

        def decode() -> None:
            jax.block_until_ready(self.codec.decode_step(silence, self.codec.init_decode_state(1)))

        # Python traces one program while XLA compiles the other, or reads it from the disk.
        with ThreadPoolExecutor(1) as other:
            decoded = other.submit(decode)
            rows = self._rows([config], [0], [self._plan(voices, config)])
            rows.feed(0, "a")
            rows.close(0)
            if rows.refresh():
                rows.step()
            rows.cancel()
            decoded.result()

    def prepare_voice(
        self,
        audio: str | Path | Float[np.ndarray, " W"],
        *,
        words: Sequence[WordTime] | None = None,
        transcript: str | None = None,
        recognizer: object = "base",
    ) -> Voice:
        """Prepare a recording for ``voices=`` (see :func:`dia2_jax.voice.prepare_voice`)."""
        return prepare_voice(
            audio,
            self.codec,
            self.tokenizer,
            codebooks=self.config.data.codebooks,
            words=words,
            transcript=transcript,
            recognizer=recognizer,
        )

    def _plan(self, voices: Voices, config: GenerationConfig) -> PrefixPlan | None:
        if voices is None:
            return None
        if self._fingerprint is None:
            self._fingerprint = codec_fingerprint(self.codec)
        turns = prefix_turns(voices, self._fingerprint)
        if not turns:
            return None
        kind: Literal["exact", "upstream"] = config.prefix_plan
        return plan_prefix(
            turns, self.tokenizer, self.config, kind=kind, frame_rate=self.frame_rate
        )

    def _rows(
        self,
        configs: Sequence[GenerationConfig],
        seeds: Sequence[int],
        plans: Sequence[PrefixPlan | None],
        trace: bool = False,
    ) -> Rows:
        for seed in seeds:
            whole = isinstance(seed, int | np.integer) and not isinstance(seed, bool)
            if not whole or not 0 <= seed < 2**32:
                raise ConfigError(f"seed: must be a whole number from 0 to 2**32 - 1, got {seed!r}")
        rate = self.frame_rate
        return Rows(
            self._programs, self.tokenizer, configs, seeds, plans, frame_rate=rate, trace=trace
        )

    def _result(self, row: Row) -> Result:
        codes = row.frames(0, row.available)
        wave = self.codec.decode(codes[None])[0] if codes.size else np.zeros(0, np.float32)
        words = [(text, frame / self.frame_rate) for text, frame in row.word_steps()]
        return Result(
            codes=codes,
            waveform=np.clip(wave, -1.0, 1.0),
            sample_rate=self.sample_rate,
            words=words,
            truncated=row.truncated,
        )


def _stream(session: Session, pieces: Iterable[str]) -> Iterator[Chunk]:
    try:
        for piece in pieces:
            session.feed(piece)
            yield from session
            if session.finished:  # the context ended; the text may never
                return
        session.close()
        yield from session
    finally:
        session.cancel()


def _dtype(dtype: Any) -> np.dtype[Any] | None:
    if dtype is None:
        return None
    known = {name: jnp.dtype(kind) for name, kind in _DTYPES.items()}
    try:
        kind = jnp.dtype(_DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype)
    except TypeError:
        kind = None
    if kind not in known.values():
        raise ConfigError(f"dtype: must be {' or '.join(map(repr, known))}, got {dtype!r}")
    return kind


def _each(value: Any, count: int, kind: type, name: str) -> list[Any]:
    """One value for every script, or the given ones."""
    if not isinstance(value, (list, tuple)):
        value = [value] * count
    values = list(value)
    if len(values) != count:
        raise ConfigError(f"{name}: {len(values)} values for {count} scripts")
    for item in values:
        if not isinstance(item, kind):
            raise ConfigError(f"{name}: must be a {kind.__name__}, got {item!r}")
    return values


def _per_script(voices: Any) -> bool:
    """Whether ``voices`` is a list with a list, a mapping or None for each script."""
    return (
        isinstance(voices, (list, tuple))
        and len(voices) > 0
        and all(
            item is None or not isinstance(item, Voice) and hasattr(item, "__len__")
            for item in voices
        )
        and any(item is not None for item in voices)
    )
