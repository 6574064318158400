"""Rows: independent sessions in one batch, and text that arrives in any pieces."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dia2_jax.compilation_cache import CompileWatch
from dia2_jax.errors import ConfigError, ScriptError, SessionError
from dia2_jax.generation.settings import GenerationConfig, SamplingConfig
from dia2_jax.generation.state import NO_CACHE
from dia2_jax.model.delays import undelay
from dia2_jax.text.machine import Machine
from dia2_jax.text.script import parse_script

SCRIPTS = (
    "[S1] Hello there. [S2] (clears throat) What a lovely morning!",
    '<break time="0.9s"/> yes',
    'Wait, <break time="1.2s"/> wait; it is [S2] (laughs) extraordinarily <break time="0.1s"/>late',
)
CONFIGS = (
    GenerationConfig(cfg_scale=3.0, cfg_filter_k=5),
    GenerationConfig(
        text=SamplingConfig(1.3, 2),
        audio=SamplingConfig(0.4, 9),
        cfg_scale=1.0,
        initial_padding=0,
        max_padding=11,
        prefix_plan="upstream",
    ),
    GenerationConfig(text=SamplingConfig(0.0, 1), cfg_scale=1.5, cfg_filter_k=20, max_padding=3),
)
SEEDS = (3, 14, 15)


def results(row: Any) -> tuple[Any, ...]:
    """All that a session has said."""
    return (
        row.grid.tolist(), row.words, row.done, row.truncated, row.computed,
        row.crop, row.available, row.word_steps(),
    )  # fmt: skip


# ------------------------------------------------------------------------- a batch is single runs


@pytest.mark.parametrize("shift", [0, 1])
def test_every_row_of_a_mixed_batch_equals_its_single_run(run, make_plan, shift) -> None:
    """Other texts, lengths, settings, prefixes and seeds beside it; row 1 is not guided at all."""
    plans = [None, make_plan("main", "upstream"), make_plan("main", "exact", 1)]
    plans = plans[shift:] + plans[:shift]
    batch = run("main", CONFIGS, SCRIPTS, seeds=SEEDS, plans=plans)
    lengths = set()
    for index in range(3):
        alone = run(
            "main",
            [CONFIGS[index]],
            [SCRIPTS[index]],
            seeds=[SEEDS[index]],
            plans=[plans[index]],
        )
        assert results(alone.rows.rows[0]) == results(batch.rows.rows[index])
        guided, steps = alone.rows.options.guided, len(alone.traces)
        assert guided == (index != 1)
        lengths.add(steps)
        assert (alone.stack("picks")[:, 0] == batch.stack("picks")[:steps, index]).all()
        network_rows = [index, 3 + index] if guided else [index]
        for name in ("hidden", "action", "cb0"):
            np.testing.assert_allclose(
                alone.stack(name), batch.stack(name)[:steps, network_rows], atol=1e-4, rtol=0
            )
        for one, all_ in zip(alone.traces, batch.traces, strict=False):
            for draw, (left, right) in enumerate(zip(one.draws, all_.draws, strict=True)):
                assert (np.isneginf(left[0]) == np.isneginf(right[index])).all(), draw
                finite = np.isfinite(left[0])
                np.testing.assert_allclose(left[0][finite], right[index][finite], atol=1e-4)
    assert len(lengths) == 3 and len(batch.traces) == max(lengths)


def test_rows_equal_single_runs_under_replay(run) -> None:
    """Whatever the picks: here they are random, not what the model would draw."""
    guided = [CONFIGS[0], CONFIGS[2], GenerationConfig()]
    rng = np.random.default_rng(5)
    picks = rng.integers(0, 32, (140, 3, 5)).astype(np.int32)
    picks[..., 0] = rng.random((140, 3)) < 0.3
    batch = run("main", guided, SCRIPTS, picks=picks)
    for index in range(3):
        alone = run("main", [guided[index]], [SCRIPTS[index]], picks=picks[:, index : index + 1])
        steps = len(alone.traces)
        assert results(alone.rows.rows[0]) == results(batch.rows.rows[index])
        assert (alone.stack("picks") == picks[:steps, index : index + 1]).all()
        for name in ("hidden", "action", "cb0"):
            np.testing.assert_allclose(
                alone.stack(name), batch.stack(name)[:steps, [index, 3 + index]], atol=1e-4, rtol=0
            )


def test_a_row_is_a_function_of_its_seed_not_of_its_place(run) -> None:
    batch = run("main", [CONFIGS[0]] * 3, [SCRIPTS[0]] * 3, seeds=[7, 8, 7])
    first, other, again = batch.rows.rows
    assert results(first) == results(again)
    assert (first.grid != other.grid).any()
    # Different texts under one seed draw by the same noise until their texts differ.
    batch = run("main", [CONFIGS[0]] * 3, ["same words here", "same words there", "other"])
    assert (batch.stack("picks")[0] != batch.stack("picks")[0, :1]).any()
    shared = run("main", [CONFIGS[0]] * 3, ["one", "one two", "[S2] one"], seeds=[4, 4, 4])
    assert (shared.stack("picks")[0] == shared.stack("picks")[0, :1]).all()


# --------------------------------------------------------------------- text arrives in any pieces


def cut(text: str, places: list[int]) -> list[str]:
    borders = [0, *sorted(places), len(text)]
    return [text[a:b] for a, b in zip(borders, borders[1:], strict=False)]


TEXT = SCRIPTS[2]


@pytest.fixture(scope="module", params=[None, "exact", "upstream"])
def given_at_once(request, run, make_plan) -> tuple[Any, tuple[Any, ...]]:
    plan = None if request.param is None else make_plan("main", request.param)
    made = run("main", CONFIGS[:1], [TEXT], seeds=SEEDS[:1], plans=[plan])
    return plan, results(made.rows.rows[0])


@settings(max_examples=12)
@given(
    st.lists(st.integers(0, len(TEXT)), max_size=12),
    st.lists(st.integers(0, 9), min_size=13, max_size=13),
)
@example(list(range(len(TEXT))), [99] * 200)  # character by character, every frame at once
@example(list(range(len(TEXT))), [1] * 200)
@example([i for i, c in enumerate(TEXT) if c == " "], [99] * 200)  # word by word
@example([len(TEXT)], [0, 0])
def test_codes_do_not_depend_on_how_the_text_arrives(
    given_at_once, make_rows, driver, places, frames
) -> None:
    """Cut anywhere, with any number of frames computed in between: the same bits."""
    plan, expected = given_at_once
    rows = make_rows("main", CONFIGS[:1], SEEDS[:1], [plan])
    waited = False
    for piece, count in zip(cut(TEXT, places), frames, strict=False):
        rows.feed(0, piece)
        driver(rows, frames=count)
        waited |= rows.rows[0].waiting
    rows.close(0)
    driver(rows)
    assert results(rows.rows[0]) == expected
    if len(places) == len(TEXT) and frames[0] == 99:
        assert waited


@settings(max_examples=12)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9), st.integers(0, 6)), max_size=30))
@example([(2, 99, 40), (0, 12, 3), (0, 99, 3), (1, 99, 0)])
def test_rows_wait_for_their_own_text_only(run, make_rows, make_plan, driver, arrivals) -> None:
    """Whoever is fed when, and however far the others got meanwhile: the same bits.

    Rows 1 and 2 have prefixes, which warm up while the others are under way.
    """
    plans = [None, make_plan("main", "exact"), make_plan("main", "upstream", 1)]
    whole = run("main", CONFIGS, SCRIPTS, seeds=SEEDS, plans=plans)
    rows = make_rows("main", CONFIGS, SEEDS, plans)
    left = list(SCRIPTS)
    for row, letters, frames in arrivals:
        if left[row]:
            rows.feed(row, left[row][:letters])
            left[row] = left[row][letters:]
            if not left[row]:
                rows.close(row)
        driver(rows, frames=frames)
    for row, text in enumerate(left):
        if text:
            rows.feed(row, text)
            rows.close(row)
            driver(rows, frames=2)
    driver(rows)
    for found, expected in zip(rows.rows, whole.rows.rows, strict=True):
        assert results(found) == results(expected)


def test_a_row_that_waits_changes_nothing(make_rows, driver) -> None:
    rows = make_rows("main", CONFIGS, SEEDS)
    for index in (0, 2):
        rows.feed(index, SCRIPTS[index])
        rows.close(index)
    rows.feed(1, "one two three f")
    driver(rows, frames=30)
    row = rows.rows[1]
    assert row.waiting and not row.done and 0 < row.steps < 30
    before = jax.device_get(rows._state.replace(cache=NO_CACHE, keys=()))
    seen = results(row)
    assert len(driver(rows, frames=5)) == 5
    after = jax.device_get(rows._state.replace(cache=NO_CACHE, keys=()))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b[1]), before, after)
    assert (before.frame[[0, 2]] + 5 == after.frame[[0, 2]]).all()
    assert results(row) == seen
    slot = int(before.frame[1])
    cache = np.asarray(rows._state.cache.keys)[[1, 4]]
    rows.feed(1, "our five. ")
    driver(rows, frames=1)
    again = np.asarray(rows._state.cache.keys)[[1, 4]]
    assert (cache[..., :slot] == again[..., :slot]).all()
    assert row.steps > slot


def test_a_frame_waits_only_when_its_outcome_is_open(make_rows, driver) -> None:
    """Before any text: the initial padding. Then up to where an unknown word would be seen."""
    padding = GenerationConfig(initial_padding=4)
    rows = make_rows("main", [padding])
    assert len(driver(rows)) == 4 and rows.rows[0].waiting
    rows.feed(0, "a b ")  # the second stream looks two words ahead
    assert driver(rows) == []
    rows.feed(0, "c")  # not a word yet: it may go on
    assert driver(rows) == []
    rows.feed(0, " ")
    assert len(driver(rows)) > 0
    assert [word for word, _ in rows.rows[0].words] == ["a"]
    rows.close(0)
    driver(rows)
    assert [word for word, _ in rows.rows[0].words] == ["a", "b", "c"] and rows.rows[0].done
    # A pause at the head of the queue needs no word behind it.
    rows = make_rows("main", [GenerationConfig(initial_padding=0)])
    assert driver(rows) == []
    rows.feed(0, '<break time="1s"/>')
    assert len(driver(rows)) == 12


# --------------------------------------------------------------------------- joining and leaving


def test_sessions_join_and_leave_between_any_frames(run, make_rows, make_plan, driver) -> None:
    """Nothing is compiled for it, whoever joins equals a single run, and so does who stays."""
    stays = results(run("main", CONFIGS, SCRIPTS, seeds=SEEDS).rows.rows[0])
    (joins,) = run("main", [CONFIGS[2]], [SCRIPTS[1]], seeds=[99]).rows.rows
    plan = make_plan("main", "upstream")
    (follows,) = run("main", [CONFIGS[1]], [SCRIPTS[2]], seeds=[5], plans=[plan]).rows.rows
    rows = make_rows("main", CONFIGS, SEEDS)
    for index, script in enumerate(SCRIPTS):
        rows.feed(index, script)
        rows.close(index)
    driver(rows, frames=7)
    left = rows.rows[1]
    with CompileWatch() as watch:
        rows.leave(1)
        driver(rows, frames=2)
        rows.join(1, CONFIGS[2], 99)
        rows.feed(1, SCRIPTS[1])
        rows.close(1)
        driver(rows, frames=3)
        assert rows.rows[1].steps == 3
    assert watch.counts["programs"] == 0
    assert left.done and left.computed == 7 and left.available == 7 + 1 - 3 - 1
    # With a prefix, in the middle of the sentence of one that never left.
    rows.join(2, CONFIGS[1], 5, plan)
    driver(rows, frames=2)
    assert rows.rows[2].steps == 0
    rows.feed(2, SCRIPTS[2])
    rows.close(2)
    driver(rows)
    assert results(rows.rows[0]) == stays
    assert results(rows.rows[1]) == results(joins)
    assert results(rows.rows[2]) == results(follows)


@pytest.mark.parametrize(
    "config",
    [GenerationConfig(cfg_scale=2.0), GenerationConfig(cfg_scale=1.0, audio=SamplingConfig(1, 0))],
)
def test_a_session_that_asks_for_more_than_the_batch_can_do_is_refused(make_rows, config) -> None:
    rows = make_rows("main", [CONFIGS[1]])
    before = rows.rows[0]
    with pytest.raises(ConfigError, match="guidance, or for a larger top_k"):
        rows.join(0, config, 1)
    assert rows.rows[0] is before


# ---------------------------------------------------------------------------------- ends and edges


def test_a_long_take_ends_at_the_context_and_says_so(run) -> None:
    script = " ".join(["one two three four five"] * 30)
    made = run("main", [CONFIGS[0]] * 3, [script, "short", script])
    long, short, _ = made.rows.rows
    assert (long.done, long.truncated, long.computed) == (True, True, 140)
    assert (short.done, short.truncated) == (True, False)
    assert len(made.traces) == 140 and not made.rows.refresh()
    assert long.available == 140 + 1 - 3 - 1
    assert (long.frames(0, long.available) >= 0).all()


def test_a_take_that_ends_with_the_context_is_whole(run, tokenizer) -> None:
    """Its last frame is the context's last: done, and nothing was cut off."""
    ends = {}
    for frames in range(110, 132):
        script = f'one <break time="{frames / 12.5}s"/>'
        machine = Machine(tokenizer.ids, 2, CONFIGS[0].max_padding, CONFIGS[0].initial_padding)
        state = machine.new_state(parse_script(script, tokenizer))
        for step in range(140):
            machine.process(state, step, 1)
        ends[state.end_step] = script
    # The delays (3) and one pause (6) follow the end of the text.
    for end, truncated in ((130, False), (131, False), (132, True)):
        picks = np.ones((140, 1, 5), np.int32)
        row = run("main", CONFIGS[:1], [ends[end]], picks=picks).rows.rows[0]
        assert (row.done, row.truncated) == (True, truncated)
        assert row.computed == min(end + 9, 140)


