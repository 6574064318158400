"""The training form of the quantiser: gradients, running means, k-means, revival, row choices."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_codec import tiny_shape

from dia2_jax.config import MimiConfig
from dia2_jax.mimi.rvq import SplitQuantizer
from train.codec_training.config import CodebookConfig
from train.codec_training.generator import Generator, random_codebooks, random_params
from train.codec_training.quantizer import (
    Assignments,
    RowChoices,
    codebook_paths,
    initialize_codebooks,
    kmeans,
    nearest,
    perplexity,
    quantize,
    row_choices,
    update_codebooks,
)

#: Without projections, so that gradients can be followed by hand.
PLAIN = tiny_shape(hidden_size=4, upsample_groups=4)
STILL = CodebookConfig(dead_share=0.0)


# Compiled once for all tests of one shape and setting.
update = functools.partial(jax.jit, static_argnums=3)(update_codebooks)
draw = functools.partial(jax.jit, static_argnums=(1, 2, 3))(row_choices)


def quantizer(config: MimiConfig = PLAIN) -> SplitQuantizer:
    generator = Generator(config)
    params, codebooks = random_params(generator, 0), random_codebooks(generator, 0)
    return generator.mimi(*jax.tree.map(jnp.asarray, (params, codebooks))).quantizer


def features(rows: int = 3, steps: int = 5, width: int = 4, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (rows, steps, width))


def choices(active: list[int], quantized: list[bool]) -> RowChoices:
    return RowChoices(jnp.array(active), jnp.array(quantized), jnp.zeros(len(active), bool))


def test_all_codebooks_are_what_inference_gives() -> None:
    for config in (PLAIN, tiny_shape()):
        module, x = quantizer(config), features(width=config.hidden_size)
        result = quantize(module, x, choices([3, 3, 3], [True] * 3))
        codes = module.encode(x)
        flat = np.asarray(codes).transpose(1, 0, 2).reshape(3, -1)
        np.testing.assert_array_equal(result.assignments.codes, flat)
        np.testing.assert_allclose(result.features, module.decode(codes), atol=2e-6)


def test_fewer_codebooks_are_what_a_shorter_decode_gives_and_a_bypass_is_the_projections() -> None:
    config = tiny_shape()
    module, x = quantizer(config), features(width=8)
    result = quantize(module, x, choices([1, 2, 3], [True, True, False])).features
    codes = module.encode(x)
    np.testing.assert_allclose(result[0], module.decode(codes[:, :1])[0], atol=2e-6)
    np.testing.assert_allclose(result[1], module.decode(codes[:, :2])[1], atol=2e-6)
    around = [b.output_proj(b.input_proj(x)) for b in (module.semantic, module.acoustic)]
    np.testing.assert_allclose(result[2], (around[0] + around[1])[2], atol=2e-6)


def test_gradients_pass_straight_through_the_active_branches() -> None:
    module, x = quantizer(), features()
    weight = features(seed=1)

    def heard(x: jax.Array) -> jax.Array:
        result = quantize(module, x, choices([1, 3, 2], [True, True, False]))
        return jnp.sum(weight * result.features)

    # One copy through the semantic branch, one through the acoustic one where it is heard.
    copies = jnp.array([1.0, 2.0, 2.0])[:, None, None]
    np.testing.assert_allclose(jax.grad(heard)(x), copies * weight, rtol=1e-6)

    def semantic(x: jax.Array) -> jax.Array:
        result = quantize(module, x, choices([1, 3, 2], [True, True, False]))
        return jnp.sum(weight * result.semantic)

    np.testing.assert_allclose(jax.grad(semantic)(x), weight, rtol=1e-6)


def test_commitment_is_the_distance_to_the_entries_and_moves_the_features_only() -> None:
    module, x = quantizer(), features()
    active = np.array([1, 2, 3])
    every = [*module.semantic.codebooks, *module.acoustic.codebooks]
    tables = [np.asarray(c.embed_sum[...] / c.cluster_usage[...][:, None]) for c in every]
    expected = np.zeros(3)
    slope = np.zeros(x.shape)
    for branch in ([0], [1, 2]):
        residual = np.asarray(x, np.float64)
        for index in branch:
            distance = ((residual[..., None, :] - tables[index]) ** 2).sum(-1)
            error = residual - tables[index][distance.argmin(-1)]
            mask = (index < active)[:, None, None]
            expected[index] = (mask * error**2).mean()
            slope += 2 * mask * error / x.size / 3
            residual = error

    def commitment(x: jax.Array) -> jax.Array:
        return quantize(module, x, choices(list(active), [True, True, False])).commitment

    value, found = jax.value_and_grad(commitment)(x)
    assert float(value) == pytest.approx(expected.mean(), rel=1e-5)
    np.testing.assert_allclose(found, slope, atol=1e-6)


def sums(seed: int) -> tuple[Generator, dict[str, jax.Array]]:
    generator = Generator(PLAIN)
    random = np.random.default_rng(seed)
    arrays = {
        path: jnp.asarray(random.uniform(0.5, 2, leaf.shape).astype(np.float32))
        for path, leaf in generator.codebooks.items()
    }
    return generator, arrays


def assignments(seed: int, vectors: int = 20) -> Assignments:
    random = np.random.default_rng(seed)
    codes = random.integers(0, 8, (3, vectors)).astype(np.int32)
    residuals = random.standard_normal((3, vectors, 4)).astype(np.float32)
    return Assignments(jnp.asarray(codes), jnp.asarray(residuals))


def test_codebooks_follow_as_running_sums() -> None:
    _, codebooks = sums(0)
    batch = assignments(1)
    updated, replaced = update(codebooks, batch, jax.random.key(0), STILL)
    assert codebook_paths(codebooks)[0] == "quantizer.semantic.codebooks.0"
    for index, path in enumerate(codebook_paths(codebooks)):
        usage = np.asarray(codebooks[f"{path}.cluster_usage"]).copy() * 0.99
        total = np.asarray(codebooks[f"{path}.embed_sum"]).copy() * 0.99
        for code, vector in zip(batch.codes[index], batch.residuals[index], strict=True):
            usage[int(code)] += 0.01
            total[int(code)] += 0.01 * np.asarray(vector)
        np.testing.assert_allclose(updated[f"{path}.cluster_usage"], usage, rtol=1e-5)
        np.testing.assert_allclose(updated[f"{path}.embed_sum"], total, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(
            updated[f"{path}.initialized"], codebooks[f"{path}.initialized"]
        )
    np.testing.assert_array_equal(replaced, [0, 0, 0])


@pytest.mark.parametrize(("dead", "vectors"), [(3, 20), (5, 2)])
def test_dead_entries_become_vectors_of_the_batch(dead: int, vectors: int) -> None:
    _, codebooks = sums(0)
    path = codebook_paths(codebooks)[1]
    usage = np.full(8, 1.0, np.float32)
    usage[:dead] = 1e-4
    codebooks[f"{path}.cluster_usage"] = jnp.asarray(usage)
    batch = assignments(2, vectors)
    # None of the vectors falls to a dead entry.
    batch = batch.replace(codes=jnp.maximum(batch.codes, dead))
    settings = CodebookConfig(dead_share=0.1, revived_share=0.5)
    key = jax.random.key(7)
    updated, replaced = update(codebooks, batch, key, settings)
    again, _ = update(codebooks, batch, key, settings)
    others = [update(codebooks, batch, jax.random.key(seed), settings)[0] for seed in range(8)]
    np.testing.assert_array_equal(replaced, [0, min(dead, vectors), 0])
    entries = updated[f"{path}.embed_sum"] / updated[f"{path}.cluster_usage"][:, None]
    gone = np.asarray(0.99 * usage + 0.01 * np.bincount(batch.codes[1], minlength=8))
    revived = np.asarray(entries[: int(replaced[1])])
    distances = np.abs(revived[:, None] - np.asarray(batch.residuals[1])).max(-1)
    assert (distances.min(axis=1) < 1e-5).all()
    assert len(set(distances.argmin(axis=1))) == len(revived)  # without repetition
    np.testing.assert_allclose(
        updated[f"{path}.cluster_usage"][: len(revived)], 0.5 * gone.mean(), rtol=1e-4
    )
    np.testing.assert_array_equal(again[f"{path}.embed_sum"], updated[f"{path}.embed_sum"])
    assert any((o[f"{path}.embed_sum"] != updated[f"{path}.embed_sum"]).any() for o in others)


def test_kmeans_is_deterministic_and_finds_clusters() -> None:
    random = np.random.default_rng(0)
    centres = 10 * random.standard_normal((6, 3))
    vectors = (centres[random.integers(0, 6, 300)] + 0.1 * random.standard_normal((300, 3))).astype(
        np.float32
    )
    means, counts = kmeans(jnp.asarray(vectors), 12, jax.random.key(1), 10)
    again, _ = kmeans(jnp.asarray(vectors), 12, jax.random.key(1), 10)
    np.testing.assert_array_equal(means, again)
    assert counts.sum() == 300

    def error(means: jax.Array) -> float:
        chosen = np.asarray(means)[np.asarray(nearest(jnp.asarray(vectors), means))]
        return float(((vectors - chosen) ** 2).sum(-1).mean())

    assert error(means) < error(kmeans(jnp.asarray(vectors), 12, jax.random.key(1), 0)[0])
    # A Lloyd step moves every mean that has vectors to their average.
    owner = np.asarray(nearest(jnp.asarray(vectors), means))
    settled, _ = kmeans(jnp.asarray(vectors), 12, jax.random.key(1), 30)
    owner = np.asarray(nearest(jnp.asarray(vectors), settled))
    for index in set(owner):
        np.testing.assert_allclose(settled[index], vectors[owner == index].mean(0), atol=1e-4)


def test_codebooks_start_from_what_those_before_leave_over() -> None:
    generator, codebooks = sums(0)
    x = jax.random.normal(jax.random.key(3), (64, 4))
    start = initialize_codebooks(quantizer(), codebooks, x, jax.random.key(0), 8)
    paths = codebook_paths(start)
    left = []
    for path in paths:
        residual = x if path.endswith(".0") else left[-1]
        entries = start[f"{path}.embed_sum"] / start[f"{path}.cluster_usage"][:, None]
        left.append(residual - entries[nearest(residual, entries)])
        assert float(jnp.square(left[-1]).mean()) < float(jnp.square(residual).mean())
        assert start[f"{path}.initialized"] == 1
        assert float(start[f"{path}.cluster_usage"].mean()) == pytest.approx(1, abs=0.1)
    assert {path: a.shape for path, a in start.items()} == {
        path: a.shape for path, a in generator.codebooks.items()
    }


def test_choices_belong_to_rows() -> None:
    settings = CodebookConfig(dropout=0.5, unquantized=0.25)
    key = jax.random.key(5)
    few, many = draw(key, 3, 8, settings), draw(key, 4000, 8, settings)
    np.testing.assert_array_equal(few.active, many.active[:3])
    np.testing.assert_array_equal(few.quantized, many.quantized[:3])
    assert float(many.quantized.mean()) == pytest.approx(0.75, abs=0.03)
    # Half keep all eight; the others draw from 1 ... 8 alike.
    shares = np.bincount(many.active, minlength=9)[1:] / 4000
    np.testing.assert_allclose(shares, [1 / 16] * 7 + [1 / 2 + 1 / 16], atol=0.03)
    off = draw(key, 10, 8, CodebookConfig(dropout=0.0, unquantized=0.0))
    assert (off.active == 8).all() and off.quantized.all()


def test_the_share_of_rows_heard_through_predictions_is_drawn_beside_the_other_choices() -> None:
    key = jax.random.key(5)
    without = draw(key, 400, 4, CodebookConfig(dropout=0.5, unquantized=0.5))
    some = draw(
        key, 400, 4, CodebookConfig(dropout=0.5, unquantized=0.5, frozen=True, predicted=0.3)
    )
    assert not without.predicted.any()
    assert 0.2 < float(some.predicted.mean()) < 0.4
    np.testing.assert_array_equal(some.active, without.active)
    np.testing.assert_array_equal(some.quantized, without.quantized)


def test_perplexity_counts_entries_used_alike() -> None:
    counts = jnp.array([[5.0, 5, 5, 5], [9, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(perplexity(counts), [4, 1, 2, 1], rtol=1e-6)
