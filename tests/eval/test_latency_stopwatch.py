"""The outside stopwatch: its clock on programs of known times, its sums, and the real command."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dia2_jax import Dia2
from eval import latency_measure, latency_stopwatch
from eval.latency_cadences import Schedule
from eval.latency_listener import Chunk, Take, figures
from eval.latency_measure import Sweeps
from eval.latency_models import Source
from eval.latency_process import MeasurementError
from eval.latency_report import _listening
from eval.latency_stopwatch import TOLERANCE, Outside, agreement, compared, time_command, verdict

#: Speaks like the command: notes on a terminal, and a frame of 100 samples as soon as there is
#: text, in two pieces, another half a frame 0.2 s after the end of it.
PROGRAM = """
import json, os, sys, time
assert sys.stderr.isatty()
print("loading /a/model that is not ready", file=sys.stderr, flush=True)
time.sleep(0.1)
print("ready", file=sys.stderr, flush=True)
text = os.read(0, 100)
os.write(1, b"\\0\\x20" * 20)
time.sleep(0.1)
os.write(1, b"\\0\\x20" * 80)
while piece := os.read(0, 100):
    text += piece
time.sleep(0.2)
os.write(1, b"\\0\\0" * 50)
json.dump({"text": text.decode(), "variable": os.environ["SAID"]}, open(sys.argv[1], "w"))
"""


def timed(program: str, monkeypatch: pytest.MonkeyPatch, **options: float) -> Outside:
    monkeypatch.setattr(
        latency_stopwatch,
        "command_of",
        lambda model, json_path, **_: [sys.executable, "-c", program, json_path],
    )
    return time_command(
        "model",
        Schedule(((0.0, "Naïve "), (0.3, "words")), 0.5),
        chunk_frames=2,
        sample_rate=1000,
        samples_per_frame=50,
        rest_s=0.0,
        environment={"SAID": "yes", "HOME": None},
    )


def test_what_a_client_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lower bounds hold on any machine: nothing can come sooner than it was made."""
    seen = timed(PROGRAM, monkeypatch)
    assert seen.report == {"text": "Naïve words", "variable": "yes"}
    assert seen.start_s > 0.1
    take = seen.take
    assert take.fed[0] >= 0 and take.fed[1] >= 0.3
    assert take.ended is not None and take.ended >= 0.5 and take.began is None
    assert [chunk.seconds for chunk in take.chunks] == [0.1, 0.05]
    assert [chunk.level for chunk in take.chunks] == pytest.approx([-12.04, -120], abs=0.01)
    assert np.array_equal(seen.pcm, [0.25] * 100 + [0] * 50)
    # A chunk is there with its last byte, not with its first.
    assert take.first_byte is not None
    assert take.chunks[0].at - take.first_byte >= 0.09
    assert take.chunks[1].at - take.ended >= 0.19


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (
            "import sys; sys.exit('no such model')",
            "dia2-jax stream ended at once: no such model",
        ),
        (
            "import sys; print('ready', file=sys.stderr); sys.stdin.close(); sys.exit('too long')",
            "dia2-jax stream ended with code 1: ready / too long",
        ),
    ],
)
def test_a_command_that_fails_is_quoted(
    program: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MeasurementError, match=said):
        timed(program, monkeypatch)


# -------------------------------------------------------------------------------------------- sums


def take(first: float, each: float, *, level: float = -20.0) -> Take:
    chunks = tuple(Chunk(first + i * each, 0.08, level) for i in range(11))
    return Take((0.0,), 0.0, 0, chunks)


def test_compared_figures_count_from_the_look_ahead() -> None:
    late = dataclasses.replace(take(0.5, 0.04), fed=(0.0, 0.3), began=1)
    assert compared(late) == pytest.approx(
        {
            "first_playable_ms": 200,
            "first_audible_ms": 200,
            "last_chunk_ms": 600,
            "x_realtime": 2.0,
        }
    )


def test_agreement_is_that_of_the_worst_figure_run_for_run() -> None:
    inside = [take(0.1, 0.04), take(0.2, 0.04), take(0.1, 0.08)]
    # First audio 5 % later in two of three runs, the pace the same.
    outside = [take(0.105, 0.04), take(0.21, 0.04), take(0.2, 0.08)]
    found = agreement(inside, outside)
    assert found["first_playable_ms"]["ratios"] == pytest.approx([1.05, 1.05, 2.0])
    assert found["first_playable_ms"]["difference"] == pytest.approx(0.05)
    assert found["first_playable_ms"]["inside"] == pytest.approx(100)
    assert found["x_realtime"]["difference"] == pytest.approx(0, abs=1e-9)
    assert found["largest_difference"] == pytest.approx(0.05) and found["agrees"]
    slow = agreement(inside[:1], [take(0.1, 0.04 * (1 + 1.5 * TOLERANCE))])
    assert slow["first_playable_ms"]["difference"] == pytest.approx(0)
    assert slow["x_realtime"]["difference"] == pytest.approx(1 / 1.15 - 1)
    assert not slow["agrees"] and not slow["doubtful"]
    assert verdict(slow) == "DOES NOT AGREE within 10%"


