"""Safetensors files: memory-mapped reading, streamed writing, errors that name the tensor.

The format is read here and not by the ``safetensors`` library for three reasons: the
library's numpy reader copies every tensor into anonymous memory before handing it over (a map
of the file costs none), its ``save_file`` wants every tensor in memory at once (we write one
at a time), and its errors do not say which tensor of a truncated file is lost. Tests read our
files with the library and the library's files with this module.

A safetensors file is an 8-byte little-endian header length, a JSON header that maps tensor
names to dtype, shape and byte range, and the bytes. A sharded checkpoint adds an index,
``model.safetensors.index.json``, whose ``weight_map`` says which file holds which tensor.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from dia2_jax.errors import CheckpointError
from dia2_jax.hub import WEIGHTS, find_weights

#: Safetensors dtype names and what holds them in numpy, in the order in which the reference
#: implementation writes them (widest first).
DTYPES: dict[str, np.dtype[Any]] = {
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# The limit of the reference implementation: a longer header is a corrupt length.
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one tensor; what is known before its bytes are read."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorSource(Protocol):
    """Named tensors that are read one at a time (a file, a set of shards, an Orbax tree)."""

    @property
    def where(self) -> str:
        """The file or folder, for messages."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor, in file order."""

    @property
    def metadata(self) -> Mapping[str, str] | None:
        """The ``__metadata__`` strings of the file; None where it has no such entry."""

    def read(self, name: str) -> np.ndarray:
        """The values of one tensor, possibly a read-only view of a mapped file."""


class SafetensorsFile:
    """One safetensors file, mapped read-only; implements :class:`TensorSource`.

    The header is checked completely when the file is opened (sizes, byte ranges, dtypes), so a
    truncated file fails here, with the name of the first tensor that is lost. Do not let
    another program shorten the file while it is open: the mapping would fault.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        try:
            with open(self._path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                header, self._start = _read_header(file, size, self._path)
                self._map: mmap.mmap | None = None
                if size > self._start:
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise CheckpointError(f"{self._path}: no such weights file") from None
        except OSError as error:
            raise CheckpointError(f"{self._path}: cannot be read ({error.strerror})") from error
        self._metadata = _pop_metadata(header, self._path)
        self._specs, self._offsets = _check_header(header, size - self._start, self._path)

    @property
    def where(self) -> str:
        return str(self._path)

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return self._specs

    @property
    def metadata(self) -> Mapping[str, str] | None:
        return self._metadata

    def read(self, name: str) -> np.ndarray:
        """A read-only, possibly unaligned view of one tensor's bytes in the mapped file."""
        spec = self._specs[name]
        if self._map is None or spec.nbytes == 0:
            return np.empty(spec.shape, spec.dtype)
        flat = np.frombuffer(
            self._map, np.uint8, count=spec.nbytes, offset=self._start + self._offsets[name]
        )
        return flat.view(spec.dtype).reshape(spec.shape)


class ShardedSafetensors:
    """The files of one ``*.safetensors.index.json``; implements :class:`TensorSource`.

    Tensors come in the order of the shards, and inside a shard in file order.
    """

    def __init__(self, index: str | Path) -> None:
        self._path = Path(index)
        shards = _read_index(self._path)
        self._file_of: dict[str, SafetensorsFile] = {}
        specs: dict[str, TensorSpec] = {}
        metadata: Mapping[str, str] | None = None
        for shard, names in shards.items():
            path = self._path.parent / shard
            if not path.is_file():
                raise CheckpointError(
                    f"{self._path}: names the shard {shard}, which is missing; it holds "
                    f"{len(names)} tensors ({_few(names)}). Put it beside the index."
                )
            file = SafetensorsFile(path)
            missing = [name for name in names if name not in file.specs]
            if missing:
                raise CheckpointError(
                    f"{path}: lacks {len(missing)} tensors that {self._path.name} places there: "
                    f"{_few(missing)}"
                )
            wanted = set(names)
            unlisted = [name for name in file.specs if name not in wanted]
            if unlisted:
                raise CheckpointError(
                    f"{path}: holds {len(unlisted)} tensors that {self._path.name} does not place "
                    f"there: {_few(unlisted)}. The shard belongs to another checkpoint."
                )
            metadata = file.metadata if metadata is None else metadata
            for name in file.specs:
                self._file_of[name] = file
                specs[name] = file.specs[name]
        self._specs, self._metadata = specs, metadata

    @property
    def where(self) -> str:
        return str(self._path)

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return self._specs

    @property
    def metadata(self) -> Mapping[str, str] | None:
        return self._metadata

    def read(self, name: str) -> np.ndarray:
        """See :meth:`SafetensorsFile.read`."""
        return self._file_of[name].read(name)


def open_safetensors(path: str | Path) -> SafetensorsFile | ShardedSafetensors:
    """Open a safetensors file, an index of shards, or the folder that holds one.

    Raises:
      CheckpointError: nothing there, or the file is truncated or corrupt; names the tensor.
    """
    path = Path(path)
    if path.is_dir():
        found = find_weights(path)
        if found is None:
            raise CheckpointError(
                f"{path}: holds neither {WEIGHTS} nor one index of shards; "
                "pass the weights file itself"
            )
        path = found
    if path.name.endswith(".json"):
        return ShardedSafetensors(path)
    return SafetensorsFile(path)


