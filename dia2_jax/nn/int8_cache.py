"""A key-value cache of int8, and attention of one step over it.

For the int8 model: at the end of a long take a step reads as much of a float32 cache as of int8
weights, and XLA's CPU backend reads it slowly. Keys and values have a scale for every slot and
head. Scores are int8 products with the rounded query; softmax is float32.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from dia2_jax.nn.attention import BLOCK, MASKED
from dia2_jax.nn.quantized import BASE, LEVELS, SMALLEST, round_rows, round_rows_twice
from dia2_jax.typing import Array, Float, Int

# A step attends over one of this many lengths of the cache, each a program to be compiled.
_PIECES = 4


def pieces(slots: int) -> list[int]:
    """The lengths of a cache of ``slots`` slots that a step may attend over, each whole blocks."""
    blocks = slots // BLOCK
    return sorted({-(-blocks * part // _PIECES) * BLOCK for part in range(1, 1 + _PIECES)})


def nearest(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """``x`` as the cache gives it back."""
    rounded, step = round_rows(x)
    return (rounded * step[..., None]).astype(x.dtype)


@struct.dataclass
class Int8Cache:
    """Keys and values of one layer; slot s of row b counts once ``s < length[b]``.

    Attributes:
      keys, values: ``[B, K, S, H]`` int8, S a multiple of ``BLOCK``.
      key_scale, value_scale: ``[B, K, S]`` float32.
    """

    keys: Int[Array, "B K S H"]
    values: Int[Array, "B K S H"]
    key_scale: Float[Array, "B K S"]
    value_scale: Float[Array, "B K S"]

    @classmethod
    def empty(cls, batch: int, heads: int, slots: int, head_dim: int) -> Int8Cache:
        """A cache of at least ``slots`` slots, rounded up to whole blocks."""
        shape = (batch, heads, -(-slots // BLOCK) * BLOCK)
        return cls(
            keys=jnp.zeros((*shape, head_dim), jnp.int8),
            values=jnp.zeros((*shape, head_dim), jnp.int8),
            key_scale=jnp.zeros(shape, jnp.float32),
            value_scale=jnp.zeros(shape, jnp.float32),
        )

    def write_step(
        self,
        keys: Float[Array, "B K H"],
        values: Float[Array, "B K H"],
        index: Int[Array, " B"],
    ) -> Int8Cache:
        """Put one step of every row at that row's own slot; one update a row, as in ``KVCache``."""
        pieces = (*round_rows(keys), *round_rows(values))
        held = [self.keys, self.key_scale, self.values, self.value_scale]
        for row in range(keys.shape[0]):
            for part, piece in enumerate(pieces):
                start = (row, 0, index[row], 0)[: piece.ndim + 1]
                held[part] = lax.dynamic_update_slice(held[part], piece[row][None, :, None], start)
        return Int8Cache(keys=held[0], key_scale=held[1], values=held[2], value_scale=held[3])

    def write_prefix(
        self, keys: Float[Array, "B T K H"], values: Float[Array, "B T K H"]
    ) -> Int8Cache:
        """Put T steps of every row at slots 0 to T - 1."""

        def put(held: Array, piece: Array) -> Array:
            return lax.dynamic_update_slice(held, piece.swapaxes(1, 2), (0,) * held.ndim)

        (new_keys, key_scale), (new_values, value_scale) = round_rows(keys), round_rows(values)
        return Int8Cache(
            keys=put(self.keys, new_keys),
            key_scale=put(self.key_scale, key_scale),
            values=put(self.values, new_values),
            value_scale=put(self.value_scale, value_scale),
        )

    def attend(
        self, query: Float[Array, "B N H"], length: Int[Array, " B"], *, scale: float
    ) -> Float[Array, "B N H"]:
        """Attention of one query a row over the first ``length[b]`` slots.

        One of a few compiled programs runs, by the longest row, over a part of the cache that
        holds it. Slots a short row does not have add exactly zero.
        """
        parts = [
            functools.partial(self._attend_first, query, length, end, scale)
            for end in pieces(self.keys.shape[2])
        ]
        ends = jnp.asarray(pieces(self.keys.shape[2]))
        return lax.switch(jnp.searchsorted(ends, jnp.max(length)), parts)

    def _attend_first(
        self, query: Float[Array, "B N H"], length: Int[Array, " B"], slots: int, scale: float
    ) -> Float[Array, "B N H"]:
        batch, heads, width = query.shape
        kv_heads = self.keys.shape[1]
        grouped = query.reshape(batch, kv_heads, heads // kv_heads, width)
        *digits, step = round_rows_twice(grouped)
        # The cache is the left operand, as weights are.
        sums = jnp.einsum(
            "BKSH,BKGH->BKSG",
            self.keys[:, :, :slots],
            jnp.concatenate(digits, axis=2),
            preferred_element_type=jnp.int32,
        )
        high, low = jnp.split(sums.swapaxes(2, 3).astype(jnp.float32), 2, axis=2)
        scores = (high + low / BASE) * (scale * step[..., None])
        scores = scores * self.key_scale[:, :, None, :slots]
        there = jnp.arange(slots) < length[:, None, None, None]
        weights = jax.nn.softmax(jnp.where(there, scores, MASKED), axis=-1)
        # Weights times the values' scales, in two digits of base 127: with one, whatever is
        # below 1/254 of the largest would be lost, and many small weights are much together.
        scaled = weights * self.value_scale[:, :, None, :slots]
        peak = jnp.max(scaled, axis=-1, keepdims=True)
        number = jnp.round(scaled * (LEVELS**2 / jnp.maximum(peak, SMALLEST)))
        first = jnp.floor(number / LEVELS)
        parts = jnp.concatenate([first, number - LEVELS * first], axis=2).astype(jnp.int8)
        sums = jnp.einsum(
            "BKGS,BKSH->BKGH", parts, self.values[:, :, :slots], preferred_element_type=jnp.int32
        )
        high, low = jnp.split(sums.astype(jnp.float32), 2, axis=2)
        out = (high * LEVELS + low) * (peak / LEVELS**2)
        return out.reshape(batch, heads, width)
