"""Projections: the small-row path equals the plain one, and sums are float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dia2_jax.nn import linear
from dia2_jax.nn.linear import Embedding, Linear, fan_in_init, project


def values(shape: tuple[int, ...], seed: int, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


def reference(x: jax.Array, weight: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T


@pytest.fixture(params=[True, False], ids=["kernels", "xla"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernels of this processor, if it has any, and without."""
    if not request.param:
        monkeypatch.setattr(linear, "use_float32", lambda: False)


# Below, at and beyond the limits of the kernel and the small-row path; an odd width has no halves.
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("rows", [1, 2, 8, 9, linear._FEW_ROWS, linear._FEW_ROWS + 1])
@pytest.mark.parametrize("outputs", [6, 7])
def test_every_path_is_the_matrix_product(rows: int, outputs: int) -> None:
    x, weight = values((rows, 24), 0), values((outputs, 24), 1)
    y = project(x, weight)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, reference(x, weight), atol=2e-5)


def test_small_row_path_is_another_program_with_the_same_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear, "use_float32", lambda: False)
    x, weight = values((2, 3, 24), 0), values((10, 24), 1)
    small, small_program = project(x, weight), jax.jit(project).lower(x, weight).as_text()
    monkeypatch.setattr(linear, "_FEW_ROWS", 0)
    plain_program = jax.jit(lambda *a: project(*a)).lower(x, weight).as_text()
    assert "2x5x24" in small_program and "2x5x24" not in plain_program
    assert small.shape == (2, 3, 10)
    np.testing.assert_allclose(small, project(x, weight), atol=1e-5)


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize(
    ("x_dtype", "w_dtype"),
    [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "float32")],
)
def test_narrow_operands_accumulate_in_float32(rows: int, x_dtype: str, w_dtype: str) -> None:
    """Summing 2,048 products in bfloat16 would be wrong in the first digits."""
    x, weight = values((rows, 2048), 0, x_dtype), values((8, 2048), 1, w_dtype)
    y = project(x, weight)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, reference(x, weight), atol=1e-3)
    narrow = jnp.einsum("BD,FD->BF", x.astype("bfloat16"), weight.astype("bfloat16"))
    assert np.abs(np.asarray(narrow, np.float64) - reference(x, weight)).max() > 0.02


def test_linear_adds_its_bias_in_float32() -> None:
    layer = Linear(4, 3, use_bias=True, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.asarray([1.0, 2.0, 3.0], jnp.bfloat16)
    x = values((5, 4), 2)
    expected = reference(x, layer.weight[...]) + np.array([1, 2, 3])
    y = layer(x)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected, atol=1e-5)
    assert Linear(4, 3, rngs=nnx.Rngs(0)).bias is None


def test_embedding_looks_rows_up() -> None:
    table = Embedding(7, 3, rngs=nnx.Rngs(0))
    ids = jnp.asarray([[6, 0], [2, 2]])
    assert (np.asarray(table(ids)) == np.asarray(table.weight[...])[np.asarray(ids)]).all()


def test_initial_weights_have_variance_one_over_fan_in() -> None:
    weight = np.asarray(fan_in_init(jax.random.key(0), (200, 50), jnp.float32))
    assert weight.shape == (200, 50)
    assert abs(weight.var() * 50 - 1) < 0.05
