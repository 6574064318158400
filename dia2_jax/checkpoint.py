"""Orbax checkpoints: a tree of arrays and a JSON document in one folder, saved atomically.

Any pytree is kept as a nested dict of its leaf names, so a checkpoint can be read without the
classes that made it, and restored into them when they are at hand. Arrays are stored
uncompressed: weights hardly shrink, and compression doubled the memory and the time of a save.

The import of Orbax takes about a second, so it happens inside the functions.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dia2_jax.errors import CheckpointError

_FORMAT = 1
_TREE, _METADATA = "tree", "metadata"
# Bytes that Orbax may hold in flight beyond the tree. Its default of 96 GB would double the
# weights; it refuses leaves above the limit, so the largest one raises it.
_IN_FLIGHT = 256_000_000
_LISTED = 8


@dataclass(frozen=True)
class StoredLeaf:
    """Shape and dtype of an array on disk (also of dtypes that JAX would narrow)."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def flatten_tree(tree: Any) -> tuple[dict[str, Any], jax.tree_util.PyTreeDef]:
    """Leaves of any pytree by dotted name, and the structure to put them back.

    Dict keys, list indices and field names are the parts of a name; the inner ``value`` of an
    NNX variable is none, so ``state["layers"][0]["weight"]`` is ``layers.0.weight`` whether the
    leaf is a variable or an array.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    named = {".".join(_parts(path)): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the tree share one dotted name")
    return named, treedef


def unflatten_tree(treedef: jax.tree_util.PyTreeDef, named: Mapping[str, Any]) -> Any:
    """The inverse of :func:`flatten_tree`; `named` may come in any order."""
    skeleton = jax.tree_util.tree_unflatten(treedef, range(treedef.num_leaves))
    order = [
        (index, ".".join(_parts(path)))
        for path, index in jax.tree_util.tree_flatten_with_path(skeleton)[0]
    ]
    return jax.tree_util.tree_unflatten(treedef, [named[name] for _, name in sorted(order)])


def _parts(path: tuple[Any, ...]) -> list[str]:
    parts = []
    for key in path:
        if isinstance(key, jax.tree_util.SequenceKey):
            parts.append(str(key.idx))
        elif isinstance(key, jax.tree_util.GetAttrKey):
            parts.append(key.name)
        else:
            parts.append(str(key.key))
    if path and isinstance(path[-1], jax.tree_util.GetAttrKey) and parts[-1] == "value":
        parts.pop()
    return parts


def is_orbax(path: str | Path) -> bool:
    """Whether `path` is a folder that :func:`save` wrote."""
    path = Path(path)
    return (path / _TREE).is_dir() and (path / _METADATA / _METADATA).is_file()


def save(
    path: str | Path, tree: Any, metadata: Mapping[str, Any], *, overwrite: bool = False
) -> None:
    """Write `tree` and the JSON document `metadata` to the folder `path`.

    Leaves may be JAX or numpy arrays, typed random keys and Python numbers. The folder appears
    whole or not at all; with `overwrite` an older one stays until the new one is complete.

    Raises:
      CheckpointError: `path` exists and `overwrite` is off, or the tree cannot be stored.
    """
    import orbax.checkpoint as ocp

    path = Path(path).absolute()
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path}: exists; choose another folder or pass overwrite=True")
    named, _ = flatten_tree(tree)
    keys, leaves = {}, {}
    for name, leaf in named.items():
        if _is_random_key(leaf):
            keys[name] = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float):
            raise CheckpointError(
                f"{path}: {name or 'the tree'} is a {type(leaf).__name__}; only arrays, random "
                "keys and numbers are stored"
            )
        leaves[name] = leaf
    document = {"format": _FORMAT, "random_keys": keys, "metadata": dict(metadata)}
    try:
        json.dumps(document)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the metadata is not JSON ({error})") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{os.getpid()}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        with ocp.Checkpointer(_handler(_largest(leaves))) as checkpointer:
            checkpointer.save(
                staging / path.name,
                args=ocp.args.Composite(
                    tree=ocp.args.PyTreeSave(_nest(leaves, path)),
                    metadata=ocp.args.JsonSave(document),
                ),
            )
        replace_folder(staging / path.name, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The JSON document of a checkpoint, without its arrays.

    Raises:
      CheckpointError: no checkpoint there, or of another format version.
    """
    return dict(_read_document(Path(path).absolute())["metadata"])


