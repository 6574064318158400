"""All layers of a step in one call: the formula, and no row that depends on another."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dia2_jax.nn.attention import KVCache
from dia2_jax.nn.kernels import kernels
from dia2_jax.nn.kernels.layers import (
    AttentionWeights,
    LayerWeights,
    Matrix,
    step_layers,
    use_layers,
)
from dia2_jax.nn.quantized import quantize

have_float32 = pytest.mark.skipif(not kernels().float32, reason=kernels().reason)
have_int8 = pytest.mark.skipif(not kernels().int8, reason=kernels().reason)

#: Whether weights and cache are int8.
KINDS = [pytest.param(False, marks=have_float32), pytest.param(True, marks=have_int8)]

EPSILON = 1e-6
SLOTS = 70


@dataclass(frozen=True)
class Shape:
    """A stack of layers and the rows of a step."""

    rows: int = 2
    layers: int = 2
    width: int = 24
    heads: int = 4
    kv_heads: int = 2
    head_width: int = 8
    hidden: int = 40
    sets: int = 1
    fused: bool = False


SHAPES = st.builds(
    Shape,
    rows=st.integers(1, 9),
    layers=st.integers(1, 3),
    width=st.sampled_from([1, 8, 24, 65, 300]),
    kv_heads=st.integers(1, 3),
    head_width=st.sampled_from([2, 8, 34, 64]),
    hidden=st.sampled_from([1, 7, 40, 520]),
    sets=st.integers(1, 3),
    fused=st.booleans(),
).flatmap(
    lambda shape: st.integers(1, 5).map(lambda group: replace(shape, heads=group * shape.kv_heads))
)


class Case:
    """Operands of a call, drawn from a seed; ``int8`` rounds weights and cache."""

    def __init__(self, shape: Shape, *, int8: bool, float32_cache: bool = False) -> None:
        rng = np.random.default_rng(0)
        self.shape = shape

        def normal(*size: int) -> jax.Array:
            return jnp.asarray(rng.standard_normal(size), jnp.float32)

        def matrix(outputs: int, inputs: int) -> Matrix:
            weight = np.asarray(normal(outputs, inputs)) / np.sqrt(inputs)
            if not int8:
                return Matrix(jnp.asarray(weight))
            return Matrix(*map(jnp.asarray, quantize(weight)))

        merged, one = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
        outputs = (merged + 2 * one,) if shape.fused else (merged, one, one)
        self.weights = [
            LayerWeights(
                attention_norm=1 + 0.1 * normal(shape.width),
                query_norm=normal(shape.head_width),
                key_norm=normal(shape.head_width),
                mlp_norm=1 + 0.1 * normal(shape.width),
                sets=tuple(
                    AttentionWeights(
                        tuple(matrix(count, shape.width) for count in outputs),
                        matrix(shape.width, merged),
                    )
                    for _ in range(shape.sets)
                ),
                wi=matrix(2 * shape.hidden, shape.width),
                wo=matrix(shape.width, shape.hidden),
            )
            for _ in range(shape.layers)
        ]
        self.x = normal(shape.rows, shape.width)
        angle = normal(shape.rows, shape.head_width // 2)
        self.angle = (jnp.cos(angle), jnp.sin(angle))
        borders = [0, 14, 15, 16, 62, 63, 64, SLOTS - 1]
        self.slot = jnp.asarray([borders[row % len(borders)] for row in range(shape.rows)])
        size = (shape.rows, shape.layers, shape.kv_heads)
        keys, values = (normal(*size, SLOTS, shape.head_width) for _ in range(2))
        self.cache: tuple[jax.Array, ...] = (keys.swapaxes(3, 4), values)
        if int8 and not float32_cache:
            digits = [
                jnp.asarray(rng.integers(-127, 128, held.shape), jnp.int8)
                for held in (keys, values)
            ]
            scales = [jnp.abs(normal(*size, SLOTS)) / 100 for _ in range(2)]
            self.cache = (*digits, *scales)

    def run(self, weight_set: int = 0) -> tuple[np.ndarray, list[np.ndarray]]:
        call = jax.jit(
            lambda x, angle, slot, cache, weights: step_layers(
                x, angle, slot, cache, self.unflatten(weights), weight_set=weight_set,
                epsilon=EPSILON,
            )
        )  # fmt: skip
        flat = [layer.operands() for layer in self.weights]
        y, cache = call(self.x, self.angle, self.slot, self.cache, flat)
        return np.asarray(y), [np.asarray(part) for part in cache]

    def unflatten(self, flat: list[list[jax.Array]]) -> list[LayerWeights]:
        """The weights as arguments of a program."""

        def fill(layer: LayerWeights, operands: list[jax.Array]) -> LayerWeights:
            left = iter(operands)
            norms = [next(left) for _ in range(4)]

            def matrix(one: Matrix) -> Matrix:
                return Matrix(next(left), None if one.scale is None else next(left))

            sets = tuple(
                AttentionWeights(tuple(map(matrix, each.inward)), matrix(each.outward))
                for each in layer.sets
            )
            return LayerWeights(*norms, sets, matrix(layer.wi), matrix(layer.wo))

        return [fill(*pair) for pair in zip(self.weights, flat, strict=True)]


def value(matrix: Matrix) -> np.ndarray:
    weight = np.asarray(matrix.weight, np.float64)
    return weight if matrix.scale is None else weight * np.asarray(matrix.scale)[:, None]


def normalised(x: np.ndarray, weight: jax.Array) -> np.ndarray:
    mean = np.mean(np.square(x), axis=-1, keepdims=True)
    return x / np.sqrt(mean + EPSILON) * np.asarray(weight)


def rotated(x: np.ndarray, angle: tuple[jax.Array, jax.Array], row: int) -> np.ndarray:
    cos, sin = (np.asarray(part[row], np.float64) for part in angle)
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def formula(
    case: Case, cache: list[np.ndarray], weight_set: int = 0
) -> tuple[np.ndarray, list[list[tuple[np.ndarray, np.ndarray]]]]:
    """In float64 and a row after another: what comes out, and keys and values ``[K, H]`` of every
    row and layer. It attends over ``cache``, which holds them as they were kept."""
    shape = case.shape
    if len(cache) == 2:
        keys, values = cache[0].swapaxes(3, 4), cache[1]
    else:
        keys, values = (
            part * scale[..., None] for part, scale in zip(cache[:2], cache[2:], strict=True)
        )
    out, kept = [], []
    for row, x in enumerate(np.asarray(case.x, np.float64)):
        kept.append([])
        length = int(case.slot[row]) + 1
        for number, layer in enumerate(case.weights):
            attention = layer.sets[weight_set]
            inward = np.concatenate([value(matrix) for matrix in attention.inward])
            heads = (inward @ normalised(x, layer.attention_norm)).reshape(-1, shape.head_width)
            query, key, new = np.split(heads, [shape.heads, shape.heads + shape.kv_heads])
            query = rotated(normalised(query, layer.query_norm), case.angle, row)
            key = rotated(normalised(key, layer.key_norm), case.angle, row)
            kept[-1].append((key, new))
            grouped = query.reshape(shape.kv_heads, -1, shape.head_width)
            scores = np.einsum("KGH,KSH->KGS", grouped, keys[row, number, :, :length])
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            merged = np.einsum("KGS,KSH->KGH", weights, values[row, number, :, :length])
            x = x + value(attention.outward) @ merged.reshape(-1)
            gates, through = np.split(value(layer.wi) @ normalised(x, layer.mlp_norm), 2)
            x = x + value(layer.wo) @ (gates / (1 + np.exp(-gates)) * through)
        out.append(x)
    return np.stack(out), kept


def check_cache(case: Case, after: list[np.ndarray], kept: list, atol: float) -> None:
    """Every row's own slot of every layer holds its key and value, and no other was touched."""
    for row, slot in enumerate(np.asarray(case.slot)):
        for number, (key, new) in enumerate(kept[row]):
            if len(after) == 2:
                held = after[0][row, number, :, :, slot], after[1][row, number, :, slot]
            else:
                held = tuple(
                    part[row, number, :, slot] * scale[row, number, :, slot, None]
                    for part, scale in zip(after[:2], after[2:], strict=True)
                )
            for found, expected in zip(held, (key, new), strict=True):
                step = 0 if len(after) == 2 else np.abs(expected).max() / 127
                np.testing.assert_allclose(found, expected, atol=atol + 0.51 * step)
    for index, (found, before) in enumerate(zip(after, case.cache, strict=True)):
        slots = 4 if len(after) == 2 and index == 0 else 3
        untouched = np.moveaxis(np.array(found), slots, 1)
        expected = np.moveaxis(np.array(before), slots, 1)
        for row, slot in enumerate(np.asarray(case.slot)):
            untouched[row, slot] = expected[row, slot] = 0
        np.testing.assert_array_equal(untouched, expected)


