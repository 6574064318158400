"""A key-value cache of int8, as the int8 model attends over it.

At the end of a long take a step reads as much of a float32 cache as of int8 weights, and XLA's CPU
backend reads it slowly. Keys and values have a scale for every slot and head. Scores are int8
products with the rounded query; softmax is float32.
"""

from __future__ import annotations

from typing import ClassVar

import jax.numpy as jnp
from flax import struct
from jax import lax

from dia2_jax.nn.attention import attend_blocks, block_of
from dia2_jax.nn.kernels import attention_int8, use_int8
from dia2_jax.nn.quantized import BASE, LEVELS, SMALLEST, round_rows, round_rows_twice
from dia2_jax.typing import Array, Float, Int

#: Slots attended at a time: enough for the products to be as fast as one over all slots, few
#: enough to cost little early in a take.
BLOCK = 384


def nearest(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """``x`` as the cache gives it back."""
    rounded, step = round_rows(x)
    return (rounded * step[..., None]).astype(x.dtype)


@struct.dataclass
class Int8Cache:
    """Keys and values of all layers; slot s of row b counts once ``s < length[b]``.

    The kernel of all layers reads the fields in this order.

    Attributes:
      keys, values: ``[B, L, K, S, H]`` int8, S a multiple of ``BLOCK``.
      key_scale, value_scale: ``[B, L, K, S]`` float32.
    """

    block: ClassVar[int] = BLOCK

    keys: Int[Array, "B L K S H"]
    values: Int[Array, "B L K S H"]
    key_scale: Float[Array, "B L K S"]
    value_scale: Float[Array, "B L K S"]

    @classmethod
    def empty(cls, batch: int, layers: int, heads: int, slots: int, head_dim: int) -> Int8Cache:
        """A cache of at least ``slots`` slots, rounded up to whole blocks."""
        shape = (batch, layers, heads, -(-slots // BLOCK) * BLOCK)
        return cls(
            keys=jnp.zeros((*shape, head_dim), jnp.int8),
            values=jnp.zeros((*shape, head_dim), jnp.int8),
            key_scale=jnp.zeros(shape, jnp.float32),
            value_scale=jnp.zeros(shape, jnp.float32),
        )

    def write_step(
        self,
        layer: int | Int[Array, ""],
        keys: Float[Array, "B K H"],
        values: Float[Array, "B K H"],
        index: Int[Array, " B"],
    ) -> Int8Cache:
        """Put one step of a layer at every row's own slot; one update a row, as in ``KVCache``."""
        pieces = (*round_rows(keys), *round_rows(values))
        held = [self.keys, self.key_scale, self.values, self.value_scale]
        for row in range(keys.shape[0]):
            for part, piece in enumerate(pieces):
                start = (row, layer, 0, index[row], 0)[: piece.ndim + 2]
                held[part] = lax.dynamic_update_slice(
                    held[part], piece[row][None, None, :, None], start
                )
        return Int8Cache(keys=held[0], key_scale=held[1], values=held[2], value_scale=held[3])

    def write_prefix(
        self, layer: int, keys: Float[Array, "B T K H"], values: Float[Array, "B T K H"]
    ) -> Int8Cache:
        """Put T steps of a layer at slots 0 to T - 1 of every row."""

        def put(held: Array, piece: Array) -> Array:
            start = (0, layer, *[0] * (held.ndim - 2))
            return lax.dynamic_update_slice(held, piece.swapaxes(1, 2)[:, None], start)

        (new_keys, key_scale), (new_values, value_scale) = round_rows(keys), round_rows(values)
        return Int8Cache(
            keys=put(self.keys, new_keys),
            key_scale=put(self.key_scale, key_scale),
            values=put(self.values, new_values),
            value_scale=put(self.value_scale, value_scale),
        )

    def attend(
        self,
        query: Float[Array, "B K G H"],
        layer: int | Int[Array, ""],
        length: Int[Array, " B"],
    ) -> Float[Array, "B K G H"]:
        if not use_int8():
            return attend_blocks(self, query, layer, length)
        held = (self.keys, self.key_scale, self.values, self.value_scale)
        return attention_int8(query, *held, layer, length)

    def ask(self, query: Float[Array, "B K G H"]) -> tuple[Int[Array, "B K F H"], Array]:
        """Two int8 digits of every query, one after the other, and their scale ``[B, K, G]``."""
        first, second, step = round_rows_twice(query)
        return jnp.concatenate([first, second], axis=2), step

    def scores(
        self,
        asked: tuple[Int[Array, "B K F H"], Array],
        layer: int | Int[Array, ""],
        start: Int[Array, ""],
    ) -> Float[Array, "B K G S"]:
        digits, step = asked
        # The cache is the left operand, as weights are.
        sums = jnp.einsum(
            "BKSH,BKFH->BKSF",
            block_of(self.keys, layer, start, BLOCK, axis=3),
            digits,
            preferred_element_type=jnp.int32,
        )
        high, low = jnp.split(sums.swapaxes(2, 3).astype(jnp.float32), 2, axis=2)
        scale = block_of(self.key_scale, layer, start, BLOCK, axis=3)
        return (high + low / BASE) * step[..., None] * scale[:, :, None]

    def weighted(
        self, weights: Float[Array, "B K G S"], layer: int | Int[Array, ""], start: Int[Array, ""]
    ) -> Float[Array, "B K G H"]:
        # Weights times the values' scales, in two digits of base 127: with one, whatever is
        # below 1/254 of the largest would be lost, and many small weights are much together.
        scaled = weights * block_of(self.value_scale, layer, start, BLOCK, axis=3)[:, :, None]
        peak = jnp.max(scaled, axis=-1, keepdims=True)
        number = jnp.round(scaled * (LEVELS**2 / jnp.maximum(peak, SMALLEST)))
        first = jnp.floor(number / LEVELS)
        parts = jnp.concatenate([first, number - LEVELS * first], axis=2).astype(jnp.int8)
        sums = jnp.einsum(
            "BKFS,BKSH->BKFH",
            parts,
            block_of(self.values, layer, start, BLOCK, axis=3),
            preferred_element_type=jnp.int32,
        )
        high, low = jnp.split(sums.astype(jnp.float32), 2, axis=2)
        return (high * LEVELS + low) * (peak / LEVELS**2)