def stored_leaves(path: str | Path) -> dict[str, StoredLeaf]:
    """Shapes and dtypes of a checkpoint's leaves by dotted name, without reading them.

    Raises:
      CheckpointError: no checkpoint there, or a damaged one.
    """
    import orbax.checkpoint as ocp

    path = Path(path).absolute()
    _read_document(path)
    try:
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True)
        stored = handler.metadata(path / _TREE).tree
        leaves = jax.tree_util.tree_flatten_with_path(stored)[0]
        return {
            ".".join(_parts(key)): StoredLeaf(tuple(leaf.shape), np.dtype(leaf.dtype))
            for key, leaf in leaves
        }
    except Exception as error:  # Orbax and TensorStore raise many types on a damaged folder.
        raise CheckpointError(
            f"{path}: the checkpoint is damaged ({_first_line(error)})"
        ) from error


def restore(
    path: str | Path, abstract_tree: Any = None, *, partial: bool = False
) -> tuple[Any, dict[str, Any]]:
    """Read a checkpoint back.

    Leaves are read a few at a time, so beside the result there is little in flight; what glibc's
    allocator keeps of it costs 0.6 to 1 GB at the 1B shape (``MALLOC_MMAP_THRESHOLD_=65536`` in
    the environment gives it back: 1.1 times the weights at the peak).

    Args:
      path: a folder written by :func:`save`.
      abstract_tree: the wanted structure, with arrays or ``jax.ShapeDtypeStruct`` leaves; their
        dtype (and sharding, where set) is what is restored, cast while reading. Numpy leaves come
        back as numpy arrays, Python numbers as Python numbers. None gives a nested dict of
        everything as it was stored.
      partial: leaves of the checkpoint that `abstract_tree` lacks are skipped instead of refused.

    Returns:
      The tree and the metadata document.

    Raises:
      CheckpointError: damaged, or lists every leaf that is missing, unexpected or misshapen.
    """
    import orbax.checkpoint as ocp

    path = Path(path).absolute()
    document = _read_document(path)
    stored = stored_leaves(path)
    keys = document["random_keys"]
    treedef = None
    if abstract_tree is None:
        wanted: dict[str, Any] = dict(stored)
    else:
        wanted, treedef = flatten_tree(abstract_tree)
        _check_fit(path, stored, wanted, keys, partial)
    item, arguments = {}, {}
    for name, leaf in wanted.items():
        spec = stored[name]
        dtype = spec.dtype if name in keys else np.dtype(getattr(leaf, "dtype", spec.dtype))
        item[name] = jax.ShapeDtypeStruct(spec.shape, jax.dtypes.canonicalize_dtype(dtype))
        if _as_numpy(leaf, dtype):
            arguments[name] = ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype)
        else:
            sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(
                jax.devices()[0]
            )
            arguments[name] = ocp.ArrayRestoreArgs(
                dtype=dtype, sharding=sharding, global_shape=spec.shape, strict=True
            )
    try:
        with ocp.Checkpointer(_handler(max(_largest(stored), _largest(item)))) as checkpointer:
            result = checkpointer.restore(
                path,
                args=ocp.args.Composite(
                    tree=ocp.args.PyTreeRestore(
                        item=_nest(item, path),
                        restore_args=_nest(arguments, path),
                        partial_restore=partial,
                    )
                ),
            )
    except Exception as error:
        raise CheckpointError(
            f"{path}: the checkpoint is damaged ({_first_line(error)})"
        ) from error
    leaves = {
        ".".join(_parts(key)): leaf
        for key, leaf in jax.tree_util.tree_flatten_with_path(result[_TREE])[0]
    }
    for name, implementation in keys.items():
        if name in leaves:
            leaves[name] = jax.random.wrap_key_data(leaves[name], impl=implementation)
    for name, leaf in wanted.items():
        if isinstance(leaf, bool | int | float):
            leaves[name] = type(leaf)(leaves[name])
    tree = _nest(leaves, path) if treedef is None else unflatten_tree(treedef, leaves)
    return tree, dict(document["metadata"])


