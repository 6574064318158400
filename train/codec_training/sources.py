"""Audio for the codec: sources, and the cache of decoded samples that training reads from.

A source is a folder of audio files (searched through), a JSONL manifest whose rows have a ``path``
(relative to the manifest) and perhaps ``targets``, or a data set saved by ``datasets`` with an
``audio`` column. Everything is decoded once, mixed to mono, resampled and kept as one file of
int16 samples that is mapped into memory: reading a window is then a copy of a few pages.

Targets are arrays ``[frames, K]``, one row a code frame: an ``.npy`` file named in the manifest
(or beside the audio file, ``NAME.targets.npy``), or a ``targets`` column of the data set.
"""

from __future__ import annotations

import hashlib
import io
import json
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dia2_jax.audio import read_audio, resample
from dia2_jax.checkpoint import staged_folder
from dia2_jax.errors import AudioError, DataError, Dia2Error
from dia2_jax.typing import Float, Int

SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aiff", ".au", ".sph"})

_FORMAT = 1
_AUDIO, _INDEX, _TARGETS = "audio.i16", "index.json", "targets.f16"
_SCALE = 32_768.0

#: Recordings decoded ahead while one is written; libsndfile and soxr release the interpreter.
_THREADS = 4

#: numpy reads a file's header through Python's parser. With several threads in it one failed, once
#: in 4,000 files ("AST constructor recursion depth mismatch", Python 3.11.7); so one at a time.
_HEADERS = threading.Lock()

#: Targets of a waveform ``[W]`` at the codec's rate, one row a frame of the codec.
Teacher = Callable[[Float[np.ndarray, " W"]], Float[np.ndarray, "T K"]]


@dataclass(frozen=True)
class Recording:
    """One recording of a source.

    Attributes:
      name: unique among recordings; decides whether it is kept for validation.
      version: changes when the recording does.
      read: its samples at a rate, and its targets (None where it has none).
    """

    name: str
    version: str
    read: Callable[[int], tuple[Float[np.ndarray, " W"], Float[np.ndarray, "T K"] | None]]


@dataclass(frozen=True)
class Corpus:
    """Decoded recordings in one file.

    Attributes:
      samples: int16 of all recordings, one after another, mapped.
      starts: where each begins; one more for the end.
      names: of the recordings.
      left_out: names of recordings that could not be read, each with the reason.
      targets: float16 rows of all recordings, mapped; None without targets.
      target_starts: where each recording's rows begin; one more for the end.
      fingerprint: of the sources and the rate.
    """

    samples: Int[np.ndarray, " W"]
    starts: Int[np.ndarray, " R"]
    names: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]
    targets: Float[np.ndarray, "T K"] | None
    target_starts: Int[np.ndarray, " R"]
    fingerprint: str

    @property
    def lengths(self) -> Int[np.ndarray, " R"]:
        """Samples of each recording."""
        return np.diff(self.starts)

    def window(self, recording: int, start: int, size: int) -> Float[np.ndarray, " W"]:
        """Float samples from `start` of a recording on; beyond its end it begins again.

        Repeated and not silent, since digital silence is endlessly far below any real sound, and a
        logarithmic loss would care about little else.
        """
        first, end = self.starts[recording], self.starts[recording + 1]
        piece = self.samples[first + start : min(first + start + size, end)]
        if len(piece) < size:
            whole = self.samples[first:end]
            piece = np.resize(np.concatenate([piece, whole]), size)
        return piece / np.float32(_SCALE)

    def target_window(
        self, recording: int, start: int, size: int
    ) -> tuple[Float[np.ndarray, "T K"], Float[np.ndarray, " T"]]:
        """Rows of targets from frame `start` on, and which of them exist."""
        assert self.targets is not None
        first, end = self.target_starts[recording], self.target_starts[recording + 1]
        piece = self.targets[first + start : min(first + start + size, end)]
        rows = np.zeros((size, self.targets.shape[1]), np.float32)
        rows[: len(piece)] = piece
        return rows, (np.arange(size) < len(piece)).astype(np.float32)


def list_recordings(sources: Sequence[str]) -> list[Recording]:
    """The recordings of all sources, in an order that does not depend on the file system.

    Raises:
      DataError: a source that is none, or holds no audio.
    """
    found: list[Recording] = []
    for source in sources:
        path = Path(source)
        if path.is_dir() and (path / "state.json").is_file():
            recordings = list(_from_dataset(path))
        elif path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
            recordings = [_from_file(p, str(p.relative_to(path))) for p in files if p.is_file()]
        elif path.suffix.lower() in (".jsonl", ".json") and path.is_file():
            recordings = list(_from_manifest(path))
        elif path.is_file():
            recordings = [_from_file(path, path.name)]
        else:
            raise DataError(f"{source}: no such source; name a folder, a .jsonl or a data set")
        if not recordings:
            raise DataError(f"{source}: holds no audio (looked for {', '.join(sorted(SUFFIXES))})")
        found += recordings
    return found