def test_a_word_starts_on_its_own_after_max_padding_frames_and_so_many_end_the_take(run) -> None:
    """Where every action pads, the setting alone says when words start; with any value."""
    picks = np.zeros((140, 3, 5), np.int32)
    numbers = (1, 9, 2**31 - 1)
    configs = [GenerationConfig(max_padding=number) for number in numbers]
    rows = run("main", configs, ["a b c"] * 3, seeds=SEEDS, picks=picks).rows.rows
    for row, number in zip(rows[:2], numbers, strict=False):
        steps = [step for _, step in row.words]
        # A word is read to its end first; the first is two tokens, the speaker being one.
        second = 2 + max(number, 2) + 1
        assert steps == [2, second, second + number + 1]
        end = steps[-1] + number + 1
        assert (row.done, row.truncated, row.computed) == (True, False, end + 3 + number)
    assert [step for _, step in rows[2].words] == [2]
    assert (rows[2].truncated, rows[2].computed) == (True, 140)


def test_text_after_the_end_of_a_take_changes_nothing(make_rows, driver) -> None:
    rows = make_rows("main", CONFIGS[:1])
    rows.feed(0, "one two three four five six seven " * 12)
    driver(rows)
    row = rows.rows[0]
    assert row.done and row.truncated and not row.closed
    seen = results(row)
    rows.feed(0, "more")
    rows.close(0)
    assert driver(rows) == [] and results(row) == seen


