"""Parity of whole generations: every step, every draw, and what came out.

Greedy runs go on their own, token for token; after a tie, and in sampled runs, the recorded
picks are replayed, so that one difference does not make everything behind it incomparable.
Every run is looked at three times: by the word machine's specification, by the compiled step
that serves all sessions, and by the network's whole-sequence form over the recorded tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from dia2_jax.generation.prefix import PrefixPlan, PrefixTurn, WarmUp, plan_prefix, warm_up
from dia2_jax.generation.rows import Row, Rows
from dia2_jax.generation.sampling import distribution
from dia2_jax.generation.settings import GenerationConfig, SamplingConfig
from dia2_jax.text.machine import Machine
from dia2_jax.text.script import parse_script
from dia2_jax.text.timing import WordTime
from eval.parity_checks import DRAW_BAR, NETWORK_BAR, Checks, difference, snr
from eval.parity_draws import Pairs, Recorded, StepTally, Tally, Worst
from eval.parity_folder import Golden
from eval.parity_text import read_entries

#: Whole sequences are filled up to a multiple of this, so that few lengths are compiled.
_LENGTHS = 128
_KNOWN = {
    "delayed", "aligned", "waveform", "prefix_codes", "step_tokens", "step_pos", "step_hidden",
    "step_action", "step_cb0", "draw_kind", "draw_logits", "draw_len", "draw_pick",
}  # fmt: skip


@dataclass
class Spoken:
    """A run as the word machine's specification tells it.

    Attributes:
      text: ``[S, 2]`` main and second token that each step's frame speaks.
      warm: the warm-up of its prefix, if it has one.
    """

    text: np.ndarray
    warm: WarmUp | None


@dataclass
class Run:
    """One recorded generation, taken apart.

    Attributes:
      name: prefix of its items' names.
      settings: from ``golden.json``.
      recorded: its arrays.
      config: the settings as ours.
      script: its text, one line.
      plan: of its prefix, if it has one.
    """

    name: str
    settings: dict[str, Any]
    recorded: Recorded
    config: GenerationConfig
    script: str
    plan: PrefixPlan | None = None


def check_generations(golden: Golden, checks: Checks) -> None:
    """Every ``generate_NAME.npz`` and its settings."""
    names = golden.generation_names()
    if not names:
        checks.absent("generation", "no generate_NAME.npz")
    for name in names:
        with checks.guard(f"generation {name}"):
            _check(golden, name, checks)


def _check(golden: Golden, name: str, checks: Checks) -> None:
    settings, arrays = golden.generation(name)
    title = f"generation {name}"
    for key in sorted(set(arrays) - _KNOWN):
        checks.unread(f"{title}: {key}", "unknown array")
    recorded = Recorded(arrays, golden.config.data.codebooks)
    script = settings["script"]
    run = Run(
        name=title,
        settings=settings,
        recorded=recorded,
        config=read_config(settings),
        script=script if isinstance(script, str) else "\n".join(script),
    )
    run.plan = _plan(golden, run, checks)
    if recorded.picks is None:
        checks.absent(f"{title}: draws", "no draw_pick, so nothing to replay or compare with")
        return
    pairs = None
    with checks.guard(f"{title}: machine"):
        spoken = _specification(golden, run, checks)
        with checks.guard(f"{title}: network, whole"):
            pairs = _whole(golden, run, spoken, checks)
    row = _play(golden, run, pairs, checks)
    _outcome(golden, run, row, checks)


def read_config(settings: dict[str, Any]) -> GenerationConfig:
    """The settings of a recorded generation as ours."""
    return GenerationConfig(
        text=SamplingConfig(max(settings["text_temperature"], 0.0), settings["text_top_k"]),
        audio=SamplingConfig(max(settings["audio_temperature"], 0.0), settings["audio_top_k"]),
        cfg_scale=settings["cfg_scale"],
        cfg_filter_k=settings["cfg_filter_k"],
        initial_padding=settings["initial_padding"],
        include_prefix=settings.get("include_prefix", False),
        prefix_plan="upstream",
    )


def _plan(golden: Golden, run: Run, checks: Checks) -> PrefixPlan | None:
    """The plan of the run's prefix, compared with the recorded one."""
    prefix, codes = run.settings.get("prefix"), run.recorded.arrays.get("prefix_codes")
    if prefix is None and codes is None:
        return None
    if prefix is None or codes is None:
        held, lacks = ("prefix_codes", "prefix") if prefix is None else ("prefix", "prefix_codes")
        raise ValueError(f"it has {held} but no {lacks}")
    name = f"{run.name}: plan"
    if "words" not in prefix:
        checks.absent(name, "no words; the recorded plan is taken as it is")
        entries, steps = read_entries(prefix["entries"]), prefix["new_word_steps"]
        return PrefixPlan("upstream", tuple(entries), tuple(steps), codes.astype(np.int32))
    turns, start = [], 0
    for index, turn in enumerate(prefix["words"]):
        words = tuple(WordTime(w["text"], w["start"], w["end"]) for w in turn["words"])
        part = codes[:, start : start + turn["frames"]]
        turns.append(PrefixTurn(turn.get("speaker", index + 1), part, words))
        start += turn["frames"]
    plan = plan_prefix(
        turns, golden.tokenizer, golden.config, kind="upstream", frame_rate=golden.frame_rate
    )
    ours = {
        "entries": list(plan.entries),
        "new_word_steps": list(plan.steps),
        "aligned_frames": plan.frames,
    }
    golden_plan = {**prefix, "entries": read_entries(prefix.get("entries", []))}
    pairs = [(key, ours[key], golden_plan[key]) for key in ours if key in prefix]
    checks.equal(name, [*pairs, ("frames of prefix_codes", start, codes.shape[1])])
    return plan


