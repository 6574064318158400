"""Prepared data sets as training reads them: recordings from Arrow or parquet, batches through
grain.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dia2_jax.config import Dia2Config
from dia2_jax.data import (
    Alignment,
    BatchPlan,
    Masking,
    Pace,
    PlannedRow,
    Recording,
    Row,
    SpokenWord,
    align,
    build_row,
    collate,
    crop,
    crop_start,
)
from dia2_jax.errors import DataError
from dia2_jax.text.tokenizer import Tokenizer

#: What `train.prepare` writes beside the Arrow files.
MANIFEST = "dia2_jax.json"
#: The rows of a data set that `train.pack` wrote, in place of Arrow files.
PACKED = "data.parquet"

#: Alignments kept: whole recordings come again every epoch.
_ALIGNMENTS = 4096


class Recordings:
    """Random access to the rows of a prepared data set.

    Attributes:
      pace: how it was aligned.
      frames: code frames of every recording.
      fingerprint: changes when anything that training reads of it changes.
    """

    def __init__(self, folder: str | Path) -> None:
        """
        Raises:
          DataError: no such data set, or not one that `train.prepare` finished.
        """
        self.folder = Path(folder)
        manifest = self.folder / MANIFEST
        if not manifest.is_file():
            raise DataError(
                f"{folder}: no prepared data set (it has no {MANIFEST}): make one with "
                "`python -m train.prepare SOURCE OUT`"
            )
        try:
            self.manifest: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))
            self.pace = Pace(
                frame_rate=self.manifest["frame_rate"],
                word_step_offset=self.manifest["word_step_offset"],
                initial_padding=self.manifest["initial_padding"],
                max_padding=self.manifest["max_padding"],
            )
            self.codebooks = int(self.manifest["codebooks"])
            self._rows = _open(self.folder).with_format("arrow")
            self.frames: list[int] = self._column("frames")
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{folder}: the data set is damaged or unfinished ({error!r}): run the same "
                "`python -m train.prepare` again, it goes on where it stopped"
            ) from error
        digest = hashlib.sha256(manifest.read_bytes())
        digest.update(np.array(self.frames, np.int64).tobytes())
        digest.update("\n".join(self._column("id")).encode())
        self.fingerprint = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> Recording:
        row = self._rows[index]
        codes = row.column("codes").combine_chunks().flatten().to_numpy()
        words = (
            row.column(f"word_{name}").combine_chunks().flatten().to_pylist()
            for name in ("text", "start", "end", "speaker")
        )
        return Recording(
            codes=codes.reshape(-1, self.codebooks).T,
            words=tuple(
                SpokenWord(text, start, end, speaker)
                for text, start, end, speaker in zip(*words, strict=True)
            ),
        )

    def table(self) -> Any:
        """All rows as a ``pyarrow.Table``."""
        return self._rows.data.table

    def scripts(self, count: int) -> list[str]:
        """The scripts of the first recordings."""
        return self._rows[:count].column("text").to_pylist()

    def _column(self, name: str) -> list[Any]:
        return self._rows.data.column(name).to_pylist()


def _open(folder: Path) -> Any:
    """A data set that is mapped from Arrow files, or read from parquet into memory."""
    from datasets import Dataset, load_from_disk

    packed = folder / PACKED
    if not packed.is_file():
        return load_from_disk(str(folder))
    import pyarrow.parquet as pq

    return Dataset(pq.read_table(packed))


class RowBuilder:
    """Planned rows to training rows: reads, crops, aligns, runs the machine."""

    def __init__(self, recordings: Recordings, tokenizer: Tokenizer, config: Dia2Config) -> None:
        """
        Raises:
          DataError: the data set was made with another codec than the model speaks with.
        """
        if recordings.codebooks != config.data.codebooks:
            raise DataError(
                f"{recordings.folder} holds {recordings.codebooks} codebooks, the model has "
                f"{config.data.codebooks}: prepare the data for this model"
            )
        size = recordings.manifest.get("codebook_size", 0)
        if size > config.data.depth_vocab_size:
            raise DataError(
                f"{recordings.folder} holds codes below {size}, the model knows those below "
                f"{config.data.depth_vocab_size}: prepare the data with this model's codec"
            )
        self.recordings, self.tokenizer, self.config = recordings, tokenizer, config
        self._aligned = functools.lru_cache(_ALIGNMENTS)(self._align)

    def row(self, planned: PlannedRow, max_steps: int) -> Row:
        """One row of at most ``max_steps`` steps."""
        slot, pace = planned.slot, self.recordings.pace
        recording = self.recordings[slot.recording]
        if slot.windows == 1:
            alignment = self._aligned(slot.recording)
        else:
            spare = self.recordings.frames[slot.recording] - max_steps
            first = crop_start(recording.words, spare / pace.frame_rate, planned.place)
            ahead = self.config.data.second_stream_ahead
            recording = crop(recording, first, max_steps, pace, ahead)
            alignment = align(recording.words, self.tokenizer, pace)
        return build_row(
            alignment,
            recording.codes,
            self.config,
            self.tokenizer.ids,
            pace,
            max_steps=max_steps,
        )

    def _align(self, index: int) -> Alignment:
        return align(self.recordings[index].words, self.tokenizer, self.recordings.pace)


class BatchSource:
    """The batch of every step, by step: what grain reads at random.

    Rows ``first`` to ``first + rows`` of the global batch are built (those of this host).
    """

    def __init__(
        self,
        builder: RowBuilder,
        plan: BatchPlan,
        masking: Masking,
        *,
        steps: int,
        first: int = 0,
        rows: int | None = None,
    ) -> None:
        self.builder, self.plan, self.masking = builder, plan, masking
        self.steps, self.first = steps, first
        self.rows = plan.rows if rows is None else rows

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: Any) -> dict[str, np.ndarray]:
        step = int(step)
        length, planned = self.plan.batch(step)
        mine = planned[self.first : self.first + self.rows]
        return collate(
            [self.builder.row(row, length) for row in mine],
            length,
            self.builder.config,
            self.builder.tokenizer.ids,
            self.masking,
            seed=self.plan.seed,
            step=step,
            first=self.first,
        )


class StepSource(Protocol):
    """A batch for every step, read at random."""

    def __len__(self) -> int: ...

    def __getitem__(self, step: Any) -> dict[str, np.ndarray]: ...


def read_batches(
    source: StepSource, start: int, *, threads: int, prefetch: int
) -> Iterator[dict[str, np.ndarray]]:
    """The batches of steps ``start``, ``start + 1``, …; nothing before ``start`` is read."""
    import grain

    dataset = grain.MapDataset.source(source).slice(slice(start, None))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    yield from dataset.to_iter_dataset(options)


def plan_for(
    recordings: Recordings,
    config: Dia2Config,
    *,
    rows: int,
    max_steps: int,
    buckets: Sequence[int],
    seed: int,
) -> BatchPlan:
    """The batches of a data set for a model."""
    return BatchPlan(
        recordings.frames,
        rows=rows,
        max_steps=max_steps,
        buckets=buckets,
        seed=seed,
        lead=min(config.data.delay_pattern) - 1,
    )
