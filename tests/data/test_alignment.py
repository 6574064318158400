"""Alignment: what it lays out is what the machine, left alone, does with the written script."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dia2_jax.data import Alignment, Pace, SpokenWord, align
from dia2_jax.errors import AlignmentError
from dia2_jax.text.machine import Machine
from dia2_jax.text.script import parse_script

PLAIN = ["a", "good", "(laughs)", "morning,", "extraordinarily", "I", "<3", "isn’t"]
ODD = ["(clears", "throat)", "two  words", "half:past:ten", ":", " padded\n", "(clears throat)."]


@st.composite
def recordings(draw: st.DrawFn, texts: list[str], longest: float = 3.0) -> list[SpokenWord]:
    """Words of both speakers: overlapping, fast, slow, and far apart; on a grid of 20 ms too."""
    words, now = [], draw(st.sampled_from([0.0, 0.04, 0.3, 1.3, 7.0]))
    for _ in range(draw(st.integers(1, 9))):
        end = now + draw(st.sampled_from([0.0, 0.08, 0.2, 0.5, 1.0]))
        words.append(
            SpokenWord(draw(st.sampled_from(texts)), now, end, draw(st.sampled_from([1, 1, 2])))
        )
        gap = draw(st.sampled_from([0.06, 0.24, longest]))
        now = max(now, round(now + draw(st.floats(0, gap)), draw(st.sampled_from([2, 12]))))
    return words


paces = st.builds(
    Pace,
    word_step_offset=st.sampled_from([2, 0, 5]),
    initial_padding=st.sampled_from([2, 0, 7]),
    max_padding=st.sampled_from([6, 0, 3]),
)


def run(alignment: Alignment, machine: Machine) -> tuple[list[int], int | None]:
    """Steps in which the unforced machine takes the script's entries, and where the text ends."""
    state, taken = machine.new_state(alignment.entries), []
    actions = {*alignment.steps, alignment.end_step}
    for step in range(alignment.end_step + 3):
        before = state.entries_taken
        machine.process(state, step, int(step in actions))
        taken += [step] * (state.entries_taken - before)
    return taken, state.end_step


def check(alignment: Alignment, tokenizer, pace: Pace, ahead: int) -> None:
    assert list(alignment.entries) == parse_script(alignment.script, tokenizer)
    machine = Machine(tokenizer.ids, ahead, pace.max_padding, pace.initial_padding)
    assert run(alignment, machine) == (list(alignment.steps), alignment.end_step)
    spread = pace.delay_spread
    assert alignment.frames_needed == alignment.end_step + pace.max_padding + 1 + spread
    check_pace(alignment, pace)


def check_pace(alignment: Alignment, pace: Pace) -> None:
    """No break and no delay without need, and every one that is needed."""
    due = limit = pace.initial_padding
    drift = iter(alignment.drift)
    pause = None
    breaks = 0
    for entry, step in zip(alignment.entries, alignment.steps, strict=True):
        if not entry.tokens:
            assert pause is None, "two breaks in a row"
            assert due <= step <= limit
            pause, breaks = (step, entry.padding), breaks + 1
            continue
        if pause is None:
            assert due <= step <= limit
        else:
            assert step == sum(pause) > limit, "a break where none was needed"
        late = next(drift)
        assert late >= 0
        assert late == 0 or step == due, "late without need"
        due, limit = (
            step + len(entry.tokens) + 1,
            step + max(pace.max_padding, len(entry.tokens)) + 1,
        )
        pause = None
    assert pause is None and next(drift, None) is None
    assert due <= alignment.end_step <= limit
    assert alignment.breaks == breaks == alignment.script.count("<break")


@settings(max_examples=150)
@given(recordings(PLAIN), paces, st.sampled_from([0, 1, 2]))
def test_the_unforced_machine_takes_every_word_in_its_step(tokenizer, words, pace, ahead) -> None:
    alignment = align(words, tokenizer, pace)
    check(alignment, tokenizer, pace, ahead)
    said = [entry for entry in alignment.entries if entry.tokens]
    assert [entry.text for entry in said] == [word.text.replace("’", "'") for word in words]
    steps = [s for e, s in zip(alignment.entries, alignment.steps, strict=True) if e.tokens]
    wanted = [pace.step(word.start) for word in words]
    assert [s - late for s, late in zip(steps, alignment.drift, strict=True)] == wanted
    # The tags that the grammar asks for, and no other: where the speaker changes.
    spoken = [word.speaker for word in words]
    tags = [1 if tag == "[S1]" else 2 for tag in re.findall(r"\[S[12]\]", alignment.script)]
    assert tags == [s for i, s in enumerate(spoken) if i == 0 or s != spoken[i - 1]]


@settings(max_examples=150)
@given(recordings(ODD + PLAIN[:2], longest=1.0), paces)
def test_words_with_white_space_and_cut_sound_tags(tokenizer, words, pace) -> None:
    if all(word.text == ":" for word in words):
        with pytest.raises(AlignmentError, match="no word of the recording has a token"):
            align(words, tokenizer, pace)
        return
    alignment = align(words, tokenizer, pace)
    check(alignment, tokenizer, pace, 2)
    # Every character is said, in order.
    texts = "".join(entry.text for entry in alignment.entries)
    said = "".join(word.text.replace(":", "") for word in words)
    assert "".join(texts.split()) == "".join(said.split())


