"""The array machine against goldens and against the Python specification."""

from __future__ import annotations

import functools
import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dia2_jax.errors import SessionError
from dia2_jax.generation.machine import (
    QueueBuilder,
    TextQueue,
    from_spec,
    init_state,
    process,
    ready,
)
from dia2_jax.text.machine import Machine, forced_trace
from dia2_jax.text.script import Entry, parse_script
from dia2_jax.text.tokenizer import TokenIds, Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "text"
IDS = TokenIds(
    card=64, new_word=2, pad=3, bos=1, zero=7, spk1=60, spk2=61, audio_pad=65, audio_bos=64
)
ROWS, STEPS, ARRIVAL = 128, 60, 30


def token_ids(data: dict) -> SimpleNamespace:
    """What a tokenizer reads of a config's data section."""
    pad, bos = data["audio_pad_token_id"], data["audio_bos_token_id"]
    return SimpleNamespace(**data, audio_pad=pad, audio_bos=bos)


def build(entries, max_steps, ahead, closed=True) -> QueueBuilder:
    builder = QueueBuilder(max_steps, ahead)
    builder.append(entries)
    if closed:
        builder.close()
    return builder


def stack(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


start = jax.jit(jax.vmap(init_state))
# These integer programs run for milliseconds; compiling them is what the tests wait for.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(jit, static_argnames=("ids", "ahead"))
def run_rows(state, queue, steps, actions, forced, max_padding, *, ids, ahead):
    """Whole traces of many rows: last states, outputs [row, step]."""

    def row(state, queue, steps, actions, forced, max_padding):
        def one(state, item):
            step, action, force = item
            settings = {"ids": ids, "ahead": ahead, "max_padding": max_padding}
            return process(state, queue, step, action, forced=force, **settings)

        return jax.lax.scan(one, state, (steps, actions, forced))

    return jax.vmap(row)(state, queue, steps, actions, forced, max_padding)


@functools.partial(jit, static_argnames=("ahead",))
def run_dripped(queue, arrived, actions, initial_padding, max_padding, *, ahead):
    """Rows that step only when ready, with ``arrived`` (entries, words, closed) at each tick."""

    def row(queue, arrived, actions, initial_padding, max_padding):
        def tick(carry, counts):
            state, taken = carry
            seen = poison(queue, *counts)
            go = ready(state, seen, ahead) & (taken < actions.size)
            settings = {"ids": IDS, "ahead": ahead, "max_padding": max_padding}
            action = actions[jnp.minimum(taken, actions.size - 1)]
            after, output = process(state, seen, taken, action, **settings)
            state = jax.tree.map(lambda new, old: jnp.where(go, new, old), after, state)
            return (state, taken + go), (go, output)

        return jax.lax.scan(tick, (init_state(initial_padding), jnp.int32(0)), arrived)

    return jax.vmap(row)(queue, arrived, actions, initial_padding, max_padding)


def poison(queue: TextQueue, entries, words, closed) -> TextQueue:
    """The queue when only so much has arrived; whoever reads on gets nonsense."""

    def keep(values, count, nonsense):
        return jnp.where(jnp.arange(values.size) < count, values, nonsense)

    return TextQueue(
        pool=keep(queue.pool, queue.word_offset[words], 999),
        word_offset=keep(queue.word_offset, words + 1, 7),
        entry_word=keep(queue.entry_word, entries, 5),
        entry_padding=keep(queue.entry_padding, entries, 44),
        entry_count=entries,
        word_count=words,
        closed=closed,
    )


def random_entries(rng, count, longest=5):
    """Words of 1 to ``longest`` tokens, special ones among them, and pauses."""
    entries = []
    for index in range(count):
        tokens = tuple(rng.integers(2, 20, rng.integers(1, longest + 1)).tolist())
        pause = rng.random() < 0.25
        entries.append(Entry(() if pause else tokens, f"w{index}", int(rng.integers(0, 8))))
    return entries


def spec_outputs(outcomes):
    return [(o.main, o.second, o.consumed is not None) for o in outcomes]


def array_outputs(output, row, where=slice(None)):
    columns = (output.main[row][where], output.second[row][where], output.consumed[row][where])
    return [(int(m), int(s), bool(c)) for m, s, c in zip(*columns, strict=True)]


def transcript(output, row, builder, first_step=0):
    """(text, step) of the words that a row started."""
    words = np.asarray(output.word[row])
    return [
        (builder.words[word], first_step + step) for step, word in enumerate(words) if word >= 0
    ]


def end(state, row):
    value = int(state.end_step[row])
    return None if value < 0 else value


# ----------------------------------------------------------------------------------------- goldens


@pytest.fixture(scope="module", params=["a", "b", "c"])
def golden(request):
    folder = GOLDEN / request.param
    values = json.loads(gzip.decompress((folder / "text.json.gz").read_bytes()))
    return Tokenizer.from_folder(folder, token_ids(values["data"])), values


def same_ids(tokenizer):
    """IDS, with which the compiled functions are shared: the machine reads two of the ids."""
    assert (tokenizer.ids.new_word, tokenizer.ids.pad) == (IDS.new_word, IDS.pad)
    return IDS


def recorded(entries):
    return [Entry(tuple(e["tokens"]), e["text"], e["padding"]) for e in entries]


def test_traces_match_golden(golden):
    tokenizer, values = golden
    traces = values["traces"]
    steps, rows = len(traces[0]["actions"]), len(traces)
    assert rows == 20
    for ahead in {trace["ahead"] for trace in traces}:
        builders = [
            build(recorded(values["scripts"][trace["script"]]["entries"]), steps, ahead)
            for trace in traces
        ]
        state, output = jax.device_get(
            run_rows(
                start(np.array([trace["initial_padding"] for trace in traces])),
                stack([builder.arrays() for builder in builders]),
                np.tile(np.arange(steps), (rows, 1)),
                np.array([trace["actions"] for trace in traces]),
                np.array([trace["forced"] for trace in traces], bool),
                np.array([trace["max_padding"] for trace in traces]),
                ids=same_ids(tokenizer),
                ahead=ahead,
            )
        )
        for row, trace in enumerate(traces):
            if trace["ahead"] != ahead:
                continue
            assert output.main[row].tolist() == trace["main"]
            assert output.second[row].tolist() == trace["second"]
            assert output.consumed[row].tolist() == [bool(c) for c in trace["consumed"]]
            assert end(state, row) == trace["end_step"]
            said = [list(item) for item in transcript(output, row, builders[row])]
            assert said == trace["transcript"]


@pytest.mark.parametrize("warmup", ["device", "host"])
def test_prefixed_generations_match_golden(golden, warmup):
    """The warm-up on the device, or on the host with the state handed over, and what follows."""
    tokenizer, values = golden
    ids, ahead, total = same_ids(tokenizer), values["data"]["second_stream_ahead"], 160
    runs = [run for run in values["generations"].values() if "prefix" in run]
    assert len(runs) == 3
    rows, builders = [], []
    for run in runs:
        frames, new_words = run["prefix"]["aligned_frames"], run["prefix"]["new_word_steps"]
        script = parse_script(run["script"], tokenizer, split_sound_tags=True)
        entries = recorded(run["prefix"]["entries"]) + script
        builder = build(entries, total, ahead)
        builders.append(builder)
        # The last prefix frame's step is taken again, as the published runtime does.
        steps, actions = np.arange(total) + run["start"], np.zeros(total, int)
        forced = np.zeros(total, bool)
        if warmup == "host":
            machine = Machine(ids, ahead, initial_padding=run["initial_padding"])
            _, spec = forced_trace(machine, entries, new_words, frames)
            state, first = from_spec(spec, builder.arrays(), ahead), 0
        else:
            state, first = init_state(run["initial_padding"]), frames
            steps = np.concatenate([np.arange(frames), steps[:-frames]])
            actions[:frames] = np.isin(np.arange(frames), new_words)
            forced[:frames] = True
        actions[first : first + len(run["actions"])] = run["actions"]
        rows.append((state, builder.arrays(), steps, actions, forced, np.array(6)))
    batch = stack(rows)
    state, output = jax.device_get(run_rows(*batch, ids=ids, ahead=ahead))
    for row, run in enumerate(runs):
        # What a step puts out is read in the next one.
        read = np.stack([output.main[row], output.second[row]], -1).tolist()
        begin = run["prefix"]["aligned_frames"] - 1 if warmup == "device" else -1
        expected = run["text_tokens"][max(0, -begin) :]
        assert read[max(0, begin) :][: len(expected)] == expected
        assert end(state, row) == run["end_step"]
        said = [
            [builders[row].words[word], int(step)]
            for word, step in zip(output.word[row], batch[2][row], strict=True)
            if word >= 0
        ]
        assert len(said) > 10
        assert said == run["transcript"][-len(said) :]
        assert warmup == "host" or len(said) == len(run["transcript"])


# ------------------------------------------------------------------ equal to the specification


@pytest.mark.parametrize("ahead", [0, 1, 2, 3])
@settings(max_examples=8)
@given(seed=st.integers(0, 2**32 - 1))
def test_random_traces_equal_the_specification(ahead, seed):
    rng = np.random.default_rng(seed)
    texts = [random_entries(rng, rng.integers(0, 12)) for _ in range(ROWS)]
    actions = rng.choice([0, 1, 2, 3, 9], (ROWS, STEPS), p=[0.6, 0.2, 0.1, 0.05, 0.05])
    forced = rng.random((ROWS, STEPS)) < rng.choice([0, 0.2, 1], (ROWS, 1))
    initial, budget = rng.integers(0, 5, ROWS), rng.integers(0, 8, ROWS)
    builders = [build(entries, 2 * STEPS, ahead) for entries in texts]
    state, output = jax.device_get(
        run_rows(
            start(initial),
            stack([builder.arrays() for builder in builders]),
            np.tile(np.arange(STEPS), (ROWS, 1)),
            actions,
            forced,
            budget,
            ids=IDS,
            ahead=ahead,
        )
    )
    ended = 0
    for row, entries in enumerate(texts):
        machine = Machine(IDS, ahead, int(budget[row]), int(initial[row]))
        spec = machine.new_state(entries)
        outcomes = [
            machine.process(spec, step, int(actions[row, step]), bool(forced[row, step]))
            for step in range(STEPS)
        ]
        assert array_outputs(output, row) == spec_outputs(outcomes)
        assert end(state, row) == spec.end_step
        assert transcript(output, row, builders[row]) == spec.transcript
        ended += spec.end_step is not None
    assert 0 < ended < ROWS  # the traces reach the end of the text, and not only that


@pytest.mark.parametrize("ahead", [0, 1, 2, 3])
@settings(max_examples=5)
@given(seed=st.integers(0, 2**32 - 1))
def test_dripping_text_gives_the_trace_of_the_whole(ahead, seed):
    rng = np.random.default_rng(seed)
    texts = [random_entries(rng, rng.integers(0, 16)) for _ in range(ROWS)]
    actions = rng.integers(0, 2, (ROWS, STEPS))
    initial, budget = rng.integers(0, 5, ROWS), rng.integers(0, 8, ROWS)
    # How much has arrived at each tick; everything has, and is closed, from tick ARRIVAL on.
    entries_in, words_in, closed_in = [], [], []
    for entries in texts:
        count = np.sort(rng.integers(0, len(entries) + 1, ARRIVAL))
        count = np.append(count, np.full(STEPS, len(entries)))
        words = np.cumsum([0, *(bool(entry.tokens) for entry in entries)])
        close = rng.integers(np.argmax(count == len(entries)), ARRIVAL + 1)
        entries_in.append(count)
        words_in.append(words[count])
        closed_in.append(np.arange(len(count)) >= close)
    arrived = (np.array(entries_in, np.int32), np.array(words_in, np.int32), np.array(closed_in))
    builders = [build(entries, STEPS, ahead) for entries in texts]
    queue = stack([builder.arrays() for builder in builders])
    (state, taken), (went, output) = jax.device_get(
        run_dripped(queue, arrived, actions, initial, budget, ahead=ahead)
    )
    assert taken.tolist() == [STEPS] * ROWS
    waited = 0
    for row, entries in enumerate(texts):
        machine = Machine(IDS, ahead, int(budget[row]), int(initial[row]))
        spec = machine.new_state(entries)
        outcomes = [machine.process(spec, t, int(actions[row, t])) for t in range(STEPS)]
        assert array_outputs(output, row, went[row]) == spec_outputs(outcomes)
        assert end(state, row) == spec.end_step
        # And it waited exactly when the specification says so.
        drip, fed, steps = machine.new_state(), 0, 0
        for tick, count in enumerate(entries_in[row]):
            drip.entries.extend(entries[fed:count])
            fed = count
            go = machine.ready(drip, bool(closed_in[row][tick])) and steps < STEPS
            assert went[row][tick] == go
            if go:
                machine.process(drip, steps, int(actions[row, steps]))
                steps += 1
        waited += int((~went[row][:ARRIVAL]).sum())
    assert waited > ROWS


@pytest.mark.parametrize("ahead", [0, 2])
@settings(max_examples=5)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_state_of_the_specification_goes_on_as_arrays(ahead, seed):
    rng = np.random.default_rng(seed)
    states, builders, expected = [], [], []
    for _ in range(ROWS):
        entries = random_entries(rng, rng.integers(0, 12))
        machine = Machine(IDS, ahead)
        known = int(rng.integers(0, len(entries) + 1))
        spec = machine.new_state(entries[:known])
        builder = build(entries[:known], 2 * STEPS, ahead, closed=False)
        for step in range(rng.integers(0, STEPS)):
            if machine.ready(spec, closed=False):
                machine.process(spec, step, int(rng.integers(0, 2)))
        states.append(from_spec(spec, builder.arrays(), ahead))
        # The text that was missing arrives after the hand-over.
        spec.entries.extend(entries[known:])
        builder.append(entries[known:])
        builder.close()
        builders.append(builder)
        expected.append(
            spec_outputs([machine.process(spec, step, step % 2) for step in range(STEPS)])
        )
    steps = np.tile(np.arange(STEPS), (ROWS, 1))
    _, output = jax.device_get(
        run_rows(
            stack(states),
            stack([builder.arrays() for builder in builders]),
            steps,
            steps % 2,
            np.zeros((ROWS, STEPS), bool),
            np.full(ROWS, 6),
            ids=IDS,
            ahead=ahead,
        )
    )
    for row in range(ROWS):
        assert array_outputs(output, row) == expected[row]


# --------------------------------------------------------------------------------------- capacity


@pytest.mark.parametrize("ahead", [0, 2])
@settings(max_examples=4)
@given(seed=st.integers(0, 2**32 - 1))
def test_nothing_within_reach_is_lost(ahead, seed):
    """Far more text than fits: within the capacity's steps no step notices."""
    rng, steps = np.random.default_rng(seed), 12
    texts = []
    for kind in range(ROWS):
        entries = random_entries(rng, 80, longest=(1, 3, 60)[kind % 3])
        if kind % 4 == 1:  # the word to peek at lies behind more pauses than there are steps
            pauses = [Entry((), "", 10**12)] * 40
            entries = entries[:1] + pauses + entries[1:2] + pauses + entries[2:]
        elif kind % 4 == 2:  # the new-word token, of which a step can read two
            entries = [Entry((2,) * int(rng.integers(1, 40)), "n", 1) for _ in range(40)]
        texts.append(entries)
    builders = [build(entries, steps, ahead, closed=rng.random() < 0.5) for entries in texts]
    assert all(builder.full for builder in builders)
    actions = rng.integers(0, 2, (ROWS, steps)) | (np.arange(ROWS) % 5 == 0)[:, None]
    forced = rng.random((ROWS, steps)) < 0.3
    _, output = jax.device_get(
        run_rows(
            start(np.zeros(ROWS, int)),
            stack([builder.arrays() for builder in builders]),
            np.tile(np.arange(steps), (ROWS, 1)),
            actions,
            forced,
            np.ones(ROWS, int),
            ids=IDS,
            ahead=ahead,
        )
    )
    for row, entries in enumerate(texts):
        machine = Machine(IDS, ahead, 1, 0)
        spec = machine.new_state(entries)
        outcomes = []
        for step in range(steps):
            action, force = int(actions[row, step]), bool(forced[row, step])
            outcomes.append(machine.process(spec, step, action, force))
        assert array_outputs(output, row) == spec_outputs(outcomes)
        assert transcript(output, row, builders[row]) == spec.transcript


def test_a_full_queue_is_ready_without_more_text():
    """The last step that can be taken must not wait for words that were left out."""
    entries = [Entry((9,), "w", 0)] * 100
    state, queue = init_state(0), build(entries, 8, 2, closed=False).arrays()
    for step in range(8):
        assert bool(ready(state, queue, 2))
        state, _ = process(state, queue, step, 1, ids=IDS, ahead=2)


def test_the_builder_appends_in_pieces():
    entries = random_entries(np.random.default_rng(0), 12)
    whole, pieces = build(entries, 40, 2), QueueBuilder(40, 2)
    before = pieces.arrays()
    for entry in entries:
        pieces.append([entry])
    pieces.close()
    pieces.close()
    assert pieces.words == whole.words and len(pieces.words) > 5
    jax.tree.map(np.testing.assert_array_equal, pieces.arrays(), whole.arrays())
    # What was handed out does not change, and a feed never changes a shape (so never recompiles).
    assert before.entry_count == 0 and not before.closed and not before.pool.any()
    assert jax.tree.map(np.shape, before) == jax.tree.map(np.shape, whole.arrays())
    with pytest.raises(SessionError, match="appended to a closed text queue"):
        pieces.append(entries)
