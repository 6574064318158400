"""Prefixes: plans of words over steps, and the warm-up in one batched pass."""

from __future__ import annotations

import functools
import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from dia2_jax.errors import PrefixError
from dia2_jax.generation.prefix import WORD_STEP_OFFSET, PrefixTurn, plan_prefix, warm_up
from dia2_jax.generation.settings import GenerationConfig
from dia2_jax.model.delays import delay
from dia2_jax.text.machine import Machine
from dia2_jax.text.script import parse_script
from dia2_jax.text.timing import WordTime
from dia2_jax.text.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "text"
SCRIPT = "[S1] and now for something [S2] completely different."
GUIDED = GenerationConfig(cfg_scale=3.0, cfg_filter_k=5)


def token_ids(data: dict) -> SimpleNamespace:
    """What a tokenizer reads of a config's data section."""
    pad, bos = data["audio_pad_token_id"], data["audio_bos_token_id"]
    return SimpleNamespace(**data, audio_pad=pad, audio_bos=bos)


def turn(config: Any, words: Any, frames: int, number: int = 1, seed: int = 0) -> PrefixTurn:
    data, rng = config.data, np.random.default_rng(seed)
    codes = rng.integers(0, data.depth_vocab_size, (data.codebooks, frames))
    return PrefixTurn(number, codes, tuple(WordTime(*word) for word in words))


def evenly(texts: list[str], seconds: float) -> list[tuple[str, float, float]]:
    edges = np.linspace(0, seconds, len(texts) + 1)
    return [(t, a, b) for t, a, b in zip(texts, edges, edges[1:], strict=False)]


# ------------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_upstream_s_plan_to_the_number(name: str, speaker) -> None:
    values = json.loads(gzip.decompress((GOLDEN / name / "text.json.gz").read_bytes()))
    tokenizer = Tokenizer.from_folder(GOLDEN / name, token_ids(values["data"]))
    config = speaker("main").config
    prefixes = [g["prefix"] for g in values["generations"].values() if "prefix" in g]
    assert len(prefixes) >= 3
    for prefix in prefixes:
        turns = [
            turn(
                config,
                [(w["text"], w["start"], w["end"]) for w in said["words"]],
                said["frames"],
                number,
                seed=number,
            )
            for number, said in enumerate(prefix["words"], 1)
        ]
        plan = plan_prefix(turns, tokenizer, config, kind="upstream")
        found = [
            {"tokens": list(e.tokens), "text": e.text, "padding": e.padding} for e in plan.entries
        ]
        assert found == prefix["entries"]
        assert list(plan.steps) == prefix["new_word_steps"]
        assert plan.frames == prefix["aligned_frames"] == plan.codes.shape[1]
        assert (plan.codes == np.concatenate([t.codes for t in turns], axis=1)).all()