def _specification(golden: Golden, run: Run, checks: Checks) -> Spoken:
    """The recorded actions through the readable machine: text of every step, words, the end."""
    ids, data, picks = golden.tokenizer.ids, golden.config.data, run.recorded.picks
    assert picks is not None
    entries = parse_script(
        run.script, golden.tokenizer, frame_rate=golden.frame_rate, split_sound_tags=True
    )
    machine = Machine(
        ids, data.second_stream_ahead, run.config.max_padding, run.config.initial_padding
    )
    warm = None
    if run.plan is None:
        state, start, read = machine.new_state(entries), 0, [(ids.bos, ids.pad)]
    else:
        warm = warm_up(run.plan, entries, machine, golden.config, closed=True)
        state, start, read = warm.machine, warm.start, [warm.text]
    for step, action in enumerate(picks[:, 0].tolist(), start):
        outcome = machine.process(state, step, action)
        read.append((outcome.main, outcome.second))
    text = np.array(read)
    pairs: list[tuple[str, Any, Any]] = []
    tokens = run.recorded.arrays.get("step_tokens")
    if tokens is not None:
        blank = np.full_like(tokens[:, 1:, :2], [ids.zero, ids.pad])
        pairs += [
            ("text of every step", text[:-1].tolist(), tokens[:, 0, :2].tolist()),
            ("unconditional text", blank.tolist(), tokens[:, 1:, :2].tolist()),
        ]
    transcript = [list(word) for word in state.transcript]
    for key, ours in (("end_step", state.end_step), ("transcript", transcript)):
        if key in run.settings:
            pairs.append((key, ours, run.settings[key]))
    checks.equal(f"{run.name}: machine", pairs)
    return Spoken(text[1:], warm)