def split_recordings(
    recordings: Sequence[Recording], share: float
) -> tuple[list[Recording], list[Recording]]:
    """Training and validation recordings. A recording's side depends on its name alone, so that
    more data never moves one from validation into training; each side has at least one.

    Raises:
      DataError: fewer than two recordings.
    """
    if len(recordings) < 2:
        raise DataError(
            "data: one recording cannot be split; give more, or name sources in data.validation"
        )

    def place(recording: Recording) -> float:
        digest = hashlib.sha256(recording.name.encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    ranked = sorted(recordings, key=place)
    count = sum(place(recording) < share for recording in ranked)
    count = min(max(count, 1), len(ranked) - 1)
    held = {id(recording) for recording in ranked[:count]}
    return (
        [recording for recording in recordings if id(recording) not in held],
        [recording for recording in recordings if id(recording) in held],
    )


def open_corpus(
    recordings: Sequence[Recording],
    cache: Path,
    sample_rate: int,
    samples_per_frame: int,
    *,
    teacher: Teacher | None = None,
    teacher_name: str = "",
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Corpus:
    """The recordings, decoded: from the cache where they are in it, else into it.

    A recording that cannot be read is left out and listed.

    Args:
      recordings: of :func:`list_recordings`.
      cache: folder; the corpus is a folder in it, named by its fingerprint.
      sample_rate: of the codec.
      samples_per_frame: of the codec.
      teacher: gives targets where the sources bring none of their own.
      teacher_name: what distinguishes its targets.
      progress: told of every recording done.

    Raises:
      DataError: targets that do not fit, or no recording that can be read.
    """
    identity = json.dumps(
        [_FORMAT, sample_rate, samples_per_frame, teacher_name]
        + [[recording.name, recording.version] for recording in recordings]
    )
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()
    folder = cache / fingerprint[:16]
    if not (folder / _INDEX).is_file():
        with staged_folder(folder) as staged:
            _decode(recordings, staged, sample_rate, samples_per_frame, teacher, progress)
    return _open(folder, fingerprint)


def _decode(
    recordings: Sequence[Recording],
    folder: Path,
    sample_rate: int,
    samples_per_frame: int,
    teacher: Teacher | None,
    progress: Callable[[int, int], None],
) -> None:
    lengths: list[int] = []
    rows: list[int] = []
    names: list[str] = []
    left_out: list[tuple[str, str]] = []
    width: int | None = None
    with (
        ThreadPoolExecutor(_THREADS) as pool,
        (folder / _AUDIO).open("wb") as audio,
        (folder / _TARGETS).open("wb") as labels,
    ):
        ahead = [pool.submit(r.read, sample_rate) for r in recordings[: 2 * _THREADS]]
        for index, recording in enumerate(recordings):
            result = ahead.pop(0)
            if index + 2 * _THREADS < len(recordings):
                ahead.append(pool.submit(recordings[index + 2 * _THREADS].read, sample_rate))
            progress(index + 1, len(recordings))
            try:
                wave, targets = result.result()
            except (Dia2Error, OSError, ValueError) as error:
                left_out.append((recording.name, str(error)))
                continue
            if targets is None and teacher is not None:
                targets = teacher(wave)
            if targets is not None:
                expected = -(-len(wave) // samples_per_frame)
                _check_targets(recording.name, targets, width, expected)
                width = targets.shape[1]
            else:
                targets = np.zeros((0, 0), np.float32)
            pcm = np.clip(np.rint(wave * _SCALE), -32_768, 32_767).astype("<i2")
            audio.write(pcm.tobytes())
            labels.write(targets.astype("<f2").tobytes())
            names.append(recording.name)
            lengths.append(len(pcm))
            rows.append(len(targets))
    if not names:
        raise DataError(
            f"none of {len(recordings)} recordings can be read, the first because: {left_out[0][1]}"
        )
    document = {"names": names, "left_out": left_out, "samples": lengths}
    document |= {"target_rows": rows, "target_width": width}
    (folder / _INDEX).write_text(json.dumps(document), encoding="utf-8")


def _check_targets(name: str, targets: np.ndarray, width: int | None, frames: int) -> None:
    if targets.ndim != 2 or targets.shape[1] != (width or targets.shape[1]):
        raise DataError(
            f"{name}: its targets are {list(targets.shape)}, expected [frames, "
            f"{width or 'width'}]; all recordings have one width"
        )
    if abs(len(targets) - frames) > 2:
        raise DataError(
            f"{name}: has {len(targets)} rows of targets for {frames} code frames; targets have "
            "one row a code frame of the codec"
        )


def _open(folder: Path, fingerprint: str) -> Corpus:
    index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    starts = np.concatenate([[0], np.cumsum(index["samples"])]).astype(np.int64)
    rows = np.concatenate([[0], np.cumsum(index["target_rows"])]).astype(np.int64)
    targets = None
    if rows[-1]:
        shape = (int(rows[-1]), index["target_width"])
        targets = np.memmap(folder / _TARGETS, "<f2", "r", shape=shape)
    samples = np.memmap(folder / _AUDIO, "<i2", "r", shape=(int(starts[-1]),))
    left_out = tuple((name, reason) for name, reason in index["left_out"])
    names = tuple(index["names"])
    return Corpus(samples, starts, names, left_out, targets, rows, fingerprint)


def _from_file(path: Path, name: str, targets: Path | None = None) -> Recording:
    beside = path.with_suffix(".targets.npy")
    if targets is None and beside.is_file():
        targets = beside
    if not path.is_file():
        raise DataError(f"{path}: no such audio file")
    parts = [path] if targets is None else [path, targets]
    try:
        stats = [part.stat() for part in parts]
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}") from None
    version = " ".join(f"{stat.st_size}:{stat.st_mtime_ns}" for stat in stats)

    def read(rate: int) -> tuple[np.ndarray, np.ndarray | None]:
        return read_audio(path, rate), None if targets is None else _load_targets(targets)

    return Recording(name, version, read)


def _load_targets(path: Path) -> np.ndarray:
    with _HEADERS:
        return np.asarray(np.load(path, allow_pickle=False))


def _from_manifest(manifest: Path) -> Iterator[Recording]:
    for number, line in enumerate(manifest.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            path = row["path"]
        except (ValueError, TypeError, KeyError):
            raise DataError(f'{manifest}:{number}: expected a JSON object with a "path"') from None
        targets = row.get("targets")
        beside = manifest.parent
        yield _from_file(beside / path, path, None if targets is None else beside / targets)


def _from_dataset(folder: Path) -> Iterator[Recording]:
    import datasets

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about its own dependencies
        rows = datasets.load_from_disk(str(folder))
    if not isinstance(rows, datasets.Dataset) or "audio" not in rows.column_names:
        raise DataError(f"{folder}: not a data set with an audio column (or one of splits)")
    if isinstance(rows.features["audio"], datasets.Audio):
        # Its own decoding wants torch; libsndfile reads the same bytes.
        rows = rows.cast_column("audio", datasets.Audio(decode=False))
    keys = [name for name in ("id", "name") if name in rows.column_names]
    stamp = (folder / "state.json").stat().st_mtime_ns

    def reader(index: int) -> Callable[[int], tuple[np.ndarray, np.ndarray | None]]:
        def read(rate: int) -> tuple[np.ndarray, np.ndarray | None]:
            row = rows[index]
            labels = row.get("targets")
            where = f"{folder}, row {index}"
            return _samples(row["audio"], rate, where), (
                None if labels is None else np.asarray(labels, np.float32)
            )

        return read

    for index in range(len(rows)):
        name = str(rows[index][keys[0]]) if keys else f"{folder.name}/{index}"
        yield Recording(name, f"{rows._fingerprint}:{stamp}", reader(index))


def _samples(audio: Any, rate: int, where: str) -> Float[np.ndarray, " W"]:
    """Samples of a cell: encoded bytes, a path, or an array with its rate."""
    import soundfile

    if not isinstance(audio, dict):
        raise AudioError(f"{where}: its audio is a {type(audio).__name__}, expected a recording")
    if audio.get("bytes"):
        try:
            wave, own = soundfile.read(io.BytesIO(audio["bytes"]), dtype="float32", always_2d=True)
        except soundfile.SoundFileError as error:
            raise AudioError(f"{where}: cannot be read as audio ({error})") from None
        return resample(wave.mean(axis=1, dtype=np.float32), own, rate)
    if audio.get("array") is not None:
        wave = np.asarray(audio["array"])
        if np.issubdtype(wave.dtype, np.integer):
            wave = wave / _SCALE
        return resample(wave.astype(np.float32), int(audio["sampling_rate"]), rate)
    if audio.get("path"):
        return read_audio(audio["path"], rate)
    raise AudioError(f"{where}: holds neither bytes, samples nor a path")
