"""``eval.compare``: a run with itself, with a worse copy, with what it cannot be compared to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from eval.compare import main
from eval.scoring import comparison
from eval.scoring.comparison import FEWEST, compare, read_run, verdict
from eval.scoring.metric import Figure
from eval.scoring.registry import METRICS

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
                    "peak": -6.0, "floor": -70.0, "leading_noise": None,
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
    assert level.verdict == "differs" and level.low == pytest.approx(level.high, abs=1e-6)
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
        assert floor.low > 0 and floor.verdict == expected
        # Two seeds are two takes and one prompt.
        assert (floor.prompts, floor.takes) == (count, 2 * count)
        shown = run(plain, worse)
        few = f"| no evidence: too few pairs ({count} of {FEWEST}) | {count} | {2 * count} |"
        assert (few in shown.stdout) == ("too few pairs" in shown.stderr) == (count < FEWEST)
    assert f"too few pairs (n of {FEWEST})" in run("--help").stdout


def test_a_prompt_without_the_figure_is_no_pair() -> None:
    """Five prompts have gaps; twenty have turns without one, which say nothing of gaps."""
    figure = Figure("gap", "s", "lower", "", lambda scores: None)
    pairs = [(n, (0.2, 1.0), (0.4, 1.0)) for n in range(FEWEST - 1)]
    pairs += [(n, (0.0, 0.0), (0.0, 0.0)) for n in range(10, 30)]
    (found,) = comparison._difference("generated", "all", "m", figure, pairs)
    assert found.prompts == FEWEST - 1 and found.verdict == "no evidence"


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
    "second, expected", [(1.2, "no evidence"), (1.05, "better"), (0.6, "worse"), (1.6, "worse")]
)
def test_what_is_best_near_1_is_judged_by_its_distance(second: float, expected: str) -> None:
    figure = Figure("f", "", "near 1", "", lambda scores: None)
    noise = np.random.default_rng(0).normal(0, 0.02, (2, 40))
    pairs = [(n, (0.8 + one, 1.0), (second + two, 1.0)) for n, (one, two) in enumerate(noise.T)]
    (found,) = comparison._difference("generated", "all", "m", figure, pairs)
    assert found.verdict == expected
    assert found.low < second - 0.8 < found.high


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
