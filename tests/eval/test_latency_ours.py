"""Our side of latency measurements, on tiny models: where a frame is timed, what is loaded, and the
codec beside another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from small_shapes import load, write_shapes

from eval import latency_measure, latency_models
from eval.codec_speed import OurCodec
from eval.latency_models import Source
from eval.latency_ours import SPAN, Ours
from eval.latency_process import MeasurementError
from eval.latency_report import table

SPREAD = {"p25_ms", "p50_ms", "p75_ms", "p95_ms", "p99_ms", "min_ms", "max_ms", "count"}


@pytest.fixture(scope="module")
def small_configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shapes that compile faster than tiny: ``long`` has room for a cache that costs more than all
    the rest of a frame, and ``mimi_long`` is its codec."""
    folder = tmp_path_factory.mktemp("configs")
    write_shapes(folder, "long", delays=[1, 2], context=40_000)
    return folder


@pytest.fixture(scope="module")
def long_context(small_configs: Path) -> Ours:
    return load(small_configs, "long")


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
    written = np.asarray(long_context._state.cache.values[0, 0, 0]).any(axis=-1)
    assert written[20_000 : 20_000 + SPAN].all()
    assert not written[10_000:20_000].any() and not written[20_000 + SPAN : 30_000].any()
    assert int(long_context._state.frame[0]) == 20_002
    with pytest.raises(MeasurementError, match="--at 40000: outside this model's context"):
        long_context.seek(40_000)


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


class Local:
    """A side in this process."""

    def __init__(self, side: Any) -> None:
        self._side = side

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._side, method)(*arguments)

    def close(self) -> None:
        pass


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
