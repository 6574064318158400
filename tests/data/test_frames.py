"""Rows: what generation feeds when it acts as the recording does, and what is to be predicted."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from dia2_jax.config import Dia2Config
from dia2_jax.data import Alignment, Pace, Row, SpokenWord, align, build_row
from dia2_jax.errors import AlignmentError, DataError
from dia2_jax.generation.prefix import WORD_STEP_OFFSET, PrefixTurn, plan_prefix, warm_up
from dia2_jax.generation.rows import Rows
from dia2_jax.generation.settings import MAX_PADDING, GenerationConfig, SamplingConfig
from dia2_jax.generation.step import Programs
from dia2_jax.model.dia2 import Dia2Model
from dia2_jax.text.machine import Machine
from dia2_jax.text.script import Entry
from dia2_jax.text.timing import WordTime
from dia2_jax.text.tokenizer import TokenIds

PACE = Pace()  # of the published checkpoints and of generation
IDS = TokenIds(
    card=64, new_word=2, pad=3, bos=1, zero=7, spk1=60, spk2=61, audio_pad=65, audio_bos=64
)


def config_of(configs, kind: str) -> Dia2Config:
    """configs/tiny.yaml, or one without second stream; the depformer's schedule plays no part."""
    if kind == "tiny":
        return configs(runtime={"weights_schedule": [0] * 7})
    data = {"channels": 4, "delay_pattern": [1, 2], "second_stream_ahead": 0}
    return configs(data=data, runtime={"weights_schedule": [0]})


# ------------------------------------------------------------------------------------ by hand


def two_words(configs, ahead: int) -> tuple[Alignment, Dia2Config]:
    config = configs(
        data={"channels": 4, "delay_pattern": [1, 3], "second_stream_ahead": ahead},
        runtime={"weights_schedule": [0]},
    )
    alignment = Alignment(
        entries=(Entry((10, 11), "a", 2), Entry((12,), "b", 1)),
        steps=(2, 6),
        end_step=9,
        script="",
        drift=(0, 0),
        frames_needed=0,
    )
    return alignment, config


def test_every_field_of_a_small_row(configs) -> None:
    alignment, config = two_words(configs, ahead=1)
    codes = np.stack([np.arange(12), np.arange(12) + 20])
    row = build_row(alignment, codes, config, IDS, PACE)
    new, pad, bos = 2, 3, 64
    #        step: 0    1    2    3   4    5    6    7    8    9    10   11
    main = [[pad], [pad], [10], [11], [pad], [pad], [12], [pad], [pad], [pad], [pad], [pad]]
    second = [[pad], [pad], [new], [12], [pad], [pad], [new], [pad], [pad], [new], [pad], [pad]]
    spoken = np.concatenate([np.array(main), np.array(second)], axis=1).T
    assert (row.spoken == spoken).all()
    assert row.tokens[:2].tolist() == [[1, *spoken[0, :-1]], [pad, *spoken[1, :-1]]]
    assert row.actions.tolist() == [0, 0, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0]
    # Not free: before the first word, while a word is spelled, and after the end.
    assert row.free.astype(int).tolist() == [0, 0, 0, 0, 0, 1, 1, 0, 1, 1, 0, 0]
    # Column t holds code t - delay; the target of step t is column t + 1.
    assert row.tokens[2].tolist() == [bos, *range(11)]
    assert row.codes[0].tolist() == [*range(12)]
    assert row.known[0].all()
    assert row.tokens[3].tolist() == [bos, bos, bos, *range(20, 29)]
    assert row.codes[1, 2:].tolist() == [*range(20, 30)]
    assert row.known[1].astype(int).tolist() == [0, 0, *[1] * 10]
    assert (row.codes[1, :2] == bos).all()
    assert row.steps == 12
    assert {row.tokens.dtype, row.spoken.dtype, row.actions.dtype, row.codes.dtype} == {
        np.dtype(np.int32)
    }


def test_without_a_second_stream_both_carry_the_main_one(configs) -> None:
    alignment, config = two_words(configs, ahead=0)
    row = build_row(alignment, np.zeros((2, 12), int), config, IDS, PACE)
    assert (row.spoken[0] == row.spoken[1]).all()
    assert row.spoken[0].tolist() == [3, 3, 2, 10, 11, 3, 2, 12, 3, 3, 3, 3]


def test_forced_starts_are_not_free(configs) -> None:
    alignment, config = two_words(configs, ahead=1)
    late = Alignment((alignment.entries), (2, 9), 16, "", (0, 0), 0)
    row = build_row(late, np.zeros((2, 30), int), config, IDS, PACE)
    # Step 9 is 7 behind step 2, step 16 is 7 behind step 9: the machine does not wait longer.
    assert row.actions[[2, 9, 16]].tolist() == [1, 1, 1] and row.actions.sum() == 3
    assert not row.free[[2, 9, 16]].any()
    assert row.free[[5, 8, 11, 15]].all()


