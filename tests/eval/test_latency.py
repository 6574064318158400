"""Latency measurements: the arithmetic on known times, and whole runs on tiny models."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
import yaml
from click.testing import CliRunner

from dia2_jax.config import config_to_dict, load_dia2_config
from dia2_jax.convert.models import abstract_dia2
from eval import latency, latency_measure, latency_models
from eval.codec_speed import OurCodec
from eval.latency_machine import AnonymousPeak, OtherWork, read_bandwidth
from eval.latency_measure import Sweeps
from eval.latency_models import Source, frame_cache_bytes, frame_weight_bytes
from eval.latency_ours import SPAN, Ours
from eval.latency_process import Child, MeasurementError
from eval.latency_report import table
from eval.latency_statistics import alternate, ratio, summary

SPREAD = {"p25_ms", "p50_ms", "p75_ms", "p95_ms", "p99_ms", "min_ms", "max_ms", "count"}


# -------------------------------------------------------------------------------------- arithmetic


def test_percentiles_of_known_times() -> None:
    times = list(range(101))[::-1]
    assert summary(times) == {
        "p25_ms": 25, "p50_ms": 50, "p75_ms": 75, "p95_ms": 95, "p99_ms": 99,
        "min_ms": 0, "max_ms": 100, "count": 101,
    }  # fmt: skip
    assert summary([1.0, 2.0])["p50_ms"] == 1.5
    with pytest.raises(ValueError, match="no times"):
        summary([])


def test_ratio_is_their_median_over_ours() -> None:
    assert ratio([2.0, 1.0, 90.0], [7.0, 1.0, 5.0]) == 2.5


def test_sides_take_turns_and_the_first_of_each_turn_is_dropped() -> None:
    log: list[tuple[str, int]] = []

    def side(name: str) -> Any:
        def run(count: int) -> list[float]:
            log.append((name, count))
            return [1e6] + [float(len(log))] * (count - 1)

        return run

    times = alternate({"a": side("a"), "b": side("b")}, 5, 2)
    assert log == [("a", 3), ("b", 3), ("a", 3), ("b", 3), ("a", 2), ("b", 2)]
    assert times == {"a": [1, 1, 3, 3, 5], "b": [2, 2, 4, 4, 6]}
    with pytest.raises(ValueError, match="asked for 2 times, got 1"):
        alternate({"short": lambda n: [1.0]}, 1, 1)


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
            seek=lambda position: where.update({side: position}),
            decode=lambda count: [2.0] * count,
            bandwidth=lambda gigabytes: {"best_gb_per_s": 20.0},
            costs=lambda _: {"frame_ms_of_audio": 80.0, "weights_gb": 0.1, "cache_gb": 0.05},
        )

    report = latency_measure.measure_model(
        Source.of("tiny"),
        dtype="float32",
        frames=5,
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
    assert report["ratio"] == 60.0 / 20.0  # medians over all frames: 60 and (10 + 30) / 2
    assert report["step"]["20"]["max_ms"] == 10.0
    assert report["step"]["20"]["x_realtime"] == 8.0
    assert report["step"]["20"]["weights_gb_per_s"] == pytest.approx(10.0)
    assert report["step"]["20"]["achieved_gb_per_s"] == pytest.approx(15.0)
    assert report["step"]["20"]["share_of_bandwidth"] == pytest.approx(0.75)
    # The cold process is gone before the warm one starts, and both share a folder of programs.
    assert log.index("ours0.close") < log.index("ours1.load")
    assert started[0][2]["DIA2_JAX_CACHE"] == started[1][2]["DIA2_JAX_CACHE"]
    # In turns: 4 frames as 3 and 1, at each of two positions.
    turns = [entry for entry in log[log.index("theirs.seek") :] if entry.endswith(".frames")]
    assert turns == ["ours1.frames", "theirs.frames"] * 4
    assert {"ours1.close", "theirs.close"} <= set(log)


# ------------------------------------------------------------------------------------------- costs


def test_weight_bytes_of_a_frame_of_the_published_shape() -> None:
    config = Source.of("dia2_1b").dia2_config()
    _, abstract = abstract_dia2(config)
    width, hidden, heads, stages = 1024, 3072, 8 * 128, 31
    layer = 2 * width * 16 * 128 + 2 * width * 8 * 128 + 3 * width * 6144 + 2 * width + 2 * 128
    decoder = 30 * layer + width + (2 + 2050) * width + 2 * width * width  # heads, text projections
    stage = 4 * width * heads + 3 * width * hidden + 2 * width + 2 * 128
    depformer = stages * (3 * stage + width + 2050 * width) + 3 * width * width
    assert frame_weight_bytes(config, abstract) == 4 * (decoder + depformer)


def test_cache_bytes_are_whole_blocks_of_both_rows() -> None:
    config = Source.of("dia2_1b").dia2_config()
    block = 2 * 2 * 30 * 128 * 8 * 128 * 4  # rows, keys and values, layers, slots
    assert [frame_cache_bytes(config, position) for position in (0, 127, 128, 1400)] == [
        block, block, 2 * block, 11 * block,
    ]  # fmt: skip


def test_default_positions_lie_in_the_context() -> None:
    assert latency_measure.default_positions(1500) == [100, 1400]
    assert latency_measure.default_positions(256) == [64, 156]
    assert latency_measure.default_positions(4) == [1, 2]


def test_bandwidth_is_the_best_of_several_ways() -> None:
    rates = read_bandwidth(0.02, repeats=1)
    assert rates["best_gb_per_s"] == max(rates.values()) > 0
    assert len(rates) == 4


def test_anonymous_peak_sees_memory_that_is_gone_again() -> None:
    with AnonymousPeak(0.001) as peak:
        block = np.ones(8_000_000, np.float64)
        time.sleep(0.05)
        del block
    assert peak.before is not None and peak.peak is not None
    assert 60e6 < peak.peak - peak.before < 120e6


def test_other_work_is_what_is_not_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = iter([(100.0, 50.0, 5.0), (110.0, 56.0, 9.0), (110.0, 50.1, 5.2)])
    with monkeypatch.context() as patch:
        patch.setattr(OtherWork, "_sample", staticmethod(lambda: next(samples)))
        others = OtherWork()
        assert others.share() == pytest.approx(0.2)  # of 10 s, 6 busy, 4 of them ours
        assert others.share() == 0  # clocks tick in hundredths: never negative
    before = OtherWork._sample()
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    wall, busy, own = (b - a for a, b in zip(before, OtherWork._sample(), strict=True))
    assert 0.25 < own < busy + 0.1 and busy <= wall


# --------------------------------------------------------------------------------------- processes


def test_child_answers_or_says_what_failed() -> None:
    with Child("eval.latency_models:Source", {"name": "mimi", "folder": None}) as child:
        assert child.call("mimi_config").num_quantizers == 32
        with pytest.raises(MeasurementError, match="Source: --config mimi: a codec's shape"):
            child.call("dia2_config")
        with pytest.raises(MeasurementError, match="AttributeError.*nothing"):
            child.call("nothing")
        # A failed call leaves it usable.
        assert child.call("mimi_config").codebook_size == 2048


def test_child_that_dies_is_reported_with_its_code() -> None:
    with pytest.raises(MeasurementError, match="_exit: its process ended with code 3"):
        Child("os:_exit", {"status": 3})


# ---------------------------------------------------------------------------------------- position


@pytest.fixture(scope="module")
def small_configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shapes that compile faster than tiny: ``long`` has room for a cache that costs more than all
    the rest of a frame, and ``mimi_long`` is its codec."""
    folder = tmp_path_factory.mktemp("configs")
    model = config_to_dict(Source.of("tiny").dia2_config())
    model["data"] |= {"channels": 4, "delay_pattern": [1, 2]}
    model["runtime"] = {"weights_schedule": [0], "max_context_steps": 40_000}
    codec = config_to_dict(Source.of("mimi_tiny").mimi_config())
    codec |= {"upsampling_ratios": [6, 4], "sampling_rate": 600, "num_hidden_layers": 1}
    codec |= {"num_quantizers": 2}
    for name, content in (("long", model), ("mimi_long", codec)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder


@pytest.fixture(scope="module")
def long_context(small_configs: Path) -> Ours:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency_models, "CONFIGS", small_configs)
        ours = Ours("long")
        ours.load()
    return ours