def test_cancel_gives_the_memory_back(make_rows, driver) -> None:
    rows = make_rows("main", CONFIGS[:1])
    rows.feed(0, SCRIPTS[0])
    driver(rows, frames=3)
    leaves = jax.tree.leaves(rows._state.cache)
    rows.cancel()
    assert not rows.refresh() and rows._state is None and rows._queue is None
    assert rows.rows[0].computed == 3
    assert all(leaf.size for leaf in leaves)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("", "script is empty"),
        (" \n ", "script is empty"),
        ('<break time="1s"/>', "no speakable word"),
        ("[S1]", "script is empty"),
        ("... !", "no speakable word"),
    ],
)
def test_a_script_without_a_word_is_refused(make_rows, script, message) -> None:
    rows = make_rows("main", CONFIGS[:1])
    rows.feed(0, script)
    with pytest.raises(ScriptError, match=message):
        rows.close(0)


def test_feeding_a_closed_row_is_refused(make_rows) -> None:
    rows = make_rows("main", CONFIGS[:1])
    rows.feed(0, "word")
    rows.close(0)
    rows.close(0)
    with pytest.raises(SessionError, match="after close"):
        rows.feed(0, "more")


def test_output_begins_where_every_codebook_has_a_code(run) -> None:
    """Codebook 1 of "main" has no delay: column 0 is never generated, so frame 0 is left out."""
    made = run("main", CONFIGS[:1], SCRIPTS[:1])
    row = made.rows.rows[0]
    assert row.crop == 1
    aligned = undelay(row.grid[:, : row.computed + 1], (2, 0, 3, 1))
    assert (row.frames(0, row.available) == aligned[:, 1:]).all()
    assert (aligned[:, 1:] >= 0).all() and aligned[1, 0] == -1
    assert (row.frames(2, 5) == aligned[:, 3:6]).all()
    assert row.word_steps() == [(word, step - 1) for word, step in row.words if step >= 1]
    assert [word for word, _ in row.words][:2] == ["Hello", "there."]


