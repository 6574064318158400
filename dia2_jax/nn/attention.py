"""Scaled dot-product attention: over a whole sequence, and of one step over a cache.

Heads are grouped: N query heads share K key-value heads, G = N / K each. Scores and
softmax are float32.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.typing import DTypeLike

from dia2_jax.nn.kernels import attention_float32, use_float32
from dia2_jax.nn.linear import exact
from dia2_jax.typing import Array, Bool, Float, Int

#: Slots of a :class:`KVCache` attended at a time.
BLOCK = 128

#: Score of what is not attended. Large and finite: a fully masked block must not turn
#: exp(-inf - -inf) into NaN.
MASKED = -1e30


class StepCache(Protocol):
    """What a step attends over: keys and values of all layers."""

    @property
    def keys(self) -> Array:
        """``[B, L, K, ...]``."""
        ...

    def attend(
        self,
        query: Float[Array, "B K G H"],
        layer: int | Int[Array, ""],
        length: Int[Array, " B"],
    ) -> Float[Array, "B K G H"]:
        """What :func:`attend_cache` returns, of grouped and scaled queries and in float32."""
        ...


class BlockCache(Protocol):
    """Keys and values of all layers that :func:`attend_blocks` reads some slots at a time."""

    #: Slots attended at a time; a cache is a whole number of them long.
    block: ClassVar[int]

    def ask(self, query: Float[Array, "B K G H"]) -> Any:
        """The query as :meth:`scores` reads it, made once for all blocks."""
        ...

    def scores(
        self, asked: Any, layer: int | Int[Array, ""], start: Int[Array, ""]
    ) -> Float[Array, "B K G S"]:
        """float32 products with the keys of the block at slot ``start``."""
        ...

    def weighted(
        self, weights: Float[Array, "B K G S"], layer: int | Int[Array, ""], start: Int[Array, ""]
    ) -> Float[Array, "B K G H"]:
        """float32 sum of the values of the block at slot ``start``."""
        ...


def block_of(
    held: Float[Array, "B L ..."],
    layer: int | Int[Array, ""],
    start: Int[Array, ""],
    size: int,
    *,
    axis: int,
) -> Float[Array, "B ..."]:
    """``size`` slots from ``start`` of a layer; ``axis`` is the axis of slots in ``held``."""
    sizes, starts = list(held.shape), [jnp.zeros((), jnp.int32)] * held.ndim
    sizes[1], sizes[axis] = 1, size
    starts[1], starts[axis] = jnp.asarray(layer, jnp.int32), jnp.asarray(start, jnp.int32)
    return lax.squeeze(lax.dynamic_slice(held, starts, sizes), [1])


@struct.dataclass
class KVCache:
    """Keys and values of all layers; slot s of row b counts once ``s < length[b]``.

    Both lie as the products of a step read them fastest on a CPU; the kernel of all layers reads
    them in this order.

    Attributes:
      keys: ``[B, L, K, H, S]``, S a multiple of ``BLOCK``.
      values: ``[B, L, K, S, H]``.
    """

    block: ClassVar[int] = BLOCK

    keys: Float[Array, "B L K H S"]
    values: Float[Array, "B L K S H"]

    @classmethod
    def empty(
        cls, batch: int, layers: int, heads: int, slots: int, head_dim: int, dtype: DTypeLike
    ) -> KVCache:
        """A cache of at least ``slots`` slots, rounded up to whole blocks."""
        slots = -(-slots // BLOCK) * BLOCK
        return cls(
            keys=jnp.zeros((batch, layers, heads, head_dim, slots), dtype),
            values=jnp.zeros((batch, layers, heads, slots, head_dim), dtype),
        )

    def write_step(
        self,
        layer: int | Int[Array, ""],
        keys: Float[Array, "B K H"],
        values: Float[Array, "B K H"],
        index: Int[Array, " B"],
    ) -> KVCache:
        """Put one step of a layer at every row's own slot.

        One update a row: a vmapped update becomes a scatter, which XLA's CPU backend runs as a
        slow loop. The copies are elided when the cache is donated.
        """
        new_keys, new_values = self.keys, self.values
        for row in range(keys.shape[0]):
            slot = index[row]
            new_keys = lax.dynamic_update_slice(
                new_keys, keys[row][None, None, :, :, None], (row, layer, 0, 0, slot)
            )
            new_values = lax.dynamic_update_slice(
                new_values, values[row][None, None, :, None], (row, layer, 0, slot, 0)
            )
        return KVCache(keys=new_keys, values=new_values)

    def write_prefix(
        self, layer: int, keys: Float[Array, "B T K H"], values: Float[Array, "B T K H"]
    ) -> KVCache:
        """Put T steps of a layer at slots 0 to T - 1 of every row."""
        start = (0, layer, 0, 0, 0)
        keys, values = jnp.moveaxis(keys, 1, 3)[:, None], values.swapaxes(1, 2)[:, None]
        return KVCache(
            keys=lax.dynamic_update_slice(self.keys, keys, start),
            values=lax.dynamic_update_slice(self.values, values, start),
        )

    def attend(
        self,
        query: Float[Array, "B K G H"],
        layer: int | Int[Array, ""],
        length: Int[Array, " B"],
    ) -> Float[Array, "B K G H"]:
        if self.keys.dtype != jnp.float32 or not use_float32():
            return attend_blocks(self, query, layer, length)
        return attention_float32(query, self.keys, self.values, layer, length)

    def ask(self, query: Float[Array, "B K G H"]) -> Float[Array, "B K G H"]:
        return query

    def scores(
        self,
        asked: Float[Array, "B K G H"],
        layer: int | Int[Array, ""],
        start: Int[Array, ""],
    ) -> Float[Array, "B K G S"]:
        keys = block_of(self.keys, layer, start, BLOCK, axis=4)
        return jnp.einsum(
            "BKGH,BKHS->BKGS",
            asked,
            keys,
            precision=exact(keys.dtype),
            preferred_element_type=jnp.float32,
        )

    def weighted(
        self, weights: Float[Array, "B K G S"], layer: int | Int[Array, ""], start: Int[Array, ""]
    ) -> Float[Array, "B K G H"]:
        values = block_of(self.values, layer, start, BLOCK, axis=3)
        return jnp.einsum(
            "BKGS,BKSH->BKGH",
            weights.astype(values.dtype),
            values,
            precision=exact(values.dtype),
            preferred_element_type=jnp.float32,
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
    query: Float[Array, "B N H"],
    cache: StepCache,
    layer: int | Int[Array, ""],
    length: Int[Array, " B"],
    *,
    scale: float,
) -> Float[Array, "B N H"]:
    """Attention of one query a row over the first ``length[b]`` slots of a layer."""
    batch, heads, width = query.shape
    kv_heads = cache.keys.shape[2]
    grouped = scale * query.reshape(batch, kv_heads, heads // kv_heads, width)
    return cache.attend(grouped, layer, length).reshape(query.shape).astype(query.dtype)


def attend_blocks(
    cache: BlockCache,
    query: Float[Array, "B K G H"],
    layer: int | Int[Array, ""],
    length: Int[Array, " B"],
) -> Float[Array, "B K G H"]:
    """:meth:`StepCache.attend`, a block of slots after another.

    Blocks of the cache are visited up to the longest row with a running softmax (Milakov and
    Gimelshein, 2018), so a step costs what was written so far, not what was allocated, and one
    compiled program serves every length. Blocks a short row does not have add exactly zero.
    """
    asked = cache.ask(query)
    block = cache.block
    blocks = (jnp.max(length) + block - 1) // block
    limit = length[:, None, None, None]
    shape = query.shape[:-1]

    def visit(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        peak, total, out = carry
        start = index * block
        scores = cache.scores(asked, layer, start)
        scores = jnp.where(start + jnp.arange(block) < limit, scores, MASKED)
        new_peak = jnp.maximum(peak, scores.max(axis=-1))
        weights = jnp.exp(scores - new_peak[..., None])
        decay = jnp.exp(peak - new_peak)
        added = cache.weighted(weights, layer, start)
        return new_peak, total * decay + weights.sum(axis=-1), out * decay[..., None] + added

    first = (
        jnp.full(shape, MASKED, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros(query.shape, jnp.float32),
    )
    _, total, out = lax.fori_loop(0, blocks, visit, first)
    return out / total[..., None]
