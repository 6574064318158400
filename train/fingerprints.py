"""One number for each array of a state, by which damage on disk is found.

It is a sum of integers that mix each value's bits with its place, so it does not depend on how the
array is sharded, and no process needs to see all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dia2_jax.typing import Array, Int


def fingerprints_of(named: Mapping[str, Any]) -> dict[str, tuple[int, bool]]:
    """For each array a number that depends on every bit, and whether all values are finite."""
    results = {}
    for name, leaf in named.items():
        results[name] = _fingerprint(jnp.asarray(leaf))
        if jax.process_count() > 1:
            # Several devices of a process on a CPU run what is under way in an order of their own,
            # and wait for each other's collectives for ever.
            jax.block_until_ready(results[name])
    return {
        name: (int(value), bool(finite))
        for name, (value, finite) in jax.device_get(results).items()
    }


@jax.jit
def _fingerprint(x: Array) -> tuple[Int[Array, ""], Array]:
    if x.dtype == jnp.bool_:
        bits = x.astype(jnp.uint32)
    else:
        kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)
    # The flat index of each value, without reshaping what may be sharded.
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        index = index * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    # The finaliser of MurmurHash3 (Appleby, public domain), over value and place.
    mixed = bits ^ (index * np.uint32(0x9E3779B9))
    mixed = (mixed ^ (mixed >> 16)) * np.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * np.uint32(0xC2B2AE35)
    mixed = mixed ^ (mixed >> 16)
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    finite = jnp.isfinite(x).all() if floating else jnp.bool_(True)
    return mixed.sum(dtype=jnp.uint32), finite
