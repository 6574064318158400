"""The kernels in C: the formula, XLA's own result, and no row that depends on another.

They are compiled here; where the processor or a compiler is missing, what is tested is that XLA
takes their place and that the reason is told.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dia2_jax.nn import kernels as module
from dia2_jax.nn.attention import KVCache, attend_blocks
from dia2_jax.nn.int8_cache import Int8Cache
from dia2_jax.nn.kernels import (
    KERNELS_VARIABLE,
    Kernels,
    attention_float32,
    attention_int8,
    kernels,
    product_float32,
    product_int8,
)
from dia2_jax.nn.linear import project
from dia2_jax.nn.quantized import LEVELS, project_int8, quantize

have_float32 = pytest.mark.skipif(not kernels().float32, reason=kernels().reason)
have_int8 = pytest.mark.skipif(not kernels().int8, reason=kernels().reason)


@pytest.mark.skipif(KERNELS_VARIABLE in os.environ, reason="kernels were asked to be off")
def test_where_they_can_be_compiled_there_are_kernels() -> None:
    """Else a mistake in their code would skip all tests of them."""
    able = module._processor_flags() >= module._NEEDED
    compiler = any(shutil.which(name) for name in module._COMPILERS)
    assert kernels().float32 == (able and compiler), kernels().reason


def normal(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture
def by_xla(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., jax.Array]], Callable]:
    """The same function as XLA computes it."""

    def without(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        def run(*arguments: jax.Array) -> jax.Array:
            with monkeypatch.context() as patch:
                patch.setattr(module, "kernels", lambda: Kernels(False, False, "a test"))
                return jax.jit(lambda *a: function(*a))(*arguments)

        return run

    return without


# Around what is computed at a time (8 rows or 4, 8 outputs, 16 or 64 inputs); enough for threads.
SHAPES = st.tuples(
    st.integers(1, 19),
    st.one_of(st.integers(1, 20), st.just(700)),
    st.one_of(st.integers(1, 20), st.sampled_from([63, 64, 65, 127, 128, 130, 300])),
)


@have_float32
@settings(max_examples=30)
@given(SHAPES)
def test_a_float32_product_is_the_matrix_product(shape: tuple[int, int, int]) -> None:
    rows, outputs, inputs = shape
    x, weight = normal((rows, inputs), 0), normal((outputs, inputs), 1)
    y = np.asarray(product_float32(jnp.asarray(x), jnp.asarray(weight)))
    exact = x.astype(np.float64) @ weight.T.astype(np.float64)
    np.testing.assert_allclose(y, exact, atol=1e-6 * inputs, rtol=1e-6)


@have_int8
@settings(max_examples=30)
@given(SHAPES)
def test_an_int8_product_is_that_of_the_rounded_numbers(shape: tuple[int, int, int]) -> None:
    rows, outputs, inputs = shape
    weight, scale = quantize(normal((outputs, inputs), 1))
    x = normal((rows, inputs), 0)
    y = np.asarray(product_int8(jnp.asarray(x), jnp.asarray(weight), jnp.asarray(scale)))
    exact = x.astype(np.float64) @ (weight * scale.astype(np.float64)[:, None]).T
    # Half a second digit of every input, all in one direction.
    off = (
        np.abs(x).max(axis=1, keepdims=True)
        / (2 * LEVELS * 254)
        * np.abs(weight * scale[:, None]).sum(1)
    )
    assert (np.abs(y - exact) <= off + 1e-6 * np.abs(exact).max() + 1e-6).all()


@have_int8
def test_the_extreme_weights_and_digits_do_not_overflow() -> None:
    """The processor adds products of bytes in fours; some instructions saturate there."""
    weight = np.tile(np.int8([[127], [-127], [-128], [0]]), (1, 8192))
    x = jnp.asarray(np.tile(np.float32([[1.0], [-1.0]]), (1, 8192)))
    y = product_int8(x, jnp.asarray(weight), jnp.ones(4))
    expected = np.outer([1.0, -1.0], [127, -127, -128, 0]) * 8192
    np.testing.assert_allclose(y, expected, rtol=1e-6)


@have_int8
def test_int8_is_what_xla_makes_of_it(by_xla: Callable) -> None:
    weight, scale = map(jnp.asarray, quantize(normal((300, 200), 1)))
    x = jnp.asarray(normal((3, 200), 0))
    np.testing.assert_allclose(
        project_int8(x, weight, scale), by_xla(project_int8)(x, weight, scale), atol=2e-5
    )


@have_int8
def test_rows_that_are_not_finite_give_nan_and_small_ones_zeros() -> None:
    x = normal((6, 40), 0)
    x[1, 3], x[2, 39], x[3, 0], x[4], x[5] = np.nan, np.inf, -np.inf, 0, 1e-38
    weight, scale = map(jnp.asarray, quantize(normal((20, 40), 1)))
    y = np.asarray(product_int8(jnp.asarray(x), weight, scale))
    assert np.isfinite(y[[0, 4, 5]]).all() and np.isnan(y[1:4]).all() and not y[4].any()


def rows_alone(product: Callable[[jax.Array], jax.Array], x: np.ndarray) -> None:
    together = np.asarray(product(jnp.asarray(x)))
    for row in range(len(x)):
        np.testing.assert_array_equal(together[row], product(jnp.asarray(x[row : row + 1]))[0])


@have_float32
def test_a_row_is_the_same_bits_whoever_is_beside_it() -> None:
    """Some are computed in fours or eights and some alone, by either thread."""
    x, weight = normal((15, 130), 0), normal((900, 130), 1)
    rows_alone(lambda x: product_float32(x, jnp.asarray(weight)), x)


@have_int8
def test_an_int8_row_is_the_same_bits_whoever_is_beside_it() -> None:
    x = normal((15, 130), 0)
    x[4] = np.nan
    held = tuple(map(jnp.asarray, quantize(normal((900, 130), 1))))
    rows_alone(lambda x: product_int8(x, *held), x)


LAYERS, SLOTS = 3, 384


def lengths(rows: int) -> st.SearchStrategy[list[int]]:
    border = st.sampled_from([1, 15, 16, 17, 63, 64, 65, SLOTS - 1, SLOTS])
    one = st.one_of(border, st.integers(1, SLOTS))
    return st.lists(one, min_size=rows, max_size=rows)


@st.composite
def attended(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """Queries [B, K, G, H], keys and values [B, S, K, H], and lengths."""
    rows, heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 7))
    width = draw(st.sampled_from([1, 8, 16, 20, 64, 72, 128]))
    query = normal((rows, heads, group, width), 0)
    keys, values = (normal((rows, SLOTS, heads, width), seed) for seed in (1, 2))
    return query, keys, values, draw(lengths(rows))


def formula(
    query: np.ndarray, keys: np.ndarray, values: np.ndarray, length: list[int]
) -> np.ndarray:
    """In float64, a row after another."""
    out = np.zeros(query.shape)
    for row, count in enumerate(length):
        k, v = (held[row, :count].astype(np.float64) for held in (keys, values))
        scores = np.einsum("KGH,SKH->KGS", query[row].astype(np.float64), k)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        out[row] = np.einsum("KGS,SKH->KGH", weights, v)
    return out


@have_float32
@settings(max_examples=20)
@given(attended())
def test_float32_attention_is_the_formula(case) -> None:
    query, keys, values, length = case
    rows, _, heads, width = keys.shape
    empty = KVCache.empty(rows, LAYERS, heads, SLOTS, width, jnp.float32)
    cache = empty.write_prefix(1, jnp.asarray(keys), jnp.asarray(values))
    out = attention_float32(
        jnp.asarray(query), cache.keys, cache.values, jnp.int32(1), jnp.asarray(length, jnp.int32)
    )
    np.testing.assert_allclose(out, formula(query, keys, values, length), atol=2e-5)


@have_int8
@settings(max_examples=20)
@given(attended())
def test_int8_attention_is_the_formula_over_what_the_cache_holds(case) -> None:
    query, keys, values, length = case
    rows, _, heads, width = keys.shape
    empty = Int8Cache.empty(rows, LAYERS, heads, SLOTS, width)
    cache = empty.write_prefix(1, jnp.asarray(keys), jnp.asarray(values))
    held = [
        (np.asarray(part[:, 1], np.float64) * np.asarray(scale[:, 1])[..., None]).swapaxes(1, 2)
        for part, scale in ((cache.keys, cache.key_scale), (cache.values, cache.value_scale))
    ]
    out = cache.attend(jnp.asarray(query), 1, jnp.asarray(length))
    # The query is rounded to 1 / 64,516 of its largest: scores of up to 30 are off by little.
    np.testing.assert_allclose(out, formula(query, *held, length), atol=3e-3)


@have_int8
def test_attention_is_what_xla_makes_of_it(by_xla: Callable) -> None:
    query = jnp.asarray(normal((2, 2, 2, 16), 0))
    keys, values = (jnp.asarray(normal((2, SLOTS, 2, 16), seed)) for seed in (1, 2))
    size, length = (2, LAYERS, 2, SLOTS, 16), jnp.asarray([200, 9])
    whole = KVCache.empty(*size, jnp.float32).write_prefix(2, keys, values)
    narrow = Int8Cache.empty(*size).write_prefix(2, keys, values)
    for cache, tolerance in ((whole, 1e-5), (narrow, 2e-3)):
        expected = by_xla(lambda q, c, n: attend_blocks(c, q, 2, n))(query, cache, length)
        np.testing.assert_allclose(cache.attend(query, 2, length), expected, atol=tolerance)


@have_int8
@pytest.mark.parametrize("layer", [-1, -9, 7])
def test_a_layer_that_is_none_is_the_one_that_xla_slices(layer: int) -> None:
    query, length = jnp.asarray(normal((1, 1, 2, 16), 0)), jnp.asarray([40])
    keys, values = (jnp.asarray(normal((1, SLOTS, 1, 16), seed)) for seed in (1, 2))
    size = (1, LAYERS, 1, SLOTS, 16)
    for cache in (KVCache.empty(*size, jnp.float32), Int8Cache.empty(*size)):
        filled = cache.write_prefix(0, keys, values).write_prefix(LAYERS - 1, values, keys)
        out = filled.attend(query, jnp.int32(layer), length)
        np.testing.assert_allclose(out, attend_blocks(filled, query, layer, length), atol=3e-3)


@have_float32
def test_large_scores_and_nan_stay_what_they_are() -> None:
    query, keys, values = (
        normal((2, 1, 2, 16), 0),
        normal((2, 64, 1, 16), 1),
        normal((2, 64, 1, 16), 2),
    )
    query[0] *= 1e4
    query[1, 0, 1, 3] = np.nan
    cache = KVCache.empty(2, 1, 1, 64, 16, jnp.float32).write_prefix(0, keys, values)
    out = np.asarray(cache.attend(jnp.asarray(query), 0, jnp.asarray([40, 40])))
    expected = formula(query, keys, values, [40, 40])
    np.testing.assert_allclose(out[0], expected[0], atol=1e-4)
    np.testing.assert_allclose(out[1, 0, 0], expected[1, 0, 0], atol=1e-4)
    assert np.isnan(out[1, 0, 1]).all()


@have_float32
def test_gradients_are_those_of_the_matrix_product() -> None:
    x, weight = jnp.asarray(normal((3, 40), 0)), jnp.asarray(normal((20, 40), 1))

    def loss(product: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return lambda x, weight: jnp.sum(jnp.sin(product(x, weight)))

    assert module.FLOAT32_PRODUCT in jax.jit(project).lower(x, weight).as_text()
    found = jax.grad(loss(project), argnums=(0, 1))(x, weight)
    expected = jax.grad(loss(lambda x, w: x @ w.T), argnums=(0, 1))(x, weight)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    batched = jax.vmap(project, in_axes=(0, None))(x.reshape(3, 1, 40), weight)
    np.testing.assert_allclose(batched[:, 0], project(x, weight), atol=1e-5)


@have_int8
@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda x: product_float32(x, x[:, :3]), "float32 product: operands that do not fit"),
        (lambda x: product_float32(x.astype(jnp.int32), x), "float32 product: operands that do"),
        (lambda x: product_float32(x[None][0:1], x), "float32 product: operands of other ranks"),
        (
            lambda x: product_int8(x, x.astype(jnp.int8), jnp.ones(9)),
            "int8 product: operands that do not fit",
        ),
        (
            lambda x: attention_float32(
                x.reshape(1, 1, 2, 4), x.reshape(1, 1, 1, 2, 4), x.reshape(1, 1, 1, 4, 2), *PLACE
            ),
            "float32 attention: operands that do not fit",
        ),
        (
            lambda x: attention_int8(x.reshape(1, 1, 2, 4), x, x, x, x, *PLACE),
            "int8 attention: operands of other ranks",
        ),
        (
            lambda x: attention_float32(
                x.reshape(1, 1, 2, 4),
                jnp.zeros((1, 0, 1, 4, 2)),
                jnp.zeros((1, 0, 1, 2, 4)),
                *PLACE,
            ),
            "float32 attention: operands of other ranks",
        ),
    ],
)
def test_operands_that_do_not_fit_are_refused_and_nothing_is_read(
    call: Callable, said: str
) -> None:
    """A compiled program may come from a cache that an older version filled."""
    with pytest.raises(Exception, match=said):
        jax.block_until_ready(call(jnp.zeros((2, 4))))


PLACE = (jnp.int32(0), jnp.ones(1, jnp.int32))


def report(cwd: Path | None = None, **environment: str) -> str:
    """What a process with these variables says of its kernels."""
    code = "from dia2_jax.nn.kernels import kernels; print(kernels())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.fixture
def broken_compiler(tmp_path: Path) -> Iterator[Path]:
    compiler = tmp_path / "broken-cc"
    compiler.write_text("#!/bin/sh\necho 'line 1: no such thing' >&2\nexit 3\n")
    compiler.chmod(0o755)
    yield compiler


@have_float32
def test_without_a_compiler_xla_computes_and_the_reason_is_told(
    tmp_path: Path, broken_compiler: Path
) -> None:
    none = "Kernels(float32=False, int8=False, reason="
    assert report(**{KERNELS_VARIABLE: "off"}) == f"{none}'none: {KERNELS_VARIABLE} is off')"
    off = {"DIA2_JAX_CACHE": "off"}  # nothing that was compiled before is found
    assert "no C compiler found (of cc, gcc, clang; CC names another)" in report(
        PATH=str(tmp_path), CC="", **off
    )
    said = report(CC=str(broken_compiler), **off)
    assert said.startswith(none) and "could not compile them: line 1: no such thing" in said
    assert "'/nowhere/cc' of CC is not there" in report(CC="/nowhere/cc", **off)
    assert "CC is no command: No closing quotation" in report(CC="'cc", **off)


@have_float32
def test_what_was_compiled_is_kept_and_found_again(tmp_path: Path, broken_compiler: Path) -> None:
    first = report(DIA2_JAX_CACHE=str(tmp_path / "cache"))
    assert "float32=True" in first
    kept = [path.name for path in (tmp_path / "cache").iterdir()]
    assert len(kept) == 1 and kept[0].startswith("kernels-") and kept[0].endswith(".so")
    # A second process has no use for a compiler.
    again = report(DIA2_JAX_CACHE="cache", CC=str(broken_compiler), cwd=tmp_path)
    assert again == first
    # What is damaged is made anew; where nothing can be kept, it is not kept.
    (tmp_path / "cache" / kept[0]).write_bytes(b"no library")
    assert report(DIA2_JAX_CACHE=str(tmp_path / "cache")) == first
    assert (tmp_path / "cache" / kept[0]).stat().st_size > 10_000
    (tmp_path / "file").touch()
    assert report(DIA2_JAX_CACHE=str(tmp_path / "file")) == first


def test_other_processors_are_left_to_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KERNELS_VARIABLE, raising=False)
    monkeypatch.setattr(module, "_processor_flags", lambda: module._NEEDED - {"avx512_vnni"})
    once_more = module._find.__wrapped__()
    assert once_more == Kernels(False, False, "none: this processor has no avx512_vnni")


@have_float32
def test_several_devices_are_left_to_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    """It splits operations of its own; for a call to C it would gather all operands."""
    assert module.kernels_here() == kernels()
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert not module.use_float32() and not module.use_int8()
    assert module.kernels_here().reason == "none: there are several devices"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert module.kernels_here().reason == "none: this process does not compute on a CPU"