WORDS = ["a", "good", "(laughs)", "morning,", "extraordinarily", "(clears throat)", "I"]
said = st.lists(st.tuples(st.sampled_from(WORDS), st.floats(0, 0.9)), min_size=0, max_size=6)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(said, st.integers(1, 30)), min_size=1, max_size=3),
    st.sampled_from(["main", "no second stream"]),
)
def test_the_exact_plan_takes_every_word_once_inside_the_prefix(
    speaker, tokenizer, parts, name
) -> None:
    config, turns = speaker(name).config, []
    for index, (words, frames) in enumerate(parts):
        starts = np.cumsum([gap for _, gap in words])
        timed = [(text, s, s + 0.1) for (text, _), s in zip(words, starts, strict=True)]
        turns.append(turn(config, timed, frames, 1 + index % 2))
    frames = sum(each.codes.shape[1] for each in turns)
    if not 2 <= frames < config.runtime.max_context_steps - config.data.max_delay:
        return
    ahead = config.data.second_stream_ahead
    machine = Machine(tokenizer.ids, ahead, 6, 2)
    tokens = [
        len(tokenizer.encode(f"[S{each.speaker}] {w.text}" if i == 0 else w.text))
        for each in turns
        for i, w in enumerate(each.words)
    ]
    # Spelled within steps 0 to frames - 2; without a second stream a word is spelled one late.
    needed = sum(tokens) + (0 if ahead else len(tokens))
    if needed > frames - 1:
        with pytest.raises(PrefixError, match=f"says {len(tokens)} words"):
            plan_prefix(turns, tokenizer, config)
        return
    plan = plan_prefix(turns, tokenizer, config)
    assert [len(entry.tokens) for entry in plan.entries] == tokens
    script = parse_script(SCRIPT, tokenizer)
    warm = warm_up(plan, script, machine, config, closed=True)
    # Each word is taken in its own step, and nothing is left to be spelled.
    assert [step for _, step in warm.machine.transcript] == list(plan.steps)
    assert warm.machine.words_taken == len(plan.entries) and not warm.machine.pending
    assert warm.machine.end_step is None
    # At the machine's own pace, tokens + 1, wherever that fits.
    gaps = np.diff(plan.steps)
    if needed + (len(tokens) if ahead else 0) <= frames - 1:
        assert (gaps >= np.array(tokens[:-1], int) + 1).all()
    assert (gaps >= tokens[:-1]).all()
    # Where the words already leave that room, they keep their times.
    offsets = np.cumsum([0] + [each.codes.shape[1] for each in turns])
    wanted = [
        int(offsets[i]) + round(w.start * 12.5) + WORD_STEP_OFFSET
        for i, each in enumerate(turns)
        for w in each.words
    ]
    room = all(b - a > n for a, b, n in zip(wanted, wanted[1:], tokens, strict=False))
    if wanted and room and wanted[-1] + tokens[-1] <= frames - 2 - 1:
        assert list(plan.steps) == wanted


def test_a_conversation_keeps_its_turns_in_order(speaker, tokenizer) -> None:
    config = speaker("main").config
    turns = [
        turn(config, [("hello", 0.1, 0.3), ("you", 0.8, 1.0)], 20, 1, 1),
        turn(config, [("hi", 0.0, 0.2)], 15, 2, 2),
        turn(config, [], 6, 2, 3),
        turn(config, [("good", 0.4, 0.5)], 18, 1, 4),
    ]
    for kind in ("exact", "upstream"):
        plan = plan_prefix(turns, tokenizer, config, kind=kind)  # type: ignore[arg-type]
        assert [entry.text for entry in plan.entries] == ["hello", "you", "hi", "good"]
        speakers = [entry.tokens[0] for entry in plan.entries]
        ids = tokenizer.ids
        assert [speakers[i] for i in (0, 2, 3)] == [ids.spk1, ids.spk2, ids.spk1]
        assert speakers[1] not in (ids.spk1, ids.spk2)
        assert plan.frames == 59
        assert (plan.codes[:, 20:35] == turns[1].codes).all()
    # Half to even: 0.1 s is frame 1.25, 0.8 s frame 10, 0.4 s frame 5.
    assert plan_prefix(turns, tokenizer, config).steps == (3, 12, 22, 48)
    assert plan.steps == (3, 12, 20, 45)