def _whole(golden: Golden, run: Run, spoken: Spoken, checks: Checks) -> Pairs | None:
    """The recorded tokens through the whole-sequence forms, both guidance rows."""
    name, arrays, steps = f"{run.name}: network, whole", run.recorded.arrays, run.recorded.steps
    if not {"step_tokens", "step_pos"} <= set(arrays):
        checks.absent(name, "no step_tokens, or no step_pos")
        return None
    tokens, positions = arrays["step_tokens"].transpose(1, 2, 0), arrays["step_pos"]
    rows, warmed = len(tokens), 0
    if spoken.warm is not None:
        ids, warmed = golden.tokenizer.ids, spoken.warm.tokens.shape[1]
        before = np.repeat(spoken.warm.tokens[None], rows, axis=0)
        before[1:, :2] = np.array([ids.zero, ids.pad])[:, None]
        tokens = np.concatenate([before, tokens], axis=2)
        positions = np.concatenate([np.arange(warmed), positions])
    # Nothing looks ahead, so what fills a sequence up changes nothing before it.
    fill = -tokens.shape[2] % _LENGTHS
    out = jax.device_get(
        golden.whole_decoder(
            golden.programs.params,
            np.pad(tokens, ((0, 0), (0, 0), (0, fill))).astype(np.int32),
            np.tile(np.pad(positions, (0, fill)), (rows, 1)).astype(np.int32),
        )
    )
    worst = Worst()
    by_step = {}
    for key in ("hidden", "action", "cb0"):
        by_step[key] = getattr(out, key)[:, warmed : warmed + steps].swapaxes(0, 1)
        if f"step_{key}" in arrays:
            error, where = difference(by_step[key], arrays[f"step_{key}"])
            worst.take(error, f"{key} {where}")
    detail = worst.detail if worst.error > NETWORK_BAR else ""
    checks.at_most(name, worst.error, NETWORK_BAR, detail=detail)
    depth = _whole_depth(golden, run, spoken, by_step["hidden"])
    _check_depth(run, depth, checks)
    if rows < 2:
        return None
    return Pairs(action=by_step["action"], cb0=by_step["cb0"], depth=depth)


def _check_depth(run: Run, depth: np.ndarray, checks: Checks) -> None:
    """The depformer's draws by the teacher-forced form, as distributions over the survivors."""
    if "draw_logits" not in run.recorded.arrays:
        return  # reported with the draws
    worst = Worst()
    for step, stage in np.ndindex(len(depth), depth.shape[2]):
        recorded = run.recorded.logits(step, stage + 2)
        assert recorded is not None
        # Survivors of the filter keep their conditional logits.
        ours = depth[step, 0, stage]
        if ours.shape == recorded.shape:
            kept = np.isfinite(recorded)
            gap = distribution(ours[kept], 1.0, 0) - distribution(recorded[kept], 1.0, 0)
            error = 0.5 * float(np.abs(gap).sum())
        else:
            error = np.inf
        worst.take(error, f"step {step}, codebook {stage + 1}")
    detail = worst.detail if worst.error > DRAW_BAR else ""
    checks.at_most(f"{run.name}: depformer, whole", worst.error, DRAW_BAR, "TV", detail=detail)


def _whole_depth(golden: Golden, run: Run, spoken: Spoken, hidden: np.ndarray) -> np.ndarray:
    """Depformer logits ``[S, rows, C - 1, V]`` over the recorded picks."""
    assert run.recorded.picks is not None
    steps, rows, _ = hidden.shape
    fill = -steps % _LENGTHS

    def batch(values: np.ndarray) -> np.ndarray:
        padded = np.pad(values, [(0, fill)] + [(0, 0)] * (values.ndim - 1))
        return np.repeat(padded, rows, axis=0) if values.ndim < 3 else padded

    logits = golden.whole_depformer(
        golden.programs.params,
        batch(run.recorded.picks[:, 1:-1]),
        batch(hidden).reshape(-1, hidden.shape[2]),
        batch(spoken.text[:, 0].astype(np.int32)),
        batch(spoken.text[:, 1].astype(np.int32)),
    )
    shaped = np.asarray(logits).reshape(steps + fill, rows, *logits.shape[1:])
    return shaped[:steps]


