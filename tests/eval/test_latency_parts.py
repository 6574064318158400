"""What latency measurements stand on: the arithmetic of times, what a frame costs, the machine, and
processes that answer."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dia2_jax.config import load_dia2_config
from dia2_jax.convert.models import abstract_dia2
from dia2_jax.nn.kernels import kernels
from eval import latency_models
from eval.latency_machine import AnonymousPeak, OtherWork, read_bandwidth
from eval.latency_models import Source, frame_cache_bytes, frame_weight_bytes
from eval.latency_process import Child, MeasurementError
from eval.latency_statistics import alternate, ratio, summary

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


def test_cache_bytes_are_blocks_or_slots_of_both_rows() -> None:
    config = Source.of("dia2_1b").dia2_config()
    block = 2 * 2 * 30 * 128 * 8 * 128 * 4  # rows, keys and values, layers, slots
    assert [frame_cache_bytes(config, position) for position in (0, 127, 128, 1400)] == [
        block, block, 2 * block, 11 * block,
    ]  # fmt: skip
    # A kernel reads the slots that there are.
    assert frame_cache_bytes(config, 99, blocks=False) == block * 100 // 128
    int8 = frame_cache_bytes(config, 99, int8=True, blocks=False)
    assert int8 == 2 * 2 * 30 * 100 * 8 * (128 + 4)


def test_bandwidth_is_the_best_of_several_ways() -> None:
    rates = read_bandwidth(0.02, repeats=1)
    assert rates["best_gb_per_s"] == max(rates.values()) > 0
    assert len(rates) == 4 + kernels().float32


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


def test_child_is_silent_about_ctrl_c_which_its_parent_reports() -> None:
    with Child("eval.latency_models:Source", {"name": "mimi", "folder": None}) as child:
        os.kill(child._process.pid or 0, signal.SIGINT)
        with pytest.raises(MeasurementError, match="its process ended with code 130"):
            child.call("mimi_config")


def test_child_that_dies_is_reported_with_its_code() -> None:
    with pytest.raises(MeasurementError, match="_exit: its process ended with code 3"):
        Child("os:_exit", {"status": 3})


def test_config_for_upstream_is_the_published_form(tmp_path: Path) -> None:
    config = Source.of("tiny").dia2_config()
    path = latency_models.write_config(config, tmp_path / "config.json")
    assert load_dia2_config(path) == config
    assert json.loads(path.read_text())["data"]["channels"] == 10
