"""The fixed suite: every run measures the same things, so that two runs can be compared.

A **round** is a process of its own, started warm (its programs are on disk), so that what differs
between processes, such as where memory lies, is part of the spread. Before the rounds one process
starts cold. The report keeps every sample:

    suite     number of this list of measurements; reports of different numbers do not compare
    command, config, weights, dtype, backend, versions, context_steps, positions, rounds
    machine   as in `eval.latency`, read bandwidth included
    figures   by name: unit, better ("lower" or "higher") and rounds, a list of samples a round

    cold_start_s, warm_start_s  process start to the first frame and chunk done, without and with
              compiled programs on disk; of the warm one import_s, load_s and ready_s
    first_audio_ms  a whole text fed to the first chunk of one frame
    first_audible_ms  (of a checkpoint) to the first chunk above -40 dBFS, of some scripts; a
              script that is never audible gives no sample
    x_realtime  of a stream, codec included
    frame_early_ms, frame_late_ms  at the two `positions`, both guidance rows
    decode_ms  the codec, a frame
    rows_N_ms  a frame of N rows together, the median of a round
    join_ms, leave_ms  of four rows: another session in the place of one, up to the next frame;
              and that one's end
    weights_gb, peak_gb  weights and codec; peak of anonymous memory with one row
    rest_gb   of that peak, what is neither weights nor caches
    rows_4_peak_gb  while four rows spoke
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eval.latency_cadences import words_at_once
from eval.latency_listener import figures as figures_of_take
from eval.latency_measure import (
    OURS,
    Start,
    cache_environment,
    default_positions,
    everyday_scripts,
    frames_at,
    say,
)
from eval.latency_models import Source
from eval.latency_process import Child, Side
from eval.latency_statistics import alternate

#: Raised whenever a measurement is added, dropped or means something else.
SUITE = 2
#: Rounds unless others are asked for.
ROUNDS = 5

_FRAMES = 20
#: Of them in a turn, positions taking turns.
_BLOCK = 5
_ROWS = (1, 2, 4)
_ROW_FRAMES = 8
_SCRIPTS = 5
_BANDWIDTH_GB = 1.0


@dataclass(frozen=True)
class Figure:
    """One thing that the suite measures.

    Attributes:
      unit: of its samples.
      better: ``lower`` or ``higher``.
      label: in tables.
    """

    unit: str
    better: str
    label: str


FIGURES: dict[str, Figure] = {
    "cold_start_s": Figure("s", "lower", "start, nothing compiled"),
    "warm_start_s": Figure("s", "lower", "start, programs on disk"),
    "import_s": Figure("s", "lower", "of that: imports"),
    "load_s": Figure("s", "lower", "of that: weights"),
    "ready_s": Figure("s", "lower", "of that: programs, a frame, a chunk"),
    "first_audio_ms": Figure("ms", "lower", "text to first chunk"),
    "first_audible_ms": Figure("ms", "lower", "text to first audible chunk"),
    "x_realtime": Figure("x", "higher", "stream, times real time"),
    "frame_early_ms": Figure("ms", "lower", "frame, early"),
    "frame_late_ms": Figure("ms", "lower", "frame, late"),
    "decode_ms": Figure("ms", "lower", "codec, a frame"),
    **{f"rows_{n}_ms": Figure("ms", "lower", f"frame of {n} row{'s' * (n > 1)}") for n in _ROWS},
    "join_ms": Figure("ms", "lower", f"a session joins {_ROWS[-1]} rows"),
    "leave_ms": Figure("ms", "lower", f"a session leaves {_ROWS[-1]} rows"),
    "weights_gb": Figure("GB", "lower", "weights"),
    "peak_gb": Figure("GB", "lower", "peak memory, one row"),
    "rest_gb": Figure("GB", "lower", "peak without weights and caches"),
    f"rows_{_ROWS[-1]}_peak_gb": Figure("GB", "lower", f"peak memory, {_ROWS[-1]} rows"),
}


def measure_suite(
    source: Source, *, dtype: str, rounds: int = ROUNDS, start: Start = Child
) -> dict[str, Any]:
    """Run the suite; keys are listed above (command, config and dtype are the caller's).

    Args:
      source: a shape or a checkpoint.
      dtype: as in `eval.latency`.
      rounds: warm processes; at least 4 for a comparison that can say anything.
      start: starts a side.

    Raises:
      MeasurementError: something cannot be measured.
    """
    context = source.dia2_config().runtime.max_context_steps
    positions = default_positions(context)
    arguments = {"source": source.name, "dtype": dtype, "chunk_frames": 1, "cache": True}
    found: dict[str, list[list[float]]] = {}
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as cache:
        for index in range(rounds + 1):
            say("cold start" if index == 0 else f"round {index} of {rounds}")
            ours = start(OURS, arguments, cache_environment(cache))
            try:
                if index == 0:
                    samples = {"cold_start_s": [_started(ours)["warm_start_s"][0]]}
                else:
                    samples = _round(ours, source, positions)
                if index == rounds:
                    report = ours.call("about")
                    say("reading memory")
                    report["machine"] = ours.call("bandwidth", _BANDWIDTH_GB)
            finally:
                ours.close()
            for name, values in samples.items():
                found.setdefault(name, []).append(values)
    return {
        "suite": SUITE,
        "weights": "checkpoint" if source.folder else "random",
        "positions": positions,
        "rounds": rounds,
        **report,
        "figures": {
            name: {"unit": figure.unit, "better": figure.better, "rounds": found[name]}
            for name, figure in FIGURES.items()
            if any(found.get(name, []))
        },
    }


def _started(ours: Side) -> Mapping[str, list[float]]:
    """Load and prepare a new process; one sample of each part, those not known left out."""
    loaded, ready = ours.call("load"), ours.call("prepare")
    parts = {"import_s": loaded["import_s"], "load_s": loaded["load_s"]}
    parts["ready_s"] = ready["ready_s"]
    return {
        "warm_start_s": [sum(parts.values())],
        **{name: [value] for name, value in parts.items()},
        "weights_gb": [loaded["weights_gb"]],
    }


def _round(ours: Side, source: Source, positions: list[int]) -> dict[str, list[float]]:
    """All samples of a warm process."""
    samples = dict(_started(ours))
    stream = ours.call("stream", _FRAMES)
    samples["first_audio_ms"] = [stream["first_audio_ms"]]
    samples["x_realtime"] = [stream["x_realtime"]]
    if source.folder is not None:
        texts = everyday_scripts(_SCRIPTS)
        takes = ours.call("listen", [words_at_once(text, 0) for text in texts], None, True)
        heard = [figures_of_take(take).first_audible_ms for take in takes]
        samples["first_audible_ms"] = [value for value in heard if value is not None]
    names = ("frame_early_ms", "frame_late_ms")
    sides = {name: frames_at(ours, at) for name, at in zip(names, positions, strict=True)}
    samples |= alternate(sides, _FRAMES, _BLOCK)
    samples["decode_ms"] = ours.call("decode", _FRAMES + 1)[1:]
    memory = ours.call("memory")
    samples["peak_gb"] = _known(memory["anonymous_peak_gb"])
    samples["rest_gb"] = _known(memory["rest_gb"])
    for count in _ROWS:
        batch = ours.call("batch", count, _ROW_FRAMES)
        samples[f"rows_{count}_ms"] = [batch["step"]["p50_ms"]]
        if f"rows_{count}_peak_gb" in FIGURES:
            samples[f"rows_{count}_peak_gb"] = _known(batch["anonymous_peak_gb"])
            samples["join_ms"] = [batch["join"]["p50_ms"]]
            samples["leave_ms"] = [batch["leave"]["p50_ms"]]
    return samples


def _known(value: float | None) -> list[float]:
    return [] if value is None else [value]