def test_a_position_really_times_a_longer_cache(long_context: Ours) -> None:
    medians = {}
    for position in (100, 39_000):
        long_context.seek(position)
        medians[position] = np.median(long_context.frames(8)[1:])
    assert medians[39_000] > 3 * medians[100]


def test_a_position_is_where_frames_are_written(long_context: Ours) -> None:
    long_context.seek(20_000)
    long_context.frames(SPAN + 2)  # jumps back once
    assert long_context._state is not None
    written = np.asarray(long_context._state.cache[0].values[0, 0]).any(axis=-1)
    assert written[20_000 : 20_000 + SPAN].all()
    assert not written[10_000:20_000].any() and not written[20_000 + SPAN : 30_000].any()
    assert int(long_context._state.frame[0]) == 20_002
    with pytest.raises(MeasurementError, match="--at 40000: outside this model's context"):
        long_context.seek(40_000)


# -------------------------------------------------------------------------------------- whole runs


def test_a_folder_is_loaded_not_made_up(tiny_model_folder: Path) -> None:
    ours = Ours(str(tiny_model_folder))
    loaded = ours.load()
    files = [tiny_model_folder / name for name in ("model.safetensors", "mimi/model.safetensors")]
    weights = sum(path.stat().st_size for path in files)
    assert loaded["weights_gb"] == pytest.approx(weights / 1e9, rel=0.05)  # headers come on top
    assert loaded["anonymous_over_weights"] == pytest.approx(
        loaded["anonymous_added_gb"] / loaded["weights_gb"]
    )
    tensors = safetensors.numpy.load_file(files[0])
    held = ours._programs.model().transformer.cb0_head.weight[...]
    assert np.array_equal(held, tensors["transformer.cb0_head.weight"])


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


