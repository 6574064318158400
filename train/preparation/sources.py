"""Where recordings come from: a folder, a JSONL manifest, or a data set; told apart by looking.

A source is a fixed list of rows, read one by one by their number, and a fingerprint that changes
when they do. Data sets are in `dataset_source`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from dia2_jax.errors import DataError
from dia2_jax.hub import is_repository_id
from train.preparation.recordings import read_recording
from train.preparation.records import Channel, Item, Rejected, SourceRow, Turn
from train.preparation.transcripts import read_turns

Kind = Literal["folder", "manifest", "dataset"]

#: Files that are taken for recordings. Those that libsndfile cannot read are rejected by name,
#: which is better than passing them over.
AUDIO_SUFFIXES = (
    ".wav", ".flac", ".mp3", ".ogg", ".opus", ".aif", ".aiff", ".m4a", ".aac", ".wma", ".mp4",
)  # fmt: skip

#: How much of an audio file its fingerprint reads, in bytes, and from how many places.
_PIECE, _PIECES = 512, 16

#: Kyutai's name for the speaker whose words its fine-tuning data transcribes.
_KYUTAI_MAIN = "SPEAKER_MAIN"


class Source(Protocol):
    """A fixed list of rows."""

    kind: Kind

    def __len__(self) -> int: ...

    def row(self, index: int) -> SourceRow:
        """The row of that number; always the same one."""

    def fingerprint(self) -> str:
        """Changes when the rows do: their names, transcripts, or audio."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a data set."""

    audio: str = "audio"
    text: str = "text"
    words: str = "words"
    turns: str = "turns"
    speaker: str = "speaker"
    id: str = "id"


