"""Finished work on disk: shards, each written whole or not at all, and the data set of them all.

While a preparation runs, ``OUT.preparing`` holds its settings and the shards that are done. When
all are, the data set is put together beside them and takes its name ``OUT`` in one step.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import datasets

from dia2_jax.errors import DataError
from train.preparation.records import PreparedRow, Rejected, SourceRow

#: Beside a finished data set: what it was made with.
MANIFEST = "dia2_jax.json"
FORMAT = 1

REJECTED, SCRIPTS = "rejected.jsonl", "scripts.jsonl"

#: Columns of a data set, a row a recording; the data card explains them.
FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "source": datasets.Value("string"),
        "text": datasets.Value("string"),
        "duration": datasets.Value("float32"),
        "frames": datasets.Value("int32"),
        "codes": datasets.Sequence(datasets.Value("uint16")),
        "word_text": datasets.Sequence(datasets.Value("string")),
        "word_start": datasets.Sequence(datasets.Value("float32")),
        "word_end": datasets.Sequence(datasets.Value("float32")),
        "word_speaker": datasets.Sequence(datasets.Value("int8")),
        "drift": datasets.Value("int32"),
        "breaks": datasets.Value("int32"),
    }
)

_ROWS, _ABOUT, _SETTINGS = "rows", "shard.json", "settings.json"


@dataclass(frozen=True)
class Shard:
    """A run of rows of the source that is prepared and written as one."""

    index: int
    start: int
    stop: int


def plan_shards(rows: int, size: int) -> list[Shard]:
    """Rows 0 … ``rows`` - 1 in runs of ``size``."""
    starts = range(0, rows, size)
    return [Shard(i, start, min(start + size, rows)) for i, start in enumerate(starts)]


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """What changed between two trees of settings, "aligner.name: 'data' -> 'whisper'"."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = [*before, *(key for key in now if key not in before)]
        path = f"{name}." if name else ""
        return [
            line for key in keys for line in differences(before.get(key), now.get(key), path + key)
        ]
    return [] if before == now else [f"{name}: {before!r} -> {now!r}"]


