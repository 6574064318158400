"""Layers in a loop compute what they compute one by one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dia2_jax.nn import one_of as module
from dia2_jax.nn.linear import Linear
from dia2_jax.nn.norm import LayerNorm
from dia2_jax.nn.one_of import OneOf, in_turn, one_of
from dia2_jax.nn.quantized import quantize

WIDTH, LAYERS, ROWS = 6, 3, 4


class Block(nnx.Module):
    """Vectors and matrices, in modules of modules."""

    def __init__(self, seed: int, *, int8: bool) -> None:
        rngs = nnx.Rngs(seed)
        self.norm = LayerNorm(WIDTH, epsilon=1e-5)
        self.norm.bias[...] = jax.random.normal(jax.random.key(seed), (WIDTH,))
        self.linear = Linear(WIDTH, WIDTH, use_bias=True, rngs=rngs)
        assert self.linear.bias is not None
        self.linear.bias[...] = jnp.arange(WIDTH) / 10 + seed
        if int8:
            weight, scale = quantize(np.asarray(self.linear.weight[...]))
            self.linear.make_int8()
            self.linear.weight[...], self.linear.weight_scale[...] = weight, scale

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.linear(self.norm(x))


@pytest.fixture(params=[False, True], ids=["float32", "int8"])
def blocks(request) -> list[Block]:
    return [Block(seed, int8=request.param) for seed in range(LAYERS)]


@pytest.fixture
def x() -> jax.Array:
    return jax.random.normal(jax.random.key(9), (ROWS, WIDTH))


def test_every_one_is_itself(blocks, x) -> None:
    """A wrong one would be far off: the biases differ by 1."""
    chosen = jax.jit(lambda blocks, index, x: one_of(blocks, index)(x))
    for index, block in enumerate(blocks):
        np.testing.assert_allclose(chosen(blocks, index, x), block(x), atol=2e-6)


def test_a_loop_is_one_after_another(blocks, x, monkeypatch) -> None:
    def run(blocks, x):
        def step(number, block, carry):
            x, seen = carry
            return block(x), seen.at[number].set(number)

        return in_turn(blocks, step, (x, jnp.zeros(LAYERS, jnp.int32)))

    looped, seen = jax.jit(run)(blocks, x)
    assert "scan[" in str(jax.make_jaxpr(lambda *a: run(*a))(blocks, x))
    monkeypatch.setattr(module, "on_cpu", lambda: False)
    assert "scan[" not in str(jax.make_jaxpr(lambda *a: run(*a))(blocks, x))
    unrolled, also = jax.jit(lambda *a: run(*a))(blocks, x)
    np.testing.assert_allclose(looped, unrolled, atol=2e-6)
    expected = x
    for block in blocks:
        expected = block(expected)
    np.testing.assert_allclose(looped, expected, atol=2e-6)
    assert seen.tolist() == also.tolist() == [0, 1, 2]


def test_matrices_are_not_stacked(blocks, x) -> None:
    """A stacked one would be copied, layer by layer, before every product."""
    text = str(jax.make_jaxpr(lambda blocks, index: one_of(blocks, index)(x))(blocks, 0))
    assert f"[{LAYERS},{WIDTH}]" in text
    assert f"[{LAYERS},{WIDTH},{WIDTH}]" not in text


def test_it_says_what_it_is(x) -> None:
    weights = tuple(jnp.full((2, 5), float(n), jnp.bfloat16) for n in range(3))
    held = OneOf(weights, jnp.int32(1))
    assert held.shape == (2, 5) and held.dtype == jnp.bfloat16 and held[...] is held
    assert (held.apply(lambda x, w: x * w, jnp.bfloat16(3)) == 3).all()
