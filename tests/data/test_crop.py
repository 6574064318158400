"""Crops: a piece of a recording trains on the frames that the whole one has there."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dia2_jax.data import Pace, Recording, SpokenWord, align, build_row, crop, crop_start

PACE = Pace()
STEPS = 40
# One token each (two with a speaker tag), so the second stream is silent again before the next.
SHORT = ["a", "I", "so", "(laughs)", "(clears throat)"]


@st.composite
def spoken(draw: st.DrawFn) -> list[SpokenWord]:
    """16 words far enough apart to keep their times, on a grid of 20 ms as aligners have."""
    words, now, speaker = [], 0, 1
    for _ in range(16):
        now += draw(st.integers(16, 60))  # more than 4 frames
        speaker = draw(st.sampled_from([speaker, speaker, 3 - speaker]))
        start = now / 50
        text = draw(st.sampled_from(SHORT))
        words.append(SpokenWord(text, start, start + draw(st.sampled_from([0.1, 0.3])), speaker))
    return words


@given(words=spoken(), first=st.integers(1, 12), ahead=st.sampled_from([0, 1, 2, 5]))
def test_a_crop_has_the_frames_of_the_whole_recording(
    configs, tokenizer, random_codes, words, first, ahead
) -> None:
    config = configs(
        data={"channels": 4, "delay_pattern": [1, 3], "second_stream_ahead": ahead},
        runtime={"weights_schedule": [0], "max_context_steps": 1500},
    )
    whole = align(words, tokenizer, PACE)
    assert not any(whole.drift)
    codes = random_codes(config, whole.frames_needed)
    long = build_row(whole, codes, config, tokenizer.ids, PACE)

    piece = crop(Recording(codes, tuple(words)), first, STEPS, PACE, ahead)
    made = align(piece.words, tokenizer, PACE)
    row = build_row(made, piece.codes, config, tokenizer.ids, PACE, max_steps=STEPS)
    frame = PACE.step(words[first].start) - PACE.word_step_offset
    assert row.steps == min(STEPS, long.steps - frame)
    assert (piece.codes == codes[:, frame : frame + STEPS + 1]).all()

    # The word is taken as soon as the machine takes any, and no later one is moved.
    assert made.entries[0].text == words[first].text
    assert made.steps[0] == PACE.initial_padding
    assert not any(made.drift)
    starts = [step for entry, step in zip(made.entries, made.steps, strict=True) if entry.tokens]
    shifted = [PACE.step(word.start) - frame for word in words[first:]]
    assert starts == shifted[: len(starts)]

    # Beyond the delays the codes are the same ...
    late = config.data.max_delay
    end = frame + row.steps
    assert (row.tokens[2:, late:] == long.tokens[2:, frame + late : end]).all()
    assert row.known[:, late - 1 :].all() or end == long.steps
    assert (row.codes[:, late - 1 :] == long.codes[:, frame + late - 1 : end]).all()
    # ... and the text is from the second word on: the first has a speaker tag in the crop.
    since = starts[1]
    if since < row.steps:
        assert (row.spoken[:, since:] == long.spoken[:, frame + since : end]).all()
        assert (row.actions[since:] == long.actions[frame + since : end]).all()
        assert (row.free[since:] == long.free[frame + since : end]).all()
    # Every line opens with speaker 1, as a script's does.
    assert made.entries[0].tokens[0] == tokenizer.ids.spk1


@given(st.integers(0, 400), st.sampled_from([50, 100, 12.5, 30]))
def test_the_first_word_is_never_late_nor_behind_a_break(tokenizer, ticks, grid) -> None:
    """0.2 s is frame 2.5, rounded to 2: what is left over must not round up to a frame."""
    words = (SpokenWord("a", 0.0, 0.1), SpokenWord("so", ticks / grid, ticks / grid + 0.1))
    piece = crop(Recording(np.zeros((2, 600), int), words), 1, STEPS, PACE, 0)
    made = align(piece.words, tokenizer, PACE)
    assert (made.steps, made.drift, made.breaks) == ((PACE.initial_padding,), (0,), 0)


def test_words_behind_the_row_are_kept_as_far_as_they_matter() -> None:
    words = tuple(SpokenWord("a", float(second), second + 0.5) for second in range(20))
    recording = Recording(np.zeros((2, 250), int), words)
    for ahead, behind in ((0, 2), (2, 4)):
        piece = crop(recording, 3, 30, PACE, ahead)
        steps = [PACE.step(word.start) for word in piece.words]
        # 3 words start within 30 steps (2, 14 or 15, 27); one more settles the length of the last
        # gap, and the second stream sees ``ahead`` further.
        assert sum(step <= 30 for step in steps) == 3
        assert len(piece.words) == 3 + behind
    assert len(crop(recording, 3, 10_000, PACE, 0).words) == 17
    assert crop(recording, 3, 10_000, PACE, 0).codes.shape == (2, 250 - 38)


def test_a_word_behind_the_audio_leaves_one_frame() -> None:
    words = (SpokenWord("a", 0.0, 0.1), SpokenWord("so", 30.0, 30.1))
    piece = crop(Recording(np.arange(20).reshape(2, 10), words), 1, STEPS, PACE, 2)
    assert piece.codes.tolist() == [[9], [19]]


def test_crops_start_anywhere_and_often_at_both_ends() -> None:
    words = [SpokenWord("a", start, start + 0.1) for start in (0.5, 1.0, 1.9, 2.0, 7.0)]
    # Places are those between 0 s and 2 s, with a margin that stands for the ends themselves.
    starts = [crop_start(words, 2.0, place / 1000) for place in range(1000)]
    assert starts == sorted(starts) and set(starts) == {0, 1, 2, 3}
    counts = np.bincount(starts) / 1000
    edge = 0.15 / 1.3
    # 0.5 s of 2 s and the margin before; 0.1 s and the margin behind.
    assert np.allclose(counts[[0, 3]], [edge + 0.25 / 1.3, edge + 0.05 / 1.3], atol=0.003)
    assert np.allclose(counts[[1, 2]], [0.25 / 1.3, 0.45 / 1.3], atol=0.003)
    # A recording no longer than a row starts with its first word; no word starts behind 8 s.
    assert {crop_start(words, -3.0, place) for place in (0.0, 0.5, 0.99)} == {0}
    assert crop_start(words, 8.0, 0.99) == 4


@pytest.mark.parametrize("first", [0, 4])
def test_a_crop_may_begin_with_speaker_2(tokenizer, first) -> None:
    words = tuple(SpokenWord("a", float(i), i + 0.2, 2 - i % 2 if i else 2) for i in range(6))
    piece = crop(Recording(np.zeros((2, 90), int), words), first, STEPS, PACE, 2)
    made = align(piece.words, tokenizer, PACE)
    ids = tokenizer.ids
    assert made.entries[0].tokens[:2] == (ids.spk1, ids.spk2)
    assert made.script.startswith("[S2] a")
