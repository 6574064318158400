"""A frame, explained: every token read, logit, draw and word of whole generations.

Nothing here steps the network. A generation's own tokens are put through the whole-sequence
decoder and the teacher-forced depformer, its actions through the machine's specification, and
its draws through the sampler with keys derived from (seed, frame).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dia2_jax.errors import NonFiniteError
from dia2_jax.generation import sampling
from dia2_jax.generation.prefix import warm_up
from dia2_jax.generation.rows import Rows
from dia2_jax.generation.sampling import MASKED_LOGIT, rank_bound
from dia2_jax.generation.settings import GenerationConfig, SamplingConfig
from dia2_jax.generation.step import Programs
from dia2_jax.text.machine import Machine
from dia2_jax.text.script import parse_script

TOLERANCE = 1e-4
LENGTH = 192  # sequences are padded to it, so that each form is compiled once a speaker
SCRIPT = '[S1] Hello there. <break time="0.4s"/> [S2] (laughs) What a lovely morning!'
# More than the context of "main" can hold, which is more than one block of cache.
LONG = " ".join(["[S1] one two three four [S2] five six seven eight nine ten"] * 8)

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(jit, static_argnums=0)
def decode(graph, params, tokens, positions):
    return nnx.merge(graph, params).transformer(tokens, positions)


@functools.partial(jit, static_argnums=0)
def deepen(graph, params, previous, hidden, main, second):
    return nnx.merge(graph, params).depformer(previous, hidden, (main, second))


@functools.partial(jit, static_argnames=("index", "bound"))
def redraw(logits, seed, frames, temperature, top_k, *, index, bound):
    """The draw ``index`` of many frames of one seed."""
    key = jax.random.key(seed)
    keys = jax.vmap(lambda t: jax.random.fold_in(jax.random.fold_in(key, t), index))(frames)
    settings = jnp.full(len(frames), temperature), jnp.full(len(frames), top_k)
    return sampling.draw(logits, *settings, keys, bound)


def padded(values: np.ndarray, axis: int) -> np.ndarray:
    width = [(0, 0)] * values.ndim
    width[axis] = (0, LENGTH - values.shape[axis])
    return np.pad(values, width)


def explain(programs: Programs, run: Any, script: str, tokenizer: Any, seed: int) -> None:
    """Derive everything that the only row of ``run`` did from its draws."""
    config, data, ids = programs.config, programs.config.data, tokenizer.ids
    row, guided = run.rows.rows[0], run.rows.options.guided
    settings: GenerationConfig = row.config
    delays, picks, tokens = data.delay_pattern, run.stack("picks")[:, 0], run.stack("tokens")

    # Text: the machine's specification under the drawn actions.
    machine = Machine(ids, data.second_stream_ahead, settings.max_padding, settings.initial_padding)
    entries = parse_script(script, tokenizer)
    if row.plan is None:
        start, text = 0, (ids.bos, ids.pad)
        column: Any = np.full(data.codebooks, data.audio_bos)
        state, past = machine.new_state(entries), np.zeros((2 + data.codebooks, 0), np.int32)
    else:
        warm = warm_up(row.plan, entries, machine, config, closed=True)
        start, text, column, state, past = (
            warm.start, warm.text, warm.column, warm.machine, warm.tokens
        )  # fmt: skip
    spelled = []
    for t, read in enumerate(tokens, start):
        audio = [
            column[c] if delays[c] <= t and t > 0 else data.audio_bos for c in range(data.codebooks)
        ]
        assert read[0].tolist() == [*text, *audio], t
        if guided:
            assert read[1].tolist() == [ids.zero, ids.pad, *audio], t
        outcome = machine.process(state, t, int(picks[t - start, 0]))
        text, column = (outcome.main, outcome.second), picks[t - start, 1:]
        spelled.append(text)
    assert row.words == state.transcript

    # The end, and the grid.
    steps = start + len(picks)
    tail = data.max_delay + settings.max_padding
    cutoff = None if state.end_step is None else state.end_step + tail
    assert row.done and row.computed == steps
    assert row.truncated == (cutoff is None or cutoff > steps)
    assert steps == (config.runtime.max_context_steps if row.truncated else cutoff)
    assert (picks[:, 1:] == row.grid[:, start + 1 : steps + 1].T).all()
    assert (row.grid[:, steps + 1 :] == -1).all()

    # Logits: whole-sequence forms over what was read, in both guidance rows.
    sequence = np.concatenate([past, tokens[:, 0].T], axis=1)
    blank = sequence.copy()
    blank[0], blank[1] = ids.zero, ids.pad
    positions = np.concatenate([np.arange(past.shape[1]), np.arange(start, steps)])
    out = decode(
        programs.graph,
        programs.params,
        padded(np.stack([sequence, blank]), 2),
        padded(np.stack([positions, positions]), 1),
    )
    for name in ("hidden", "action", "cb0"):
        expected = np.asarray(getattr(out, name))[:, past.shape[1] : len(positions)]
        found = run.stack(name).swapaxes(0, 1)
        np.testing.assert_allclose(found, expected[: len(found)], atol=TOLERANCE, rtol=0)
    depth = []
    for hidden in run.stack("hidden").swapaxes(0, 1):
        text_read = padded(np.array(spelled), 0).T  # the conditional row's text in both
        inputs = padded(picks[:, 1:-1], 0), padded(hidden, 0), *text_read
        logits = np.asarray(deepen(programs.graph, programs.params, *inputs))
        depth.append(logits[: len(picks)].swapaxes(0, 1))  # [stage, T, V]

    # Guidance and mask, then the draws.
    scale = settings.cfg_scale
    network = [
        [run.stack("action")[:, 0], run.stack("cb0")[:, 0], *depth[0]],
        [run.stack("action")[:, -1], run.stack("cb0")[:, -1], *depth[-1]],
    ]
    bound = rank_bound([settings])
    for index, (cond, uncond) in enumerate(zip(*network, strict=True)):
        found = np.stack([trace.draws[index][0] for trace in run.traces])
        kept = np.isfinite(found)
        if index == 1:
            special = found[:, [data.audio_pad, data.audio_bos]]
            assert (special == np.float32(MASKED_LOGIT)).all()
        masked = found == np.float32(MASKED_LOGIT)
        if guided and 0 < settings.cfg_filter_k < found.shape[1]:
            survivors, by_guidance = kept & ~masked, uncond + scale * (cond - uncond)
            assert (survivors.sum(1) <= settings.cfg_filter_k).all()
            assert (kept.sum(1) >= settings.cfg_filter_k).all()
            worst_kept = np.where(survivors, by_guidance, np.inf).min(1)
            assert (worst_kept >= np.where(kept, -np.inf, by_guidance).max(1) - TOLERANCE).all()
        else:
            assert kept.all()
        loose = kept & ~masked
        np.testing.assert_allclose(found[loose], cond[loose], atol=TOLERANCE, rtol=0)
        how = settings.text if index == 0 else settings.audio
        frames = padded(np.arange(start, steps), 0)
        settled = float(how.temperature), int(how.top_k)
        drawn = redraw(padded(found, 0), seed, frames, *settled, index=index, bound=bound)
        assert (np.asarray(drawn)[: len(picks)] == picks[:, index]).all()


def config(scale: float = 2.0, filter_k: int = 50, **changes: Any) -> GenerationConfig:
    return GenerationConfig(cfg_scale=scale, cfg_filter_k=filter_k, **changes)


GREEDY = SamplingConfig(0.0, 50)


@pytest.mark.parametrize(
    ("name", "settings", "plan", "script"),
    [
        ("main", config(3.0, 5), None, SCRIPT),
        ("main", config(3.0, 5, text=GREEDY, audio=GREEDY), None, SCRIPT),
        ("main", config(1.0, initial_padding=0), None, SCRIPT),
        ("main", config(0.3, 7), "exact", SCRIPT),
        ("main", config(1.0, max_padding=14), "upstream", SCRIPT),
        ("main", config(3.0, 5, max_padding=1), "exact", SCRIPT),
        ("main", config(6.0, 9, include_prefix=True), "upstream", SCRIPT),
        ("main", config(2.0, 5), None, LONG),
        ("main", config(2.0, 5), "upstream", LONG),
        ("no second stream", config(1.0, initial_padding=5), None, SCRIPT),
        ("two codebooks", config(2.0, 3), None, SCRIPT),
        ("one codebook", config(2.0, 4), None, SCRIPT),
    ],
)
def test_every_generation_is_explained(
    name, settings, plan, script, speaker, tokenizer, run, make_plan
) -> None:
    plans = None if plan is None else [make_plan(name, plan)]
    made = run(name, [settings], [script], seeds=[11], plans=plans)
    assert len(made.traces) > 20
    if script is LONG:
        assert made.rows.rows[0].truncated
    explain(speaker(name), made, script, tokenizer, seed=11)


def test_a_filter_of_zero_keeps_all_and_computes_the_same_codes(run) -> None:
    """Guidance chooses survivors only; where all survive, it changes nothing."""
    guided = run("main", [config(4.0, 0)], [SCRIPT])
    alone = run("main", [config(1.0)], [SCRIPT])
    assert guided.rows.options.guided and not alone.rows.options.guided
    assert (guided.rows.rows[0].grid == alone.rows.rows[0].grid).all()


def test_replay_takes_the_given_picks_and_computes_the_logits_all_the_same(run) -> None:
    sampled = run("main", [config(3.0, 5)], [SCRIPT])
    replayed = run("main", [config(3.0, 5)], [SCRIPT], picks=sampled.stack("picks"), seeds=[99])
    assert (replayed.stack("picks") == sampled.stack("picks")).all()
    for name in ("hidden", "action", "cb0"):
        np.testing.assert_allclose(replayed.stack(name), sampled.stack(name), atol=1e-5)
    assert (replayed.rows.rows[0].grid == sampled.rows.rows[0].grid).all()
    assert replayed.rows.rows[0].words == sampled.rows.rows[0].words


def test_settings_text_and_prefixes_compile_nothing_anew(speaker, make_rows, make_plan, driver):
    """Temperatures, top-k below the bound, scales, filters and text are values, not programs."""
    programs = speaker("one codebook")
    driver(whole(make_rows("one codebook", [config()]), SCRIPT))
    program = programs.jitted(make_rows("one codebook", [config()]).options)
    steps = len(programs._steps)
    assert program._cache_size() == 1
    others = [
        config(1.5, 40, text=SamplingConfig(0.0, 33), audio=SamplingConfig(2.5, 64)),
        config(5.0, 1, initial_padding=7),
        config(max_padding=2),
    ]
    for settings in others:
        driver(whole(make_rows("one codebook", [settings], [123]), "Something else entirely."))
    plans = [make_plan("one codebook", "upstream")]
    rows = make_rows("one codebook", [config()], plans=plans)
    for piece in (SCRIPT[:20], SCRIPT[20:31], SCRIPT[31:]):
        rows.feed(0, piece)
        driver(rows, frames=3)
    rows.close(0)
    driver(rows)
    assert rows.rows[0].done
    assert (program._cache_size(), len(programs._steps)) == (1, steps)


def whole(rows: Rows, script: str) -> Rows:
    rows.feed(0, script)
    rows.close(0)
    return rows


def damaged(programs: Programs, spoil: Callable[[str, np.ndarray], None]) -> Programs:
    """The same compiled programs with other weights."""
    other = copy.copy(programs)
    other.params = jax.tree.map(np.array, programs.params)  # variables of its own
    for path, variable in nnx.to_flat_state(other.params):
        spoil(".".join(map(str, path)), variable.get_value())
        variable.set_value(jnp.asarray(variable.get_value()))
    return other


@pytest.mark.parametrize(
    "weight",
    ["transformer.action_head.weight", "transformer.cb0_head.weight", "depformer.logits.1.weight"],
)
def test_damaged_weights_are_reported_in_the_first_frame(weight, speaker, tokenizer) -> None:
    """Whichever head; an infinite value is as bad as a NaN."""

    def spoil(name: str, value: np.ndarray) -> None:
        if name == weight:
            value[1] = np.inf

    rows = Rows(damaged(speaker("main"), spoil), tokenizer, [config()], [0], [None], trace=True)
    whole(rows, SCRIPT)
    assert rows.refresh()
    with pytest.raises(NonFiniteError, match=r"frame 0 \(row 0\).*dtype='float32'"):
        rows.step()


def test_a_non_finite_row_is_named_with_its_frame(speaker, tokenizer) -> None:
    """A damaged text embedding shows when its word is read, and only in the row that reads it."""
    (token, *_) = tokenizer.encode("zebra")

    def spoil(name: str, value: np.ndarray) -> None:
        if name == "transformer.text_embed.embedding.weight":
            value[token] = np.nan

    programs = damaged(speaker("main"), spoil)
    rows = Rows(programs, tokenizer, [config()] * 3, [0, 1, 2], [None] * 3, trace=True)
    for index, script in enumerate((SCRIPT, "one two three four zebra", SCRIPT)):
        assert (token in sum((e.tokens for e in parse_script(script, tokenizer)), ())) == (
            index == 1
        )
        rows.feed(index, script)
        rows.close(index)
    frame = 0
    with pytest.raises(NonFiniteError, match=r"in frame \d+ \(row 1\)") as caught:
        while rows.refresh():
            rows.step()
            frame += 1
    assert frame > 3 and f"frame {frame} " in str(caught.value)


def test_special_ids_are_never_drawn(speaker, tokenizer) -> None:
    """Where the filter left pad and bos alone, codebook 0 is drawn as if there were no filter."""
    data, settings = speaker("main").config.data, config(3.0, 1)
    special = [data.audio_pad, data.audio_bos]

    def spoil(name: str, value: np.ndarray) -> None:
        if name == "transformer.cb0_head.weight":
            value[special] *= 30

    rows = Rows(damaged(speaker("main"), spoil), tokenizer, [settings], [5], [None], trace=True)
    whole(rows, SCRIPT)
    alone, frames = 0, 0
    while rows.refresh():
        trace = jax.device_get(rows.step())
        left = np.isfinite(trace.draws[1][0])
        left[special] = False
        pick, free = trace.picks[0, 1], trace.cb0[:1].copy()
        assert pick not in special
        free[:, special] = MASKED_LOGIT
        if not left.any():
            how = float(settings.audio.temperature), settings.audio.top_k
            drawn = redraw(free, 5, np.array([frames]), *how, index=1, bound=64)
            assert pick == drawn[0]
            alone += 1
        frames += 1
    assert 5 < alone < frames
