"""Voices: recordings prepared as context for what the model says next.

A voice is the codec's codes of a recording and the words in it with their times. It is
saved as one small file (safetensors; about 4 KB a second of speech) that any process
with the same codec can load.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from dia2_jax.audio import read_audio, resample, voiced_span
from dia2_jax.convert.safetensors_io import TensorSpec, open_safetensors, write_safetensors
from dia2_jax.errors import AudioError, CheckpointError, Dia2Error, PrefixError
from dia2_jax.generation.prefix import PrefixTurn
from dia2_jax.mimi.runtime import Codec
from dia2_jax.text.timing import WordTime, check_order, estimate_word_times
from dia2_jax.text.tokenizer import Tokenizer
from dia2_jax.transcribe import transcribe
from dia2_jax.typing import Float, Int

_FORMAT = "dia2-jax voice 1"


@dataclass(frozen=True)
class Voice:
    """A prepared recording of one speaker.

    Attributes:
      codes: ``[C, T]`` int32 Mimi codes.
      words: what is said, in seconds from the start of the recording.
      codec: fingerprint of the codec that made the codes (:func:`codec_fingerprint`).
    """

    codes: Int[np.ndarray, "C T"]
    words: tuple[WordTime, ...]
    codec: str

    def save(self, path: str | Path) -> None:
        """Write the voice to one file; it appears under its name only when complete."""
        codes = np.ascontiguousarray(self.codes, np.int32)
        words = [[word.text, word.start, word.end] for word in self.words]
        metadata = {
            "format": _FORMAT,
            "codec": self.codec,
            "words": json.dumps(words, ensure_ascii=False),
        }
        spec = TensorSpec(dtype=codes.dtype, shape=codes.shape)
        write_safetensors(path, {"codes": spec}, lambda name: codes, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> Voice:
        """Read a voice that :meth:`save` wrote.

        Raises:
          PrefixError: the file is missing, damaged, or no voice.
        """
        path = Path(path)
        if not path.is_file():
            raise PrefixError(f"{path}: no such voice file; make one with `dia2-jax voice`")
        try:
            source = open_safetensors(path)
            metadata = source.metadata or {}
        except CheckpointError as error:
            raise PrefixError(f"no voice file: {error}; prepare the voice again") from None
        if metadata.get("format") != _FORMAT:
            raise PrefixError(
                f"{path}: not a voice file of this version ({_FORMAT!r}); make one with "
                "`dia2-jax voice`"
            )
        try:
            words = tuple(WordTime(*word) for word in json.loads(metadata["words"]))
            codes = np.array(source.read("codes"))
            if codes.ndim != 2 or codes.dtype != np.int32 or not words:
                raise ValueError(f"{len(words)} words, codes {codes.dtype}{list(codes.shape)}")
            return cls(codes, words, metadata["codec"])
        except (Dia2Error, KeyError, TypeError, AttributeError, ValueError) as error:
            raise PrefixError(
                f"{path}: damaged voice file ({error}); prepare the voice again"
            ) from None


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation that was already spoken: who, and the recording."""

    speaker: int
    voice: Voice


#: What ``voices=`` accepts: a voice for speaker 1; voices for speakers 1 and 2 in order or by
#: number; or the turns of a conversation.
Voices: TypeAlias = "Voice | Sequence[Voice | Turn | None] | Mapping[int, Voice] | None"


def codec_fingerprint(codec: Codec) -> str:
    """A short hash of the codec's first codebook: equal codes mean equal sounds only with it."""
    semantic = codec.mimi.quantizer.semantic.codebooks[0]
    table = np.asarray(semantic.embed_sum[...], np.float32)
    return hashlib.sha256(table.tobytes()).hexdigest()[:16]


