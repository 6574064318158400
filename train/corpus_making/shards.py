"""A corpus on disk: folders of recordings that are finished together, and manifests over them.

    OUT/corpus.json            what the corpus is made of
    OUT/SPLIT.jsonl            a row a recording; what `train.prepare` and `train.codec` read
    OUT/shards/SPLIT-NNNNN/    its recordings (FLAC), phoneme targets (.npy), rows and counts
    OUT/tokenizer/             tokenizer.json, tokenizer_config.json

A shard is written under another name and renamed: whatever has its name is complete.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from dia2_jax.errors import DataError
from train.corpus_making.assembly import Recording
from train.corpus_making.scripts import Item

_ROWS, _COUNTS = "manifest.jsonl", "counts.json"


@dataclass
class Counts:
    """Of a shard or several: items kept and skipped (by reason), seconds, words, by kind."""

    kept: int = 0
    seconds: float = 0.0
    words: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)

    def add(self, other: Counts) -> None:
        """Adds the others to these."""
        self.kept += other.kept
        self.seconds += other.seconds
        self.words += other.words
        for mine, others in ((self.skipped, other.skipped), (self.kinds, other.kinds)):
            for name, count in others.items():
                mine[name] = mine.get(name, 0) + count


class CorpusFolder:
    """The folder of a corpus. Use :func:`open_folder`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def shard(self, split: str, number: int) -> Path:
        """Where a shard is, or will be."""
        return self.path / "shards" / f"{split}-{number:05d}"

    def read_counts(self, split: str, number: int) -> Counts | None:
        """Those of a finished shard; None if it is not."""
        path = self.shard(split, number) / _COUNTS
        if not path.is_file():
            return None
        return Counts(**json.loads(path.read_text(encoding="utf-8")))

    @contextmanager
    def new_shard(self, split: str, number: int) -> Iterator[ShardWriter]:
        """A shard to be filled; it is there when the block ends without an error."""
        final = self.shard(split, number)
        staged = final.with_name(f".{final.name}.partial")
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        writer = ShardWriter(staged, split)
        yield writer
        writer.close()
        os.replace(staged, final)

    def write_manifest(self, split: str) -> None:
        """All rows of a split's finished shards, in order, with paths from this folder on."""
        staged = self.path / f".{split}.jsonl.partial"
        with staged.open("w", encoding="utf-8") as file:
            for folder in sorted((self.path / "shards").glob(f"{split}-*")):
                for line in (folder / _ROWS).read_text(encoding="utf-8").splitlines():
                    row = json.loads(line)
                    for name in ("path", "targets"):
                        row[name] = f"shards/{folder.name}/{row[name]}"
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.replace(staged, self.path / f"{split}.jsonl")

    def write_text(self, name: str, text: str) -> None:
        """A small file, at once."""
        staged = self.path / f".{name}.partial"
        staged.write_text(text, encoding="utf-8")
        os.replace(staged, self.path / name)


class ShardWriter:
    """Fills one shard."""

    def __init__(self, folder: Path, split: str) -> None:
        self._folder, self._split = folder, split
        self._rows: list[dict[str, Any]] = []
        self.counts = Counts()

    def keep(
        self, item: Item, recordings: Sequence[Recording], targets: np.ndarray, rate: int
    ) -> None:
        """An item's recording, and perhaps that with the speakers exchanged, at the same times."""
        name = f"{self._split}-{item.index:07d}"
        np.save(self._folder / f"{name}.npy", targets.astype(np.float16))
        self._keep(name, f"{name}.npy", item.kind, item.script, recordings[0], rate)
        for recording in recordings[1:]:
            self._keep(f"{name}x", f"{name}.npy", item.kind, item.exchanged, recording, rate)

    def _keep(
        self, name: str, targets: str, kind: str, script: str, recording: Recording, rate: int
    ) -> None:
        pcm = np.clip(np.rint(recording.wave * 32768.0), -32768, 32767).astype(np.int16)
        soundfile.write(self._folder / f"{name}.flac", pcm, rate, subtype="PCM_16")
        seconds = len(pcm) / rate
        self._rows.append(
            {
                "id": name,
                "path": f"{name}.flac",
                "targets": targets,
                "duration": round(seconds, 3),
                "kind": kind,
                "script": script,
                "words": word_rows(recording),
                "phonemes": [
                    [phoneme.symbol, round(phoneme.start, 3), round(phoneme.end, 3)]
                    for phoneme in recording.phonemes
                ],
            }
        )
        self.counts.add(Counts(1, seconds, len(recording.words), {}, {kind: 1}))

    def skip(self, reason: str) -> None:
        """An item that is left out."""
        self.counts.add(Counts(skipped={reason: 1}))

    def close(self) -> None:
        """Rows and counts, which make it complete."""
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in self._rows]
        (self._folder / _ROWS).write_text("".join(lines), encoding="utf-8")
        (self._folder / _COUNTS).write_text(json.dumps(asdict(self.counts)), encoding="utf-8")


def word_rows(recording: Recording) -> list[dict[str, Any]]:
    """Its words as manifests and prompt sets have them."""
    return [
        {
            "text": word.text,
            "start": round(word.start, 3),
            "end": round(word.end, 3),
            "speaker": f"[S{word.speaker}]",
        }
        for word in recording.words
    ]


@contextmanager
def open_folder(path: Path, identity: dict[str, Any]) -> Iterator[CorpusFolder]:
    """The folder of a corpus, for this process alone.

    Args:
      path: made if it is not there.
      identity: what decides its recordings; a folder with another is refused.

    Raises:
      DataError: another process works on it, or it holds another corpus or something else.
    """
    path.mkdir(parents=True, exist_ok=True)
    with (path / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"{path}: another process makes this corpus; wait for it") from None
        known = path / "corpus.json"
        if known.is_file():
            before = json.loads(known.read_text(encoding="utf-8"))
            changed = sorted(k for k in before | identity if before.get(k) != identity.get(k))
            if changed:
                raise DataError(
                    f"{path}: holds a corpus made with other {', '.join(changed)}; name another "
                    "folder, or give what corpus.json there says"
                )
        elif any(p.name != ".lock" for p in path.iterdir()):
            raise DataError(f"{path}: is not empty and holds no corpus; name another folder")
        folder = CorpusFolder(path)
        folder.write_text("corpus.json", json.dumps(identity, indent=1, ensure_ascii=False) + "\n")
        yield folder
