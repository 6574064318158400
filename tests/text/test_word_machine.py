from __future__ import annotations

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dia2_jax.errors import SessionError
from dia2_jax.text.machine import Machine, forced_trace
from dia2_jax.text.script import Entry, parse_script
from dia2_jax.text.tokenizer import TokenIds

IDS = TokenIds(
    card=640, new_word=2, pad=3, bos=1, zero=7, spk1=600, spk2=601, audio_pad=65, audio_bos=64
)


def word(*tokens, padding=None):
    return Entry(tokens, "w", len(tokens) if padding is None else padding)


def pause(padding):
    return Entry((), "", padding)


def test_traces_match_golden(golden):
    scripts = [golden.entries(script["entries"]) for script in golden.values["scripts"]]
    for trace in golden.values["traces"]:
        machine = Machine(
            golden.tokenizer.ids, trace["ahead"], trace["max_padding"], trace["initial_padding"]
        )
        state = machine.new_state(scripts[trace["script"]])
        pairs = zip(trace["actions"], trace["forced"], strict=True)
        outcomes = [
            machine.process(state, step, action, bool(forced))
            for step, (action, forced) in enumerate(pairs)
        ]
        assert [outcome.main for outcome in outcomes] == trace["main"]
        assert [outcome.second for outcome in outcomes] == trace["second"]
        assert [outcome.consumed is not None for outcome in outcomes] == [
            bool(consumed) for consumed in trace["consumed"]
        ]
        assert state.end_step == trace["end_step"]
        assert [list(item) for item in state.transcript] == trace["transcript"]


def test_generations_match_golden(golden):
    """Whole runs, voice prefixes included: the text that the network read at every step."""
    ids = golden.tokenizer.ids
    for run in golden.values["generations"].values():
        machine = Machine(
            ids,
            golden.values["data"]["second_stream_ahead"],
            initial_padding=run["initial_padding"],
        )
        script = parse_script(run["script"], golden.tokenizer, split_sound_tags=True)
        if "prefix" in run:
            prefix = run["prefix"]
            entries = golden.entries(prefix["entries"]) + script
            outcomes, state = forced_trace(
                machine, entries, prefix["new_word_steps"], prefix["aligned_frames"]
            )
            read = [[outcomes[-1].main, outcomes[-1].second]]
        else:
            state, read = machine.new_state(script), [[ids.bos, ids.pad]]
        for step, action in enumerate(run["actions"], run["start"]):
            outcome = machine.process(state, step, action)
            read.append([outcome.main, outcome.second])
        assert read[:-1] == run["text_tokens"]
        assert state.end_step == run["end_step"]
        assert [list(item) for item in state.transcript] == run["transcript"]


def test_pace():
    """Word starts are at least tokens + 1 and at most max(7, tokens + 1) frames apart."""
    entries = [word(10), word(20, 21, 22), word(*range(30, 39)), word(40)]

    def starts(action):
        machine = Machine(IDS, 2, initial_padding=0)
        state = machine.new_state(entries)
        for step in range(60):
            machine.process(state, step, action)
        return [step for _, step in state.transcript]

    assert starts(1) == [0, 2, 6, 16]
    assert starts(0) == [0, 7, 14, 24]


def test_a_forced_start_waits_for_the_word_before_but_not_for_padding():
    machine = Machine(IDS, 0)
    entries = [word(10, 11, 12), word(20, padding=9), word(30)]
    _, state = forced_trace(machine, entries, [1, 3, 6, 8], 10)
    assert state.transcript == [("w", 1), ("w", 6), ("w", 8)]


def test_end_is_marked_once_in_the_second_stream():
    cases = ((2, [(10, 2), (3, 3), (3, 2), (3, 3)]), (0, [(2, 2), (10, 10), (3, 3)]))
    for ahead, expected in cases:
        machine = Machine(IDS, ahead, initial_padding=0)
        state = machine.new_state([word(10)])
        outcomes = [machine.process(state, step, 1)[:2] for step in range(8)]
        assert outcomes == expected + [(3, 3)] * (8 - len(expected))
        assert state.end_step == 2


