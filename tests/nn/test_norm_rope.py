"""Norms and rotary positions against their formulas in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dia2_jax.nn import rope
from dia2_jax.nn.norm import LayerNorm, RMSNorm
from dia2_jax.nn.rope import inverse_frequencies


def normal(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def rotate(x: jax.Array, positions: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    turned = jax.jit(lambda x, p: rope.rotate(x, p, frequencies))(x, positions)
    return np.asarray(turned)


@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
def test_rms_norm_is_its_formula(epsilon: float) -> None:
    layer, x = RMSNorm(12, epsilon=epsilon), 3 * normal((2, 5, 12)) + 1
    layer.weight[...] = weight = normal((12,), 1)
    wide = np.asarray(x, np.float64)
    rms = np.sqrt((wide**2).mean(-1, keepdims=True) + epsilon)
    np.testing.assert_allclose(layer(x), wide / rms * np.asarray(weight), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("epsilon", [1e-5, 0.5])
def test_layer_norm_is_its_formula(epsilon: float) -> None:
    layer, x = LayerNorm(12, epsilon=epsilon), 3 * normal((2, 5, 12)) + 1
    layer.weight[...], layer.bias[...] = weight, bias = normal((12,), 1), normal((12,), 2)
    wide = np.asarray(x, np.float64)
    scaled = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + epsilon)
    expected = scaled * np.asarray(weight) + np.asarray(bias)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_norms_keep_the_dtype_and_take_statistics_in_float32(kind: type[nnx.Module]) -> None:
    """A mean of 2,048 squares summed in bfloat16 would stop growing at 256."""
    layer = kind(2048, epsilon=1e-6)  # type: ignore[call-arg]
    x = (normal((3, 2048)) + (4 if kind is RMSNorm else 0)).astype(jnp.bfloat16)
    y = layer(x)  # type: ignore[operator]
    assert y.dtype == jnp.bfloat16
    exact = layer(x.astype(jnp.float32))  # type: ignore[operator]
    assert (np.asarray(y) == np.asarray(exact.astype(jnp.bfloat16))).all()
    assert abs(np.square(np.asarray(exact, np.float64)).mean() - 1) < 1e-4


@pytest.mark.parametrize(("low", "high"), [(1, 10_000), (2, 300)])
def test_rotation_turns_each_plane_by_its_angle(low: float, high: float) -> None:
    """Plane i is (i, i + H/2), a complex number that is turned by position / timescale."""
    x, positions = normal((2, 4, 3, 8)), np.array([[0, 1, 7, 1499], [3, 2, 1, 0]])
    timescale = low * (high / low) ** (2 * np.arange(4) / 8)
    wide = np.asarray(x, np.float64)
    turned = (wide[..., :4] + 1j * wide[..., 4:]) * np.exp(
        1j * positions[..., None, None] / timescale
    )
    frequencies = inverse_frequencies(8, min_timescale=low, max_timescale=high)
    assert frequencies.dtype == np.float32
    y = rotate(x, positions, frequencies)
    # Float32 holds an angle of 1,499 radians to 1e-4.
    np.testing.assert_allclose(y, np.concatenate([turned.real, turned.imag], -1), atol=3e-4)
    assert (y[0, 0] == np.asarray(x)[0, 0]).all()


def test_rotated_products_depend_on_distance_only() -> None:
    query, keys = normal((1, 1, 1, 16)), normal((1, 1, 1, 16), 1)
    frequencies = inverse_frequencies(16)

    positions = np.array([[900, 890, 10, 0]])
    several = (1, 4, 1, 16)
    left = rotate(jnp.broadcast_to(query, several), positions, frequencies)[0, :, 0]
    right = rotate(jnp.broadcast_to(keys, several), positions, frequencies)[0, :, 0]
    scores = left @ right.T
    assert abs(scores[0, 1] - scores[2, 3]) < 1e-3
    assert abs(scores[0, 1] - scores[1, 0]) > 1e-2


def test_bfloat16_angles_are_not_rounded() -> None:
    x = normal((1, 1, 1, 8)).astype(jnp.bfloat16)
    frequencies, position = inverse_frequencies(8), np.array([[1001]])
    narrow = rotate(x, position, frequencies)
    assert narrow.dtype == jnp.bfloat16
    exact = rotate(x.astype(jnp.float32), position, frequencies)
    np.testing.assert_allclose(np.asarray(narrow, np.float32), exact, atol=0.02)
