"""The suite of speed and the comparison of two: known samples, one tiny run, bad files."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from eval import latency, latency_compare
from eval.latency_compare import difference
from eval.latency_listener import Chunk, Take
from eval.latency_models import Source
from eval.latency_suite import FIGURES, SUITE, measure_suite


class Fake:
    """A side with answers as `eval.latency_ours` gives them; one whose peak nobody knows."""

    def __init__(self) -> None:
        self.closed = False
        self.position = 0
        self.asked: list[str] = []

    def call(self, method: str, *arguments: Any) -> Any:
        self.asked.append(method)
        return getattr(self, f"_{method}")(*arguments)

    def close(self) -> None:
        self.closed = True

    def _load(self) -> dict[str, float]:
        return {"import_s": 1.0, "load_s": 2.0, "weights_gb": 0.5}

    def _prepare(self) -> dict[str, float]:
        return {"ready_s": 4.0}

    def _stream(self, frames: int) -> dict[str, float]:
        return {"first_audio_ms": 100.0, "x_realtime": 2.0}

    def _listen(self, schedules: list[Any], chunk_frames: None, heard: bool) -> list[Take]:
        assert heard
        levels = [-20.0] * (len(schedules) - 1) + [-90.0]  # the last is never audible
        return [Take((0.0,), 0.0, 0, (Chunk(0.2, 0.08, level),)) for level in levels]

    def _seek(self, position: int) -> None:
        self.position = position

    def _frames(self, count: int) -> list[float]:
        return [999.0] + [float(self.position)] * (count - 1)

    def _decode(self, count: int) -> list[float]:
        return [999.0] + [3.0] * (count - 1)

    def _memory(self) -> dict[str, float | None]:
        return {"anonymous_peak_gb": None, "rest_gb": None}

    def _batch(self, count: int, frames: int) -> dict[str, Any]:
        changes = {"join": {"p50_ms": 2.0}, "leave": {"p50_ms": 1.0}}
        return {"step": {"p50_ms": 10.0 * count}, "anonymous_peak_gb": 1.5, **changes}

    def _about(self) -> dict[str, Any]:
        return {"backend": "cpu", "versions": {}}

    def _bandwidth(self, gigabytes: float) -> dict[str, float]:
        return {"best_gb_per_s": 20.0}


def test_a_suite_keeps_every_sample_of_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    sides: list[Fake] = []
    folders = set()

    def start(_: str, arguments: Mapping[str, Any], environment: Mapping[str, Any]) -> Fake:
        assert all(side.closed for side in sides)  # one process at a time
        folders.add(environment["DIA2_JAX_CACHE"])
        sides.append(Fake())
        return sides[-1]

    tiny = Source.of("tiny")
    report = measure_suite(tiny, dtype="float32", rounds=2, start=start)
    assert len(sides) == 3 and sides[-1].closed and len(folders) == 1
    assert sides[0].asked == ["load", "prepare"]
    assert report["suite"] == SUITE and report["positions"] == [64, 156]
    found = report["figures"]
    # No checkpoint, so nothing to hear; and nobody told the peak.
    assert set(FIGURES) - set(found) == {"first_audible_ms", "peak_gb", "rest_gb"}
    assert {name: len(one["rounds"]) for name, one in found.items()} == {
        name: 1 if name == "cold_start_s" else 2 for name in found
    }
    # The first of each is dropped: it pays for caches that what came before filled.
    assert found["frame_early_ms"]["rounds"] == [[64.0] * 20] * 2
    assert found["frame_late_ms"]["rounds"] == [[156.0] * 20] * 2
    assert found["decode_ms"]["rounds"] == [[3.0] * 20] * 2
    assert found["rows_4_ms"]["rounds"] == [[40.0]] * 2
    assert found["warm_start_s"]["rounds"] == [[7.0]] * 2
    assert all(one["unit"] == FIGURES[name].unit for name, one in found.items())
    json.dumps(report)

    config = tiny.dia2_config()
    monkeypatch.setattr(Source, "dia2_config", lambda _: config)
    checkpoint = Source("folder", Path("folder"))
    heard = measure_suite(checkpoint, dtype="int8", rounds=1, start=start)
    assert heard["figures"]["first_audible_ms"]["rounds"] == [[pytest.approx(200.0)] * 4]


# -------------------------------------------------------------------------------------- comparison


def rounds(*middles: float) -> list[list[float]]:
    return [[value * 0.9, value, value * 1.5] for value in middles]


def test_verdicts_of_known_rounds() -> None:
    slow, fast = rounds(10, 10.5, 11, 10.2, 10.8), rounds(5, 5.2, 5.1, 5.3, 4.9)
    found = difference("frame_early_ms", slow, fast)
    assert (found.first, found.second, found.rounds) == (10.5, 5.1, (5, 5))
    assert found.ratio == pytest.approx(5.1 / 10.5) and found.verdict == "faster"
    assert found.low is not None and found.high is not None
    # No resampled median lies outside the rounds.
    assert 4.9 / 11 <= found.low <= found.ratio <= found.high <= 5.3 / 10
    assert difference("frame_early_ms", fast, slow).verdict == "slower"
    assert difference("x_realtime", fast, slow).verdict == "faster"  # higher is better
    assert difference("peak_gb", fast, slow).verdict == "larger"
    assert difference("peak_gb", slow, fast).verdict == "smaller"
    mixed = rounds(9, 12, 10, 11, 10.4)
    assert difference("frame_early_ms", slow, mixed).verdict == "no evidence"
    nearly = rounds(*(value * 1.001 for value in (2.0, 2.0, 2.0, 2.0)))
    assert difference("weights_gb", rounds(2, 2, 2, 2), nearly).verdict == "same"


def test_too_few_rounds_are_no_evidence() -> None:
    found = difference("cold_start_s", [[20.0]], [[5.0]])
    assert (found.ratio, found.low, found.verdict) == (0.25, None, "no evidence")
    three, four = rounds(1, 1.1, 1.2), rounds(9, 9, 9, 9)
    assert difference("decode_ms", three, four).verdict == "no evidence"
    # A round without a sample is none.
    assert difference("decode_ms", [*three, []], four).verdict == "no evidence"


def test_equal_runs_are_seldom_told_apart() -> None:
    rng = np.random.default_rng(0)
    verdicts = [
        difference("decode_ms", *(rounds(*rng.normal(10, 1, 5)) for _ in range(2))).verdict
        for _ in range(200)
    ]
    assert set(verdicts) <= {"no evidence", "faster", "slower"}
    assert verdicts.count("no evidence") >= 180


# ------------------------------------------------------------------------------------------- files


@pytest.fixture
def report() -> dict[str, Any]:
    samples = {name: rounds(10, 10.5, 11, 10.2, 10.8) for name in FIGURES}
    return {
        "suite": SUITE, "command": "python -m eval.latency …", "config": "tiny", "dtype": "float32",
        "weights": "random", "backend": "cpu", "positions": [64, 156], "rounds": 5,
        "versions": {"jax": "0.10.2"},
        "machine": {"cpu": "a processor", "cores": 2, "others_cpu_share": 0.0},
        "figures": {
            name: {"unit": FIGURES[name].unit, "better": FIGURES[name].better, "rounds": one}
            for name, one in samples.items()
        },
    }  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Any:
    def run(*reports: Any, options: tuple[str, ...] = ()) -> Result:
        paths = []
        for index, content in enumerate(reports):
            path = tmp_path / f"{'AB'[index]}.json"
            path.write_text(content if isinstance(content, str) else json.dumps(content))
            paths.append(str(path))
        return CliRunner().invoke(latency_compare.main, [*paths, *options])

    return run


def test_a_table_of_one_and_of_two(run: Any, report: dict[str, Any], tmp_path: Path) -> None:
    alone = run(report)
    assert alone.exit_code == 0, alone.output
    assert "| frame at step 64 | 10.5 ms | 10 … 11 | 9 … 16.5 | 5 |" in alone.stdout
    assert alone.stdout.startswith("tiny, random weights, float32; a processor, 2 cores")
    other = copy.deepcopy(report)
    other["figures"]["decode_ms"]["rounds"] = rounds(5, 5.2, 5.1, 5.3, 4.9)
    other["versions"]["jax"] = "0.10.3"
    other["machine"]["others_cpu_share"] = 0.4
    target = tmp_path / "out.json"
    both = run(report, other, options=("--json", str(target)))
    assert both.exit_code == 0, both.output
    assert "| codec, a frame | 10.5 ms | 5.1 ms | 0.486 (" in both.stdout
    assert both.stdout.count("| faster |") == 1 and both.stdout.count("| no evidence |") == 19
    assert "note: jax 0.10.2 in A, 0.10.3 in B" in both.stderr
    assert "warning: B was measured on a busy machine (other programs took 40%)" in both.stderr
    assert {one["name"] for one in json.loads(target.read_text())} == set(FIGURES)


def test_what_was_not_measured_alike_is_refused(run: Any, report: dict[str, Any]) -> None:
    other = {**report, "dtype": "int8", "machine": {**report["machine"], "cpu": "another"}}
    refused = run(report, other)
    assert refused.exit_code == 2 and refused.stdout == ""
    assert refused.stderr == (
        "error: the two were not measured alike: dtype (A 'float32', B 'int8'), cpu (A 'a "
        "processor', B 'another'); measure both alike, or say --across if the difference is what "
        "you ask about\n"
    )
    across = run(report, other, options=("--across",))
    assert across.exit_code == 0 and "warning: not measured alike: dtype (A" in across.stderr
    moved = run(report, {**report, "positions": [1, 2]}, options=("--across",))
    assert moved.exit_code == 2 and moved.stderr.endswith("; measure both alike\n")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("{", "B.json: not JSON"),
        ("[]", "B.json: not a report of a suite; write one with python -m eval.latency"),
        ({"suite": 99}, f"B.json: suite 99, where this program knows suite {SUITE}"),
        ({"versions": None}, "B.json: versions is not an object"),
        ({"positions": 7}, "B.json: positions is not a list"),
        ({"positions": [1]}, "B.json: positions are not two steps"),
        ({"positions": [1, "late"]}, "B.json: positions are not two steps"),
        ({"config": None}, "B.json: config is not a text"),
        ({"machine": {}}, "B.json: lacks machine.cores, machine.cpu, machine.oth"),
        ({"figures": {"decode_ms": {"rounds": [[]]}}}, "figures.decode_ms: needs a known name"),
        ({"figures": {"decode_ms": {"rounds": [["1"]]}}}, "rounds of positive numbers"),
        ({"figures": {"speed": {"rounds": [[1.0]]}}}, "figures.speed: needs a known name"),
    ],
)
def test_bad_files_are_one_error(run: Any, report: dict[str, Any], change: Any, said: str) -> None:
    refused = run(report, change if isinstance(change, str) else {**report, **change})
    assert refused.exit_code == 2 and said in refused.stderr, refused.output
    assert refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1


def test_a_missing_file_and_options_that_do_not_fit(tmp_path: Path) -> None:
    gone = CliRunner().invoke(latency_compare.main, [str(tmp_path / "none.json")])
    assert gone.exit_code == 2 and "none.json: No such file or directory; write one" in gone.stderr
    suite = ["--config", "tiny", "--suite", str(tmp_path / "a.json")]
    extra = CliRunner().invoke(latency.main, [*suite, "--frames", "5", "--rows", "1"])
    assert extra.exit_code == 2
    assert "--suite measures a fixed list, without --frames, --rows" in extra.stderr
    alone = CliRunner().invoke(latency.main, ["--config", "tiny", "--rounds", "2"])
    assert alone.exit_code == 2 and "--rounds is of --suite" in alone.stderr


def test_the_command_writes_what_it_prints(
    tmp_path: Path, report: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    own = ("command", "config", "dtype", "machine")
    content = {name: value for name, value in report.items() if name not in own}

    def measure(source: Source, **options: Any) -> dict[str, Any]:
        asked.update(options, source=source.name)
        return {**content, "machine": {"best_gb_per_s": 20.0}}

    monkeypatch.setattr(latency, "measure_suite", measure)
    path = tmp_path / "new" / "a.json"
    command = ["--config", "tiny", "--dtype", "int8", "--rounds", "4", "--suite", str(path)]
    run = CliRunner().invoke(latency.main, command)
    assert run.exit_code == 0, run.output
    assert asked == {"source": "tiny", "dtype": "int8", "rounds": 4}
    assert latency_compare.read_suite(path)["dtype"] == "int8"
    assert latency_compare.table(report) in run.stdout
    assert json.loads(path.read_text())["machine"].keys() >= {"cpu", "best_gb_per_s"}