def test_a_row_ends_with_generation_the_codes_the_context_or_on_demand(configs) -> None:
    alignment, config = two_words(configs, ahead=1)

    def steps(frames: int, **kinds: Any) -> int:
        codes = np.zeros((2, frames), int)
        return build_row(alignment, codes, kinds.pop("config", config), IDS, PACE, **kinds).steps

    assert steps(100) == 9 + 3 + MAX_PADDING  # delays, and one pause
    assert steps(10) == 10  # the least delayed codebook has a code for column 10
    assert steps(10, max_steps=7) == 7
    short = configs(
        data={"channels": 4, "delay_pattern": [1, 3], "second_stream_ahead": 1},
        runtime={"weights_schedule": [0], "max_context_steps": 8},
    )
    assert steps(10, config=short) == 8


def test_beyond_the_codes_of_a_codebook_nothing_is_known(configs) -> None:
    """The most delayed codebook runs out last; a row of codebook delays 3, 1 ends with the 1."""
    alignment, _ = two_words(configs, ahead=1)
    config = configs(
        data={"channels": 4, "delay_pattern": [3, 1]}, runtime={"weights_schedule": [0]}
    )
    row = build_row(alignment, np.full((2, 6), 5), config, IDS, PACE)
    assert row.steps == 6 and row.known[1].all()
    assert row.known[0].astype(int).tolist() == [0, 0, 1, 1, 1, 1]


def test_a_codebook_without_delay_has_no_code_at_step_0(configs) -> None:
    alignment, _ = two_words(configs, ahead=1)
    config = configs(
        data={"channels": 4, "delay_pattern": [0, 1]}, runtime={"weights_schedule": [0]}
    )
    row = build_row(alignment, np.stack([np.arange(9)] * 2) + 5, config, IDS, PACE)
    assert row.tokens[2].tolist() == [64, *range(6, 13)]
    assert row.codes[0].tolist() == [*range(6, 14)] and row.known[0].all()


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((3, 9), int), r"shape \(3, 9\), the model reads \[2, frames\]"),
        (np.zeros(9, int), r"shape \(9,\)"),
        (np.full((2, 9), 64), "outside 0 to 63"),
        (np.full((2, 9), -1), "outside 0 to 63"),
        (np.zeros((2, 0), int), "of 0 frames holds no step"),
    ],
)
def test_codes_of_another_model_are_refused(configs, codes, message) -> None:
    alignment, config = two_words(configs, ahead=1)
    with pytest.raises(DataError, match=message):
        build_row(alignment, codes, config, IDS, PACE)


def test_an_alignment_of_another_pace_is_refused(configs, tokenizer) -> None:
    words = [SpokenWord("good", 0.0, 0.4), SpokenWord("friend", 1.2, 1.5)]
    patient = align(words, tokenizer, Pace(max_padding=20))
    assert not patient.breaks
    codes = np.zeros((8, 60), int)
    with pytest.raises(AlignmentError, match="step 9: .*align with the pace of this model"):
        build_row(patient, codes, configs(), tokenizer.ids, PACE)
    early = align(words, tokenizer, Pace(initial_padding=0, word_step_offset=0))
    with pytest.raises(AlignmentError, match="step 0"):
        build_row(early, codes, configs(), tokenizer.ids, PACE)


# ------------------------------------------------------------------------- against a voice prefix


@st.composite
def conversations(draw: st.DrawFn) -> list[tuple[str, int, bool]]:
    """Words, the pause behind each beyond the machine's own, and whether a new turn begins."""
    texts = st.sampled_from(["a", "good", "(laughs)", "friend", "extraordinarily", "dear"])
    word = st.tuples(texts, st.integers(0, 6), st.sampled_from([False, False, True]))
    return draw(st.lists(word, min_size=3, max_size=9))


