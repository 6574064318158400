"""The int8 cache: close to attention in float32 over what it holds, at every length."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dia2_jax.nn.attention import KVCache, attend_cache
from dia2_jax.nn.int8_cache import BLOCK, Int8Cache, nearest

BATCH, LAYERS, HEADS, GROUP, WIDTH = 3, 3, 2, 2, 8
#: The layer that is looked at; the others hold zeros.
LAYER = 1


def normal(shape: tuple[int, ...], seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


@pytest.fixture(scope="module")
def filled() -> tuple[KVCache, Int8Cache]:
    """The same keys and values, the first with what the second could hold of them."""
    slots = 2 * BLOCK
    keys, values = (normal((BATCH, slots, HEADS, WIDTH), seed) for seed in (1, 2))
    size = (BATCH, LAYERS, HEADS, slots, WIDTH)
    whole = KVCache.empty(*size, jnp.float32).write_prefix(LAYER, nearest(keys), nearest(values))
    return whole, Int8Cache.empty(*size).write_prefix(LAYER, keys, values)


@jax.jit
def attended(query: jax.Array, cache: KVCache | Int8Cache, length: jax.Array) -> jax.Array:
    return attend_cache(query, cache, LAYER, length, scale=1.0)


@pytest.mark.parametrize(
    "lengths", [(1, 2, 3), (5, BLOCK, 3), (BLOCK + 1, 7, 300), (2 * BLOCK, 1, 500)]
)
def test_it_attends_as_float32_does(filled, lengths) -> None:
    query, length = normal((BATCH, HEADS * GROUP, WIDTH), 3), jnp.asarray(lengths)
    expected = attended(query, filled[0], length)
    out = attended(query, filled[1], length)
    np.testing.assert_allclose(out, expected, atol=0.03)


def test_many_small_weights_are_not_lost() -> None:
    """One slot of weight 1/4, and 300 that have 1/400 each: a digit alone would drop these."""
    slots, length = BLOCK, 301
    keys = jnp.zeros((1, slots, 1, WIDTH)).at[0, 0, 0, 0].set(np.log(100.0))
    values = jnp.ones((1, slots, 1, WIDTH)).at[0, 0].set(0.0)
    cache = Int8Cache.empty(1, LAYERS, 1, slots, WIDTH).write_prefix(LAYER, keys, values)
    query = jnp.zeros((1, 1, WIDTH)).at[..., 0].set(1.0)
    out = attended(query, cache, jnp.asarray([length]))
    np.testing.assert_allclose(out, 300 / 400, atol=0.01)


def test_a_step_writes_its_own_slot_and_no_other(filled) -> None:
    index = np.array([0, 200, 511])
    keys, values = normal((BATCH, HEADS, WIDTH), 5), normal((BATCH, HEADS, WIDTH), 6)
    before = filled[1]
    after = jax.jit(Int8Cache.write_step)(before, LAYER, keys, values, jnp.asarray(index))
    for row, slot in enumerate(index):
        for held, scale, new in (
            (after.keys, after.key_scale, keys),
            (after.values, after.value_scale, values),
        ):
            at = (row, LAYER, slice(None), slot)
            restored = np.asarray(held[at]) * np.asarray(scale[at])[:, None]
            np.testing.assert_allclose(restored, nearest(new[row]), rtol=1e-6)
    for name in ("keys", "values", "key_scale", "value_scale"):
        old, new = np.asarray(getattr(before, name)), np.array(getattr(after, name))
        for row, slot in enumerate(index):
            new[row, LAYER, :, slot] = old[row, LAYER, :, slot]
        np.testing.assert_array_equal(old, new)


def test_what_lies_beyond_a_row_changes_nothing(filled) -> None:
    query, length = normal((BATCH, HEADS * GROUP, WIDTH), 3), jnp.asarray([4, 60, 100])
    cache = filled[1]
    other = cache.replace(
        keys=cache.keys.at[:, LAYER, :, 100:].set(77).at[:, 0].set(5),
        value_scale=cache.value_scale.at[0, LAYER, :, 4:].set(9.0),
    )
    np.testing.assert_array_equal(attended(query, cache, length), attended(query, other, length))


def test_a_row_is_the_same_bits_whoever_is_beside_it(filled) -> None:
    """Longer rows make it visit blocks that it does not have."""
    query = normal((BATCH, HEADS * GROUP, WIDTH), 3)
    alone = attended(query, filled[1], jnp.asarray([5, 1, 1]))[0]
    together = attended(query, filled[1], jnp.asarray([5, 2 * BLOCK, BLOCK]))[0]
    np.testing.assert_array_equal(alone, together)


def test_cache_is_whole_blocks_long() -> None:
    for slots, blocks in ((1, 1), (BLOCK, 1), (BLOCK + 1, 2)):
        cache = Int8Cache.empty(1, LAYERS, 3, slots, 2)
        assert cache.keys.shape == cache.values.shape == (1, LAYERS, 3, blocks * BLOCK, 2)
        assert cache.key_scale.shape == cache.value_scale.shape == (1, LAYERS, 3, blocks * BLOCK)
