"""int8 products: exact sums, one scale an output and one a row, and nothing hidden."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dia2_jax.nn import quantized
from dia2_jax.nn.linear import Linear
from dia2_jax.nn.quantized import BASE, project_int8, quantize, round_rows_twice


def values(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(params=[True, False], ids=["kernels", "xla"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernels of this processor, if it has any, and without."""
    if not request.param:
        monkeypatch.setattr(quantized, "use_int8", lambda: False)


@pytest.mark.parametrize("block", [1, 1 << 20])
def test_a_rounded_weight_is_the_nearest(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "_BLOCK_BYTES", block)
    weight = values((9, 40), 0) * np.geomspace(1e-3, 1e3, 9, dtype=np.float32)[:, None]
    rounded, scale = quantize(weight)
    assert (rounded.dtype, scale.dtype, scale.shape) == (np.int8, np.float32, (9,))
    np.testing.assert_array_equal(np.abs(rounded).max(axis=1), 127)
    error = np.abs(rounded * scale[:, None] - weight)
    assert (error <= scale[:, None] * 0.5001).all()


@pytest.mark.usefixtures("kernels")
def test_zeros_stay_and_what_is_not_finite_shows() -> None:
    weight = values((5, 8), 0)
    weight[1], weight[2, 3], weight[3, 0], weight[4] = 0, np.nan, np.inf, 1e-38
    with np.errstate(all="raise", under="ignore"):
        rounded, scale = quantize(weight)
    assert not rounded[1].any() and scale[1] == 0
    y = np.asarray(project_int8(jnp.asarray(values((2, 8), 1)), rounded, scale))
    assert np.isfinite(y[:, [0, 1, 4]]).all() and np.isnan(y[:, [2, 3]]).all()


def test_two_digits_are_within_a_64516th_of_the_largest() -> None:
    x = values((7, 300), 1) * np.geomspace(1e-3, 1e3, 7, dtype=np.float32)[:, None]
    first, second, step = map(np.asarray, jax.jit(round_rows_twice)(x))
    assert (first.dtype, second.dtype) == (np.int8, np.int8)
    assert np.abs(first).max() == 127 and 120 < np.abs(second).max() <= 127
    restored = (first + second / BASE) * step[:, None].astype(np.float64)
    assert (np.abs(restored - x) <= np.abs(x).max(axis=1, keepdims=True) / 64_516 * 1.01).all()


@pytest.mark.usefixtures("kernels")
def test_a_product_is_that_of_the_rounded_weight() -> None:
    x, (weight, scale) = values((2, 3, 48), 1), quantize(values((10, 48), 0))
    exact = x @ weight.astype(np.float64).T * scale
    y = project_int8(jnp.asarray(x), weight, scale)
    assert y.dtype == jnp.float32 and y.shape == (2, 3, 10)
    np.testing.assert_allclose(y, exact, atol=1e-3)
    # One digit of the activations would be 50 times as far away.
    step = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
    coarse = np.rint(x / step) @ weight.astype(np.float64).T * step * scale
    assert np.abs(coarse - exact).max() > 50 * np.abs(y - exact).max()


@pytest.mark.usefixtures("kernels")
def test_a_row_is_the_same_alone_and_among_others() -> None:
    x, (weight, scale) = jnp.asarray(values((40, 48), 1)), quantize(values((10, 48), 0))
    x = x.at[3].set(jnp.nan).at[4].set(0).at[5].multiply(1e-36)
    product = jax.jit(lambda *a: project_int8(*a))
    together = np.asarray(product(x, weight, scale))
    alone = np.concatenate([product(row[None], weight, scale) for row in x])
    np.testing.assert_array_equal(together, alone)
    assert np.isnan(together[3]).all() and not together[4].any()
    assert np.isfinite(np.delete(together, 3, axis=0)).all()


def test_the_weights_are_the_left_operand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The right one is packed anew on every call."""
    monkeypatch.setattr(quantized, "use_int8", lambda: False)
    weight, scale = quantize(values((10, 48), 0))
    program = (
        jax.jit(lambda *a: project_int8(*a)).lower(jnp.zeros((2, 48)), weight, scale).as_text()
    )
    assert "(tensor<10x48xi8>, tensor<4x48xi8>) -> tensor<10x4xi32>" in program


def test_a_linear_map_in_int8_adds_its_bias() -> None:
    layer = Linear(48, 10, use_bias=True, rngs=nnx.Rngs(0))
    x, whole = jnp.asarray(values((2, 48), 1)), layer.weight[...]
    layer.bias.set_value(jnp.asarray(values((10,), 2)))
    before = layer(x)
    layer.make_int8()
    weight, scale = quantize(np.asarray(whole))
    layer.weight.set_value(jnp.asarray(weight))
    layer.weight_scale.set_value(jnp.asarray(scale))
    np.testing.assert_allclose(layer(x), before, atol=0.05)
    np.testing.assert_array_equal(layer(x), project_int8(x, weight, scale) + layer.bias[...])