@pytest.mark.parametrize("kind", ["tiny", "no second stream"])
@given(said=conversations(), seed=st.integers(0, 9))
def test_rows_are_what_the_prefix_warm_up_feeds(
    configs, tokenizer, random_codes, kind, said, seed
) -> None:
    """At the machine's own pace the exact plan drops and moves nothing.

    The last two words are the script behind the prefix: what the second stream looks ahead to.
    """
    config = config_of(configs, kind)
    inside = len(said) - 2
    words: list[SpokenWord] = []
    turns: list[tuple[int, int, list[tuple[str, int]]]] = []  # speaker, first frame, (word, step)
    step = WORD_STEP_OFFSET
    for index, (text, pause, new_turn) in enumerate(said):
        if index == inside:
            frames = step + 1
        speaker = words[-1].speaker if words else 1
        tagged = index == 0 or new_turn
        if tagged:
            speaker = 3 - speaker if index else 1
            if index < inside:
                turns.append((speaker, step - WORD_STEP_OFFSET, []))
        if index < inside:
            turns[-1][2].append((text, step))
        start = (step - WORD_STEP_OFFSET) / 12.5
        words.append(SpokenWord(text, start, start + 0.08, speaker))
        count = len(tokenizer.encode(f"[S{speaker}] {text}" if tagged else text))
        step += min(count + 1 + pause, max(MAX_PADDING, count) + 1)
    alignment = align(words, tokenizer, PACE)
    assert not alignment.breaks and not any(alignment.drift)
    codes = random_codes(config, alignment.frames_needed, seed)
    row = build_row(alignment, codes, config, tokenizer.ids, PACE)

    ends = [*(begin for _, begin, _ in turns[1:]), frames]
    prefix = []
    for (speaker, begin, timed), end in zip(turns, ends, strict=True):
        starts = [(text, (at - WORD_STEP_OFFSET - begin) / 12.5) for text, at in timed]
        said_words = tuple(WordTime(text, start, start + 0.08) for text, start in starts)
        prefix.append(PrefixTurn(speaker, codes[:, begin:end], said_words))
    plan = plan_prefix(prefix, tokenizer, config)
    assert plan.entries == alignment.entries[:inside]
    assert plan.steps == alignment.steps[:inside]
    machine = Machine(tokenizer.ids, config.data.second_stream_ahead, MAX_PADDING, 2)
    warm = warm_up(plan, alignment.entries[inside:], machine, config, closed=True)
    # Up to the step in which the first word behind the prefix is taken.
    assert warm.start == alignment.steps[inside] == warm.tokens.shape[1]
    assert (warm.tokens == row.tokens[:, : warm.start]).all()
    assert [*warm.text, *warm.column] == row.tokens[:, warm.start].tolist()


# ------------------------------------------------------------------------- against frame_step


def random_model(config: Dia2Config) -> Dia2Model:
    rng = np.random.default_rng(0)
    graph, state = nnx.split(nnx.eval_shape(lambda: Dia2Model(config, rngs=nnx.Rngs(0))))
    for _, variable in nnx.to_flat_state(state):
        variable.set_value(jnp.asarray(rng.standard_normal(variable.shape, np.float32)))
    return nnx.merge(graph, state)


RECORDINGS = {
    "gaps, leading silence, both speakers": [
        ("good", 0.9, 1.2, 1),
        ("morning,", 1.4, 1.9, 1),
        ("dear", 3.5, 3.7, 2),
        ("friend", 3.9, 4.2, 2),
        ("(laughs)", 5.6, 5.7, 1),
    ],
    "fast": [("extraordinarily", 0.0, 0.3), ("good", 0.3, 0.4), ("I", 0.4, 0.5), ("a", 0.5, 0.6)],
    "one word, by speaker 2": [("a", 0.3, 0.4, 2)],
}


@pytest.mark.parametrize("kind", ["tiny", "no second stream"])
def test_rows_are_what_generation_feeds_when_it_acts_likewise(
    configs, tokenizer, random_codes, speak, kind
) -> None:
    """Frame by frame, from the written script, until generation ends by itself."""
    config = config_of(configs, kind)
    spread = config.data.max_delay - min(config.data.delay_pattern)
    pace = Pace(delay_spread=spread)
    alignments = [align(speak(words), tokenizer, pace) for words in RECORDINGS.values()]
    assert [bool(made.breaks) for made in alignments] == [True, False, True]
    assert max(alignments[1].drift) > 5
    rows: list[Row] = [
        build_row(made, random_codes(config, made.frames_needed, seed), config, tokenizer.ids, pace)
        for seed, made in enumerate(alignments)
    ]
    count = len(rows)
    likeliest = SamplingConfig(temperature=0.0, top_k=1)
    settings = [GenerationConfig(likeliest, likeliest, cfg_scale=1.0, cfg_filter_k=1)] * count
    live = Rows(
        Programs(random_model(config)),
        tokenizer,
        settings,
        range(count),
        [None] * count,
        trace=True,
    )
    for index, made in enumerate(alignments):
        live.feed(index, made.script)
        live.close(index)
    # What stands in place of an unknown code must not matter.
    longest = max(row.steps for row in rows)
    picks = np.random.default_rng(5).integers(0, 64, (longest, count, 1 + config.data.codebooks))
    for index, row in enumerate(rows):
        mine = picks[: row.steps, index]
        mine[:, 0] = row.actions
        mine[:, 1:] = np.where(row.known, row.codes, mine[:, 1:].T).T
    read: list[np.ndarray] = []
    while live.refresh():
        trace = live.step(picks[len(read)])
        assert trace is not None
        read.append(jax.device_get(trace.tokens))
    assert len(read) == len(picks)
    for index, (row, made) in enumerate(zip(rows, alignments, strict=True)):
        fed = np.stack([tokens[index] for tokens in read[: row.steps]], axis=1)
        assert (fed == row.tokens).all()
        state = live.rows[index]
        assert state.steps == row.steps and state.done and not state.truncated
        words = [e.text for e in made.entries if e.tokens]
        steps = [s for e, s in zip(made.entries, made.steps, strict=True) if e.tokens]
        assert state.words == list(zip(words, steps, strict=True))