@pytest.mark.parametrize("name", ["main", "two codebooks"])
def test_complete_frames_never_change_nor_gain_words(make_rows, driver, name) -> None:
    """A stream emits frames as soon as they are complete, with the words that begin in them."""
    rows = make_rows(name, CONFIGS[:1])
    row = rows.rows[0]
    rows.feed(0, SCRIPTS[0])
    rows.close(0)
    seen = []
    while driver(rows, frames=1):
        words = [(word, frame) for word, frame in row.word_steps() if frame < row.available]
        seen.append((row.frames(0, row.available), words))
    grown = [codes.shape[1] for codes, _ in seen]
    assert grown == sorted(grown) and grown[-1] > 20 and len(seen[-1][1]) > 5
    for codes, words in seen:
        count = codes.shape[1]
        assert (codes == seen[-1][0][:, :count]).all() and (codes >= 0).all()
        assert words == [each for each in seen[-1][1] if each[1] < count]


@pytest.mark.parametrize("padding", [0, 3, 20])
def test_without_a_second_stream_output_begins_before_the_first_word(
    make_rows, driver, padding
) -> None:
    """``initial_padding`` frames before it; a pause delays the word, and so the output."""
    rows = make_rows("no second stream", [GenerationConfig(cfg_scale=1.0, initial_padding=padding)])
    row = rows.rows[0]
    rows.feed(0, '<break time="0.6s"/> ')
    driver(rows)
    assert row.crop is None and row.available == 0 and row.word_steps() == []
    rows.feed(0, "hello")
    rows.close(0)
    driver(rows)
    ((_, step),) = row.words
    assert row.crop == step - padding > 5
    assert row.word_steps() == [("hello", padding)]
    assert row.available == row.computed + 1 - 2 - row.crop
