"""Where takes come from: a model that speaks, recordings, recordings through the codec."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from dia2_jax import hub
from dia2_jax.audio import SAMPLE_RATE, read_audio, to_pcm16, voiced_span
from dia2_jax.data import Pace
from dia2_jax.errors import (
    AlignmentError,
    AudioError,
    ConfigError,
    DataError,
    Dia2Error,
    PrefixError,
    suggest,
)
from dia2_jax.generation.settings import GenerationConfig
from dia2_jax.text.tokenizer import SPEAKER_TAGS
from dia2_jax.transcribe import load_recognizer
from dia2_jax.typing import Float
from eval.scoring.prompts import Prompt, PromptSet, PromptVoice
from eval.scoring.scripts import with_speakers
from eval.scoring.takes import GENERATED, RECORDING, RESYNTHESIS, Take

if TYPE_CHECKING:
    from dia2_jax.engine import Dia2
    from dia2_jax.mimi.runtime import Codec
    from dia2_jax.voice import Voice


class Studio:
    """Makes takes of prompts.

    Args:
      model: speaks; None where nothing is generated.
      codec: resynthesises; None where nothing is.
      codebooks: of the codec, those that are kept.
      settings: of generation; None for the model's own.
      recognizer: transcribes voices without a text, as `dia2_jax.voice.prepare_voice` takes it.
    """

    def __init__(
        self,
        model: Dia2 | None = None,
        codec: Codec | None = None,
        codebooks: int | None = None,
        settings: GenerationConfig | None = None,
        recognizer: object = "base",
    ) -> None:
        self._model, self._codec, self._codebooks = model, codec, codebooks
        self._settings, self._recognizer = settings, recognizer
        # A prompt's takes are made one after another.
        self._read = functools.lru_cache(maxsize=2)(read_audio)
        self._prepared: dict[PromptVoice, Voice | Dia2Error] = {}

    def take(self, source: str, prompt: Prompt, run_seed: int | None = None) -> Take:
        """A take of a prompt; what is scored is what a 16-bit file of it holds.

        The words of a generated take are where they sound, which is earlier than a model reports
        them (`sounding_starts`); the times as reported go into its row as ``reported_starts``.

        Raises:
          ScriptError: the model finds nothing to speak.
          AudioError: the reference or a voice cannot be read.
          PrefixError, AlignmentError: a voice cannot be gone on from.
          NonFiniteError: the model computes NaN.
        """
        if source == GENERATED:
            assert run_seed is not None
            return self._speak(prompt, prompt.seed(run_seed))
        wave = self._reference(prompt)
        assert wave is not None
        rate, original = SAMPLE_RATE, None
        if source == RESYNTHESIS:
            assert self._codec is not None
            rate = self._codec.sample_rate
            original = self.read(prompt, rate)
            codes = self._codec.encode(original[None], codebooks=self._codebooks)
            wave = self._codec.decode(codes)[0][: len(original)]
        return Take(
            source=source,
            prompt=prompt,
            wave=as_saved(wave),
            rate=rate,
            words=prompt.words,
            reference_seconds=self._reference_seconds(prompt) if source == RESYNTHESIS else None,
            original=original,
        )

    def read(self, prompt: Prompt, rate: int) -> Float[np.ndarray, " W"]:
        """The recording of a prompt that has one, at `rate` samples a second.

        Raises:
          AudioError: it cannot be read.
        """
        assert prompt.reference is not None
        return self._read(prompt.reference, rate)

    def _speak(self, prompt: Prompt, seed: int) -> Take:
        from dia2_jax.compilation_cache import CompileWatch

        assert self._model is not None
        voices = self._voices(prompt)
        reference_seconds = self._reference_seconds(prompt)  # if it cannot be read, do not speak
        with CompileWatch() as watch:
            start = time.perf_counter()
            result = self._model.generate(prompt.script, self._settings, seed=seed, voices=voices)
            seconds = time.perf_counter() - start
        starts = sounding_starts([word[1] for word in result.words], self._model.frame_rate)
        words = [(text, start) for (text, _), start in zip(result.words, starts, strict=True)]
        return Take(
            source=GENERATED,
            prompt=prompt,
            wave=as_saved(result.waveform),
            rate=result.sample_rate,
            words=with_speakers(words, prompt.script),
            truncated=result.truncated,
            reference_seconds=reference_seconds,
            compute_seconds=seconds,
            compiled=watch.counts["programs"] > 0,
            about={"reported_starts": [start for _, start in result.words]},
        )

    def _voices(self, prompt: Prompt) -> dict[int, Voice] | None:
        """The prompt's voices by number of the speaker."""
        by_number = {
            1 + SPEAKER_TAGS.index(tag): self._voice(voice) for tag, voice in prompt.voices.items()
        }
        return by_number or None

    def _voice(self, voice: PromptVoice) -> Voice:
        """Each is prepared once; one that cannot be is not tried again for every prompt."""
        assert self._model is not None
        if voice not in self._prepared:
            try:
                self._prepared[voice] = self._model.prepare_voice(
                    voice.path, transcript=voice.text, recognizer=self._recognizer
                )
            except (AudioError, PrefixError, AlignmentError) as error:
                self._prepared[voice] = error
        found = self._prepared[voice]
        if isinstance(found, Dia2Error):
            raise found
        return found

    def _reference(self, prompt: Prompt) -> Float[np.ndarray, " W"] | None:
        return None if prompt.reference is None else self.read(prompt, SAMPLE_RATE)

    def _reference_seconds(self, prompt: Prompt) -> float | None:
        wave = self._reference(prompt)
        if wave is None:
            return prompt.seconds
        start, end = voiced_span(wave, SAMPLE_RATE)
        return end - start


