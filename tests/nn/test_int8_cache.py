"""The int8 cache: close to attention in float32 over what it holds, at every length."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dia2_jax.nn.attention import BLOCK, KVCache, attend_cache
from dia2_jax.nn.int8_cache import Int8Cache, nearest, pieces

BATCH, HEADS, GROUP, WIDTH = 3, 2, 2, 8


def normal(shape: tuple[int, ...], seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


@pytest.fixture(scope="module")
def filled() -> tuple[KVCache, Int8Cache]:
    """The same keys and values, the first with what the second could hold of them."""
    slots = 4 * BLOCK
    keys, values = (normal((BATCH, slots, HEADS, WIDTH), seed) for seed in (1, 2))
    size = (BATCH, HEADS, slots, WIDTH)
    whole = KVCache.empty(*size, jnp.float32).write_prefix(nearest(keys), nearest(values))
    return whole, Int8Cache.empty(*size).write_prefix(keys, values)


@pytest.mark.parametrize("lengths", [(1, 2, 3), (5, BLOCK, 3), (BLOCK + 1, 7, 400), (512, 1, 300)])
def test_it_attends_as_float32_does(filled, lengths) -> None:
    query, length = normal((BATCH, HEADS * GROUP, WIDTH), 3), jnp.asarray(lengths)
    expected = attend_cache(query, filled[0], length, scale=1.0)
    out = jax.jit(lambda cache, q, n: cache.attend(q, n, scale=1.0))(filled[1], query, length)
    np.testing.assert_allclose(out, expected, atol=0.03)


def test_many_small_weights_are_not_lost() -> None:
    """One slot of weight 1/4, and 300 that have 1/400 each: a digit alone would drop these."""
    slots, length = 3 * BLOCK, 301
    keys = jnp.zeros((1, slots, 1, WIDTH)).at[0, 0, 0, 0].set(np.log(100.0))
    values = jnp.ones((1, slots, 1, WIDTH)).at[0, 0].set(0.0)
    cache = Int8Cache.empty(1, 1, slots, WIDTH).write_prefix(keys, values)
    query = jnp.zeros((1, 1, WIDTH)).at[..., 0].set(1.0)
    out = cache.attend(query, jnp.asarray([length]), scale=1.0)
    np.testing.assert_allclose(out, 300 / 400, atol=0.01)


def test_a_step_writes_its_own_slot_and_no_other(filled) -> None:
    index = np.array([0, 200, 511])
    keys, values = normal((BATCH, HEADS, WIDTH), 5), normal((BATCH, HEADS, WIDTH), 6)
    before = filled[1]
    after = jax.jit(Int8Cache.write_step)(before, keys, values, jnp.asarray(index))
    for row, slot in enumerate(index):
        for held, scale, new in (
            (after.keys, after.key_scale, keys),
            (after.values, after.value_scale, values),
        ):
            restored = np.asarray(held[row, :, slot]) * np.asarray(scale[row, :, slot])[:, None]
            np.testing.assert_allclose(restored, nearest(new[row]), rtol=1e-6)
    for name in ("keys", "values", "key_scale", "value_scale"):
        old, new = np.asarray(getattr(before, name)), np.array(getattr(after, name))
        for row, slot in enumerate(index):
            new[row, :, slot] = old[row, :, slot]
        np.testing.assert_array_equal(old, new)


def test_what_lies_beyond_a_row_changes_nothing(filled) -> None:
    query, length = normal((BATCH, HEADS * GROUP, WIDTH), 3), jnp.asarray([4, 60, 100])
    attend = jax.jit(lambda cache: cache.attend(query, length, scale=1.0))
    cache = filled[1]
    other = cache.replace(
        keys=cache.keys.at[:, :, 100:].set(77), value_scale=cache.value_scale.at[0, :, 4:].set(9.0)
    )
    np.testing.assert_array_equal(attend(cache), attend(other))


def test_pieces_are_whole_blocks_up_to_all_of_it() -> None:
    assert pieces(BLOCK) == [BLOCK]
    assert pieces(2 * BLOCK) == [BLOCK, 2 * BLOCK]
    assert pieces(12 * BLOCK) == [3 * BLOCK, 6 * BLOCK, 9 * BLOCK, 12 * BLOCK]
