"""``eval.compare``: a run with itself, with a worse copy, with what it cannot be compared to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from dia2_jax.errors import DataError
from eval.compare import main
from eval.scoring import comparison
from eval.scoring.comparison import Difference, Run, compare, read_run, verdict
from eval.scoring.metric import Figure
from eval.scoring.registry import METRICS
from eval.scoring.speed import Speed
from eval.scoring.summary import FEWEST

Change = Callable[[dict[str, Any], np.random.Generator], None]


def write_run(folder: Path, change: Change | None = None, *, count: int = 40, **about: Any) -> Path:
    """Rows of `count` prompts, two seeds each, with scores of three metrics; changed if asked."""
    folder.mkdir()
    identity = {"checkpoint": folder.name, "metrics": {}, "settings": {}} | about
    (folder / "run.json").write_text(json.dumps({"identity": identity}))
    rng, other = np.random.default_rng(0), np.random.default_rng(1)
    lines = []
    for index in range(count):
        hard = float(rng.uniform())
        for seed in (0, 1):
            errors = int(rng.binomial(10, 0.3 * hard))
            scores: dict[str, Any] = {
                "intelligibility": {
                    "errors": errors, "words": 10, "character_errors": errors, "characters": 50,
                    "substitutions": errors, "insertions": 0, "deletions": 0,
                    "perfect": errors == 0, "repeating": False,
                },
                "signal": {
                    "clipped": 0, "samples": 1000, "level": -23.0 + float(rng.normal()),
                    "peak": -6.0, "floor": -70.0,
                },
                "dialogue": {"gap_lengths": [0.2 + 0.1 * float(rng.uniform()), None]},
            }  # fmt: skip
            if change is not None:
                change(scores, other)
            row = {"set": "lines", "id": f"p{index}", "kind": "line", "source": "generated"}
            lines.append(json.dumps(row | {"seed": seed, "script": "", "scores": scores}) + "\n")
    (folder / "utterances.jsonl").write_text("".join(lines))
    return folder


def more_errors(scores: dict[str, Any], rng: np.random.Generator) -> None:
    found = scores["intelligibility"]
    found["errors"] += int(rng.binomial(10, 0.1))
    found["substitutions"] = found["errors"]
    scores["signal"]["floor"] = -50.0
    scores["signal"]["level"] -= 6.0


def verdicts(first: Path, second: Path) -> dict[str, str]:
    found = compare(read_run(first), read_run(second), METRICS)
    return {f"{d.metric}.{d.figure.name}": d.verdict for d in found if d.group == "all"}


def of_nothing(scores: Any) -> None:
    """Parts of a figure, where a test gives them itself."""


def judge(better: Any, *pairs: tuple[int, float, float]) -> Difference:
    """Of single takes: their prompts, and what they are in both runs."""
    figure = Figure("f", "", better, "", of_nothing)
    parts = [(prompt, (one, 1.0), (two, 1.0)) for prompt, one, two in pairs]
    (found,) = comparison._difference("generated", "all", "m", figure, parts)
    return found


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_a_run_and_itself_show_no_evidence_of_anything(tmp_path: Path) -> None:
    same = write_run(tmp_path / "a")
    found = verdicts(same, same)
    assert {
        "intelligibility.wer",
        "signal.level",
        "dialogue.gap",
        "dialogue.overlap_at_most",
    } <= set(found)
    assert set(found.values()) == {"no evidence"}


def test_a_degraded_copy_is_worse_where_it_was_degraded(tmp_path: Path) -> None:
    plain, worse = write_run(tmp_path / "a"), write_run(tmp_path / "b", more_errors)
    found = verdicts(plain, worse)
    changed = {name: what for name, what in found.items() if what != "no evidence"}
    assert changed == {
        "intelligibility.wer": "worse",
        "intelligibility.substitutions": "worse",
        "signal.floor": "worse",
        "signal.level": "differs",
    }
    back = verdicts(worse, plain)
    assert back["intelligibility.wer"] == back["signal.floor"] == "better"


def test_pairing_sees_what_two_separate_intervals_would_not(tmp_path: Path) -> None:
    def slightly(scores: dict[str, Any], rng: np.random.Generator) -> None:
        scores["signal"]["peak"] -= 0.1
        scores["signal"]["level"] += 0.05  # far below its spread of 1 dB

    found = compare(
        read_run(write_run(tmp_path / "a")), read_run(write_run(tmp_path / "b", slightly)), METRICS
    )
    level = next(d for d in found if (d.metric, d.figure.name) == ("signal", "level"))
    assert level.verdict == "differs" and level.low is not None
    assert level.low == pytest.approx(level.high, abs=1e-6)
    assert level.second - level.first == pytest.approx(0.05)


def test_only_what_both_have_is_compared(tmp_path: Path) -> None:
    long, short = write_run(tmp_path / "a"), write_run(tmp_path / "b", count=10)
    assert {d.takes for d in compare(read_run(long), read_run(short), METRICS)} <= {10, 20}


def test_few_prompts_give_no_verdict_and_say_why(tmp_path: Path) -> None:
    """All prompts are worse by the same, so that every interval leaves out 0."""

    def lower(scores: dict[str, Any], rng: np.random.Generator) -> None:
        scores["signal"]["peak"] += 3.0
        scores["signal"]["floor"] += 3.0

    plain = write_run(tmp_path / "plain")
    for count, expected in ((1, "no evidence"), (FEWEST - 1, "no evidence"), (FEWEST, "worse")):
        worse = write_run(tmp_path / f"worse{count}", lower, count=count)
        found = compare(read_run(plain), read_run(worse), METRICS)
        (floor,) = (d for d in found if d.group == "all" and d.figure.name == "floor")
        assert (floor.low is None) == (floor.high is None) == (count < FEWEST)
        assert floor.verdict == expected
        # Two seeds are two takes and one prompt.
        assert (floor.prompts, floor.takes) == (count, 2 * count)
        shown = run(plain, worse)
        few = f"| no evidence: too few pairs ({count} of {FEWEST}) | {count} | {2 * count} |"
        assert (few in shown.stdout) == ("too few pairs" in shown.stderr) == (count < FEWEST)
        assert (f"| +3 {few}" in shown.stdout) == (count < FEWEST)  # without an interval
    assert f"too few pairs (n of {FEWEST})" in run("--help").stdout


def test_a_prompt_without_the_figure_is_no_pair() -> None:
    """Five prompts have gaps; twenty have turns without one, which say nothing of gaps."""
    figure = Figure("gap", "s", "lower", "", lambda scores: None)
    pairs = [(n, (0.2, 1.0), (0.4, 1.0)) for n in range(FEWEST - 1)]
    pairs += [(n, (0.0, 0.0), (0.0, 0.0)) for n in range(10, 30)]
    (found,) = comparison._difference("generated", "all", "m", figure, pairs)
    assert found.prompts == found.takes == FEWEST - 1 and found.verdict == "no evidence"


@pytest.mark.parametrize("changed", [0, 4, FEWEST - 1, FEWEST])
def test_too_few_prompts_that_differ_give_no_verdict_and_say_why(changed: int) -> None:
    """Of sixty yes or no, some become yes, and none becomes no."""
    found = judge("lower", *((n, 0.0, 100.0 * (n < changed)) for n in range(60)))
    assert (found.prompts, found.differing) == (60, changed)
    assert found.verdict == ("worse" if changed >= FEWEST else "no evidence")
    assert found.judgeable == (changed >= FEWEST)
    if changed == FEWEST - 1:
        assert found.low is not None and found.low > 0
        assert found.said == f"no evidence: too few differ ({changed} of {FEWEST})"


def test_one_prompt_that_goes_the_other_way_does_not_hide_what_the_others_say() -> None:
    """Of sixty such one resample in three is all alike, of six with 1.504 as often."""
    found = judge("higher", *((n, 0.0, 100.0 * (n < 59)) for n in range(60)))
    assert found.verdict == "better" and found.low is not None and found.low > 90
    # ... or would be, if sums did not round.
    mixed = judge("lower", *((n, 0.1 * n, 0.1 * n + (1.504, 1.47)[n == 5]) for n in range(6)))
    assert mixed.verdict == "worse" and mixed.low is not None and mixed.low > 1
    # Five against one happens by chance in one case of five.
    assert judge("higher", *((n, 50, 100 * (n < 5)) for n in range(6))).verdict == "no evidence"


@pytest.mark.parametrize("count", [6, 10, 60])
@pytest.mark.parametrize("skewed", [False, True])
def test_equals_are_told_apart_hardly_more_often_than_one_time_in_twenty(
    monkeypatch: pytest.MonkeyPatch, count: int, skewed: bool
) -> None:
    """Differences about 0, normal and exponential: 2 to 7 % of 600 comparisons have a verdict."""
    runs = 600
    monkeypatch.setattr(comparison, "RESAMPLES", 500)
    rng = np.random.default_rng(0)
    given = 0
    for _ in range(runs):
        moved = rng.exponential(size=count) - 1 if skewed else rng.normal(size=count)
        given += judge("", *((n, 5.0, 5.0 + x) for n, x in enumerate(moved))).verdict == "differs"
    assert 0.015 <= given / runs <= 0.075


def test_a_real_difference_of_few_prompts_is_told() -> None:
    rng = np.random.default_rng(0)
    moved = [rng.normal(2.0, 1.0, FEWEST) for _ in range(50)]
    given = [judge("lower", *((n, 5.0, 5.0 + x) for n, x in enumerate(one))) for one in moved]
    assert sum(one.verdict == "worse" for one in given) > 30


def test_the_interval_is_of_the_difference_of_two_ratios() -> None:
    """Against the spread of what is drawn again and again: errors over words of varied length."""
    rng = np.random.default_rng(0)
    figure = Figure("f", "", "lower", "", of_nothing)

    def once() -> Difference:
        words = rng.integers(2, 30, 60)
        parts = [
            (n, (float(rng.binomial(w, 0.1)), float(w)), (float(rng.binomial(w, 0.2)), float(w)))
            for n, w in enumerate(words)
        ]
        (found,) = comparison._difference("generated", "all", "m", figure, parts)
        return found

    found = [once() for _ in range(100)]
    wrong = [not one.low < 0.1 < one.high for one in found]  # type: ignore[operator]
    assert sum(wrong) <= 8
    half = np.mean([one.high - one.low for one in found]) / 2  # type: ignore[operator]
    assert half == pytest.approx(2 * np.std([one.second - one.first for one in found]), rel=0.2)


def test_directions() -> None:
    def figure(better: Any) -> Figure:
        return Figure("f", "", better, "", lambda scores: None)

    assert verdict(figure("lower"), -1.5, -0.5) == "better"
    assert verdict(figure("higher"), -1.5, -0.5) == "worse"
    assert verdict(figure("higher"), 0.5, 1.5) == "better"
    assert verdict(figure("near 1"), -0.6, -0.2) == "better"
    assert verdict(figure("near 1"), 0.3, 0.9) == "worse"
    assert verdict(figure(""), -1.5, -0.5) == "differs"
    assert verdict(figure("lower"), -1.5, 0.5) == "no evidence"


@pytest.mark.parametrize(
    "second, expected", [(1.25, "no evidence"), (1.05, "better"), (0.6, "worse"), (1.6, "worse")]
)
def test_what_is_best_near_1_is_judged_by_its_distance(second: float, expected: str) -> None:
    noise = np.random.default_rng(0).normal(0, 0.02, (2, 40))
    found = judge("near 1", *((n, 0.8 + a, second + b) for n, (a, b) in enumerate(noise.T)))
    assert found.verdict == expected
    assert found.low is not None and found.low < second - 0.8 < found.high  # type: ignore[operator]


def test_takes_on_both_sides_of_1_do_not_make_up_for_each_other() -> None:
    """Half of A drifts to 0.6 and half to 1.4, whose mean is 1; B is all about 1.15."""
    noise = np.random.default_rng(0).normal(0, 0.02, (2, 60))
    first = np.where(np.arange(60) % 2, 0.6, 1.4) + noise[0]
    pairs = [(n, a, 1.15 + b) for n, (a, b) in enumerate(zip(first, noise[1], strict=True))]
    assert judge("near 1", *pairs).verdict == "better"
    # Of two seeds of a prompt, too.
    assert judge("near 1", *((n // 2, a, b) for n, a, b in pairs)).verdict == "better"
    back = judge("near 1", *((n, b, a) for n, a, b in pairs))
    assert back.verdict == "worse" and back.first == pytest.approx(1.15, abs=0.01)
    # A silent take has no length to be judged.
    silent = judge("near 1", *pairs, (60, 0.0, 1.0), (61, 1.0, 0.0))
    assert silent == judge("near 1", *pairs) and silent.takes == 60


def test_speed_has_no_verdict_and_says_why(tmp_path: Path) -> None:
    def timed(seconds: float) -> Change:
        def change(scores: dict[str, Any], rng: np.random.Generator) -> None:
            took = seconds + 0.01 * float(rng.uniform())
            scores["speed"] = {"audio_seconds": 2.0, "compute_seconds": took, "compiled": False}

        return change

    slow, fast = write_run(tmp_path / "a", timed(2.0)), write_run(tmp_path / "b", timed(1.0))
    (speed,) = (d for d in compare(read_run(slow), read_run(fast), [Speed]) if d.group == "all")
    assert speed.low is not None and speed.low > 0.9 and speed.verdict == "not judged"
    found = run(slow, fast, "--json", tmp_path / "out.json")
    told = "not judged: depends on the machine's load, see eval.latency"
    assert f"| {told} |" in found.stdout
    assert "0 verdicts among" in found.stdout and " 0 of them can have one" in found.stdout
    (row, _) = (
        r for r in json.loads((tmp_path / "out.json").read_text()) if r["metric"] == "speed"
    )
    assert (row["verdict"], row["said"]) == ("not judged", told)


def test_takes_of_other_scripts_are_no_pairs(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "a"), write_run(tmp_path / "b", more_errors)
    lines = (two / "utterances.jsonl").read_text().splitlines()
    other = [line.replace('"script": ""', '"script": "x"') for line in lines]
    (two / "utterances.jsonl").write_text("\n".join(lines[:6] + other[6:10] + lines[10:]) + "\n")
    found = run(one, two)
    assert "4 takes are left out, for their scripts differ" in found.stderr
    assert "the first is lines/p3 (generated, seed 0)" in found.stderr
    assert {d.takes for d in compare(read_run(one), read_run(two), METRICS)} == {76}
    assert "scripts differ" not in run(one, one).stderr
    (two / "utterances.jsonl").write_text("\n".join(other) + "\n")
    found = run(one, two)
    assert found.exit_code == 2 and "share no take (the scripts of 80 differ, first lines/p0 (" in (
        found.stderr
    )


def test_the_last_line_counts_verdicts_and_what_chance_would_give(tmp_path: Path) -> None:
    plain, worse = write_run(tmp_path / "a"), write_run(tmp_path / "b", more_errors)
    for options in ([], ["--groups"]):
        shown = run(plain, worse, *options).stdout.splitlines()
        rows = [line.split(" | ")[6] for line in shown if line.startswith("| ") and "." in line]
        given = sum(one in ("better", "worse", "differs") for one in rows)
        assert given == 4 * (1 + len(options))
        # Errors, their kinds, level and floor differ; gaps and peaks are the same.
        assert shown[-1].startswith(f"{given} verdicts among {len(rows)} figures. ")
    possible = 2 * 4  # in "all" and in the one group
    assert f"{possible} of them can have one" in shown[-1]
    assert f"chance alone would give about {0.05 * possible:.1f} (5 %)" in shown[-1]


def test_the_program(tmp_path: Path) -> None:
    plain = write_run(tmp_path / "a", versions={"jax": "1", "numpy": "1"})
    worse = write_run(
        tmp_path / "b",
        more_errors,
        settings={"cfg_scale": 2.0},
        versions={"jax": "2", "numpy": "1"},
    )
    found = run(plain, worse, "--json", tmp_path / "out.json")
    assert found.exit_code == 0, found.output
    assert "| intelligibility.wer | % | lower |" in found.stdout and "| worse |" in found.stdout
    assert "## generated, all" in found.stdout and "lines: line" not in found.stdout
    assert 'settings: {} | {"cfg_scale": 2.0}' in found.stderr
    assert 'versions: {"jax": "1"} | {"jax": "2"}' in found.stderr
    rows = json.loads((tmp_path / "out.json").read_text())
    assert {row["group"] for row in rows} == {"all", "lines: line"}
    assert {(row["prompts"], row["too_few"]) for row in rows} == {(40, False)}
    assert "## generated, lines: line" in run(plain, worse, "--groups").stdout
    assert "failed" not in found.stderr
    with (worse / "utterances.jsonl").open("a") as file:
        bad = {"set": "lines", "id": "x", "source": "generated", "seed": 0, "kind": "line"}
        file.write(json.dumps(bad | {"error": "no voice"}) + "\n")
    assert "left out of both runs: 0 of A, 1 of B" in run(plain, worse).stderr
    missing = run(plain, tmp_path / "nothing")
    assert missing.exit_code == 2 and "holds no run" in missing.stderr
    empty = write_run(tmp_path / "c", count=0)
    nothing = run(plain, empty)
    assert nothing.exit_code == 2 and "share no take" in nothing.stderr


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", "[]", "its run.json describes no run"),
        ("run.json", "{", "its run.json cannot be read"),
        (
            "utterances.jsonl",
            '{"set": "lines", "id": "p0", "source": "generated", "seed": 0}\n',
            "utterances.jsonl:1: is no row of a run",
        ),
    ],
)
def test_a_damaged_run_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    one, two = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    (two / name).write_text(content)
    result = CliRunner().invoke(main, [str(one), str(two)])
    assert result.exit_code == 2 and message in result.stderr


def test_one_prompt_far_off_does_not_undo_what_all_say() -> None:
    """A take that runs away is this family's failure, and no reason for a better verdict."""
    rng = np.random.default_rng(0)
    errors = Figure("f", "", "lower", "", lambda scores: None)
    for far in (1.0, 50.0):
        later = 1 + 0.1 * rng.standard_normal(60)
        later[0] = far
        pairs = [(i, (5.0, 1.0), (5.0 + float(x), 1.0)) for i, x in enumerate(later)]
        (found,) = comparison._difference("generated", "all", "metric", errors, pairs)
        assert found.verdict == "worse", (far, found.low, found.high)


def test_runs_whose_rows_mean_other_things_are_not_compared() -> None:
    row = {"set": "s", "id": "a", "source": "generated", "seed": 0, "kind": "k", "script": "x"}
    one, two = (
        Run(Path(name), {"identity": {"format": number}}, {("s", "a", "generated", 0): row})
        for name, number in (("old", 1), ("new", 2))
    )
    with pytest.raises(DataError, match="old and new: their rows mean different things"):
        compare(one, two, [])