def detect_kind(source: str) -> Kind:
    """Which kind of source a path or name is.

    Raises:
      DataError: it is none.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix.lower() in (".jsonl", ".json", ".ndjson"):
            return "manifest"
        if path.suffix.lower() == ".parquet":
            return "dataset"
        raise DataError(
            f"{source}: not a source of recordings. Give a folder of audio files, a .jsonl "
            "manifest, a .parquet file, or a data set's folder or name"
        )
    if path.is_dir():
        saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
        audio = next((p for p in _files(path) if p.suffix.lower() in AUDIO_SUFFIXES), None)
        if saved or audio is None and next(path.rglob("*.parquet"), None) is not None:
            return "dataset"
        if audio is not None:
            return "folder"
        manifests = sorted(path.glob("*.jsonl"))
        hint = f"; did you mean {manifests[0]}?" if manifests else ""
        raise DataError(f"{source}: the folder holds no audio files and no data set{hint}")
    if is_repository_id(source) and not source.lower().endswith((".jsonl", ".json", ".parquet")):
        return "dataset"
    raise DataError(f"{source}: there is no such file or folder; check the path")


class FolderSource:
    """Audio files of a folder and those below it, each with ``NAME.txt`` or ``NAME.json`` beside.

    Linked folders are entered, each folder once. Links that lead nowhere are rows, and rejected.

    The text may hold ``[S1]`` and ``[S2]``; the JSON holds words with times, or a record like
    those of a manifest. A transcript without audio is a row too, and rejected as one.
    """

    kind: Kind = "folder"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        if not folder.is_dir():
            raise DataError(f"{folder}: there is no such folder")
        files = list(_files(folder))
        audio = [path for path in files if path.suffix.lower() in AUDIO_SUFFIXES]
        heard = {path.with_suffix("") for path in audio}
        texts = [path for path in files if path.suffix.lower() == ".txt"]
        orphans = [path for path in texts if path.with_suffix("") not in heard]
        self._paths = sorted(audio + orphans, key=lambda p: p.relative_to(folder).as_posix())
        if not audio:
            raise DataError(f"{folder}: holds no audio files ({', '.join(AUDIO_SUFFIXES[:5])}, …)")

    def __len__(self) -> int:
        return len(self._paths)

    def row(self, index: int) -> SourceRow:
        """See :class:`Source`."""
        path = self._paths[index]
        name = path.relative_to(self._folder).as_posix()
        try:
            if path.suffix.lower() not in AUDIO_SUFFIXES:
                raise Rejected("missing_audio", f"{path}: a transcript without audio beside it")
            turns, channel = sidecars(path, str(path))
            item = _file_item(name, path, turns, channel)
            return SourceRow(name, str(path), item)
        except Rejected as error:
            return SourceRow(name, str(path), None, error)

    def fingerprint(self) -> str:
        """See :class:`Source`."""
        digest = hashlib.sha256()
        for path in self._paths:
            _add_file(digest, path, path.relative_to(self._folder).as_posix())
        return digest.hexdigest()


class ManifestSource:
    """A JSONL file: one object a line with ``path`` (relative to the file) and what is said.

    What is said is under ``text``, ``words``, ``alignments`` or ``turns``; without any of them it
    is beside the audio, in ``NAME.json`` (Kyutai's layout among them) or ``NAME.txt``. ``speaker``,
    ``duration`` in seconds and ``id`` are read too; other keys are left alone.
    """

    kind: Kind = "manifest"

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            text = path.read_text(encoding="utf-8-sig")
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8") from None
        # Other ends of lines, such as U+2028, may stand inside a JSON string.
        numbered = enumerate(text.split("\n"), start=1)
        self._lines = [(number, line) for number, line in numbered if line.strip()]
        if not self._lines:
            raise DataError(f"{path}: the manifest has no lines")
        if all(_object(line) is None for _, line in self._lines):
            raise DataError(
                f'{path}: no line is a JSON object; a manifest has one a line, such as {{"path": '
                '"a.wav", "text": "Hello."}'
            )
        self._names = self._make_names()

    def __len__(self) -> int:
        return len(self._lines)

    def row(self, index: int) -> SourceRow:
        """See :class:`Source`."""
        number, line = self._lines[index]
        name, where = self._names[index], f"{self._path}:{number}"
        try:
            record = _object(line)
            if record is None:
                raise Rejected("bad_record", f"{where}: the line is not a JSON object")
            path = self._audio(record)
            if path is None:
                raise Rejected("bad_record", f'{where}: "path" must name the audio file')
            turns, channel = read_turns(record, where), _channel(record)
            if not turns:
                turns, channel = sidecars(path, where, _speaker(record))
            item = _file_item(name, path, turns, channel, where)
            return SourceRow(name, where, replace(item, seconds=_duration(record, where)))
        except Rejected as error:
            return SourceRow(name, where, None, error)

    def fingerprint(self) -> str:
        """See :class:`Source`."""
        digest = hashlib.sha256()
        for _, line in self._lines:
            digest.update(line.encode())
            record = _object(line) or {}
            path = self._audio(record)
            if path is not None:
                _add_file(digest, path, record["path"])
        return digest.hexdigest()

    def _audio(self, record: Mapping[str, Any]) -> Path | None:
        """The file that a record names; None if it names none."""
        name = record.get("path")
        if not isinstance(name, str) or not name:
            return None
        path = self._path.parent / os.path.expanduser(name)
        return path if path.name else None

    def _make_names(self) -> list[str]:
        names: list[str] = []
        seen: set[str] = set()
        for number, line in self._lines:
            record = _object(line) or {}
            name = record.get("id", record.get("path"))
            if not isinstance(name, (str, int)) or name == "":
                name = "line"
            name = str(name)
            if name == "line" or name in seen:  # one file may be named by several lines
                name = f"{name}#{number}"
            seen.add(name)
            names.append(name)
        return names


def sidecars(
    path: Path, where: str, speaker: str | None = None
) -> tuple[tuple[Turn, ...], Channel]:
    """The transcript in the files beside a recording, and the channel that it is about.

    Raises:
      Rejected: a file that cannot be read.
    """
    content: dict[str, Any] = {"speaker": speaker}
    words, text = _beside(path, ".json"), _beside(path, ".txt")
    if words is not None:
        where = str(words)
        try:
            found = json.loads(words.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise Rejected("bad_record", f"{words}: not readable as JSON ({error})") from None
        if isinstance(found, list):
            found = {"words": found}
        if not isinstance(found, dict):
            raise Rejected("bad_record", f"{words}: must hold a list of words or an object")
        content |= found
    if text is not None and content.get("turns") is None:
        try:
            content["text"] = text.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise Rejected("bad_record", f"{text}: not readable as UTF-8 text ({error})") from None
    return read_turns(content, where), _channel(content)


def _file_item(
    name: str, path: Path, turns: tuple[Turn, ...], channel: Channel, where: str | None = None
) -> Item:
    return Item(
        id=name,
        source=where or str(path),
        read=lambda longest: read_recording(path, str(path), longest),
        turns=turns,
        channel=channel,
    )


def _channel(content: Mapping[str, Any]) -> Channel:
    """Kyutai's data transcribe the left channel of a stereo recording, for its main speaker."""
    words = content.get("alignments")
    if not isinstance(words, list) or not words:
        return "mix"
    speakers = {word[2] if isinstance(word, list) and len(word) > 2 else None for word in words}
    return "left" if speakers == {_KYUTAI_MAIN} else "mix"


def _speaker(record: Mapping[str, Any]) -> str | None:
    value = record.get("speaker")
    return str(value) if isinstance(value, (str, int)) else None


def _duration(record: Mapping[str, Any], where: str) -> float | None:
    value = record.get("duration")
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return value
    raise Rejected("bad_record", f"{where}: duration must be a number of seconds, got {value!r}")


def _object(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _files(folder: Path) -> Iterator[Path]:
    """All files of a folder and those below it but hidden ones; links to nothing are files too.

    Raises:
      OSError: a folder that may not be read, whose recordings would be missed in silence.
    """

    def fail(error: OSError) -> None:
        raise error

    seen: set[tuple[int, int]] = set()
    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        entered = os.stat(place)
        folders[:] = [name for name in folders if not name.startswith(".")]
        folders.sort(key=lambda name: (os.path.islink(os.path.join(place, name)), name))
        if (entered.st_dev, entered.st_ino) in seen:  # a link up, or a second one to the same
            folders.clear()
            continue
        seen.add((entered.st_dev, entered.st_ino))
        yield from (Path(place, name) for name in names if not name.startswith("."))


def _beside(path: Path, suffix: str) -> Path | None:
    """The file of the same name and another suffix; recorders write "A.WAV" and "A.TXT"."""
    names = (path.with_suffix(suffix), path.with_suffix(suffix.upper()))
    return next((name for name in names if os.path.isfile(name)), None)


def _add_file(digest: Any, path: Path, name: str) -> None:
    """Name, size and samples of an audio file, and all of the transcripts beside it."""
    size = path.stat().st_size if os.path.isfile(path) else -1
    # Names of files need not be UTF-8.
    digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogatepass"))
    for piece in _pieces(path, size):
        digest.update(piece)
    for suffix in (".json", ".txt"):
        beside = _beside(path, suffix)
        if beside is not None:
            digest.update(suffix.encode() + _hash(beside))


def _pieces(path: Path, size: int) -> Iterator[bytes]:
    """A little of a file, from all over it: recordings made anew often keep their size."""
    try:
        if size > 0:
            with path.open("rb") as file:
                for part in range(_PIECES):
                    file.seek(part * max(size - _PIECE, 0) // (_PIECES - 1))
                    yield file.read(_PIECE)
    except OSError:
        yield b"unreadable"  # its row is rejected when it comes to it


def _hash(path: Path) -> bytes:
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError:
        return b"unreadable"  # its row is rejected when it comes to it
