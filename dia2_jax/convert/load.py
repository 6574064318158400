"""Weights into parameter trees and back, tensor by tensor.

Loading reads each tensor from the mapped file straight into a buffer that JAX owns, so the
peak is the weights in the target dtype plus one tensor. What the file said beyond the values
(key names, dtypes, metadata) is kept in a :class:`SourceInfo`, with which an export writes the
same bytes again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from dia2_jax import checkpoint
from dia2_jax.convert.rounding import before_rounding, restore_rounded
from dia2_jax.convert.rules import Step, Table
from dia2_jax.convert.safetensors_io import (
    DTYPES,
    TensorSource,
    TensorSpec,
    default_order,
    dtype_name,
    open_safetensors,
    write_safetensors,
)
from dia2_jax.errors import CheckpointError
from dia2_jax.nn.quantized import SCALE_SUFFIX, quantize

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Tensors up to this many bytes are copied on the host.
_SMALL_BYTES = 4 << 20


@dataclasses.dataclass(frozen=True)
class SourceInfo:
    """What a published file said beyond its values, so that it can be written again.

    Attributes:
      layout: the table's layout name.
      dtypes: safetensors dtype name of each published tensor, in file order.
      metadata: the ``__metadata__`` strings, None where the file had no such entry.
    """

    layout: str
    dtypes: Mapping[str, str]
    metadata: Mapping[str, str] | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON document that :meth:`from_json` reads."""
        return {
            "layout": self.layout,
            # Pairs, because the order is part of the information.
            "dtypes": [[name, dtype] for name, dtype in self.dtypes.items()],
            "metadata": None if self.metadata is None else dict(self.metadata),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> SourceInfo:
        """The inverse of :meth:`to_json`.

        Raises:
          CheckpointError: the document lacks a part.
        """
        try:
            dtypes = {str(name): str(dtype) for name, dtype in document["dtypes"]}
            return cls(str(document["layout"]), dtypes, document["metadata"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the record of the source weights is damaged ({error!r})"
            ) from None


class _ShapeStream:
    """A random stream without randomness: no key, and zeros.

    Where shapes are all that is wanted, it takes longer to trace how values are drawn than to read
    a small model.
    """

    def __call__(self) -> None:
        return None

    def normal(self, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
        return jnp.zeros(shape, dtype)


class _ShapeRngs:
    """Stands for ``nnx.Rngs``."""

    params = _ShapeStream()


def abstract_params(
    make: Callable[[nnx.Rngs], nnx.Module],
) -> tuple[nnx.GraphDef[Any], Any]:
    """Structure and parameter shapes of a module, without computing its initial values.

    Args:
      make: builds the module, e.g. ``lambda rngs: Dia2Model(config, rngs=rngs)``.

    Returns:
      The graph definition and the abstract state; ``nnx.merge(graphdef, loaded)`` gives the
      module.
    """
    rngs = cast(nnx.Rngs, _ShapeRngs())
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(rngs)))
    return graphdef, state


def load_params(
    source: TensorSource | str | Path,
    table: Table,
    abstract: Any,
    dtype: Any | Literal["source"] | None = None,
) -> tuple[Any, SourceInfo]:
    """Fill a parameter tree from a published file.

    Args:
      source: a safetensors file, an index of shards, a folder with one, or an open source.
      table: the rules of the file's layout.
      abstract: tree of arrays or ``jax.ShapeDtypeStruct``; a leaf's sharding is honoured. Weights
        that are int8 here, with scales beside them, are rounded as they are read, if the layout
        of `table` has them in floating point.
      dtype: of the floating parameters in memory; None takes the leaves' own, ``"source"`` what
        the file holds.

    Returns:
      The tree with arrays in place of the leaves, and what to keep for an export.

    Raises:
      CheckpointError: unreadable file, or tensors that do not fit (all listed).
    """
    if isinstance(source, str | Path):
        source = open_safetensors(source)
    leaves, treedef = checkpoint.flatten_tree(abstract)
    wanted, scales = before_rounding(leaves, table)
    shapes = {name: tuple(leaf.shape) for name, leaf in wanted.items()}
    specs = source.specs
    steps = table.plan_load(
        {name: spec.shape for name, spec in specs.items()}, shapes, source.where
    )
    targets = _target_dtypes(steps, specs, wanted, dtype, source.where)
    loaded: dict[str, jax.Array] = {}
    for step in steps:
        arrays = step.transform.to_ours([source.read(name) for name in step.published])
        for path, array in zip(step.ours, arrays, strict=True):
            sharding = getattr(leaves[path], "sharding", None)
            if path in scales:
                rounded = zip((path, scales[path]), quantize(array), strict=True)
                loaded.update({name: _own(part, part.dtype, sharding) for name, part in rounded})
            else:
                loaded[path] = _own(array, targets[path], sharding)
        del arrays
    info = SourceInfo(
        table.layout,
        {name: dtype_name(spec.dtype) for name, spec in specs.items()},
        source.metadata,
    )
    return checkpoint.unflatten_tree(treedef, loaded), info


def export_params(
    params: Any,
    table: Table,
    destination: str | Path,
    source: SourceInfo | None = None,
    *,
    dtype: Any | None = None,
    allow_lossy: bool = False,
) -> None:
    """Write a parameter tree as one published safetensors file.

    With `source`, the file has the key names, order, dtypes and metadata of the one the
    parameters came from, and for unchanged parameters the same bytes. Without it, dtypes are
    those in memory.

    Args:
      params: tree of arrays.
      table: the rules of the layout to write.
      destination: the file; it appears whole or stays as it was.
      source: from :func:`load_params`.
      dtype: write floating tensors in this dtype instead of the source's; rounding is then what
        was asked for.
      allow_lossy: permit the source's dtypes where memory was narrower, or where values have
        changed since and no longer fit them.

    Raises:
      CheckpointError: tensors that do not fit the layout, or a lossy export not allowed.
    """
    leaves, _ = checkpoint.flatten_tree(params)
    where = str(destination)
    spelled = source.dtypes if source is not None and source.layout == table.layout else {}
    steps, shapes = table.plan_export(
        {name: tuple(leaf.shape) for name, leaf in leaves.items()}, spelled, where
    )
    producers = {name: (step, index) for step in steps for index, name in enumerate(step.published)}
    memory = {
        name: np.dtype(leaves[_counterpart(step, index)].dtype)
        for name, (step, index) in producers.items()
    }
    kept = {name: DTYPES[kind] for name, kind in spelled.items() if name in shapes}
    specs = {
        name: TensorSpec(shape, _export_dtype(memory[name], kept.get(name), dtype))
        for name, shape in shapes.items()
    }
    exact = dtype is None and not allow_lossy
    if exact:
        _refuse_narrower(memory, kept, where)
    ordered = (
        {name: specs[name] for name in spelled}
        if set(spelled) == set(specs)
        else default_order(specs)
    )

    def read(name: str) -> np.ndarray:
        step, index = producers[name]
        arrays = step.transform.to_published([np.asarray(leaves[path]) for path in step.ours])
        return _narrow(arrays[index], specs[name].dtype, exact and name in kept, name, where)

    metadata = source.metadata if source is not None else {"format": "pt"}
    write_safetensors(destination, ordered, read, metadata)


def save_orbax(
    path: str | Path,
    params: Any,
    source: SourceInfo,
    metadata: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Save a parameter tree and its :class:`SourceInfo` as an Orbax checkpoint.

    Raises:
      CheckpointError: see :func:`dia2_jax.checkpoint.save`.
    """
    document = {"source": source.to_json(), **(metadata or {})}
    checkpoint.save(path, params, document, overwrite=overwrite)


def load_orbax(
    path: str | Path, abstract: Any, dtype: Any | Literal["source"] | None = None
) -> tuple[Any, SourceInfo]:
    """Fill a parameter tree from what :func:`save_orbax` wrote; arguments as :func:`load_params`.

    Raises:
      CheckpointError: damaged, without the record of its source, or leaves that do not fit.
    """
    document = checkpoint.read_metadata(path)
    if not isinstance(document.get("source"), dict):
        raise CheckpointError(
            f"{path}: holds no record of the published weights it came from; it is not a "
            "converted checkpoint"
        )
    info = SourceInfo.from_json(document["source"])
    leaves, treedef = checkpoint.flatten_tree(abstract)
    stored = checkpoint.stored_leaves(path)
    scales = {
        name: name + SCALE_SUFFIX
        for name, leaf in leaves.items()
        if leaf.dtype == np.int8 and name in stored and stored[name].dtype != np.int8
    }
    given, wanted = set(scales.values()), {}
    for name, leaf in leaves.items():
        if name in given or name in scales:
            continue
        target = leaf.dtype
        if jnp.issubdtype(target, jnp.floating) and dtype is not None:
            # A leaf the checkpoint lacks is reported by the restore, with all others.
            at_rest = stored[name].dtype if name in stored else target
            target = at_rest if isinstance(dtype, str) and dtype == "source" else dtype
        wanted[name] = jax.ShapeDtypeStruct(
            leaf.shape, target, sharding=getattr(leaf, "sharding", None)
        )
    if not scales:
        params, _ = checkpoint.restore(path, checkpoint.unflatten_tree(treedef, wanted))
        return params, info
    loaded = restore_rounded(path, wanted, scales, stored)
    return checkpoint.unflatten_tree(treedef, loaded), info


def load_weights(
    path: str | Path, table: Table, abstract: Any, dtype: Any | Literal["source"] | None = None
) -> tuple[Any, SourceInfo]:
    """:func:`load_orbax` or :func:`load_params`, by what `path` is.

    Raises:
      CheckpointError: as those; also an Orbax checkpoint of another layout.
    """
    if not checkpoint.is_orbax(path):
        return load_params(path, table, abstract, dtype)
    return load_orbax(path, abstract, dtype)


def _target_dtypes(
    steps: list[Step],
    specs: Mapping[str, TensorSpec],
    leaves: Mapping[str, Any],
    dtype: Any | Literal["source"] | None,
    where: str,
) -> dict[str, np.dtype[Any]]:
    """Dtype in memory of every parameter; refuses to read integers as weights or to cut F64."""
    targets, wrong = {}, []
    for step in steps:
        stored = [specs[name].dtype for name in step.published]
        for path in step.ours:
            own = np.dtype(leaves[path].dtype)
            floating = bool(jnp.issubdtype(own, jnp.floating))
            if any(bool(jnp.issubdtype(kind, jnp.floating)) != floating for kind in stored):
                wrong.append(f"{step.published[0]} is {dtype_name(stored[0])}, wanted {own}")
            if not floating or dtype is None:
                target = own
            elif isinstance(dtype, str) and dtype == "source":
                target = stored[0]
                if jax.dtypes.canonicalize_dtype(target) != target:
                    wrong.append(f"{step.published[0]} is {target}, which JAX would narrow")
            else:
                target = np.dtype(dtype)
            targets[path] = target
    if wrong:
        raise CheckpointError(f"{where}: dtypes do not fit: {', '.join(wrong)}")
    return targets


def _own(array: np.ndarray, dtype: np.dtype[Any], sharding: Any) -> jax.Array:
    """A JAX array in memory of its own, never a view of the mapped file.

    `jax.device_put` takes a 64-byte-aligned numpy buffer as it is, even with
    ``may_alias=False``; the weights would then change with the file, and a donation could not
    reuse them. A tensor is aligned by chance of its offset, so the address decides. JAX's own copy
    is a program to be compiled for every shape, which takes longer than to copy a small tensor to
    an address that is not aligned.
    """
    if array.dtype != dtype:
        array = array.astype(dtype)
    if array.nbytes <= _SMALL_BYTES:
        array = _unaligned(array)
    placed = jax.device_put(array, sharding)
    if _aliases(placed, array):
        placed = jax.device_put(jnp.array(array, copy=True), sharding)
    return placed.block_until_ready()


def _unaligned(array: np.ndarray) -> np.ndarray:
    """A copy that no device takes as it is."""
    room = np.empty(array.nbytes + 64, np.uint8)
    # Aligned as numpy wants it, for any dtype here, and not as a device does.
    offset = (16 - room.ctypes.data) % 64
    copy = room[offset : offset + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _aliases(placed: jax.Array, array: np.ndarray) -> bool:
    begin = array.ctypes.data
    return any(
        begin <= shard.data.unsafe_buffer_pointer() < begin + max(array.nbytes, 1)
        for shard in placed.addressable_shards
        if shard.device.platform == "cpu"
    )


def _counterpart(step: Step, index: int) -> str:
    """The parameter whose dtype stands for the published tensor `index` of a step."""
    return step.ours[index if len(step.ours) == len(step.published) else 0]


def _export_dtype(
    memory: np.dtype[Any], kept: np.dtype[Any] | None, asked: Any | None
) -> np.dtype[Any]:
    if asked is not None and jnp.issubdtype(memory, jnp.floating):
        return np.dtype(asked)
    return memory if kept is None else kept


def _holds(wide: np.dtype[Any], narrow: np.dtype[Any]) -> bool:
    """Whether every value of `narrow` is one of `wide`."""
    if wide == narrow:
        return True
    if jnp.issubdtype(wide, jnp.floating) and jnp.issubdtype(narrow, jnp.floating):
        a, b = ml_dtypes.finfo(wide), ml_dtypes.finfo(narrow)
        return bool(a.nmant >= b.nmant and a.maxexp >= b.maxexp and a.minexp <= b.minexp)
    return bool(np.can_cast(narrow, wide, casting="safe"))


def _refuse_narrower(
    memory: Mapping[str, np.dtype[Any]], kept: Mapping[str, np.dtype[Any]], where: str
) -> None:
    lost = [name for name, dtype in kept.items() if not _holds(memory[name], dtype)]
    if lost:
        first = lost[0]
        raise CheckpointError(
            f"{where}: {len(lost)} of {len(memory)} tensors were loaded in a narrower dtype than "
            f"the file's ({first}: {dtype_name(kept[first])} as {memory[first]}), so the "
            "original bytes are gone. Load with a wider dtype, or pass a dtype to write, or "
            "allow_lossy=True."
        )


def _narrow(
    array: np.ndarray, dtype: np.dtype[Any], exact: bool, name: str, where: str
) -> np.ndarray:
    """`array` in `dtype`; with `exact`, an error where that would change a value."""
    if array.dtype == dtype:
        return array
    if exact and array.dtype == np.float32 and dtype == _BFLOAT16:
        # By bits, so that a NaN keeps its payload; a cast would write the canonical one.
        bits = np.ascontiguousarray(array).view(np.uint32)
        if not np.any(bits & np.uint32(0xFFFF)):
            return (bits >> np.uint32(16)).astype(np.uint16).view(_BFLOAT16)
    result = array.astype(dtype)
    if exact and not np.array_equal(
        result.astype(array.dtype), array, equal_nan=jnp.issubdtype(dtype, jnp.floating)
    ):
        raise CheckpointError(
            f"{where}: {name} has values that the source's {dtype_name(dtype)} cannot hold: the "
            "parameters have changed since they were loaded. Pass the dtype to write, or "
            "allow_lossy=True to round."
        )
    return result