@have_float32
@settings(max_examples=15)
@given(SHAPES, st.data())
def test_float32_layers_are_the_formula(shape: Shape, data: st.DataObject) -> None:
    chosen = data.draw(st.integers(0, shape.sets - 1))
    case = Case(shape, int8=False)
    y, after = case.run(chosen)
    expected, kept = formula(case, after, chosen)
    check_cache(case, after, kept, atol=1e-4)
    np.testing.assert_allclose(y, expected, atol=1e-4 * max(1, np.abs(expected).max()))


@have_int8
@settings(max_examples=15)
@given(SHAPES, st.booleans(), st.data())
def test_int8_layers_are_the_formula_over_what_the_cache_holds(
    shape: Shape, float32_cache: bool, data: st.DataObject
) -> None:
    chosen = data.draw(st.integers(0, shape.sets - 1))
    case = Case(shape, int8=True, float32_cache=float32_cache)
    y, after = case.run(chosen)
    expected, kept = formula(case, after, chosen)
    check_cache(case, after, kept, atol=3e-3)
    np.testing.assert_allclose(y, expected, atol=3e-3 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("int8", KINDS)
def test_a_row_is_the_same_bits_whoever_is_beside_it(int8: bool) -> None:
    """Also beside one that is not finite; enough weights for both threads."""
    case = Case(Shape(rows=7, width=256, hidden=700, heads=6, head_width=32), int8=int8)
    case.x = case.x.at[3, 5].set(jnp.nan)
    together, cache = case.run()
    again, _ = case.run()
    np.testing.assert_array_equal(together, again)
    assert np.isnan(together[3]).all() and np.isfinite(np.delete(together, 3, axis=0)).all()
    for row in range(case.shape.rows):
        one = Case(replace(case.shape, rows=1), int8=int8)
        one.weights, one.x, one.slot = case.weights, case.x[row, None], case.slot[row, None]
        one.angle = (case.angle[0][row, None], case.angle[1][row, None])
        one.cache = tuple(part[row, None] for part in case.cache)
        alone, own = one.run()
        np.testing.assert_array_equal(alone[0], together[row])
        for part, whole in zip(own, cache, strict=True):
            np.testing.assert_array_equal(part[0], whole[row])


@have_float32
@pytest.mark.parametrize("slot", [-1, -3, -(10**6), SLOTS, 10**6])
def test_a_slot_that_is_none_is_the_one_that_xla_writes_to(slot: int) -> None:
    case = Case(Shape(rows=1), int8=False)
    case.slot = jnp.asarray([slot])
    _, after = case.run()
    changed = {int(place) for place in np.nonzero(after[1] != np.asarray(case.cache[1]))[3]}
    new = jnp.ones((1, 2, 8))
    by_xla = KVCache(*map(jnp.copy, case.cache)).write_step(0, new, new, case.slot)
    wanted = {int(place) for place in np.nonzero(by_xla.values != case.cache[1])[3]}
    assert changed == wanted


@have_int8
@pytest.mark.parametrize(("weight_set", "meant"), [(-1, 1), (-9, 0), (2, 1), (9, 1)])
def test_a_weight_set_that_is_none_is_the_one_that_xla_reads(weight_set: int, meant: int) -> None:
    case = Case(Shape(sets=2), int8=True)
    np.testing.assert_array_equal(case.run(weight_set)[0], case.run(meant)[0])
    assert (case.run(0)[0] != case.run(1)[0]).any()


@pytest.mark.parametrize("int8", KINDS)
@pytest.mark.parametrize(
    "shape",
    [
        # What an item needs is far more than what a row needs, or what a layer is wide.
        Shape(rows=1, width=1, hidden=1, heads=9, kv_heads=1, head_width=64),
        Shape(rows=3, width=1, hidden=1, heads=5, kv_heads=5, head_width=130, fused=True),
        Shape(rows=1, width=1, hidden=900, heads=1, kv_heads=1, head_width=2),
        Shape(rows=2, width=700, hidden=1, heads=2, kv_heads=1, head_width=2),
    ],
)
def test_odd_shapes_have_room(shape: Shape, int8: bool) -> None:
    case = Case(shape, int8=int8)
    y, after = case.run()
    expected, kept = formula(case, after)
    check_cache(case, after, kept, atol=3e-3)
    np.testing.assert_allclose(y, expected, atol=3e-3 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("int8", KINDS)
def test_small_rows_and_zeros(int8: bool) -> None:
    """Epsilon counts there, and a step of zeros has none to divide by."""
    case = Case(Shape(rows=3), int8=int8)
    case.x = case.x * jnp.asarray([[1e-3], [0.0], [1e-30]])
    y, after = case.run()
    expected, kept = formula(case, after)
    check_cache(case, after, kept, atol=3e-3)
    np.testing.assert_allclose(y, expected, atol=3e-3)
    layer = case.weights[0]
    by_size = np.abs(normalised(np.asarray(case.x, np.float64), layer.attention_norm)).max(axis=1)
    assert by_size[0] < 2.5 and by_size[1] == 0 and by_size[2] < 1e-20


@have_int8
def test_layers_are_used_where_they_are_faster() -> None:
    float32, int8 = (Case(Shape(), int8=narrow) for narrow in (False, True))
    assert use_layers(8, float32.weights, float32.cache)
    assert not use_layers(9, float32.weights, float32.cache)
    assert use_layers(64, int8.weights, int8.cache) and use_layers(2, int8.weights, float32.cache)


@have_int8
def test_what_the_kernel_does_not_compute_is_left_to_xla() -> None:
    float32, int8 = (Case(Shape(), int8=narrow) for narrow in (False, True))
    other = Case(Shape(hidden=41, sets=2), int8=False)

    def changed(case: Case, **parts: object) -> bool:
        return use_layers(2, [replace(case.weights[0], **parts), case.weights[1]], case.cache)

    assert changed(float32) and changed(int8)
    assert not changed(float32, mlp_norm=jnp.ones(24, jnp.bfloat16))
    assert not changed(int8, wo=float32.weights[0].wo)
    assert not changed(float32, wi=other.weights[0].wi)
    assert not changed(float32, sets=other.weights[0].sets)
    assert not use_layers(2, float32.weights, int8.cache)
    half = tuple(part.astype(jnp.bfloat16) for part in float32.cache)
    assert not use_layers(2, float32.weights, half)
    odd = Case(Shape(head_width=5), int8=False)
    assert not use_layers(2, odd.weights, odd.cache)


@have_int8
def test_operands_that_do_not_fit_are_refused() -> None:
    def refused(said: str, *, int8: bool = False, **parts: object) -> None:
        case = Case(Shape(), int8=int8)
        for name, value in parts.items():
            setattr(case, name, value)
        with pytest.raises(Exception, match=f"dia2_jax layers: {said}"):
            case.run()

    whole, narrow = (Case(Shape(), int8=kind) for kind in (False, True))
    short = replace(whole.weights[1], wo=Matrix(jnp.zeros((24, 39))))
    refused("weights that do not fit each other", weights=[whole.weights[0], short])
    refused("operands that do not fit", cache=(whole.cache[0][:1], whole.cache[1]))
    refused("operands that do not fit", slot=whole.slot.astype(jnp.float32).reshape(1, 2))
    refused("operands that do not fit", angle=(whole.angle[0], whole.angle[1][:, :3]))
    refused("another number of operands", cache=narrow.cache)  # float32 layers know no such one
    refused("operands that do not fit", int8=True, cache=(*narrow.cache[:3], whole.x))
    refused("", int8=True, weights=Case(Shape(layers=3), int8=True).weights)
    empty = (jnp.zeros((2, 2, 2, 8, 0)), jnp.zeros((2, 2, 2, 0, 8)))
    refused("matrices of other shapes", cache=empty)
    # One operand too many.
    operands = whole.weights[1].operands
    object.__setattr__(whole.weights[1], "operands", lambda: [*operands(), whole.x])
    with pytest.raises(Exception, match="weights that do not fit each other"):
        step_layers(whole.x, whole.angle, whole.slot, whole.cache, whole.weights, epsilon=EPSILON)