def prepare_voice(
    audio: str | Path | Float[np.ndarray, " W"],
    codec: Codec,
    tokenizer: Tokenizer,
    *,
    codebooks: int,
    words: Sequence[WordTime] | None = None,
    transcript: str | None = None,
    recognizer: object = "base",
) -> Voice:
    """Encode a recording and find out what is said in it, and when.

    Args:
      audio: a file of any rate, mono or stereo, or a mono waveform at the codec's rate.
      codec: the codec of the model that will speak.
      tokenizer: of the same model.
      codebooks: how many codebooks the model reads.
      words: words with times, if known.
      transcript: otherwise what is said; times are estimated over the voiced part.
      recognizer: with neither, the recording is transcribed by faster-whisper (the optional
        ``transcribe`` extra); a model name or folder.

    Raises:
      AudioError: the recording cannot be read.
      PrefixError: both ``words`` and ``transcript``; no word; a word behind the end.
    """
    if words is not None and transcript is not None:
        raise PrefixError("give words with times or a transcript, not both")
    name = str(audio) if isinstance(audio, (str, Path)) else "the recording"
    if isinstance(audio, (str, Path)):
        wave = read_audio(audio, codec.sample_rate)
    else:
        # At its own rate this resamples nothing; it refuses stereo and whole numbers.
        wave = resample(audio, codec.sample_rate, codec.sample_rate)
        if not np.isfinite(wave).all():
            raise AudioError(f"{name} holds NaN or infinity: it was damaged before it came here")
    seconds = wave.shape[0] / codec.sample_rate
    if transcript is not None:
        span = voiced_span(wave, codec.sample_rate)
        try:
            words = estimate_word_times(transcript, *span, tokenizer=tokenizer)
        except PrefixError as error:
            raise PrefixError(f"{name}: {error}") from None
    elif words is None:
        found = transcribe(wave, recognizer, sample_rate=codec.sample_rate)
        words = [WordTime(*word) for word in found]
    if not words:
        raise PrefixError(f"{name}: no word was found in it; give words or a transcript")
    check_order(words)
    late = next((word for word in words if word.start >= seconds), None)
    if late is not None:
        raise PrefixError(
            f"{name}: word {late.text!r} starts at {late.start:g} s but the recording ends at "
            f"{seconds:.2f} s: check that the words belong to this recording"
        )
    codes = codec.encode(wave[None], codebooks=codebooks)[0]
    return Voice(codes=np.asarray(codes), words=tuple(words), codec=codec_fingerprint(codec))


def prefix_turns(voices: Voices, fingerprint: str) -> list[PrefixTurn]:
    """The turns that ``voices`` stands for, in order.

    Raises:
      PrefixError: a voice of another codec, only speaker 2, or a value of another kind.
    """
    turns = []
    for turn in _turns(voices):
        if not isinstance(turn.voice, Voice):
            raise PrefixError(
                f"the voice of speaker {turn.speaker} is {turn.voice!r}: prepare the recording "
                "with model.prepare_voice, or load one with Voice.load"
            )
        if turn.voice.codec != fingerprint:
            raise PrefixError(
                f"the voice of speaker {turn.speaker} was prepared with another codec "
                f"({turn.voice.codec}, this model's is {fingerprint}): prepare it again from its "
                "recording"
            )
        turns.append(PrefixTurn(turn.speaker, turn.voice.codes, turn.voice.words))
    return turns


def _turns(voices: Voices) -> list[Turn]:
    if voices is None:
        return []
    if isinstance(voices, Voice):
        return [Turn(1, voices)]
    if isinstance(voices, Turn):
        return [voices]
    if isinstance(voices, Mapping):
        if not all(speaker in (1, 2) and isinstance(speaker, int) for speaker in voices):
            raise PrefixError(f"voices: speakers are the numbers 1 and 2, got {list(voices)}")
        given = {speaker: voice for speaker, voice in voices.items() if voice is not None}
        return [Turn(speaker, given[speaker]) for speaker in sorted(given)]
    items = (
        list(voices) if isinstance(voices, Sequence) and not isinstance(voices, str) else [voices]
    )
    if items and all(isinstance(item, Turn) for item in items):
        return [item for item in items if isinstance(item, Turn)]
    if len(items) <= 2 and all(item is None or isinstance(item, Voice) for item in items):
        pairs = enumerate(items, start=1)
        return [Turn(speaker, item) for speaker, item in pairs if isinstance(item, Voice)]
    raise PrefixError(
        "voices: give a Voice, up to two of them (for speakers 1 and 2), {speaker: Voice}, or a "
        "list of Turns"
    )