def finished_with(out: Path) -> dict[str, Any] | None:
    """The manifest of the data set at ``out``; None where there is nothing yet.

    Raises:
      DataError: something else is there.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    found = _read_json(out / MANIFEST) if out.is_dir() else None
    if not isinstance(found, dict) or "settings" not in found:
        raise DataError(
            f"{out}: is there already, and not a data set of this program; nothing in it is "
            "touched: name another folder"
        )
    return found


class Workshop:
    """The folder ``OUT.preparing``: settings, and shards as they are finished."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out.with_name(f"{out.name}.preparing")

    def open(
        self, settings: Mapping[str, Any], *, overwrite: bool, shared: bool = False
    ) -> IO[bytes]:
        """Begin, or go on where the same preparation was interrupted.

        Args:
          overwrite: remove unfinished work of other settings.
          shared: others may work on their shares meanwhile.

        Returns:
          What keeps other processes out until it is closed.

        Raises:
          DataError: what is there was begun with other settings, or is something else, or another
            process is at work on it.
        """
        before = _read_json(self.path / _SETTINGS)
        empty = self.path.is_dir() and not any(self.path.iterdir())
        if before is None and self.path.exists() and not empty:
            raise DataError(
                f"{self.path}: is in the way and not of this program; move it, or name another "
                "folder for the data set"
            )
        self._begin(settings)
        changed = differences(_read_json(self.path / _SETTINGS), settings)
        lock = self._lock(shared=shared and not changed)
        if changed and not overwrite and self._holds_rows():
            lock.close()
            raise DataError(
                f"{self.path}: holds an unfinished preparation with other settings "
                f"({'; '.join(changed[:4])}{'; …' if len(changed) > 4 else ''}). Give the same "
                "settings to finish it, or --overwrite to begin anew"
            )
        if changed:
            shutil.rmtree(self.path)
            lock.close()
            self._begin(settings)
            lock = self._lock(shared=shared)
        elif not shared:
            for old in self.path.glob(".shard-*"):
                shutil.rmtree(old, ignore_errors=True)  # of a process that was killed
        return lock

    def _begin(self, settings: Mapping[str, Any]) -> None:
        """The folder and its settings, unless they are there."""
        self.path.mkdir(parents=True, exist_ok=True)
        place = self.path / _SETTINGS
        if place.exists():
            return
        temporary = self.path / f".{_SETTINGS}.{secrets.token_hex(4)}"
        temporary.write_text(_json(settings), encoding="utf-8")
        try:
            os.link(temporary, place)  # of several processes that begin at once, one wins
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            temporary.replace(place)
        temporary.unlink(missing_ok=True)

    def _lock(self, *, shared: bool) -> IO[bytes]:
        """Held until the file is closed; the system does that for a process that is killed."""
        file = (self.path / _SETTINGS).open("r+b")
        try:
            import fcntl

            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise DataError(
                f"{self.path}: another process is at work on it; wait until it is done, or name "
                "another folder for the data set"
            ) from None
        except (ImportError, OSError):
            pass  # a system, or a file system, without locks
        return file

    def counts(self, shard: Shard) -> tuple[int, int] | None:
        """Rows kept and rejected in a finished shard; None if it is not finished."""
        about = _read_json(self._place(shard) / _ABOUT)
        return None if about is None else (about["kept"], about["rejected"])

    def write(
        self,
        shard: Shard,
        kept: Sequence[PreparedRow],
        rejected: Sequence[tuple[int, SourceRow, Rejected]],
    ) -> None:
        """Finish a shard: all rows of it, each either kept or rejected."""
        count = shard.stop - shard.start
        if len(kept) + len(rejected) != count:
            raise AssertionError(f"{count} rows became {len(kept)} kept, {len(rejected)} rejected")
        temporary = self.path / f".{self._place(shard).name}.{secrets.token_hex(4)}"
        temporary.mkdir()
        if kept:  # `datasets` saves an empty data set in a form that it cannot load
            with _quiet():
                _as_dataset(kept).save_to_disk(temporary / _ROWS)
        with _open_lines(temporary / REJECTED) as file:
            for index, row, error in rejected:
                line = {"row": index, "id": row.id, "source": row.source}
                line |= {"reason": error.reason, "message": str(error)}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        about = {"rows": [shard.start, shard.stop], "kept": len(kept), "rejected": len(rejected)}
        (temporary / _ABOUT).write_text(_json(about), encoding="utf-8")
        try:
            temporary.rename(self._place(shard))
        except OSError:
            if self.counts(shard) is None:
                raise
            shutil.rmtree(temporary)  # another process finished the same shard first

    def rows(self, shards: Sequence[Shard]) -> datasets.Dataset:
        """The kept rows of finished shards, mapped from disk."""
        folders = [self._place(shard) / _ROWS for shard in shards]
        parts = [datasets.load_from_disk(str(path)) for path in folders if path.is_dir()]
        return datasets.concatenate_datasets(parts) if parts else _as_dataset([])

    def rejected(self, shards: Sequence[Shard]) -> Iterator[dict[str, Any]]:
        """The lines of ``rejected.jsonl``."""
        for shard in shards:
            with (self._place(shard) / REJECTED).open(encoding="utf-8") as file:
                for line in file:
                    yield json.loads(line)

    def finish(
        self,
        data: datasets.Dataset,
        shards: Sequence[Shard],
        manifest: Mapping[str, Any],
        card: str,
    ) -> None:
        """Write the data set of all shards; it replaces what was at its place."""
        new = self.path / "dataset"
        if new.exists():
            shutil.rmtree(new)
        with _quiet():
            # Under a fingerprint of its own every run would write another state.json.
            name = manifest["settings_sha256"][:16]
            data = datasets.Dataset(data.data, info=data.info, fingerprint=name)
            data.save_to_disk(new)
        with _open_lines(new / REJECTED) as file:
            file.writelines(
                json.dumps(line, ensure_ascii=False) + "\n" for line in self.rejected(shards)
            )
        with (new / SCRIPTS).open("w", encoding="utf-8") as file:
            for row in data.select_columns(["id", "text"]):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        (new / "README.md").write_text(card, encoding="utf-8")
        (new / MANIFEST).write_text(_json(manifest), encoding="utf-8")
        if self.out.exists():
            os.rename(self.out, self.out.with_name(f".{self.out.name}.{secrets.token_hex(4)}.old"))
        os.rename(new, self.out)
        for old in self.out.parent.glob(f".{self.out.name}.*.old"):
            if (old / MANIFEST).exists() or not any(old.iterdir()):
                shutil.rmtree(old)
        self.discard()

    def discard(self) -> None:
        """Remove the unfinished work, if there is any."""
        if _read_json(self.path / _SETTINGS) is not None:
            shutil.rmtree(self.path)

    def clear(self, settings: Mapping[str, Any]) -> None:
        """Remove what a process left that was killed when its data set had got its name.

        Work of other settings, which is to replace that data set, stays; so does that of a
        process that lives.
        """
        if _read_json(self.path / _SETTINGS) == settings:
            with suppress(DataError), self._lock(shared=False):
                self.discard()

    def _holds_rows(self) -> bool:
        found = [_read_json(path) for path in self.path.glob(f"shard-*/{_ABOUT}")]
        return any(about is None or about["kept"] > 0 for about in found)

    def _place(self, shard: Shard) -> Path:
        return self.path / f"shard-{shard.index:06d}"


def _as_dataset(rows: Sequence[PreparedRow]) -> datasets.Dataset:
    columns = [row.as_columns() for row in rows]
    table = {name: [row[name] for row in columns] for name in FEATURES}
    return datasets.Dataset.from_dict(table, features=FEATURES)


def _open_lines(path: Path) -> IO[str]:
    """For lines of JSON, in which a file's name that is not UTF-8 is written with escapes."""
    return path.open("w", encoding="utf-8", errors="backslashreplace")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of `datasets`: one bar is enough."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