def test_slow_speech_keeps_its_times_and_fast_speech_comes_late(tokenizer, speak) -> None:
    slow = align(speak([("a", 0.0, 0.2), ("I", 0.4, 0.6), ("a", 0.8, 0.9)]), tokenizer, Pace())
    assert (slow.steps, slow.drift, slow.breaks) == ((2, 7, 12), (0, 0, 0), 0)
    assert slow.script == "[S1] a I a"
    # [S1] a is two tokens, I is one: the next is taken 3 and 2 steps later at the earliest.
    fast = align(speak([("a", 0.0, 0.1), ("I", 0.1, 0.1), ("a", 0.1, 0.1)]), tokenizer, Pace())
    assert (fast.steps, fast.drift) == ((2, 5, 7), (0, 2, 4))
    assert fast.end_step == 9  # as soon as the last word is spelled


def test_gaps_become_breaks_from_the_end_of_the_speech_on(tokenizer, speak) -> None:
    words = speak([("a", 2.0, 2.2), ("I", 4.0, 4.2, 2), ("a", 4.4, 5.2, 2)])
    alignment = align(words, tokenizer, Pace())
    # 2 s are frame 25, taken in step 27; the break before it begins with the first step that can
    # take anything. "a" ends in frame 28 (27.5, half to even): the next break begins in step 30.
    assert alignment.steps == (2, 27, 30, 52, 57)
    assert [entry.padding for entry in alignment.entries] == [25, 2, 22, 2, 1]
    assert alignment.script == '<break time="2.00s"/> [S1] a <break time="1.76s"/> [S2] I a'
    # It sounds until 5.2 s, frame 65: the end is forced before that.
    assert alignment.end_step == 57 + 7


def test_a_cut_sound_tag_starts_with_its_first_half_and_ends_with_its_second(
    tokenizer, speak
) -> None:
    words = speak([("(clears", 0.0, 0.4), ("throat)", 0.4, 1.0), ("good", 1.2, 1.3)])
    alignment = align(words, tokenizer, Pace())
    assert [entry.text for entry in alignment.entries if entry.tokens] == [
        "(clears throat)",
        "good",
    ]
    # It sounds to step 14, but the machine waits no longer than to step 9 for the break.
    assert alignment.steps == (2, 9, 17)
    # With more patience the break begins where the second half ends.
    patient = align(words, tokenizer, Pace(max_padding=13))
    assert patient.steps == (2, 14, 17)


def test_white_space_in_a_word_spreads_its_time(tokenizer, speak) -> None:
    alignment = align(speak([("aa bb", 0.0, 1.6)]), tokenizer, Pace())
    # Four characters of 0.4 s: the second word starts at 0.8 s, frame 10.
    assert [s - d for s, d in zip(alignment.steps[-1:], alignment.drift[-1:], strict=True)] == [12]


def test_long_breaks_are_written_to_the_frame(tokenizer, speak) -> None:
    """Hundredths of a second do not tell all frame counts of every rate apart."""
    for rate in (12.5, 75.0, 300.0):
        for frame in (1000, 2332, 160_003):
            pace, start = Pace(frame_rate=rate), frame / rate
            alignment = align(speak([("a", start, start)]), tokenizer, pace)
            assert alignment.steps[-1] == pace.step(start)
            assert list(alignment.entries) == parse_script(
                alignment.script, tokenizer, frame_rate=rate
            )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no words: give its transcript"),
        ([("a", 0, 1), ("b", -0.5, 1)], r"'b' \(-0.5 s to 1 s\): times are seconds from"),
        ([("a", 0, 1), ("b", math.nan, 1)], r"'b' \(nan s to 1 s\): times are seconds from"),
        ([("a", 0, math.inf)], r"'a' \(0 s to inf s\): times are seconds from"),
        ([("a", 0, 1), ("b", 2, 1)], r"'b' \(2 s to 1 s\): ends before it starts"),
        ([("a", 0, 1, 3)], "'a' .*: speaker 3, Dia2 has speakers 1 and 2"),
        ([("a", 1, 1), ("b", 0.9, 1)], "'b' starts at 0.9 s, before 'a' .*list words in the order"),
        ([("a", 0, 1)] * 40 + [('b<break time="1s"/>', 1, 2)], r"'b<break time=.*<break> tag"),
        ([("b", 0, 1), ("<break", 0, 1), ('time="1s"/>', 1, 2)], r"behind '\[S1\] b' write a <br"),
        ([("a", 0, 1)] * 40 + [("b [S2] c", 1, 2)], r"'b \[S2\] c' .*holds a speaker tag"),
        ([("a", 0, 1), ("[S1]", 1, 2)], r"'\[S1\]' .*holds a speaker tag"),
        ([(":", 0, 1), ("", 1, 2)], "no word of the recording has a token"),
    ],
)  # fmt: skip
def test_unusable_words_are_refused_by_name(tokenizer, speak, words, message) -> None:
    with pytest.raises(AlignmentError, match=message):
        align(speak(words), tokenizer, Pace())