def codes(config: Any, frames: int, rows: int = 0, low: int = 0, high: int = 1) -> np.ndarray:
    values = np.full((rows or config.data.codebooks, frames), low, np.int32)
    values[-1, -1] = high
    return values


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c: [], "no turn"),
        (lambda c: [PrefixTurn(2, codes(c, 9), ())], "only speaker 2.*Give the voice as speaker 1"),
        (lambda c: [PrefixTurn(1, codes(c, 9), ()), PrefixTurn(3, codes(c, 9), ())], "speaker 3"),
        (lambda c: [PrefixTurn(1, codes(c, 9, rows=5), ())], r"shape \(5, 9\).* \[4, frames\]"),
        (lambda c: [PrefixTurn(1, codes(c, 9)[0], ())], r"shape \(9,\)"),
        (lambda c: [PrefixTurn(1, codes(c, 9, high=64), ())], "outside 0 to 63"),
        (lambda c: [PrefixTurn(1, codes(c, 9, low=-1), ())], "outside 0 to 63"),
        (lambda c: [PrefixTurn(1, codes(c, 1), ())], "has 1 frames: it needs at least 2"),
        (lambda c: [PrefixTurn(1, codes(c, 137), ())], r"137 frames \(11.0 s\).*140 steps"),
        (
            lambda c: [PrefixTurn(i, codes(c, 70), ()) for i in (1, 2)],
            "140 frames .*shorten the prefix",
        ),
        (
            lambda c: [turn(c, evenly(["extraordinarily"] * 5, 1.0), 13)],
            r"says 5 words, which the model reads in \d+ frames .*has 13.*leave some out",
        ),
        (
            lambda c: [turn(c, [("b", 0.5, 0.6), ("a", 0.2, 0.3)], 13)],
            "'a' starts at 0.2 s, before 'b'",
        ),
    ],
)  # fmt: skip
def test_impossible_prefixes_are_refused(speaker, tokenizer, make, message) -> None:
    config = speaker("main").config
    with pytest.raises(PrefixError, match=message):
        plan_prefix(make(config), tokenizer, config)


# ----------------------------------------------------------------------------------------- warm-up


@functools.partial(
    jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0}
)
def stepped(graph, params, tokens, positions, slots):
    """The decoder step after step over ``[T, B, 2 + C]`` tokens, at ``[T, B]`` places."""
    model = nnx.merge(graph, params).transformer

    def step(cache, item):
        out, cache = model.step(*item, cache)
        return cache, out

    cache = model.init_cache(tokens.shape[1], tokens.shape[0])
    return jax.lax.scan(step, cache, (tokens, positions, slots))[1]


@pytest.mark.parametrize("kind", ["exact", "upstream"])
def test_batched_prefill_equals_forced_steps(kind, speaker, tokenizer, run, make_plan) -> None:
    """One pass over the warm-up, padded and beside other rows, against step by step.

    The frames are forced one by one through the machine as upstream does, in both guidance rows;
    then the first generated frame must see the same past. Row 2 has the prefix, row 0 another.
    """
    programs, plan = speaker("main"), make_plan("main", kind, 4)
    config, ids = programs.config, tokenizer.ids
    made = run(
        "main",
        [GUIDED] * 3,
        [SCRIPT] * 3,
        plans=[make_plan("main", "exact" if kind == "upstream" else "upstream", 5), None, plan],
    )
    ahead = config.data.second_stream_ahead
    machine = Machine(ids, ahead, GUIDED.max_padding, GUIDED.initial_padding)
    state = machine.new_state([*plan.entries, *parse_script(SCRIPT, tokenizer)])
    grid = delay(plan.codes, config.data.delay_pattern, config.data.audio_bos)
    text, columns, last = (ids.bos, ids.pad), [], plan.frames - 1
    positions = list(range(plan.frames)) + ([last] if kind == "upstream" else [])
    for step, position in enumerate(positions):
        audio = grid[:, position]
        columns.append([[*text, *audio], [ids.zero, ids.pad, *audio]])
        forced = step < plan.frames and (kind == "upstream" or position < last)
        if forced:
            outcome = machine.process(state, position, int(position in plan.steps), forced=True)
            text = outcome.main, outcome.second
    places = np.array([positions, positions]).T
    slots = np.repeat(np.arange(len(positions))[:, None], 2, axis=1)
    out = stepped(programs.graph, programs.params, np.array(columns, np.int32), places, slots)
    first = made.traces[0]
    assert (first.tokens[[2, 5]] == columns[-1]).all()
    for name in ("hidden", "action", "cb0"):
        expected = np.asarray(getattr(out, name))[-1]
        np.testing.assert_allclose(getattr(first, name)[[2, 5]], expected, atol=1e-4, rtol=0)
    assert made.rows.rows[2].words[: len(state.transcript)] == state.transcript


