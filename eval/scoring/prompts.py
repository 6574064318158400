"""Prompt sets: the project's own by name, users' JSON Lines, corpus manifests and Seed-TTS-eval's
lists by path.

What a row may say is told in ``eval/prompts/README.md``.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dia2_jax.errors import DataError
from dia2_jax.text.tokenizer import SPEAKER_TAGS
from eval.scoring.scripts import SpokenWord

FOLDER = Path(__file__).parent.parent / "prompts"


@dataclass(frozen=True)
class PromptVoice:
    """A recording that a speaker goes on from: a voice prefix.

    Attributes:
      text: what is said in it; None to have it transcribed.
    """

    path: Path
    text: str | None = None


@dataclass(frozen=True)
class Prompt:
    """One script to speak, and what is known of a reading of it.

    Attributes:
      set, id: name of the set, and the row's in it.
      kind: takes are summed up by it.
      script: with speaker tags.
      reference: a recording of it.
      seconds: how long a reading speaks, where there is no recording.
      words: those of the recording, with times.
      voices: by speaker tag, whom the take should sound like.
      also: transcripts of a perfect reading that are spelled otherwise than the script.
    """

    set: str
    id: str
    kind: str
    script: str
    reference: Path | None = None
    seconds: float | None = None
    words: tuple[SpokenWord, ...] = ()
    voices: Mapping[str, PromptVoice] = field(default_factory=dict)
    also: tuple[str, ...] = ()

    def seed(self, run_seed: int) -> int:
        """The seed of a take: of the run's seed and the id alone, whatever else is spoken."""
        return zlib.crc32(f"{run_seed} {self.id}".encode())


@dataclass(frozen=True)
class PromptSet:
    """A file of prompts.

    Attributes:
      name: its stem.
      digest: SHA-256 of the file, hexadecimal.
    """

    name: str
    path: Path
    digest: str
    prompts: tuple[Prompt, ...]

    def limited(self, count: int | None) -> PromptSet:
        """At most ``count`` prompts, in their order, chosen by a hash of their ids.

        So the choice mixes what the file sorts, and a larger one contains a smaller one.
        """
        if count is None:
            return self
        ranked = sorted(self.prompts, key=lambda p: hashlib.sha256(p.id.encode()).digest())
        chosen = {prompt.id for prompt in ranked[:count]}
        return replace(self, prompts=tuple(p for p in self.prompts if p.id in chosen))


def built_in() -> list[str]:
    """Names of the sets that come with the project."""
    return sorted(path.stem for path in FOLDER.glob("*.jsonl"))


def read_sets(names: Sequence[str]) -> list[PromptSet]:
    """The prompt sets of names or paths.

    Raises:
      DataError: as :func:`read_set`; or two files have the same stem, which tells sets apart.
    """
    sets = [read_set(name) for name in names]
    seen: dict[str, Path] = {}
    for found in sets:
        if found.name in seen:
            raise DataError(
                f"{found.path}: there is another prompt set {found.name!r} ({seen[found.name]}); "
                "rename one of the files"
            )
        seen[found.name] = found.path
    return sets


def read_set(name: str) -> PromptSet:
    """A prompt set by its name (one of :func:`built_in`) or by the path of a file.

    A file is JSON Lines, or a ``.lst`` of Seed-TTS-eval (Anastassiou et al., 2024):
    ``id|text of the voice|its recording|what to say[|a recording of that]``.

    Raises:
      DataError: there is none; or names the line and what is wrong with it.
    """
    path = Path(name)
    if not path.is_file() and name in built_in():
        path = FOLDER / f"{name}.jsonl"
    if not path.is_file():
        raise DataError(
            f"{name}: no such prompt set; give the path of a JSON Lines file or of a "
            f".lst of Seed-TTS-eval, or one of "
            f"{', '.join(built_in())}"
        )
    prompts: dict[str, Prompt] = {}
    read = _listed if path.suffix == ".lst" else _prompt
    for number, line in _lines(path):
        prompt = read(line, path, f"{path}:{number}")
        if prompt.id in prompts:
            raise DataError(f"{path}:{number}: id {prompt.id!r} occurs twice; rename one")
        prompts[prompt.id] = prompt
    if not prompts:
        raise DataError(f"{path}: holds no prompts; write one a line")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return PromptSet(path.stem, path, digest, tuple(prompts.values()))


def rows_of(found: PromptSet) -> list[dict[str, Any]]:
    """The rows of a set in JSON Lines as they are written, whatever else they hold."""
    return [json.loads(line) for _, line in _lines(found.path)]


