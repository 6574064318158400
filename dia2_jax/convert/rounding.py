"""Weights in floating point on their way into an int8 model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dia2_jax import checkpoint
from dia2_jax.convert.rules import Table
from dia2_jax.errors import CheckpointError
from dia2_jax.nn.quantized import SCALE_SUFFIX, quantize

# Bytes of float32 read from an Orbax folder before they are rounded.
_GROUP_BYTES = 100_000_000


def before_rounding(
    leaves: Mapping[str, Any], table: Table
) -> tuple[dict[str, Any], dict[str, str]]:
    """The leaves as a layout in floating point has them, and the scale's name of each int8 weight.

    A layout that has scales of its own is read as it is.
    """
    scales = {
        name: name + SCALE_SUFFIX
        for name, leaf in leaves.items()
        if leaf.dtype == np.int8
        and name + SCALE_SUFFIX in leaves
        and not table.knows(name + SCALE_SUFFIX)
    }
    given = set(scales.values())
    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) if name in scales else leaf
        for name, leaf in leaves.items()
        if name not in given
    }
    return wanted, scales


def restore_rounded(
    path: str | Path,
    wanted: Mapping[str, Any],
    scales: Mapping[str, str],
    stored: Mapping[str, checkpoint.StoredLeaf],
) -> dict[str, Any]:
    """The leaves `wanted`, and as int8 those that have a name in `scales`.

    A few of these at a time: all of them in floating point would be what int8 is to save.
    """
    extra = [name for name in stored if name not in wanted and name not in scales]
    if extra:
        raise CheckpointError(
            f"{path}: {len(extra)} leaves have no place in this model ({', '.join(extra[:8])}); "
            "was it saved with another config?"
        )
    loaded = dict(checkpoint.restore(path, dict(wanted), partial=True)[0])
    groups: list[dict[str, Any]] = [{}]
    for name in scales:
        if sum(leaf.nbytes for leaf in groups[-1].values()) > _GROUP_BYTES:
            groups.append({})
        # A numpy leaf comes back as a numpy array; this one takes no memory itself.
        groups[-1][name] = np.broadcast_to(np.float32(0), stored[name].shape)
    for group in groups:
        for name, array in checkpoint.restore(path, group, partial=True)[0].items():
            rounded = zip((name, scales[name]), quantize(array), strict=True)
            loaded.update({leaf: jnp.array(part, copy=True) for leaf, part in rounded})
    return loaded