def test_ready():
    def ready(entries, ahead=2, closed=False, padding=0, forced=False, taken=0):
        machine = Machine(IDS, ahead, initial_padding=padding)
        state = machine.new_state(entries)
        for step in range(taken):
            machine.process(state, step, 1)
        return machine.ready(state, closed, forced=forced)

    a = word(10)
    assert not ready([]) and ready([], closed=True)
    assert ready([], padding=1) and not ready([], padding=1, forced=True)
    assert not ready([a, a]) and ready([a, a, a]) and ready([a, a], closed=True)
    assert not ready([a, pause(2), a, pause(2)]) and ready([a, pause(2), a, pause(2), a])
    assert ready([pause(2)])  # a pause is taken without looking ahead
    assert ready([a], ahead=0) and not ready([], ahead=0)
    assert ready([word(10, 11)], ahead=0, taken=1)  # in the middle of a word


words = st.builds(
    lambda tokens, padding: Entry(tuple(tokens), f"w{tokens[0]}", padding),
    st.lists(st.integers(2, 12), min_size=1, max_size=4),
    st.integers(0, 5),
)
pauses = st.builds(pause, st.integers(1, 4))


@given(
    entries=st.lists(words | pauses, max_size=9),
    arrivals=st.lists(st.integers(0, 3), max_size=9),
    bits=st.integers(0, 2**50 - 1),
    ahead=st.integers(0, 3),
    prefix=st.lists(st.integers(0, 12), max_size=3),
)
def test_arrival_never_changes_a_trace(entries, arrivals, bits, ahead, prefix):
    """Stepping only when ready, as words drip in, equals having the whole text."""
    actions = [bits >> step & 1 for step in range(50)]

    def run(fed, arrivals):
        machine = Machine(IDS, ahead)
        state, waiting = machine.new_state(entries[:fed]), list(arrivals)
        outcomes = []
        while len(outcomes) < len(actions):
            step = len(outcomes)
            forced = step < 12
            if machine.ready(state, fed == len(entries), forced=forced):
                action = int(step in prefix) if forced else actions[step]
                outcomes.append(machine.process(state, step, action, forced))
            else:
                more = waiting.pop(0) if waiting else 1
                state.entries.extend(entries[fed : fed + more])
                fed = min(fed + more, len(entries))
        state.entries.extend(entries[fed:])  # what the run did not need to wait for
        return outcomes, state

    whole, state = run(len(entries), [])
    dripped, dripped_state = run(0, arrivals)
    assert dripped == whole
    assert dripped_state == state


@given(entries=st.lists(words | pauses, max_size=6), ahead=st.integers(0, 3), data=st.data())
def test_not_ready_means_that_later_text_matters(entries, ahead, data):
    """The law is tight: where the machine waits, some continuation changes the outcome."""
    machine = Machine(IDS, ahead)
    state = machine.new_state(entries)
    step = 0
    while machine.ready(state, closed=False) and step < 40:
        machine.process(state, step, data.draw(st.integers(0, 1)))
        step += 1
    if machine.ready(state, closed=False):
        return
    ends = []
    for more in ([], [word(100 + n) for n in range(ahead + 1)]):
        future = copy.deepcopy(state)
        future.entries.extend(more)
        ends.append([machine.process(future, step + n, 1) for n in range(30)])
    assert ends[0] != ends[1]


def test_a_prefix_refuses_to_look_into_text_that_is_missing():
    machine = Machine(IDS, 2)
    prefix = [word(10), word(20)]
    for known in range(3):
        entries = prefix + [word(30), word(40)][:known]
        if known == 2:
            forced_trace(machine, entries, [0, 3], 6, closed=False)
            continue
        with pytest.raises(SessionError, match="feed 2 words of the script, or close it"):
            forced_trace(machine, entries, [0, 3], 6, closed=False)
        forced_trace(machine, entries, [0, 3], 6)