def sounding_starts(reported: Iterable[float], frame_rate: float) -> list[float]:
    """Where words begin to sound, in seconds, that a model reports to start at these times.

    A model reports the step that takes a word, and learns to take it so many steps after the frame
    in which it begins to sound: `word_step_offset` of `dia2_jax.data.Pace`, two in the published
    checkpoints and in what `train.prepare` makes unless told otherwise.

    Args:
      reported: seconds from the start of the audio.
      frame_rate: of the codec, frames a second.
    """
    late = Pace().word_step_offset / frame_rate
    return [round(max(0.0, start - late), 3) for start in reported]


def check_files(sets: Iterable[PromptSet]) -> None:
    """Look for every recording and voice that the prompts name.

    Raises:
      DataError: lists all those that are not there, and which prompt names each first.
    """
    missing: dict[Path, str] = {}
    for prompt in (prompt for each in sets for prompt in each.prompts):
        named = [prompt.reference, *(voice.path for voice in prompt.voices.values())]
        for path in named:
            if path is not None and path not in missing and not path.is_file():
                missing[path] = f"{prompt.set}/{prompt.id}"
    if missing:
        listed = "".join(f"\n  {path} (named by {name})" for path, name in missing.items())
        raise DataError(
            f"{len(missing)} of the files that prompts name are not there; paths are relative to "
            f"the prompts' file; put them there, or take the prompts out:{listed}"
        )


def voice_recognizer(sets: Iterable[PromptSet], asr: str) -> Any | None:
    """What transcribes voices whose text is not given; None where each has one.

    Args:
      asr: a Whisper model, by size or folder.

    Raises:
      ConfigError: it, or faster-whisper, is not there.
    """
    prompts = [prompt for each in sets for prompt in each.prompts]
    named = [(prompt, voice) for prompt in prompts for voice in prompt.voices.values()]
    for prompt, voice in named:
        if voice.text is None:
            try:
                return load_recognizer(asr)
            except Dia2Error as error:
                raise ConfigError(
                    f"{prompt.set}/{prompt.id}: the voice {voice.path} has no text, and "
                    f"{' '.join(str(error).split())} (as its text in the prompts' file)"
                ) from error
    return None


def sources_of(prompt: Prompt, wanted: Iterable[str], seeds: Sequence[int]) -> list[Any]:
    """(source, run seed) of the takes of a prompt: references only where there is one."""
    found: list[tuple[str, int | None]] = []
    for source in (RECORDING, RESYNTHESIS):
        if source in wanted and prompt.reference is not None:
            found.append((source, None))
    if GENERATED in wanted:
        found += [(GENERATED, seed) for seed in seeds]
    return found


