"""Scaled dot-product attention: over a whole sequence, and of one step over a cache.

Heads are grouped: N query heads share K key-value heads, G = N / K each. Scores and
softmax are float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.typing import DTypeLike

from dia2_jax.nn.linear import exact
from dia2_jax.typing import Array, Bool, Float, Int

#: Cache slots attended at a time. A cache is a whole number of blocks long.
BLOCK = 128

#: Score of what is not attended. Large and finite: a fully masked block must not turn
#: exp(-inf - -inf) into NaN.
MASKED = -1e30


@struct.dataclass
class KVCache:
    """Keys and values of one layer; slot s of row b counts once ``s < length[b]``.

    Both lie as the products of a step read them fastest on a CPU.

    Attributes:
      keys: ``[B, K, H, S]``, S a multiple of ``BLOCK``.
      values: ``[B, K, S, H]``.
    """

    keys: Float[Array, "B K H S"]
    values: Float[Array, "B K S H"]

    @classmethod
    def empty(cls, batch: int, heads: int, slots: int, head_dim: int, dtype: DTypeLike) -> KVCache:
        """A cache of at least ``slots`` slots, rounded up to whole blocks."""
        slots = -(-slots // BLOCK) * BLOCK
        return cls(
            keys=jnp.zeros((batch, heads, head_dim, slots), dtype),
            values=jnp.zeros((batch, heads, slots, head_dim), dtype),
        )

    def write_step(
        self,
        keys: Float[Array, "B K H"],
        values: Float[Array, "B K H"],
        index: Int[Array, " B"],
    ) -> KVCache:
        """Put one step of every row at that row's own slot.

        One update a row: a vmapped update becomes a scatter, which XLA's CPU backend runs as a
        slow loop. The copies are elided when the cache is donated.
        """
        new_keys, new_values = self.keys, self.values
        for row in range(keys.shape[0]):
            slot = index[row]
            new_keys = lax.dynamic_update_slice(
                new_keys, keys[row][None, :, :, None], (row, 0, 0, slot)
            )
            new_values = lax.dynamic_update_slice(
                new_values, values[row][None, :, None], (row, 0, slot, 0)
            )
        return KVCache(keys=new_keys, values=new_values)

    def write_prefix(
        self, keys: Float[Array, "B T K H"], values: Float[Array, "B T K H"]
    ) -> KVCache:
        """Put T steps of every row at slots 0 to T - 1."""
        start = (0, 0, 0, 0)
        return KVCache(
            keys=lax.dynamic_update_slice(self.keys, jnp.moveaxis(keys, 1, 3), start),
            values=lax.dynamic_update_slice(self.values, values.swapaxes(1, 2), start),
        )


def attend(
    query: Float[Array, "B T N H"],
    keys: Float[Array, "B S K H"],
    values: Float[Array, "B S K H"],
    mask: Bool[Array, "#B T S"],
    *,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Attention of T queries over S keys where ``mask`` is true."""
    batch, steps, heads, width = query.shape
    kv_heads = keys.shape[2]
    grouped = query.reshape(batch, steps, kv_heads, heads // kv_heads, width)
    scores = scale * jnp.einsum(
        "BTKGH,BSKH->BKGTS",
        grouped,
        keys,
        precision=exact(keys.dtype),
        preferred_element_type=jnp.float32,
    )
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, MASKED), axis=-1)
    out = jnp.einsum(
        "BKGTS,BSKH->BTKGH", weights.astype(values.dtype), values, precision=exact(values.dtype)
    )
    return out.reshape(batch, steps, heads, width)


def attend_cache(
    query: Float[Array, "B N H"], cache: KVCache, length: Int[Array, " B"], *, scale: float
) -> Float[Array, "B N H"]:
    """Attention of one query a row over the first ``length[b]`` slots of its cache.

    Blocks of the cache are visited up to the longest row with a running softmax (Milakov and
    Gimelshein, 2018), so a step costs what was written so far, not what was allocated, and one
    compiled program serves every length. Blocks a short row does not have add exactly zero.
    """
    batch, heads, width = query.shape
    kv_heads = cache.keys.shape[1]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, width)
    blocks = (jnp.max(length) + BLOCK - 1) // BLOCK
    limit = length[:, None, None, None]
    shape = grouped.shape[:-1]

    def visit(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        peak, total, out = carry
        keys = lax.dynamic_slice_in_dim(cache.keys, index * BLOCK, BLOCK, axis=3)
        values = lax.dynamic_slice_in_dim(cache.values, index * BLOCK, BLOCK, axis=2)
        scores = scale * jnp.einsum(
            "BKGH,BKHS->BKGS",
            grouped,
            keys,
            precision=exact(keys.dtype),
            preferred_element_type=jnp.float32,
        )
        scores = jnp.where(index * BLOCK + jnp.arange(BLOCK) < limit, scores, MASKED)
        new_peak = jnp.maximum(peak, scores.max(axis=-1))
        weights = jnp.exp(scores - new_peak[..., None])
        decay = jnp.exp(peak - new_peak)
        added = jnp.einsum(
            "BKGS,BKSH->BKGH",
            weights.astype(values.dtype),
            values,
            precision=exact(values.dtype),
            preferred_element_type=jnp.float32,
        )
        return new_peak, total * decay + weights.sum(axis=-1), out * decay[..., None] + added

    start = (
        jnp.full(shape, MASKED, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros(grouped.shape, jnp.float32),
    )
    _, total, out = lax.fori_loop(0, blocks, visit, start)
    return (out / total[..., None]).reshape(batch, heads, width).astype(query.dtype)