@contextmanager
def staged_folder(path: Path) -> Iterator[Path]:
    """An empty folder that becomes `path`, replacing what is there, when the context ends well.

    After an error nothing of it is left, and `path` is as it was.
    """
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    try:
        yield staged
        replace_folder(staged, path)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def replace_folder(staged: Path, path: Path) -> None:
    """Move the finished folder `staged` to `path`, replacing what is there."""
    retired = path.with_name(f".{path.name}.{os.getpid()}.old")
    shutil.rmtree(retired, ignore_errors=True)
    if path.exists():
        path.rename(retired)
    staged.rename(path)
    shutil.rmtree(retired, ignore_errors=True)


def _handler(largest: int) -> Any:
    import orbax.checkpoint as ocp

    gigabytes = max(_IN_FLIGHT, largest * 5 // 4) / 1e9
    return ocp.CompositeCheckpointHandler(
        tree=ocp.PyTreeCheckpointHandler(
            use_ocdbt=True,
            use_zarr3=True,
            use_compression=False,
            save_concurrent_gb=gigabytes,
            restore_concurrent_gb=gigabytes,
        ),
        metadata=ocp.JsonCheckpointHandler(),
    )


def _largest(leaves: Mapping[str, Any]) -> int:
    """Bytes of the largest leaf."""
    sizes = (
        math.prod(np.shape(leaf)) * np.dtype(getattr(leaf, "dtype", np.int64)).itemsize
        for leaf in leaves.values()
    )
    return max(sizes, default=0)


def _read_document(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint folder")
    if not is_orbax(path):
        raise CheckpointError(f"{path}: not a checkpoint of this project (or an unfinished one)")
    try:
        document = json.loads((path / _METADATA / _METADATA).read_text(encoding="utf-8"))
        version = document["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: its metadata is damaged ({error})") from None
    if version != _FORMAT:
        raise CheckpointError(
            f"{path}: has format {version}, this version reads {_FORMAT}; update dia2-jax"
        )
    return dict(document)


def _check_fit(
    path: Path,
    stored: Mapping[str, Any],
    wanted: Mapping[str, Any],
    keys: Mapping[str, str],
    partial: bool,
) -> None:
    missing = [name for name in wanted if name not in stored]
    unexpected = [] if partial else [name for name in stored if name not in wanted]
    misshapen = [
        f"{name} is {list(stored[name].shape)}, wanted {list(np.shape(leaf))}"
        for name, leaf in wanted.items()
        if name in stored and name not in keys and stored[name].shape != tuple(np.shape(leaf))
    ]
    lines = [f"{path}: the checkpoint does not fit what is restored:"]
    for names, what in (
        (missing, "wanted and missing"),
        (unexpected, "in the checkpoint and not wanted"),
        (misshapen, "of the wrong shape"),
    ):
        if names:
            lines.append(f"  {len(names)} {what}:")
            lines += [f"    {name}" for name in names[:_LISTED]]
            if len(names) > _LISTED:
                lines.append(f"    … and {len(names) - _LISTED} more")
    if len(lines) > 1:
        raise CheckpointError("\n".join([*lines, "  Was it saved with another config?"]))


def _nest(named: Mapping[str, Any], path: Path) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in named.items():
        *parents, last = name.split(".")
        branch = tree
        for part in parents:
            branch = branch.setdefault(part, {})
            if not isinstance(branch, dict):
                raise CheckpointError(f"{path}: {name} lies below another leaf")
        if not last or last in branch:
            raise CheckpointError(f"{path}: a leaf has no name of its own ({name!r})")
        branch[last] = leaf
    return tree


def _is_random_key(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and bool(jnp.issubdtype(dtype, jax.dtypes.prng_key))


def _as_numpy(leaf: Any, dtype: np.dtype[Any]) -> bool:
    # 64-bit values would be cut by JAX, so without its 64-bit mode they stay numpy's.
    return (
        isinstance(leaf, np.ndarray | np.generic | bool | int | float)
        or jax.dtypes.canonicalize_dtype(dtype) != dtype
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