def read_settings(
    overrides: Sequence[str], defaults: GenerationConfig | None = None
) -> GenerationConfig:
    """Generation settings with ``name=value`` and ``part.name=value`` in place of the defaults
    (of `GenerationConfig` unless given).

    Raises:
      ConfigError: names a setting that there is none of, or a value that it cannot have.
    """
    settings = GenerationConfig() if defaults is None else defaults
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name:
            raise ConfigError(f"override {override!r}: expected NAME=VALUE, such as cfg_scale=1.0")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"{name}: {text!r} is no value; give a number or a word") from None
        settings = _replaced(settings, name, name.split("."), value)
    return settings


def _replaced(settings: Any, name: str, parts: Sequence[str], value: Any) -> Any:
    known = [field.name for field in dataclasses.fields(settings)]
    first, *rest = parts
    if first not in known:
        hint = suggest(first, known)
        raise ConfigError(f"unknown setting {name!r}{hint}; known: {', '.join(known)}")
    inner = getattr(settings, first)
    if rest:
        if not dataclasses.is_dataclass(inner):
            raise ConfigError(f"{name}: {first} has no parts; set {first}=VALUE")
        value = _replaced(inner, name, rest, value)
    elif isinstance(inner, float) and type(value) is int:
        value = float(value)  # 1 and 1.0 are the same setting, and the same run
    return dataclasses.replace(settings, **{first: value})


def is_codec(checkpoint: str) -> bool:
    """Whether this names a codec rather than a model."""
    folder = Path(checkpoint).expanduser()
    if checkpoint == hub.NANO:
        return False
    if folder.is_file() or checkpoint == hub.DEFAULT_MIMI:
        return True
    return folder.is_dir() and not any(
        (folder / name).exists() for name in (hub.TOKENIZER, hub.MANIFEST)
    )


def digest(*places: Path) -> str:
    """SHA-256 of the contents of files and folders, hexadecimal; names and dates do not count."""
    total = hashlib.sha256()
    for place in places:
        files = sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place]
        for file in files:
            with file.open("rb") as stream:
                total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def weights_files(weights: Path) -> list[Path]:
    """The files behind the name of weights: an index stands for its shards."""
    if weights.name.endswith(".index.json"):
        return [weights, *(weights.parent / shard for shard in hub.shards(weights))]
    return [weights]


def as_saved(wave: Float[np.ndarray, " W"]) -> Float[np.ndarray, " W"]:
    """What a 16-bit file of it holds."""
    return np.frombuffer(to_pcm16(wave), "<i2").astype(np.float32) / 32_768


def open_codec(checkpoint: str, mimi: str | None = None) -> tuple[Codec, int, dict[str, Any]]:
    """The codec of a model, or a codec itself.

    Args:
      mimi: the codec, if not the model's own.

    Returns:
      The codec, how many codebooks are used of it, and what its output depends on.

    Raises:
      HubError, ConfigError, CheckpointError: it cannot be found or loaded.
    """
    from dia2_jax.compilation_cache import enable_compilation_cache
    from dia2_jax.config import load_dia2_config
    from dia2_jax.convert.models import load_mimi
    from dia2_jax.mimi.runtime import Codec

    enable_compilation_cache()
    codebooks = None
    if mimi is None and not is_codec(checkpoint):
        files = hub.resolve(checkpoint)
        codebooks, codec_files = load_dia2_config(files.config).data.codebooks, files.mimi
    else:
        codec_files = hub.resolve_mimi(mimi or checkpoint)
    codec = Codec(load_mimi(codec_files)[0])
    codebooks = codebooks or codec.codebooks
    return codec, codebooks, codec_identity(codec_files, codebooks)


def codec_identity(files: hub.MimiFiles, codebooks: int) -> dict[str, Any]:
    """What resynthesis depends on."""
    places = [] if files.config is None else [files.config]
    found = digest(*places, *weights_files(files.weights))
    return {"sha256": found, "codebooks": codebooks}
