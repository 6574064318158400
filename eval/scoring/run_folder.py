"""The folder of a run: what is in it, and when a run may go on in it.

    OUT/run.json  utterances.jsonl  audio/<source>/<set>/<id>.wav
        summary.json  report.md  report.html

``run.json`` says what the scores depend on (``identity``) and what else is good to know. A run goes
on where it stopped if its identity is still the same, or has metrics that it lacked (`RunFolder`);
rows that are there are kept. While it works, no other run may work in its folder (`taken`).
"""

from __future__ import annotations

import json
import re
import secrets
import zlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from dia2_jax.errors import ConfigError, DataError
from eval.scoring.metric import Row
from eval.scoring.takes import GENERATED
from train.folder_lock import held

#: Raised whenever a row means something else: in 2, words are where they sound.
FORMAT = 2

#: What tells rows of a run apart.
Key = tuple[str, str, str, int | None]


#: Said where another run holds the folder.
_BUSY = (
    "another run works in it; wait for its end or stop it (Ctrl-C; the same command goes on from "
    "there), or name another folder with --out"
)


def taken(path: Path) -> AbstractContextManager[None]:
    """Hold the folder of a run, so that a second start does not do its work again between its rows.

    Raises:
      ConfigError: another run holds it.
      OSError: there is no such folder.
    """
    return held(path, _BUSY)


def refuse_taken(path: Path) -> None:
    """Find early, before anything is loaded, that another run works in a folder.

    Raises:
      ConfigError: it does.
    """
    if path.is_dir():
        with taken(path):
            pass


@contextmanager
def open_run(path: Path, identity: Mapping[str, Any]) -> Iterator[RunFolder]:
    """The folder of a run, for this one alone; made if it is not there.

    Raises:
      ConfigError, DataError: as `taken` and `RunFolder`.
    """
    path.mkdir(parents=True, exist_ok=True)
    with taken(path):
        yield RunFolder(path, identity)


class RunFolder:
    """Rows of a run, one by one on disk.

    Attributes:
      path: the folder.
      rows: what has been scored, by :func:`key`.
      added: names of metrics in ``identity["metrics"]`` that the run there lacks; its rows have no
        scores of them yet (`eval.scoring.added_metrics`).
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """
        Raises:
          ConfigError: the folder holds something else, or a run whose identity differs in more
            than `added`.
          DataError: its rows cannot be read.
        """
        self.path = path
        self._identity = json.loads(json.dumps({"format": FORMAT, **identity}))
        self.added: list[str] = []
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{path}: is a file; name a folder for the run with --out")
        if (path / "run.json").is_file():
            self._refuse_another()
        elif path.is_dir() and any(path.iterdir()):
            raise ConfigError(f"{path}: holds files but no run; name another folder with --out")
        path.mkdir(parents=True, exist_ok=True)
        self.rows: dict[Key, Row] = self._stored()

    def describe(self, about: Mapping[str, Any]) -> None:
        """Write ``run.json``: the identity, and what else is good to know of this start."""
        self.write_json("run.json", {"identity": self._identity, **about})

    def add(self, row: Row) -> None:
        """Append a row; it survives whatever happens next."""
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.rows[key(row)] = row

    def replace_rows(self, rows: Mapping[Key, Row]) -> None:
        """Write these rows in place of those that are there, all of them or none."""
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values()]
        self.write_text(self._file.name, "".join(lines))
        self.rows = dict(rows)

    def audio(self, row_key: Key) -> Path:
        """Where the audio of a row is kept."""
        name, identifier, source, seed = row_key
        stem = re.sub(r"[^\w.-]", "_", identifier)
        if stem != identifier:  # other ids may become the same
            stem += f"-{zlib.crc32(identifier.encode()):08x}"
        if source == GENERATED:
            stem += f"-s{seed}"
        return self.path / "audio" / source / name / f"{stem}.wav"

    def write_json(self, name: str, content: Any) -> None:
        """Write a file of the folder, whole or not at all."""
        self.write_text(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a file of the folder, whole or not at all."""
        temporary = self.path / f".{name}.{secrets.token_hex(4)}.part"
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(self.path / name)
        finally:
            temporary.unlink(missing_ok=True)

    @property
    def _file(self) -> Path:
        return self.path / "utterances.jsonl"

    def _refuse_another(self) -> None:
        place = self.path / "run.json"
        try:
            old = dict(json.loads(place.read_text(encoding="utf-8"))["identity"])
        except (ValueError, KeyError, TypeError):
            raise ConfigError(
                f"{place}: cannot be read, so nobody knows what its rows belong to; name another "
                "folder with --out"
            ) from None
        had, wanted = (each.get("metrics") or {} for each in (old, self._identity))
        self.added = [name for name in wanted if name not in had]
        if self.added:
            old["metrics"] = {**had, **{name: wanted[name] for name in self.added}}
        changed = _changes(old, self._identity)
        if changed:
            raise ConfigError(
                f"{self.path}: holds another run: {'; '.join(changed)}. Name another folder with "
                "--out, or go on with the settings and the installed versions that this one was "
                "started with"
            )

    def _stored(self) -> dict[Key, Row]:
        if not self._file.is_file():
            return {}
        data = self._file.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:  # a row that was being written when the run was stopped
            with self._file.open("r+b") as file:
                file.truncate(len(whole))
        return read_rows(self._file)


def read_rows(file: Path) -> dict[Key, Row]:
    """The rows of a run, by :func:`key`.

    Raises:
      DataError: names the line that is none.
      OSError: there is no such file.
    """
    rows = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
            if not isinstance(row["kind"], str) or not isinstance(row.get("scores", {}), dict):
                raise TypeError
            rows[key(row)] = row
        except (ValueError, KeyError, TypeError):
            raise DataError(
                f"{file}:{number}: is no row of a run; delete the line, and it is measured again"
            ) from None
    return rows


def key(row: Row) -> Key:
    """Set, id, source and run seed (None for what no model made)."""
    return row["set"], row["id"], row["source"], row["seed"]


def _changes(old: Any, new: Any, prefix: str = "") -> list[str]:
    """What differs between two nested objects, by dotted name."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            change
            for name in dict.fromkeys([*old, *new])
            for change in _changes(old.get(name), new.get(name), f"{prefix}.{name}".lstrip("."))
        ]
    if old == new:
        return []
    return [f"{prefix} was {json.dumps(old)[:60]}, now {json.dumps(new)[:60]}"]
