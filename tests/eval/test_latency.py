"""Latency measurements as a program: who is asked what when, whole runs, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import pytest
from click.testing import CliRunner

from eval import latency, latency_measure, latency_upstream
from eval.latency_measure import Sweeps
from eval.latency_models import Source

SPREAD = {"p25_ms", "p50_ms", "p75_ms", "p95_ms", "p99_ms", "min_ms", "max_ms", "count"}


# ------------------------------------------------------------------------------------------- order


class Fake:
    """A side with given answers and frame times; it notes what it is asked."""

    def __init__(self, name: str, log: list[str], **answers: Any) -> None:
        self._name, self._log, self._answers = name, log, answers

    def call(self, method: str, *arguments: Any) -> Any:
        self._log.append(f"{self._name}.{method}")
        answer = self._answers.get(method, {})
        return answer(*arguments) if callable(answer) else answer

    def close(self) -> None:
        self._log.append(f"{self._name}.close")


def test_ratio_of_a_run_with_injected_times() -> None:
    log: list[str] = []
    where = {"ours": 0, "theirs": 0}
    started = []
    # 10 ms at step 20 and 30 ms at step 200; upstream takes 60 ms anywhere. The first of a turn
    # is slow on both sides and must not count.
    frame_ms = {20: 10.0, 200: 30.0}

    def start(
        target: str, arguments: Mapping[str, Any], environment: Mapping[str, str | None]
    ) -> Fake:
        name = "theirs" if "Upstream" in target else f"ours{len(started)}"
        started.append((name, dict(arguments), dict(environment)))
        side = name.rstrip("01")

        def frames(count: int) -> list[float]:
            ms = frame_ms[where["ours"]] if side == "ours" else 60.0
            return [999.0] + [ms] * (count - 1)

        return Fake(
            name,
            log,
            frames=frames,
            stream=lambda count: {"frames": count},
            seek=lambda position: where.update({side: position}),
            decode=lambda count: [2.0] * count,
            bandwidth=lambda gigabytes: {"best_gb_per_s": 20.0},
            costs=lambda _: {"frame_ms_of_audio": 80.0, "weights_gb": 0.1, "cache_gb": 0.05},
        )

    report = latency_measure.measure_model(
        Source.of("tiny"),
        dtype="float32",
        frames=5,
        take=90,
        positions=[20, 200],
        chunk_frames=1,
        against="checkout",
        against_frames=4,
        block=3,
        bandwidth_gb=1.0,
        start=start,
    )
    assert report["upstream"]["step"]["20"]["ratio"] == 6.0
    assert report["upstream"]["step"]["200"]["ratio"] == 2.0
    assert report["stream"] == {"frames": 90}
    assert report["ratio"] == pytest.approx(12**0.5)  # as much of either position
    assert report["step"]["20"]["max_ms"] == 10.0
    assert report["step"]["20"]["x_realtime"] == 8.0
    assert report["step"]["20"]["weights_gb_per_s"] == pytest.approx(10.0)
    assert report["step"]["20"]["achieved_gb_per_s"] == pytest.approx(15.0)
    assert report["step"]["20"]["share_of_bandwidth"] == pytest.approx(0.75)
    # The cold process is gone before the warm one starts, and both share a folder of programs.
    assert log.index("ours0.close") < log.index("ours1.load")
    assert started[0][2]["DIA2_JAX_CACHE"] == started[1][2]["DIA2_JAX_CACHE"]
    # In turns: 4 frames as 3 and 1, at each of two positions.
    turns = [entry for entry in log if entry.endswith(".frames")]
    assert turns == ["ours1.frames"] * 4 + ["ours1.frames", "theirs.frames"] * 4
    assert {"ours1.close", "theirs.close"} <= set(log)


def test_default_positions_lie_in_the_context() -> None:
    assert latency_measure.default_positions(1500) == [100, 1400]
    assert latency_measure.default_positions(256) == [64, 156]
    assert latency_measure.default_positions(4) == [1, 2]


def test_what_is_measured_unless_asked_for(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"cadences": None, "rows": None, "chunks": None, "scripts": 3}
    shape, checkpoint = Source("tiny", None), Source("folder", tmp_path)
    assert Sweeps.of(shape, **asked, outside=None) == Sweeps()
    every = Sweeps.of(checkpoint, **asked, outside=None)
    assert every.cadences == ("at_once", "words_10ms", "llm_bursts", "slow_typist")
    assert every.rows == every.chunks == (1, 2, 4, 8) and every.outside > 0
    asked |= {"rows": [], "cadences": ["at_once"]}
    some = Sweeps.of(checkpoint, **asked, outside=0)
    assert (some.rows, some.cadences, some.chunks) == ((), ("at_once",), (1, 2, 4, 8))
    assert some.outside == 0


# -------------------------------------------------------------------------------------- whole runs


def test_whole_run_from_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    command = (
        "--config tiny --frames 4 --at 10,200 --chunk-frames 2 --bandwidth-gb 0.02 --scripts 2 "
        "--cadences at_once,words_10ms --chunks 2 --rows 2 --json"
    )
    out = tmp_path / "new" / "folder"
    run = CliRunner().invoke(latency.main, [*command.split(), str(path), "--out", str(out)])
    assert run.exit_code == 0, run.output
    report = json.loads(path.read_text())
    assert report["config"] == "tiny" and report["weights"] == "random"
    assert report["machine"].keys() >= {
        "cpu", "cores", "memory_gb", "load_average_1min", "others_cpu_share", "best_gb_per_s",
    }  # fmt: skip
    for kind in ("cold", "warm"):
        assert report[kind].keys() == {
            "import_s", "load_s", "weights_gb", "anonymous_added_gb", "anonymous_over_weights",
            "ready_s", "session_s", "first_frame_s", "first_chunk_s", "trace_s", "lower_s", "xla_s",
            "programs", "cache_hits", "cache_misses",
        }  # fmt: skip
    # The second process finds what the first one compiled, although these tests turn caches off.
    assert report["cold"]["cache_misses"] > 0 and report["warm"]["cache_hits"] > 0
    assert report["warm"]["cache_hits"] > report["cold"]["cache_hits"]
    assert report["warm"]["xla_s"] < report["cold"]["xla_s"]
    stream = report["stream"]
    # Codes are complete after max_delay = 4 frames, the second frame of the chunk one later.
    assert (stream["first_audio_frames"], stream["chunk_frames"]) == (5, 2)
    assert stream["first_audio_ms"] > 0 and stream["x_realtime"] > 0
    assert stream["programs_compiled"] == 0
    assert list(report["step"]) == ["10", "200"]
    for step in report["step"].values():
        assert step.keys() == SPREAD | {
            "x_realtime", "weights_gb", "cache_gb", "weights_gb_per_s", "achieved_gb_per_s",
            "share_of_bandwidth",
        }  # fmt: skip
        assert step["count"] == 4 and 0 < step["p50_ms"] <= step["p99_ms"]
    assert report["decode"].keys() == SPREAD
    assert report["memory"].keys() == {
        "rss_gb", "rss_peak_gb", "anonymous_gb", "anonymous_peak_gb", "weights_gb", "caches_gb",
        "rest_gb",
    }  # fmt: skip
    memory = report["memory"]
    assert memory["weights_gb"] == report["warm"]["weights_gb"] and memory["caches_gb"] > 0
    parts = sum(memory[name] for name in ("weights_gb", "caches_gb", "rest_gb"))
    assert parts == pytest.approx(memory["anonymous_peak_gb"])
    assert report["stream"]["growth_mb"] < 20
    assert report["versions"]["jax"] == jax.__version__
    assert "ratio" not in report and "audible" not in report and "outside" not in report
    assert "first audio" in run.output and "frame at 200" in run.output
    listened(report)
    assert json.loads((out / "report.json").read_text()) == report
    assert (out / "report.txt").read_text() in run.output
    assert (out / "latency.png").read_bytes().startswith(b"\x89PNG")


def listened(report: Mapping[str, Any]) -> None:
    """What a run of two cadences, one chunk size and one batch size must hold."""
    rows = report["rows"]["2"]
    assert rows["join_programs"] == 0 and rows["join"]["count"] == rows["leave"]["count"] == 20
    assert list(report["cadences"]) == ["at_once", "words_10ms"]
    figures = {
        "first_byte", "first_playable", "first_text_to_audio", "interval", "jitter", "stall",
        "stall_for_text", "final_text", "final_heard",
    }  # fmt: skip
    for one in (*report["cadences"].values(), report["chunks"]["2"]):
        assert (one["takes"], one["first_byte"]["count"]) == (2, 2) and one["x_realtime"] > 0
        assert all(one[name].keys() == SPREAD for name in figures)
        assert one.keys() >= {"first_audible", "leading_silence", "silent", "underruns"}
    at_once, by_word = report["cadences"].values()
    assert at_once["starts_before_text_ends"] == 0  # the end is known before anything
    assert len(by_word["each"]) == 2 and by_word["each"][0]["audio_s"] > 0
    assert by_word["curve"]["fed_s"][1] == pytest.approx(0.01)
    assert report["rows"].keys() == {"2"}
    assert report["rows"]["2"].keys() == {
        "step", "decode", "first_playable_ms", "jitter_ms", "underruns", "stall_ms", "x_realtime",
        "x_realtime_all", "compile_s", "anonymous_peak_gb", "leave", "join", "join_programs",
    }  # fmt: skip


# ------------------------------------------------------------------------------------------ errors


def refuse(*arguments: str) -> str:
    run = CliRunner().invoke(latency.main, list(arguments))
    assert run.exit_code == 2 and isinstance(run.exception, SystemExit), run.exception
    return run.output


def test_missing_torch_is_said_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dia2" / "runtime").mkdir(parents=True)
    (tmp_path / "dia2" / "runtime" / "generator.py").touch()
    find = importlib.util.find_spec
    lacking = {"torch", "transformers"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in lacking else find(name)
    )
    monkeypatch.setattr(latency, "measure_model", lambda *_, **__: pytest.fail("measured"))
    monkeypatch.setattr(latency, "measure_codec", lambda *_, **__: pytest.fail("measured"))
    said = refuse("--config", "tiny", "--against", str(tmp_path))
    assert "--against needs torch" in said and "dia2-jax[parity]" in said
    # With torch, the checkout's own imports are tried.
    monkeypatch.setattr(latency_upstream, "require", lambda *_: None)
    (tmp_path / "dia2" / "runtime" / "generator.py").write_text("import nothing_of_this_name")
    said = refuse("--config", "tiny", "--against", str(tmp_path))
    assert "cannot be imported (ModuleNotFoundError: No module named 'nothing_of" in said
    said = refuse("--codec", "--against", "transformers")
    assert "--against needs torch and transformers" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config", "huge"], "neither a checkpoint folder nor a shape in configs/; shapes are"),
        (["--config", "mimi"], "a codec's shape; add --codec"),
        (["--config", "tiny", "--at", "256"], "--at 256: outside this model's context of 256"),
        (["--config", "tiny", "--at", "early"], "steps separated by commas"),
        (["--config", "tiny", "--against", "."], "no checkout of nari-labs/dia2"),
        (["--codec", "--against", "moshi"], "with --codec the other side is 'transformers'"),
        (["--config", "tiny", "--outside", "1"], "--outside: the command speaks checkpoints"),
        (["--config", "tiny", "--rows", "0"], "whole numbers from 1 on separated by commas"),
        (["--config", "tiny", "--cadences", "fast"], "of at_once, words_10ms, llm_bursts, slow_t"),
        (["--config", ""], "neither a checkpoint folder nor a shape"),
        (["--frames", "4"], "Missing option '--config'"),
        (["--codec", "--seconds", "nan"], "nan is no finite number"),
        (["--config", "tiny", "--bandwidth-gb", "inf"], "inf is no finite number"),
    ],
)
def test_refusals_say_what_to_do(arguments: list[str], said: str) -> None:
    assert said in refuse(*arguments)


def test_what_cannot_be_written_is_said_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("measure_model", "measure_suite"):
        monkeypatch.setattr(latency, name, lambda *_, **__: pytest.fail("measured"))
    (tmp_path / "file").touch()
    for option, place in (
        ("--json", tmp_path),
        ("--json", tmp_path / "file" / "x.json"),
        ("--suite", tmp_path / "file" / "x.json"),
        ("--out", tmp_path / "file"),
        ("--out", tmp_path / "file" / "folder"),
        ("--out", ""),
    ):
        said = refuse("--config", "tiny", option, str(place))
        assert said.startswith(f"error: {option} {str(place)!r}: cannot be written ("), said
        assert said.count("\n") == 1
    # What was tried, and a mistake elsewhere, leave nothing behind.
    refuse("--out", str(tmp_path / "new" / "folder"), "--config", "huge")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b""
