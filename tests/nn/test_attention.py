"""Attention: a plain formula, and the cached step against the whole sequence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dia2_jax.nn.attention import BLOCK, KVCache, attend, attend_cache

ROWS, HEADS, KV_HEADS, WIDTH, SLOTS = 3, 4, 2, 5, 3 * BLOCK - 7
SCALE = 1.3
#: Layers of the cache, and the one that is looked at.
LAYERS, LAYER = 3, 1
BORDERS = sorted({1, 2, SLOTS} | {n * BLOCK + d for n in (1, 2) for d in (-1, 0, 1)})


def normal(shape: tuple[int, ...], seed: int, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


def formula(query, keys, values, mask, scale) -> np.ndarray:
    """Softmax attention head by head in float64."""
    query, keys, values = (np.asarray(x, np.float64) for x in (query, keys, values))
    batch, steps, heads, width = query.shape
    group = heads // keys.shape[2]
    out = np.zeros_like(query)
    for b in range(batch):
        for n in range(heads):
            scores = scale * query[b, :, n] @ keys[b, :, n // group].T
            scores = np.where(mask[b], scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[b, :, n] = weights / weights.sum(-1, keepdims=True) @ values[b, :, n // group]
    return out


def filled(dtype: str = "float32") -> KVCache:
    shape = (ROWS, LAYERS, KV_HEADS, 3 * BLOCK, WIDTH)
    keys, values = normal(shape, 1, dtype), normal(shape, 2, dtype)
    return KVCache(keys=keys.swapaxes(3, 4), values=values)


def held(cache: KVCache) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of all layers, both with the slots on axis 3."""
    return np.asarray(cache.keys).swapaxes(3, 4), np.asarray(cache.values)


def in_time(cache: KVCache) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of the layer as ``attend`` reads them, slot after slot."""
    keys, values = held(cache)
    return keys[:, LAYER].swapaxes(1, 2), values[:, LAYER].swapaxes(1, 2)


step = jax.jit(lambda query, cache, length: attend_cache(query, cache, LAYER, length, scale=SCALE))
whole = jax.jit(lambda query, keys, values, mask: attend(query, keys, values, mask, scale=SCALE))


def test_attend_is_the_formula() -> None:
    query = normal((2, 6, HEADS, WIDTH), 0)
    keys, values = (normal((2, 9, KV_HEADS, WIDTH), seed) for seed in (1, 2))
    mask = np.random.default_rng(0).random((2, 6, 9)) < 0.6
    mask[:, :, 0] = True
    out = whole(query, keys, values, jnp.asarray(mask))
    np.testing.assert_allclose(out, formula(query, keys, values, mask, SCALE), atol=1e-5)


@settings(max_examples=40)
@given(st.lists(st.one_of(st.sampled_from(BORDERS), st.integers(1, SLOTS)), min_size=3, max_size=3))
@example([BLOCK, BLOCK + 1, 1])
@example([1, 1, 1])
@example([3 * BLOCK - 7, 2 * BLOCK, BLOCK - 1])
def test_cached_step_equals_whole_attention(lengths: list[int]) -> None:
    """Rows of unequal length, at and around the borders of blocks."""
    cache, query = filled(), normal((ROWS, HEADS, WIDTH), 0)
    out = step(query, cache, jnp.asarray(lengths))
    mask = np.arange(3 * BLOCK)[None, None] < np.asarray(lengths)[:, None, None]
    keys, values = in_time(cache)
    np.testing.assert_allclose(
        out, whole(np.asarray(query)[:, None], keys, values, mask)[:, 0], atol=1e-5
    )


def test_a_row_does_not_see_the_others_nor_what_lies_beyond_it() -> None:
    """Bit for bit, though longer rows make it visit blocks of its own garbage."""
    cache, query = filled(), normal((ROWS, HEADS, WIDTH), 0)
    alone = step(query, cache, jnp.asarray([5, 1, 1]))[0]

    keys, values = map(np.array, held(cache))
    for spoiled in (keys, values):
        spoiled[1:] *= 2
        spoiled[:, :LAYER] = spoiled[:, LAYER + 1 :] = 7
        spoiled[0, :, :, 5:] = 1e3
    dirty = KVCache(keys=keys.swapaxes(3, 4), values=values)
    together = step(query, dirty, jnp.asarray([5, SLOTS, 2 * BLOCK]))[0]
    assert (np.asarray(alone) == np.asarray(together)).all()


def test_large_scores_do_not_overflow() -> None:
    cache, query = filled(), 200 * normal((ROWS, HEADS, WIDTH), 0)
    lengths = [SLOTS, BLOCK, 3]
    out = np.asarray(step(query, cache, jnp.asarray(lengths)))
    assert np.isfinite(out).all()
    mask = np.arange(3 * BLOCK)[None, None] < np.array(lengths)[:, None, None]
    keys, values = in_time(cache)
    expected = formula(np.asarray(query)[:, None], keys, values, mask, SCALE)[:, 0]
    np.testing.assert_allclose(out, expected, atol=1e-3)


def test_bfloat16_cache_scores_in_float32() -> None:
    cache, query = filled("bfloat16"), normal((ROWS, HEADS, WIDTH), 0, "bfloat16")
    out = step(query, cache, jnp.asarray([SLOTS] * ROWS))
    assert out.dtype == jnp.bfloat16
    keys, values = in_time(cache)
    mask = np.arange(3 * BLOCK)[None, None] < np.full((ROWS, 1, 1), SLOTS)
    expected = formula(np.asarray(query)[:, None], keys, values, mask, SCALE)[:, 0]
    # One rounding of the weights and one of the result: 2 ** -8 each.
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=1e-2)


def test_cache_is_whole_blocks_long() -> None:
    for slots, blocks in ((1, 1), (BLOCK, 1), (BLOCK + 1, 2)):
        cache = KVCache.empty(1, LAYERS, 3, slots, 2, jnp.float32)
        assert cache.keys.shape == (1, LAYERS, 3, 2, blocks * BLOCK)
        assert cache.values.shape == (1, LAYERS, 3, blocks * BLOCK, 2)


@pytest.mark.parametrize("index", [[0, 3, BLOCK], [BLOCK - 1, 0, 0]])
def test_a_step_is_written_to_each_row_s_own_slot(index: list[int]) -> None:
    before = filled()
    keys, values = (normal((ROWS, KV_HEADS, WIDTH), seed) for seed in (7, 8))
    after = jax.jit(KVCache.write_step)(before, LAYER, keys, values, jnp.asarray(index))
    for old, new, put in zip(held(before), held(after), (keys, values), strict=True):
        expected = np.array(old)
        for row, slot in enumerate(index):
            expected[row, LAYER, :, slot] = np.asarray(put)[row]
        assert (new == expected).all()


def test_a_prefix_is_written_from_slot_0_on() -> None:
    before = filled()
    keys, values = (normal((ROWS, 4, KV_HEADS, WIDTH), seed) for seed in (7, 8))
    after = before.write_prefix(LAYER, keys, values)
    for old, new, put in zip(held(before), held(after), (keys, values), strict=True):
        expected = np.array(old)
        expected[:, LAYER, :, :4] = np.asarray(put).swapaxes(1, 2)
        assert (new == expected).all()