def write_safetensors(
    path: str | Path,
    specs: Mapping[str, TensorSpec],
    read: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one file, tensor by tensor, in the order of `specs`.

    `read(name)` is called once for each tensor when its turn comes, so no more than one is held
    beyond what the caller holds. The bytes go to a temporary neighbour that replaces `path` at
    the end: whatever happens, `path` is the old file or the whole new one.

    Raises:
      CheckpointError: a dtype the format lacks, or an array that differs from its spec.
    """
    path = Path(path)
    header = _build_header(specs, metadata, path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(struct.pack("<Q", len(header)))
            file.write(header)
            for tensor, spec in specs.items():
                array = read(tensor)
                if tuple(array.shape) != spec.shape or array.dtype != spec.dtype:
                    raise CheckpointError(
                        f"{path}: {tensor} was announced as {spec.dtype}{list(spec.shape)} and "
                        f"came as {array.dtype}{list(array.shape)}"
                    )
                if spec.nbytes:
                    # Extended dtypes (bfloat16) have no buffer protocol; their bytes do.
                    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                    file.write(flat.data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def default_order(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """`specs` as the reference implementation orders them: widest dtype first, then by name."""
    rank = {dtype: index for index, dtype in enumerate(DTYPES.values())}
    return dict(sorted(specs.items(), key=lambda item: (rank.get(item[1].dtype, -1), item[0])))


def dtype_name(dtype: Any) -> str:
    """The safetensors name of a numpy dtype ("F32", "BF16", …).

    Raises:
      CheckpointError: the format has no such dtype.
    """
    try:
        return _NAMES[np.dtype(dtype)]
    except KeyError:
        raise CheckpointError(f"safetensors files cannot hold the dtype {dtype}") from None


def _read_header(file: Any, size: int, path: Path) -> tuple[dict[str, Any], int]:
    """The parsed JSON header and the offset of the first data byte."""
    if size < 8:
        raise CheckpointError(f"{path}: truncated: {size} bytes are no safetensors file")
    (length,) = struct.unpack("<Q", file.read(8))
    if length > _MAX_HEADER:
        raise CheckpointError(
            f"{path}: not a safetensors file, or its start is corrupt "
            f"(the header would be {length} bytes)"
        )
    if 8 + length > size:
        raise CheckpointError(
            f"{path}: truncated inside its header ({size} bytes of {8 + length}); no tensor can be "
            "read. Download it again."
        )
    try:
        header = json.loads(file.read(length), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is corrupt ({error})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is corrupt (not a JSON object)")
    return header, 8 + length


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"{key!r} occurs twice")
        result[key] = value
    return result


def _pop_metadata(header: dict[str, Any], path: Path) -> dict[str, str] | None:
    metadata = header.pop("__metadata__", None)
    if metadata is None:
        return None
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: the header is corrupt (__metadata__ is not strings)")
    return metadata


def _check_header(
    header: dict[str, Any], available: int, path: Path
) -> tuple[dict[str, TensorSpec], dict[str, int]]:
    """Specs and offsets in file order; every byte range checked against shape and file."""
    ranges = [(*_parse_entry(name, entry, path), name) for name, entry in header.items()]
    ranges.sort(key=lambda item: item[:2])
    specs: dict[str, TensorSpec] = {}
    offsets: dict[str, int] = {}
    end, lost = 0, []
    for begin, stop, spec, name in ranges:
        if begin != end:
            kind = "overlaps its neighbour" if begin < end else "leaves a hole before it"
            raise CheckpointError(f"{path}: corrupt: the byte range of {name} {kind}")
        end = stop
        if stop > available:
            lost.append(name)
        specs[name], offsets[name] = spec, begin
    if lost:
        raise CheckpointError(
            f"{path}: truncated: {available} data bytes of {end}; {len(lost)} of {len(specs)} "
            f"tensors are cut off ({_few(lost)}). Download it again."
        )
    if end != available:
        raise CheckpointError(
            f"{path}: corrupt: {available - end} bytes follow the last tensor"
            + (f" ({ranges[-1][3]})" if ranges else "")
        )
    return specs, offsets


def _parse_entry(name: str, entry: Any, path: Path) -> tuple[int, int, TensorSpec]:
    try:
        dtype, shape, (begin, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not all(type(n) is int and n >= 0 for n in (*shape, begin, stop)):
            raise ValueError
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(
            f"{path}: corrupt: the entry of {name} does not say dtype, shape and byte range"
        ) from None
    if dtype not in DTYPES:
        raise CheckpointError(f"{path}: {name} has the dtype {dtype!r}; known: {', '.join(DTYPES)}")
    spec = TensorSpec(tuple(shape), DTYPES[dtype])
    if stop - begin != spec.nbytes:
        raise CheckpointError(
            f"{path}: corrupt: {name} is {dtype}{shape}, {spec.nbytes} bytes, but its byte range "
            f"holds {stop - begin}"
        )
    return begin, stop, spec


def _read_index(path: Path) -> dict[str, list[str]]:
    """Tensor names by shard, in the order of the index."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards: dict[str, list[str]] = {}
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise ValueError(f"{shard!r} is not a file name")
            shards.setdefault(shard, []).append(name)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such index file") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not an index of safetensors shards ({error})") from None
    if not shards:
        raise CheckpointError(f"{path}: the index names no tensor")
    return shards


def _build_header(
    specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None, path: Path
) -> bytes:
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for name, spec in specs.items():
        header[name] = {
            "dtype": dtype_name(spec.dtype),
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # Padded so that the data starts at a multiple of eight, as the format asks of writers.
    return text + b" " * (-len(text) % 8)


def _few(names: Iterable[str], limit: int = 5) -> str:
    names = list(names)
    more = f", … and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
