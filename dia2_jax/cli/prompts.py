"""Voices on the command line: two speakers' recordings, or the turns of a conversation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dia2_jax.cli.files import EXISTING_FILE, text_or_file
from dia2_jax.cli.options import RECOGNIZER, apply
from dia2_jax.errors import PrefixError

if TYPE_CHECKING:
    from dia2_jax.engine import Dia2
    from dia2_jax.voice import Turn, Voice, Voices

TRANSCRIPT_HELP = "What the recording says: the text or a file with it; its times are estimated."
WORDS_HELP = 'Its words with times, JSON: [{"text": "Hello", "start": 0.1, "end": 0.5}, ...].'


def _speaker_options(speaker: int) -> list[Any]:
    return [
        click.option(
            f"--voice-{speaker}",
            type=EXISTING_FILE,
            metavar="FILE",
            help=f"Speaker {speaker}'s voice: a recording (WAV, FLAC, OGG, MP3) or a file that "
            "`dia2-jax voice` wrote. A recording without words or transcript is transcribed.",
        ),
        click.option(f"--words-{speaker}", type=EXISTING_FILE, metavar="FILE", help=WORDS_HELP),
        click.option(f"--transcript-{speaker}", metavar="TEXT|FILE", help=TRANSCRIPT_HELP),
    ]


voice_options = apply(
    [
        *_speaker_options(1),
        *_speaker_options(2),
        click.option(
            "--turns",
            type=EXISTING_FILE,
            metavar="FILE",
            help="Instead of voices, a conversation to go on from, JSON: a list of turns in order, "
            '{"speaker": 1, "audio": "a.wav", "transcript": "Hello."} each, or with "words" (a '
            'list or a file), or {"speaker": 2, "voice": "b.voice"}. Paths count from the file\'s '
            "folder.",
        ),
        RECOGNIZER,
    ]
)


class Prompts:
    """The options of :data:`voice_options`, checked before the model is loaded.

    Args:
      options: of the command; these are taken out of it.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self._recognizer = options.pop("recognizer")
        self._speakers: dict[int, dict[str, Any]] = {}
        self._turns: Path | None = options.pop("turns")
        for speaker in (1, 2):
            audio, words, transcript = (
                options.pop(f"{name}_{speaker}") for name in ("voice", "words", "transcript")
            )
            what = "words" if words is not None else "transcript"
            if audio is None and (words is not None or transcript is not None):
                raise click.UsageError(
                    f"--{what}-{speaker} says what a recording holds: give --voice-{speaker} too"
                )
            if words is not None and transcript is not None:
                raise click.UsageError(
                    f"--words-{speaker} and --transcript-{speaker} exclude each other"
                )
            if audio is None:
                continue
            if (words is not None or transcript is not None) and is_voice_file(audio):
                raise click.UsageError(
                    f"--{what}-{speaker}: {audio} is a prepared voice, which has its words already"
                )
            if transcript is not None:
                transcript = text_or_file(transcript)
            self._speakers[speaker] = {"audio": audio, "words": words, "transcript": transcript}
        if self._turns is not None and self._speakers:
            raise click.UsageError("--turns and --voice-1/-2 exclude each other")
        if 2 in self._speakers and 1 not in self._speakers:
            raise click.UsageError(
                "--voice-2 without --voice-1: the model needs speaker 1 as well. Give the voice as "
                "--voice-1, or add one for speaker 1"
            )

    def prepare(self, model: Dia2) -> Voices:
        """The voices, encoded by the model's codec.

        Raises:
          AudioError, PrefixError: a recording or what is said about it cannot be used.
        """
        if self._turns is not None:
            return self._conversation(model, self._turns)
        return {
            speaker: self._voice(model, **given) for speaker, given in self._speakers.items()
        } or None

    def _voice(self, model: Dia2, *, audio: Path, words: Any, transcript: str | None) -> Voice:
        from dia2_jax.text.timing import load_word_times
        from dia2_jax.voice import Voice

        if is_voice_file(audio):
            return Voice.load(audio)
        return model.prepare_voice(
            audio,
            words=load_word_times(words) if isinstance(words, Path) else words,
            transcript=transcript,
            recognizer=self._recognizer,
        )

    def _conversation(self, model: Dia2, path: Path) -> list[Turn]:
        try:
            content = json.loads(path.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise PrefixError(f"{path}: not valid JSON ({error})") from None
        if not isinstance(content, list) or not content:
            raise PrefixError(f'{path}: must hold a list of turns, each {{"speaker": 1, ...}}')
        turns = []
        for index, item in enumerate(content):
            try:
                turns.append(self._turn(model, item, path.parent))
            except (PrefixError, OSError) as error:
                raise PrefixError(f"{path}, turn {index}: {error}") from None
        return turns

    def _turn(self, model: Dia2, item: Any, folder: Path) -> Turn:
        from dia2_jax.text.timing import WordTime
        from dia2_jax.voice import Turn

        known = ("speaker", "audio", "voice", "words", "transcript")
        if not isinstance(item, Mapping):
            raise PrefixError(f"{json.dumps(item)[:60]} is not an object with {', '.join(known)}")
        unknown = sorted(set(item) - set(known))
        if unknown:
            raise PrefixError(f"unknown key {unknown[0]!r}; known: {', '.join(known)}")
        speaker = item.get("speaker")
        if speaker not in (1, 2) or isinstance(speaker, bool):
            raise PrefixError(f"speaker must be 1 or 2, got {json.dumps(speaker)}")
        place = item.get("voice", item.get("audio"))
        if ("voice" in item) == ("audio" in item) or not isinstance(place, str):
            raise PrefixError('give either "audio", a recording, or "voice", a prepared voice')
        source = folder / place
        if not source.is_file():
            raise PrefixError(f"there is no file {source}")
        words, transcript = item.get("words"), item.get("transcript")
        if words is not None and transcript is not None:
            raise PrefixError("words and transcript exclude each other")
        if (words is not None or transcript is not None) and is_voice_file(source):
            raise PrefixError(f"{source} is a prepared voice, which has its words already")
        if "voice" in item and not is_voice_file(source):
            raise PrefixError(f'{source} is not a prepared voice: give a recording as "audio"')
        if isinstance(words, str):
            words = folder / words
        elif words is not None:
            try:
                words = [WordTime(each["text"], each["start"], each["end"]) for each in words]
            except (KeyError, TypeError, AttributeError):
                raise PrefixError(
                    'words must be a file or a list of {"text": ..., "start": s, "end": s}'
                ) from None
        if transcript is not None and not isinstance(transcript, str):
            raise PrefixError("transcript must be a text")
        return Turn(speaker, self._voice(model, audio=source, words=words, transcript=transcript))


def is_voice_file(path: Path) -> bool:
    """Whether a file is one of `dia2-jax voice`, by its name or its content (safetensors: the
    length of a header, then JSON), rather than a recording."""
    with path.open("rb") as file:
        start = file.read(9)
    header = int.from_bytes(start[:8], "little")
    return path.suffix == ".voice" or (start[8:] == b"{" and header < 100_000_000)