def test_a_difference_that_is_not_known_is_no_disagreement() -> None:
    """Half of the runs agree: the median is beyond the bar, its interval is not."""
    inside = [take(0.1, 0.04)] * 8
    outside = [take(0.1, 0.04)] * 3 + [take(0.13, 0.04)] * 5
    found = agreement(inside, outside)
    first = found["first_playable_ms"]
    assert first["difference"] == pytest.approx(0.3) and not first["agrees"]
    assert first["low"] == pytest.approx(0) and first["high"] == pytest.approx(0.3)
    assert found["doubtful"] and not found["agrees"] and not found["known"]
    assert verdict(found).startswith("NOT KNOWN to agree within 10%")
    steady = agreement(inside, [take(0.104, 0.04)] * 8)
    assert steady["known"] and steady["agrees"] and verdict(steady) == "agrees within 10%"


def test_agreement_where_nothing_was_heard() -> None:
    silent = [take(0.1, 0.04, level=-60.0)]
    found = agreement(silent, silent)
    assert found["first_audible_ms"] is None and found["agrees"]
    nothing = [Take((0.0,), 0.0, None, ())]
    assert not agreement(nothing, nothing)["agrees"]


@pytest.mark.parametrize(("later", "runs"), [((0.106, 0.106), 2), ((0.095, 0.125), 8)])
def test_takes_are_made_in_turns_and_the_cold_one_counts_for_its_start_alone(
    later: tuple[float, float], runs: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two runs that agree are enough; those that differ are four times as many."""
    log: list[str] = []
    caches: list[str | None] = []

    def time_command(model: str, schedule: Schedule, **options: Any) -> Outside:
        cold = not log
        log.append(f"outside {schedule.script}")
        caches.append(options["environment"]["DIA2_JAX_CACHE"])
        assert (model, options["samples_per_frame"], options["dtype"]) == ("given", 50, "bfloat16")
        assert options["rest_s"] >= 2  # twice what a session and its first frame took
        first = 9.0 if cold else later[len(log) % 3 == 0]
        seen = dataclasses.replace(take(first, 0.04), began=None)
        return Outside(
            seen, 30.0 if cold else 5.0, np.zeros(0), {"first_audio_after_look_ahead": 0.104}
        )

    class Inside:
        def call(self, method: str, schedules: list[Schedule], *options: Any) -> list[Take]:
            assert method == "listen" and len(schedules) == 1
            assert options == (None, False, True)  # written into a pipe, as the command does
            log.append(f"inside {schedules[0].script}")
            return [take(0.1, 0.04)]

        def close(self) -> None: ...

    monkeypatch.setattr(latency_measure, "time_command", time_command)
    monkeypatch.setattr(latency_measure, "everyday_scripts", lambda count: [*"abcdefgh"][:count])
    report = {
        "warm": {"session_s": 0.5, "first_frame_s": 0.5},
        "sample_rate": 1000,
        "samples_per_frame": 50,
    }
    found = latency_measure._outside(
        Inside(),
        Source("given", tmp_path),
        Sweeps(outside=2),
        report,
        "bfloat16",
        1,
        {"DIA2_JAX_CACHE": "filled"},
    )
    # One for the start, then in turns, each first as often as second.
    assert log[:5] == ["outside a", "inside a", "outside a", "outside b", "inside b"]
    assert len(log) == 1 + 2 * runs
    assert caches[0] not in (None, "filled") and caches[1:] == ["filled"] * runs
    assert (found["cold_start_s"], found["warm_start_s"], found["runs"]) == (30.0, 5.0, runs)
    if runs > 2:
        assert not found["known"]
        return
    assert found["first_playable_ms"]["difference"] == pytest.approx(0.06) and found["agrees"]
    assert found["command_says_first_playable_ms"] == pytest.approx(104)
    text = "\n".join(" · ".join(row) for row in _listening({"outside": found}))
    assert "first chunk ms 106 (+6.0%, +6.0% to +6.0%)" in text
    assert "2 runs · agrees within 10%" in text
    assert "cold 30.0 s, warm 5.0 s" in text


# ------------------------------------------------------------------------------------- the command


def test_the_command_and_the_client_tell_the_same_story(
    tiny_model: Dia2, tiny_model_folder: Path
) -> None:
    script = "[S1] Hello there my old friends."
    seen = time_command(
        str(tiny_model_folder),
        Schedule(((0.0, script[:14]), (0.3, script[14:])), 0.4),
        chunk_frames=1,
        sample_rate=tiny_model.sample_rate,
        samples_per_frame=1920,
        rest_s=0.5,
    )
    assert seen.report["finished"] and seen.report["codes_shape"] == [8, len(seen.take.chunks)]
    assert len(seen.pcm) == 1920 * len(seen.take.chunks)
    # Its own clock starts later and stops sooner, and neither counts its start.
    own = seen.report["first_audio_after_first_byte"]
    found = figures(seen.take).first_text_to_audio_ms
    assert found is not None and 0.3 < own < found / 1e3 + 0.5
    assert found / 1e3 < own + 0.5 < seen.start_s
    assert seen.take.chunks[-1].at > 0.4