class Local:
    """A side in this process."""

    def __init__(self, side: Any) -> None:
        self._side = side

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._side, method)(*arguments)

    def close(self) -> None:
        pass


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


def test_codec_run_with_our_own_codec_as_the_other_side(
    small_configs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other side reads the weights that were exported for it, so it must agree exactly."""
    monkeypatch.setattr(latency_models, "CONFIGS", small_configs)

    def start(target: str, arguments: Mapping[str, Any], _: Mapping[str, str | None]) -> Local:
        if "OurCodec" in target:
            return Local(OurCodec(arguments["source"]))
        return Local(OurCodec(arguments["folder"]))

    report = latency_measure.measure_codec(
        Source.of("long"), against=True, seconds=0.64, repeats=2, stream_seconds=12.0, start=start
    )
    assert report["take"] == {"audio_s": 0.64, "frames": 8, "codebooks": 2}
    assert report["agreement"]["encode_equal_share"] == 1.0
    assert report["agreement"]["decode_snr_db"] > 200
    for name in ("encode", "decode"):
        assert report[name].keys() == SPREAD | {"x_realtime"}
        assert report["transformers"][name].keys() == SPREAD
        theirs = report["transformers"][name]["p50_ms"]
        assert report[f"ratio_{name}"] == pytest.approx(theirs / report[name]["p50_ms"])
    assert report["stream_1"]["p50_ms_per_frame"] > report["stream_8"]["p50_ms_per_frame"] > 0
    assert report["stream_8_over_whole"] == pytest.approx(
        report["decode"]["p50_ms"] / 8 / report["stream_8"]["p50_ms_per_frame"]
    )
    assert report["memory"]["stream_audio_s"] == 12.0
    assert report["memory"]["stream_growth_mb"] < 20
    machine = {"cpu": "", "cores": 1, "memory_gb": 1, "load_average_1min": 0, "others_cpu_share": 1}
    text = table({"config": "tiny", "dtype": "float32", "machine": machine, **report})
    assert "100.00% of the codes equal" in text and "NOT AN IDLE MACHINE" in text


# ------------------------------------------------------------------------------------------ errors


def refuse(*arguments: str) -> str:
    run = CliRunner().invoke(latency.main, list(arguments))
    assert run.exit_code != 0 and run.exception is not None
    assert isinstance(run.exception, SystemExit), run.exception
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
        ([], "Missing option '--config'"),
    ],
)
def test_refusals_say_what_to_do(arguments: list[str], said: str) -> None:
    assert said in refuse(*arguments)


def test_config_for_upstream_is_the_published_form(tmp_path: Path) -> None:
    config = Source.of("tiny").dia2_config()
    path = latency_models.write_config(config, tmp_path / "config.json")
    assert load_dia2_config(path) == config
    assert json.loads(path.read_text())["data"]["channels"] == 10