def _lines(path: Path) -> list[tuple[int, str]]:
    """Lines that are not empty, with their numbers."""
    try:
        # At "\n" alone: other line ends that Unicode knows may stand in a text.
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text ({error}); write it again as such") from None
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _prompt(line: str, path: Path, where: str) -> Prompt:
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()  # halves of characters (\ud83d) are no text
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is no JSON ({error}); write one object a line") from None
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: is no JSON object; write {{'id': …, 'script': …}}")
    for name in ("id", "script", "kind"):
        if not _is_text(row.get(name, "line" if name == "kind" else None)):
            raise DataError(f"{where}: {name} must be a text that is not empty")
    reference = row.get("reference", row.get("path"))
    if reference is not None and not _is_text(reference):
        raise DataError(f"{where}: reference must be the path of a recording")
    seconds = row.get("seconds", row.get("duration"))
    if seconds is not None and not (_is_number(seconds) and seconds > 0):
        raise DataError(f"{where}: seconds must be a number above 0")
    also = row.get("also", [])
    if not isinstance(also, list) or not all(_is_text(text) for text in also):
        raise DataError(
            f"{where}: also must be a list of texts that are not empty, got {json.dumps(also)[:80]}"
        )
    return Prompt(
        set=path.stem,
        id=row["id"],
        kind=row.get("kind", "line"),
        script=row["script"],
        reference=None if reference is None else path.parent / reference,
        seconds=None if seconds is None else float(seconds),
        words=tuple(_words(row.get("words") or (), where)),
        voices=_voices(row.get("voices") or {}, path, where),
        also=tuple(also),
    )


def _listed(line: str, path: Path, where: str) -> Prompt:
    """A line of a list of Seed-TTS-eval; its speaker is ``[S1]``."""
    fields = [part.strip() for part in line.split("|")]
    if len(fields) not in (4, 5) or not all(fields[:1] + fields[2:4]):
        raise DataError(
            f"{where}: needs id|text of the voice|its recording|what to say, and perhaps "
            f"|a recording of that; got {len(fields)} fields: {line[:80]!r}"
        )
    identifier, said, voice, text, *recorded = fields
    return Prompt(
        set=path.stem,
        id=Path(identifier).stem if identifier.endswith(".wav") else identifier,
        kind="line",
        script=f"{SPEAKER_TAGS[0]} {text}",
        reference=path.parent / recorded[0] if recorded and recorded[0] else None,
        voices={SPEAKER_TAGS[0]: PromptVoice(path.parent / voice, said or None)},
    )


def _voices(row: Any, path: Path, where: str) -> dict[str, PromptVoice]:
    if not isinstance(row, Mapping) or not set(row) <= set(SPEAKER_TAGS):
        raise DataError(
            f"{where}: voices must be an object of {' and '.join(SPEAKER_TAGS)}, got "
            f"{json.dumps(row)[:80]}"
        )
    found = {}
    for tag, voice in row.items():
        named = isinstance(voice, Mapping) and set(voice) <= {"path", "text"}
        texts = [*voice.values()] if named else [None]
        if "path" not in (voice if named else ()) or not all(isinstance(t, str) for t in texts):
            raise DataError(
                f"{where}: the voice of {tag} must be an object of path and perhaps text, got "
                f"{json.dumps(voice)[:80]}"
            )
        found[tag] = PromptVoice(path.parent / voice["path"], voice.get("text"))
    return found


def _words(rows: Any, where: str) -> list[SpokenWord]:
    words = []
    if not isinstance(rows, list | tuple):
        raise DataError(f"{where}: words must be a list, got {json.dumps(rows)[:80]}")
    for row in rows:
        try:
            word = SpokenWord(
                row["text"], row.get("speaker") or SPEAKER_TAGS[0], row["start"], row["end"]
            )
        except (KeyError, TypeError, AttributeError):
            raise DataError(
                f"{where}: a word needs text, start and end, got {json.dumps(row)[:80]}"
            ) from None
        if not _is_text(word.text) or word.speaker not in SPEAKER_TAGS:
            raise DataError(
                f"{where}: a word's text must be one, and its speaker {' or '.join(SPEAKER_TAGS)}, "
                f"got {json.dumps(row)[:80]}"
            )
        start, end = row["start"], row["end"]
        if not (_is_number(start) and _is_number(end) and 0 <= start <= end):
            raise DataError(
                f"{where}: start and end of {word.text!r} must be seconds, the end not before "
                f"the start, got {json.dumps(row)[:80]}"
            )
        words.append(word)
    return words


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_number(value: Any) -> bool:
    """Whether it is a finite one; JSON as Python reads it knows NaN, and 1e999 is infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e12
