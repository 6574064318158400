"""Logical axes of parameters and activations, and the mesh that binds them.

A tensor's axes have names (letters of `dia2_jax.typing`'s legend); a mesh has the axes ``data``,
``fsdp`` and ``tensor``; `RULES` say which mesh axes may carry which name. What a tensor's size
does not divide by stays whole, so every shape runs on every mesh. Nothing here knows a layer:
parameters are named by a table of paths, activations name themselves with `constrain`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from fnmatch import fnmatchcase
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dia2_jax.errors import ConfigError
from dia2_jax.typing import Array

#: Mesh axes, outermost first: batch rows only; rows and weights; weights alone.
MESH_AXES = ("data", "fsdp", "tensor")

#: Logical axis to the mesh axes that split it. Names that are not here stay whole.
RULES: Mapping[str, tuple[str, ...]] = {
    "B": ("data", "fsdp"),  # rows
    "D": ("fsdp",),  # model width of weights: gathered where it is used
    "N": ("tensor",),  # query heads x head dimension
    "K": ("tensor",),  # key-value heads x head dimension
    "F": ("tensor",),  # hidden width of the MLPs
    "V": ("tensor",),  # vocabulary
}

#: Axes of the parameters of a Dia2 network, by path; the first row that matches counts. Weights
#: are ``[out, in]``. A dot stands for an axis that is never split.
DIA2_AXES: tuple[tuple[str, str], ...] = (
    ("*norm.weight", "."),
    ("*.audio_embeds.*.weight", "V D"),
    ("*.text_embed.embedding.weight", "V D"),
    ("*.text_embed.*_proj.weight", "D ."),
    ("*.attn.q_proj.weight", "N D"),
    ("*.attn.[kv]_proj.weight", "K D"),
    ("*.attn.o_proj.weight", "D N"),
    ("*.self_attention.in_proj.*.weight", "N D"),
    ("*.self_attention.out_proj.*.weight", "D N"),
    ("*.mlp.wi.weight", "F D"),
    ("*.mlp.wo.weight", "D F"),
    ("depformer.depformer_in.*.weight", "N D"),
    ("depformer.logits.*.weight", "V D"),
    ("transformer.cb0_head.weight", "V D"),
    ("transformer.action_head.weight", ". D"),
)

_binding: ContextVar[Mesh | None] = ContextVar("dia2_jax_mesh", default=None)


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh over all devices of all hosts (or those given).

    Args:
      data, fsdp, tensor: sizes; one of them may be -1 and takes what is left.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dict(zip(MESH_AXES, (data, fsdp, tensor), strict=True))
    wild = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if any(size < 1 and size != -1 for size in sizes.values()) or len(wild) > 1:
        raise ConfigError(f"mesh {sizes}: sizes are positive, and at most one is -1")
    if wild and len(devices) % fixed == 0:
        sizes[wild[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        raise ConfigError(
            f"mesh {sizes} wants {math.prod(s for s in sizes.values() if s > 0)} devices, there "
            f"are {len(devices)}: change mesh.data, mesh.fsdp or mesh.tensor"
        )
    return Mesh(np.array(devices).reshape(tuple(sizes.values())), MESH_AXES)


def spec(axes: str, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """How a tensor of these axes and this shape is split; each mesh axis splits one of them."""
    names = axes.split()
    if len(names) != len(shape):
        raise ValueError(f"axes {axes!r} for a tensor of shape {tuple(shape)}")
    used: set[str] = set()
    parts: list[tuple[str, ...] | None] = []
    for name, size in zip(names, shape, strict=True):
        chosen = [axis for axis in RULES.get(name, ()) if axis not in used and mesh.shape[axis] > 1]
        # The whole product must divide; drop from the right until it does.
        while chosen and size % math.prod(mesh.shape[axis] for axis in chosen):
            chosen.pop()
        used.update(chosen)
        parts.append(tuple(chosen) or None)
    return PartitionSpec(*parts)


def parameter_axes(path: str, ndim: int, table: Sequence[tuple[str, str]] = DIA2_AXES) -> str:
    """The axes of one parameter.

    Raises:
      ConfigError: no row of the table names it, or one of another rank does.
    """
    for pattern, axes in table:
        if fnmatchcase(path, pattern):
            if len(axes.split()) != ndim:
                raise ConfigError(f"{path} has {ndim} axes, its row in the table {axes!r}")
            return axes
    raise ConfigError(f"no logical axes for parameter {path}: add a row to the table of axes")


def parameter_shardings(
    shapes: Mapping[str, Any],
    mesh: Mesh,
    table: Sequence[tuple[str, str]] = DIA2_AXES,
) -> dict[str, NamedSharding]:
    """The sharding of every parameter of a flat dict (of anything with a shape)."""
    return {
        path: NamedSharding(
            mesh, spec(parameter_axes(path, len(leaf.shape), table), leaf.shape, mesh)
        )
        for path, leaf in shapes.items()
    }


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds all of it."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, rows: int, ndim: int) -> NamedSharding:
    """Rows over ``data`` and ``fsdp``, the other axes whole."""
    return NamedSharding(mesh, spec(" ".join(["B", *["."] * (ndim - 1)]), (rows,) * ndim, mesh))


def host_rows(mesh: Mesh, rows: int) -> range:
    """The rows of a batch that this process's devices hold: those that it has to read.

    Processes along ``tensor`` hold the same rows.

    Raises:
      ConfigError: they do not lie in one piece.
    """
    held: Mapping[Any, Any] = batch_sharding(mesh, rows, 1).devices_indices_map((rows,))
    mine: set[int] = set()
    for device, (part,) in held.items():
        if device.process_index == jax.process_index():
            mine.update(range(*part.indices(rows)))
    found = range(min(mine, default=0), max(mine, default=-1) + 1)
    if len(found) != len(mine) or not mine:
        raise ConfigError(
            f"the mesh {dict(mesh.shape)} gives process {jax.process_index()} rows that are not "
            "neighbours: let data x fsdp be a multiple of the number of processes"
        )
    return found


def place_rows(batch: Mapping[str, np.ndarray], mesh: Mesh, rows: int) -> dict[str, Array]:
    """This host's rows (:func:`host_rows`) as their part of global arrays of ``rows`` rows."""
    return {
        name: jax.make_array_from_process_local_data(
            batch_sharding(mesh, rows, leaf.ndim), leaf, (rows, *leaf.shape[1:])
        )
        for name, leaf in batch.items()
    }


@contextmanager
def bound(mesh: Mesh | None) -> Iterator[None]:
    """What is traced inside splits its activations over ``mesh``."""
    token = _binding.set(mesh)
    try:
        yield
    finally:
        _binding.reset(token)


def constrain(x: Array, axes: str) -> Array:
    """``x``, split as its axes say over the bound mesh; ``x`` itself where none is bound."""
    mesh = _binding.get()
    if mesh is None or mesh.size == 1:
        return x
    sharding = NamedSharding(mesh, spec(axes, x.shape, mesh))
    return jax.lax.with_sharding_constraint(x, sharding)


def check_rows(rows: int, mesh: Mesh) -> None:
    """Refuses rows (of a micro-batch) that do not divide over the mesh.

    Raises:
      ConfigError: says which number fits.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % parts:
        raise ConfigError(
            f"{rows} rows of a micro-batch do not divide over data x fsdp = {parts} devices: make "
            f"data.rows / microbatches a multiple of {parts}"
        )
