"""The codec's transformer: window, positions, and the ring against the whole."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from streaming_contract import Contract, chunkings, filled, normal, run

from dia2_jax.config import MimiConfig
from dia2_jax.mimi.transformer import Attention, Ring, Transformer

WINDOW = 5
CONFIG = MimiConfig(
    hidden_size=12,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    intermediate_size=8,
    num_hidden_layers=2,
    sliding_window=WINDOW,
    upsample_groups=12,
    rope_theta=100.0,
)


def rotated(x, position, theta):
    """Half-split rotary positions, of one vector."""
    half = len(x) // 2
    angle = position * theta ** (-np.arange(half) * 2 / len(x))
    a, b = x[:half], x[half:]
    return np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)]
    )


def attention_by_hand(layer, x):
    """Definition, one query at a time: itself and the WINDOW - 1 steps before it."""
    weights = [np.asarray(p.weight[...], np.float64) for p in (layer.q_proj, layer.k_proj)]
    query, keys = (x @ w.T for w in weights)
    values = x @ np.asarray(layer.v_proj.weight[...], np.float64).T
    steps, width = x.shape[0], layer.head_dim
    query, keys, values = (y.reshape(steps, -1, width) for y in (query, keys, values))
    out = np.zeros((steps, layer.heads, width))
    for t in range(steps):
        seen = range(max(0, t - WINDOW + 1), t + 1)
        for head in range(layer.heads):
            shared = head // (layer.heads // layer.kv_heads)
            q = rotated(query[t, head], t, CONFIG.rope_theta)
            k = np.stack([rotated(keys[s, shared], s, CONFIG.rope_theta) for s in seen])
            scores = np.exp(k @ q / width**0.5)
            out[t, head] = scores @ values[list(seen), shared] / scores.sum()
    return out.reshape(steps, -1) @ np.asarray(layer.o_proj.weight[...], np.float64).T


@pytest.fixture(scope="module")
def attention():
    return filled(lambda: Attention(CONFIG, param_dtype=jnp.float32, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("steps", [2 * WINDOW, 4 * WINDOW + 3])
def test_attention_is_its_definition(attention, steps):
    """Up to two windows it is one product, beyond that it goes block by block."""
    x = normal(np.random.default_rng(0), 2, steps, CONFIG.hidden_size) * 2
    positions = np.broadcast_to(np.arange(steps), (2, steps))
    got = jax.jit(lambda x, positions: attention(x, positions))(x, positions)
    for row in range(2):
        np.testing.assert_allclose(got[row], attention_by_hand(attention, x[row]), atol=1e-5)


@pytest.fixture(scope="module")
def contract():
    layer = filled(lambda: Transformer(CONFIG, rngs=nnx.Rngs(0)))
    x = normal(np.random.default_rng(1), 2, 4 * WINDOW + 3, CONFIG.hidden_size)
    return Contract(layer, x, atol=2e-5)


def test_streaming_contract(contract):
    """Chunks shorter than, longer than, and far longer than the ring."""
    contract.check_all()
    contract.check_chunks([1, 20, 1, 1])


@settings(max_examples=10)
@given(st.data())
def test_any_chunking_is_the_whole(contract, data):
    contract.check_chunks(data.draw(chunkings(contract.x.shape[1], 1)))


def test_rows_may_be_at_different_steps(contract):
    """A stream joined to a batch in its middle goes on as it would have alone."""
    alone = contract.state(1)
    _, ahead = contract.step(contract.x[:1, :7], alone)
    joined = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), ahead, contract.state(1))
    x = np.concatenate([contract.x[:1, 7:17], contract.x[1:, :10]])
    got = run(contract.step, x, joined, [5] * 2)
    np.testing.assert_allclose(got[0], contract.expected[0, 7:17], rtol=0, atol=2e-5)
    np.testing.assert_allclose(got[1], contract.expected[1, :10], rtol=0, atol=2e-5)


write_ring = jax.jit(Ring.write)
read_ring = jax.jit(lambda ring, position: (ring.positions(position), ring.keys, ring.values))


@settings(max_examples=30)
@given(
    lengths=st.lists(st.sampled_from([1, 3, 6]), min_size=1, max_size=6),
    late=st.integers(0, 3),
)
def test_a_ring_holds_the_last_steps(lengths, late):
    """Model: a list of everything written, by row; row 1 starts ``late`` steps ahead."""
    slots = 4
    ring = Ring(*np.zeros((2, 2, 2, 1, slots, 1), np.float32))
    position = np.array([0, late])
    for size in lengths:
        steps = position[:, None] + np.arange(size)
        new = steps[:, None, :, None].astype(np.float32)
        ring = write_ring(ring, 1, new, -new, position)
        position = position + size
        held, keys, values = map(np.asarray, read_ring(ring, position))
        for row in range(2):
            first = max(position[row] - slots, 0)
            assert set(range(first, position[row])) == {p for p in held[row] if p >= 0}
            for slot, step in enumerate(held[row]):
                if step >= (late if row else 0):
                    assert keys[row, 1, 0, slot, 0] == step == -values[row, 1, 0, slot, 0]
