"""Data sets of Hugging Face `datasets`, of the hub or a local folder, as a source of recordings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from dia2_jax.errors import DataError, suggest
from train.preparation.recordings import as_recording, read_recording
from train.preparation.records import Item, Recording, Rejected, SourceRow
from train.preparation.sources import Columns, Kind
from train.preparation.transcripts import read_turns

_FIELDS = ("audio", "text", "words", "turns", "speaker", "id")


class DatasetSource:
    """A data set with a column of audio, and columns that say what is spoken.

    Audio is decoded here, as in the other sources, so no audio library of `datasets` is needed.

    Args:
      data: the rows.
      columns: names of its columns; those under default names may be missing, except audio.
      name: what messages call it.
      root: folder that relative paths in the audio column count from.
    """

    kind: Kind = "dataset"

    def __init__(self, data: datasets.Dataset, columns: Columns, name: str, root: Path) -> None:
        default = Columns()
        for field in _FIELDS:
            column = getattr(columns, field)
            optional = field != "audio" and column == getattr(default, field)
            if column not in data.column_names and not optional:
                hint = suggest(column, data.column_names)
                raise DataError(
                    f"{name}: has no column {column!r}{hint}; it has "
                    f"{', '.join(data.column_names)}. Choose with --{field}-column"
                )
        if not any(c in data.column_names for c in (columns.text, columns.words, columns.turns)):
            raise DataError(
                f"{name}: no column says what is spoken; it has {', '.join(data.column_names)}. "
                "Choose one with --text-column, --words-column or --turns-column"
            )
        if isinstance(data.features[columns.audio], datasets.Audio):
            data = data.cast_column(columns.audio, datasets.Audio(decode=False))
        self._numbers = _numbers(data.features[columns.audio])
        # Other columns may hold audio or pictures, which reading a row would decode.
        wanted = (getattr(columns, field) for field in _FIELDS)
        data = data.select_columns([name for name in wanted if name in data.column_names])
        self._data, self._columns, self._name, self._root = data, columns, name, root

    def __len__(self) -> int:
        return len(self._data)

    def row(self, index: int) -> SourceRow:
        """See :class:`~train.preparation.sources.Source`."""
        record, columns = self._data[index], self._columns
        where = f"{self._name}[{index}]"
        name = f"{index:08d}"
        if record.get(columns.id) is not None:
            name = f"{name}-{record[columns.id]}"
        fields = ("text", "words", "turns", "speaker")
        content = {field: record.get(getattr(columns, field)) for field in fields}
        audio = record[columns.audio]
        try:
            item = Item(
                id=name,
                source=where,
                read=lambda longest: self._read(audio, where, longest),
                turns=read_turns(content, where),
            )
            return SourceRow(name, where, item)
        except Rejected as error:
            return SourceRow(name, where, None, error)

    def fingerprint(self) -> str:
        """See :class:`~train.preparation.sources.Source`."""
        # What `datasets` itself knows its caches by.
        return f"{self._data._fingerprint}-{len(self._data)}"

    def _read(self, audio: Any, where: str, longest: float) -> Recording:
        if isinstance(audio, str):
            return read_recording(self._root / audio, f"{where}: {audio}", longest)
        if isinstance(audio, bytes):
            return read_recording(audio, where, longest)
        if isinstance(audio, Mapping):
            if audio.get("bytes") is not None:
                return read_recording(audio["bytes"], where, longest)
            if audio.get("array") is not None:
                array = np.asarray(audio["array"], self._numbers)
                return as_recording(array, audio.get("sampling_rate"), where, longest)
            if audio.get("path"):
                path = self._root / audio["path"]
                return read_recording(path, f"{where}: {path}", longest)
        if audio is None or isinstance(audio, Mapping):
            raise Rejected("missing_audio", f"{where}: the row has no audio")
        raise Rejected(
            "unreadable_audio",
            f"{where}: audio of type {type(audio).__name__}; it may be a path, the "
            'bytes of a file, or {"array", "sampling_rate"}',
        )


def _numbers(feature: Any) -> str | None:
    """Type of the numbers of an audio array, which Python's lists forget: int16 is full at 2^15."""
    feature = feature.get("array") if isinstance(feature, Mapping) else None
    while hasattr(feature, "feature"):
        feature = feature.feature
    return feature.dtype if isinstance(feature, datasets.Value) else None


def load_dataset_source(
    name: str, *, config: str | None, split: str, revision: str | None, columns: Columns
) -> DatasetSource:
    """A data set by the name of its hub repository, or the folder or parquet file that holds it.

    Raises:
      DataError: it cannot be loaded, has no such split, or lacks a column.
    """
    path = Path(name).expanduser()
    try:
        if path.exists():
            data = _load_local(path, split)
        else:
            data = datasets.load_dataset(name, config, split=split, revision=revision)
    except DataError:
        raise
    except Exception as error:  # `datasets` passes on whatever its readers and the hub raise
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{name}: cannot be loaded as a data set ({type(error).__name__}: {reason}); check its "
            "name, --split and --config, and whether the hub can be reached"
        ) from error
    return DatasetSource(data, columns, name, path if path.is_dir() else path.parent)


def _load_local(path: Path, split: str) -> datasets.Dataset:
    if path.is_dir() and any((path / n).is_file() for n in ("state.json", "dataset_dict.json")):
        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise DataError(
                    f"{path}: has no split {split!r}; it has {', '.join(saved)}. Choose one with "
                    "--split"
                )
            return saved[split]
        return saved
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    if path.is_dir():
        # The hub's layout names the split first: train-00000-of-00001.parquet.
        named = [p for p in files if p.name.startswith(f"{split}-") or p.stem == split]
        files = named or files
    if not files:
        raise DataError(f"{path}: holds neither a saved data set nor parquet files")
    return datasets.load_dataset(
        "parquet", data_files={"train": [str(file) for file in files]}, split="train"
    )