def _play(golden: Golden, run: Run, pairs: Pairs | None, checks: Checks) -> Row:
    """Run it, on its own where it is greedy, and compare every step and draw."""
    greedy = run.config.text.temperature <= 0 and run.config.audio.temperature <= 0
    row = None
    if greedy:
        row, steps, draws = _drive(golden, run, pairs, replay=False)
    if row is None:
        row, steps, draws = _drive(golden, run, pairs, replay=True)
    assert row is not None
    steps.report(run.name, checks)
    draws.report(run.name, checks)
    return row


def _drive(
    golden: Golden, run: Run, pairs: Pairs | None, *, replay: bool
) -> tuple[Row | None, StepTally, Tally]:
    """One pass over the run; without ``replay`` it stops (no row) where a pick differs."""
    recorded, picks = run.recorded, run.recorded.picks
    assert picks is not None
    steps, draws = StepTally(recorded), Tally(recorded, run.config, pairs)
    rows = Rows(
        golden.programs,
        golden.tokenizer,
        [run.config],
        [0],
        [run.plan],
        frame_rate=golden.frame_rate,
        split_sound_tags=True,
        trace=True,
    )
    rows.feed(0, run.script)
    rows.close(0)
    row = rows.rows[0]
    for step in range(recorded.steps):
        if not rows.refresh():
            break
        trace = jax.device_get(rows.step(picks[step : step + 1] if replay else None))
        steps.step(step, row.computed - 1, trace)
        drawn = trace.picks[0]
        for draw, logits in enumerate(trace.draws):
            pick = int(np.argmax(logits[0])) if replay else int(drawn[draw])
            draws.draw(step, draw, logits[0], pick)
            if not replay and pick != picks[step, draw]:
                return None, steps, draws
    return row, steps, draws


def _outcome(golden: Golden, run: Run, row: Row, checks: Checks) -> None:
    """Codes, words and sound of the finished run."""
    arrays, data = run.recorded.arrays, golden.config.data
    aligned = row.frames(0, row.available)
    grid = row.grid[:, : row.computed + 1]
    # Upstream marks what was never generated by pad.
    ours = {"delayed": np.where(grid < 0, data.audio_pad, grid), "aligned": aligned}
    for key, codes in ours.items():
        if key in arrays:
            checks.same(f"{run.name}: {key}", codes, arrays[key])
        else:
            checks.absent(f"{run.name}: {key}")
    _words(golden, run, row, checks)
    if "waveform" not in arrays:
        checks.absent(f"{run.name}: waveform")
        return
    with checks.guard(f"{run.name}: waveform"):
        wave = golden.codec.decode(aligned[None])[0]
        checks.decibels(f"{run.name}: waveform", snr(wave, arrays["waveform"].reshape(-1)))


def _words(golden: Golden, run: Run, row: Row, checks: Checks) -> None:
    """When words begin, where the output begins, and how long the run was."""
    data, settings = golden.config.data, run.settings
    start = row.computed - run.recorded.steps
    first = row.crop
    ours: dict[str, Any] = {
        "timestamps": [[text, at / golden.frame_rate] for text, at in row.word_steps()],
        "transcript": [list(word) for word in row.words],
        "crop": first,
        "start": start,
        "frames": row.available,
    }
    if not run.config.include_prefix:
        ours["first_word_frame"] = first
    if not row.truncated:
        # A run ends so long after the step that found no more text.
        ours["end_step"] = row.computed - data.max_delay - run.config.max_padding
    pairs: list[tuple[str, Any, Any]] = [("finished", row.done, True)]
    for key, value in ours.items():
        if key not in settings:
            checks.absent(f"{run.name}: {key}")
            continue
        recorded = settings[key]
        if key == "timestamps":
            value, recorded = _rounded(value), _rounded(recorded)
        elif key == "first_word_frame":
            recorded = max(recorded, 0)
        pairs.append((key, value, recorded))
    checks.equal(f"{run.name}: words", pairs)


def _rounded(timestamps: list[Any]) -> list[tuple[str, float]]:
    """Times to the microsecond: a frame is tens of thousands of them."""
    return [(text, round(float(seconds), 6)) for text, seconds in timestamps]