@pytest.mark.parametrize("kind", ["exact", "upstream"])
def test_upstream_s_plan_leaves_words_to_the_generation_and_the_exact_one_does_not(
    kind, speaker, tokenizer, run
) -> None:
    """A dense prefix, in which starts are dropped while tokens of the word before are left."""
    config = speaker("main").config
    dense = [
        turn(config, evenly(["good", "morning,", "extraordinarily"], 1.9), 26, 1),
        turn(config, evenly(["so", "dear", "friend"], 0.9), 12, 2),
    ]
    plan = plan_prefix(dense, tokenizer, config, kind=kind)  # type: ignore[arg-type]
    row = run("main", [GUIDED], [SCRIPT], plans=[plan]).rows.rows[0]
    inside = [word for word, step in row.words if step < plan.frames - 1]
    texts = [entry.text for entry in plan.entries]
    assert inside == texts if kind == "exact" else inside == texts[: len(inside)] != texts
    # However late a prefix word was spoken, the output's words are the script's.
    assert [word for word, _ in row.word_steps()] == SCRIPT.replace("[S1] ", "").replace(
        "[S2] ", ""
    ).split()


def test_the_prefix_is_kept_or_trimmed(run, make_plan) -> None:
    plan = make_plan("main", "exact")
    both = [GUIDED, GenerationConfig(cfg_scale=3.0, cfg_filter_k=5, include_prefix=True), GUIDED]
    made = run("main", both, [SCRIPT] * 3, seeds=[1, 1, 1], plans=[plan, plan, None])
    trimmed, kept, plain = made.rows.rows
    whole = plan.frames - 3  # frames whose every codebook lies in the prefix
    assert (kept.frames(0, whole) == plan.codes[:, :whole]).all()
    assert (trimmed.crop, kept.crop, plain.crop) == (plan.frames - 1, 0, 1)
    assert kept.available - trimmed.available == trimmed.crop
    assert (kept.frames(trimmed.crop, kept.available) == trimmed.frames(0, trimmed.available)).all()
    late = [(word, step - trimmed.crop) for word, step in kept.word_steps()[len(plan.entries) :]]
    assert late == trimmed.word_steps()
    assert kept.word_steps()[: len(plan.entries)] == [
        (entry.text, step) for entry, step in zip(plan.entries, plan.steps, strict=True)
    ]


def test_a_prefix_waits_for_the_words_that_it_looks_ahead_to(make_rows, make_plan, driver) -> None:
    rows = make_rows("main", [GUIDED], plans=[make_plan("main", "exact")])
    row = rows.rows[0]
    for piece in ("one", " two"):
        rows.feed(0, piece)
        assert driver(rows) == [] and row.waiting and not row.started
        assert row.crop is None and row.available == 0 and row.word_steps() == []
    rows.feed(0, " ")
    rows.refresh()
    assert row.started
    assert [word for word, _ in row.words] == ["good", "morning,", "hello", "you"]
    # A closed script may be shorter than the look-ahead.
    rows = make_rows("main", [GUIDED], plans=[make_plan("main", "exact")])
    rows.feed(0, "one")
    rows.close(0)
    assert len(driver(rows)) > 0 and rows.rows[0].done


def test_a_prefix_that_fills_the_context_ends_cleanly(speaker, tokenizer, run) -> None:
    """The longest allowed prefix leaves three frames, the last of them inside the delays."""
    config = speaker("main").config
    for kind in ("exact", "upstream"):
        words = evenly(["good", "morning,"], 2.0)
        plan = plan_prefix([turn(config, words, 136)], tokenizer, config, kind=kind)  # type: ignore[arg-type]
        made = run("main", [GUIDED], [SCRIPT], plans=[plan])
        row = made.rows.rows[0]
        assert (len(made.traces), row.done, row.truncated, row.computed) == (5, True, True, 140)
        assert row.available == 3
        found = row.frames(0, 3)
        assert ((found >= 0) & (found < 64)).all()
        # Codebook 1 has no delay, so its first frame still is the prefix's last.
        assert found[1, 0] == plan.codes[1, -1]
