"""Guidance filter and draws: upstream's numbers, the right distribution, rows on their own."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dia2_jax.generation import sampling
from dia2_jax.generation.sampling import RowSettings, distribution, rank_bound
from dia2_jax.generation.settings import GenerationConfig, SamplingConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "network" / "guidance.npz"
ROWS, VOCABULARY = 4, 12
BOUNDS = (1, 2, 4, 8, 16)  # powers of two, as rank_bound gives them; 0 is the whole vocabulary

jit = functools.partial(
    jax.jit, static_argnames="bound", compiler_options={"xla_backend_optimization_level": 0}
)
compiled_guide, compiled_draw = jit(sampling.guide), jit(sampling.draw)
keys_of = jax.jit(jax.vmap(jax.random.key))


def guide(conditional, unconditional, scale, filter_k, bound=0) -> np.ndarray:
    rows = len(conditional)
    scale = np.broadcast_to(np.float32(scale), rows)
    filter_k = np.broadcast_to(np.int32(filter_k), rows)
    return np.asarray(compiled_guide(conditional, unconditional, scale, filter_k, bound=bound))


def draw(logits, temperature, top_k, seeds, bound=0) -> np.ndarray:
    rows = len(logits)
    temperature = np.broadcast_to(np.float32(temperature), rows)
    top_k = np.broadcast_to(np.int32(top_k), rows)
    keys = keys_of(np.asarray(seeds, np.uint32))
    return np.asarray(compiled_draw(logits, temperature, top_k, keys, bound=bound))


def fits(bound: int, *wanted: int) -> bool:
    """Whether ranks up to ``bound`` serve these k, 0 meaning all."""
    return bound == 0 or (min(wanted) > 0 and max(wanted) <= bound)


# Integers and halves: many ties, and a lerp without rounding.
row = st.lists(st.integers(-6, 6).map(lambda n: n / 2), min_size=VOCABULARY, max_size=VOCABULARY)
rows = st.lists(row, min_size=ROWS, max_size=ROWS).map(lambda x: np.array(x, np.float32))
ranks = st.lists(st.integers(0, VOCABULARY + 3), min_size=ROWS, max_size=ROWS)
temperatures = st.lists(st.sampled_from([0.0, 0.25, 0.8, 1.0, 3.0]), min_size=ROWS, max_size=ROWS)
scales = st.lists(st.sampled_from([0.25, 0.5, 1.0, 2.0, 6.0]), min_size=ROWS, max_size=ROWS)


# ---------------------------------------------------------------------------------------- guidance


@pytest.mark.parametrize("bound", [0, 8])
def test_guidance_gives_upstream_s_numbers(bound: int) -> None:
    with np.load(GOLDEN) as values:
        logits = values["logits"][:, :, 0]
        cases = {name: values[name][:, 0, 0] for name in values.files if name != "logits"}
    assert len(cases) == 9
    for name, expected in cases.items():
        scale, filter_k = name.removeprefix("scale").split("_k")
        if not fits(bound, int(filter_k) or 1):
            continue
        out = guide(logits[:, 0], logits[:, 1], float(scale), int(filter_k), bound)
        assert (np.isneginf(out) == np.isneginf(expected)).all(), name
        assert np.isneginf(expected).any() == (0 < int(filter_k) < expected.shape[-1]), name
        np.testing.assert_array_equal(out, expected)


@given(rows, rows, scales, ranks, st.sampled_from((0, *BOUNDS)))
def test_filter_keeps_the_best_by_guided_logits(cond, uncond, scale, filter_k, bound) -> None:
    if not fits(bound, *(k or 1 for k in filter_k)):
        bound = 0
    out = guide(cond, uncond, scale, filter_k, bound)
    for r in range(ROWS):
        guided = uncond[r] + scale[r] * (cond[r] - uncond[r])
        keep = np.full(VOCABULARY, True)
        if scale[r] != 1.0 and 0 < filter_k[r] < VOCABULARY:
            keep = guided >= np.sort(guided)[-filter_k[r]]  # ties at the cut survive
        np.testing.assert_array_equal(out[r], np.where(keep, cond[r], -np.inf))


def test_scale_one_is_off_whatever_the_filter() -> None:
    cond = np.arange(VOCABULARY, dtype=np.float32)[None].repeat(2, 0)
    out = guide(cond, -cond, np.array([1.0, 1.5]), 2, 2)
    np.testing.assert_array_equal(out[0], cond[0])
    assert np.isneginf(out[1]).sum() == VOCABULARY - 2


# ------------------------------------------------------------------------------------------- draws


@pytest.mark.parametrize(
    ("temperature", "top_k", "bound"),
    [(0.8, 5, 8), (0.8, 5, 0), (1.0, 0, 0), (2.5, 12, 16), (0.3, 50, 0), (0.0, 3, 4)],
)
def test_draws_follow_the_distribution(temperature: float, top_k: int, bound: int) -> None:
    count = 20_000
    logits = np.random.default_rng(0).normal(size=(1, VOCABULARY)).astype(np.float32) * 2
    picks = draw(logits.repeat(count, 0), temperature, top_k, np.arange(count), bound)
    expected = distribution(logits[0], temperature, top_k)
    seen = np.bincount(picks, minlength=VOCABULARY) / count
    # Three and a half standard deviations of every frequency.
    spread = 3.5 * np.sqrt(expected * (1 - expected) / count)
    assert (np.abs(seen - expected) <= spread).all()


def test_distribution_is_softmax_cut_and_renormalised() -> None:
    logits = np.array([1.0, 3.0, -np.inf, 2.0, 3.0, 0.0])
    weights = np.exp(logits / 0.5)
    np.testing.assert_allclose(distribution(logits, 0.5, 0), weights / weights.sum())
    cut = np.array([0, weights[1], 0, weights[3], weights[4], 0])
    np.testing.assert_allclose(distribution(logits, 0.5, 3), cut / cut.sum())
    np.testing.assert_allclose(distribution(logits, 0.5, 99), weights / weights.sum())
    # Among equals the first counts, as in the draw.
    np.testing.assert_array_equal(distribution(logits, 0.5, 1), np.eye(6)[1])
    np.testing.assert_array_equal(distribution(logits, 0.0, 0), np.eye(6)[1])


@given(rows, temperatures, ranks, st.integers(0, 1000))
def test_bound_never_changes_a_draw(logits, temperature, top_k, seed) -> None:
    seeds = np.arange(ROWS) + seed
    whole = draw(logits, temperature, top_k, seeds)
    for bound in BOUNDS:
        if fits(bound, *top_k):
            np.testing.assert_array_equal(draw(logits, temperature, top_k, seeds, bound), whole)
    for r in range(ROWS):  # and never leaves what may be drawn
        assert distribution(logits[r], temperature[r], top_k[r])[whole[r]] > 0


@given(rows, temperatures, ranks, st.integers(0, 1000), st.integers(0, ROWS - 1))
def test_a_draw_does_not_depend_on_the_other_rows(logits, temperature, top_k, seed, r) -> None:
    seeds = np.arange(ROWS) * 7 + seed
    together = draw(logits, temperature, top_k, seeds)
    alone = draw(logits[r : r + 1], temperature[r], top_k[r], seeds[r : r + 1])
    assert alone[0] == together[r]
    others = [3 - t for t in temperature]
    others[r] = temperature[r]
    changed = np.where(np.arange(ROWS)[:, None] == r, logits, -logits)
    again = draw(changed, others, top_k, np.where(np.arange(ROWS) == r, seeds, 5))
    assert again[r] == together[r]


@given(rows, rows, st.integers(0, 1000))
def test_greedy_takes_the_first_best(logits, unconditional, seed) -> None:
    seeds = np.arange(ROWS) + seed
    best = logits.argmax(-1)
    np.testing.assert_array_equal(draw(logits, 0.0, 0, seeds), best)
    np.testing.assert_array_equal(draw(logits, 0.0, 3, seeds, 4), best)
    np.testing.assert_array_equal(draw(logits, 2.0, 1, seeds), best)  # top-1 at any temperature
    # With guidance: the best conditional entry of those that the filter left.
    left = guide(logits, unconditional, 3.0, 4)
    np.testing.assert_array_equal(draw(left, 0.0, 50, seeds), left.argmax(-1))


@given(rows, st.integers(0, 1000))
def test_top_k_zero_the_vocabulary_and_more_are_all_the_same(logits, seed) -> None:
    seeds = np.arange(ROWS) + seed
    picks = [draw(logits, 0.9, top_k, seeds) for top_k in (0, VOCABULARY, 2**31 - 1)]
    np.testing.assert_array_equal(picks[0], picks[1])
    np.testing.assert_array_equal(picks[0], picks[2])


def test_a_filtered_entry_is_never_drawn() -> None:
    logits = np.full((500, VOCABULARY), -np.inf, np.float32)
    logits[:, [4, 9]] = [-80.0, -81.0]
    assert set(draw(logits, 3.0, 0, np.arange(500))) == {4, 9}
    logits[:, 9] = sampling.MASKED_LOGIT
    assert set(draw(logits, 0.8, 50, np.arange(500), 64)) == {4}


def test_extreme_temperatures_stay_draws() -> None:
    """Dividing by a tiny temperature overflows; by a huge one leaves nothing but noise."""
    logits = np.array([[1.0, 5.0, -3.0] + [0.0] * 9] * 200, np.float32)
    assert set(draw(logits, 1e-38, 0, np.arange(200))) == {1}
    assert set(draw(-np.abs(logits) - 1, 1e-38, 0, np.arange(200))) == {3}
    assert len(set(draw(logits, 1e30, 0, np.arange(200)))) == VOCABULARY


# ---------------------------------------------------------------------------------------- settings


def config(text_k: int, audio_k: int, filter_k: int) -> GenerationConfig:
    text, audio = SamplingConfig(0.5, text_k), SamplingConfig(1.5, audio_k)
    return GenerationConfig(text=text, audio=audio, cfg_scale=3.0, cfg_filter_k=filter_k)


@given(st.lists(st.tuples(*[st.integers(0, 70)] * 3), min_size=1, max_size=3))
def test_rank_bound_serves_every_row(wanted) -> None:
    bound = rank_bound([config(*each) for each in wanted])
    for text_k, audio_k, filter_k in wanted:
        assert fits(bound, text_k, audio_k, filter_k or 1)
    if bound:
        assert bound & (bound - 1) == 0 and bound < 2 * max(max(each) for each in wanted)
    else:
        assert any(0 in each[:2] for each in wanted)


def test_row_settings_are_columns() -> None:
    found = RowSettings.of([config(1, 2, 3), GenerationConfig()])
    columns = {
        "text_temperature": [0.5, 0.6],
        "text_top_k": [1, 50],
        "audio_temperature": [1.5, 0.8],
        "audio_top_k": [2, 50],
        "cfg_scale": [3.0, 2.0],
        "cfg_filter_k": [3, 50],
    }
    for name, values in columns.items():
        column = np.asarray(getattr(found, name))
        assert column.dtype in (np.float32, np.int32)
        np.testing.assert_array_equal(column, np.array(values, column.dtype))
