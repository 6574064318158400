"""The order of a latency measurement: which side does what when, and what becomes of it.

Sides are processes of their own (`eval.latency_process`); this module starts them, asks them in
turn and puts their answers into a report, whose keys are listed in `eval.latency`.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from eval import codec_speed
from eval.latency_cadences import CADENCES, at_once, words_at_once
from eval.latency_listener import Take, figures, summed_up
from eval.latency_models import Source, write_config
from eval.latency_process import Child, MeasurementError, Side
from eval.latency_statistics import Timed, alternate, ratio, summary
from eval.latency_stopwatch import MOST, agreement, time_command
from eval.scoring.prompts import read_sets

#: Starts a side: target class, its arguments, environment variables of its process.
Start = Callable[[str, Mapping[str, Any], Mapping[str, str | None]], Side]

#: Batch rows and chunk sizes that are measured unless others are asked for.
SIZES = (1, 2, 4, 8)

OURS = "eval.latency_ours:Ours"
_AUDIBLE_SCRIPTS = 20
_OUR_CODEC = "eval.codec_speed:OurCodec"
_UPSTREAM = "eval.latency_upstream:Upstream"
_TRANSFORMERS = "eval.latency_upstream:TransformersMimi"


def cache_environment(folder: str) -> dict[str, str | None]:
    """What makes a process keep compiled programs in ``folder``, whatever it inherited."""
    return {
        "DIA2_JAX_CACHE": folder,
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": None,
    }


@dataclass(frozen=True)
class Sweeps:
    """What is measured of listening besides the standard figures.

    Attributes:
      cadences: names in ``CADENCES``.
      rows: batch sizes.
      chunks: frames in a chunk.
      scripts: takes a cadence and a chunk size; each of another script.
      outside: runs of the outside stopwatch at least, beside one for a cold start; 0 for none.
    """

    cadences: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()
    chunks: tuple[int, ...] = ()
    scripts: int = 3
    outside: int = 0

    @classmethod
    def of(
        cls,
        source: Source,
        *,
        cadences: Sequence[str] | None,
        rows: Sequence[int] | None,
        chunks: Sequence[int] | None,
        scripts: int,
        outside: int | None,
    ) -> Sweeps:
        """What was asked for; where nothing was (None), everything for a checkpoint, whose speech
        means something, and nothing for a shape."""
        whole = source.folder is not None

        def choose(asked: Any, everything: Any, nothing: Any) -> Any:
            return asked if asked is not None else everything if whole else nothing

        return cls(
            tuple(choose(cadences, CADENCES, ())),
            tuple(choose(rows, SIZES, ())),
            tuple(choose(chunks, SIZES, ())),
            scripts,
            choose(outside, 5, 0),
        )


def say(text: str) -> None:
    """A line on standard error for whoever waits."""
    click.echo(f"… {text}", err=True)


def default_positions(context: int) -> list[int]:
    """Early and late in the context: 100 and 1,400 of 1,500 steps."""
    return sorted({min(100, context // 4), max(context - 100, context // 2)})


def frames_at(side: Side, position: int) -> Timed:
    """What times frames at a position. Positions are compared, so they are measured in turns: a
    shared machine is not as fast when the last one's turn comes as it was for the first one."""

    def run(count: int) -> list[float]:
        side.call("seek", position)
        times: list[float] = side.call("frames", count)
        return times

    return run


def chosen_positions(positions: Sequence[int] | None, context: int) -> list[int]:
    """Those asked for in order, else the default ones.

    Raises:
      MeasurementError: one that the model does not have.
    """
    chosen = sorted(set(positions or default_positions(context)))
    for position in chosen:
        if not 0 <= position < context:
            raise MeasurementError(
                f"--at {position}: outside this model's context of {context} steps"
            )
    return chosen


def measure_model(
    source: Source,
    *,
    dtype: str,
    frames: int,
    take: int | None = None,
    positions: list[int] | None,
    chunk_frames: int,
    against: str | None,
    against_frames: int,
    block: int,
    bandwidth_gb: float,
    sweeps: Sweeps | None = None,
    start: Start = Child,
) -> dict[str, Any]:
    """All figures of a model; keys are listed in the module's docstring."""
    arguments = {
        "source": source.name, "dtype": dtype, "chunk_frames": chunk_frames, "cache": True,
    }  # fmt: skip
    sweeps = sweeps or Sweeps()
    if sweeps.outside and source.folder is None:
        raise MeasurementError(
            f"--outside: the command speaks checkpoints, and {source.name} is a shape; name a "
            "folder with --config"
        )
    context = source.dia2_config().runtime.max_context_steps
    positions = chosen_positions(positions, context)
    report: dict[str, Any] = {"weights": "checkpoint" if source.folder else "random"}
    with tempfile.TemporaryDirectory() as cache:
        environment = cache_environment(cache)
        ours: Side | None = None
        try:
            for kind in ("cold", "warm"):
                if ours is not None:
                    ours.close()
                say(f"{kind} start")
                ours = start(OURS, arguments, environment)
                report[kind] = {**ours.call("load"), **ours.call("prepare")}
            assert ours is not None
            report |= ours.call("about")
            say("streaming an utterance")
            report["stream"] = ours.call("stream", take or frames)
            # Of one session: what follows adds rows, chunk sizes and their programs.
            report["memory"] = ours.call("memory")
            steps = ", ".join(map(str, positions))
            say(f"{frames} frames at each of steps {steps}, {block} a turn")
            sides = {str(position): frames_at(ours, position) for position in positions}
            timed = alternate(sides, frames, block)
            report["step"] = {position: summary(times) for position, times in timed.items()}
            report["decode"] = summary(ours.call("decode", frames + 1)[1:])
            if against is not None:
                report |= _against(ours, source, against, positions, against_frames, block, start)
            if source.folder is not None:
                report["audible"] = _audible(ours)
            report |= _listening(ours, sweeps, frames)
            if sweeps.outside:
                # A process as young as the command's: one that had a batch of rows has its buffers
                # elsewhere, and its frames can take longer from then on.
                inside = start(OURS, arguments, environment)
                try:
                    inside.call("load")
                    inside.call("prepare")
                    report["outside"] = _outside(
                        inside, source, sweeps, report, dtype, chunk_frames, environment
                    )
                finally:
                    inside.close()
            say("reading memory")
            report["machine"] = ours.call("bandwidth", bandwidth_gb)
            for position in positions:
                step = report["step"][str(position)]
                step |= _rates(step, ours.call("costs", position), report["machine"])
        finally:
            if ours is not None:
                ours.close()
    return report


def everyday_scripts(count: int) -> list[str]:
    """The first scripts of the everyday set."""
    (found,) = read_sets(["everyday"])
    return [prompt.script for prompt in found.prompts[:count]]


def _audible(ours: Side) -> dict[str, Any]:
    """How soon a checkpoint is heard, over the first scripts of the everyday set."""
    texts = everyday_scripts(_AUDIBLE_SCRIPTS)
    say(f"the first audible chunk of {len(texts)} sentences")
    takes = ours.call("listen", [words_at_once(text, 0) for text in texts], None, True, True)
    found = summed_up(takes)
    return {name: found[name] for name in ("first_audible", "leading_silence", "silent")}


def _listening(ours: Side, sweeps: Sweeps, frames: int) -> dict[str, Any]:
    """What a listener gets: by cadence of the text, by chunk size, by number of rows."""
    report: dict[str, Any] = {}
    texts = everyday_scripts(sweeps.scripts)
    for name in sweeps.cadences:
        schedules = [CADENCES[name](text, seed) for seed, text in enumerate(texts)]
        say(f"text by {name}, {sum(each.end for each in schedules):.0f} s of it")
        takes = ours.call("listen", schedules, None, False, True)
        report.setdefault("cadences", {})[name] = {
            **summed_up(takes),
            "each": [dataclasses.asdict(figures(take)) for take in takes],
            "curve": _curve(takes[0]),
        }
    for size in sweeps.chunks:
        say(f"chunks of {size} frames")
        takes = ours.call("listen", [at_once(text, 0) for text in texts], size, False, True)
        report.setdefault("chunks", {})[str(size)] = summed_up(takes)
    for count in sweeps.rows:
        say(f"{count} rows")
        report.setdefault("rows", {})[str(count)] = ours.call("batch", count, frames)
    return report


def _curve(take: Take) -> dict[str, Any]:
    """What a plot of a take needs, in seconds."""
    return {
        "fed_s": list(take.fed),
        "ended_s": take.ended,
        "origin_s": take.origin,
        "chunks_s": [[chunk.at, chunk.seconds] for chunk in take.chunks],
        "levels_dbfs": [chunk.level for chunk in take.chunks],
    }


def _outside(
    ours: Side,
    source: Source,
    sweeps: Sweeps,
    report: Mapping[str, Any],
    dtype: str,
    chunk_frames: int,
    environment: Mapping[str, str | None],
) -> dict[str, Any]:
    """The same takes by the driver inside and by a client of the command, in turns."""
    schedules = [at_once(text, 0) for text in everyday_scripts(MOST * sweeps.outside)]
    warm = report["warm"]
    inside: list[Take] = []
    outside: list[Take] = []
    starts: list[float] = []
    said: list[float] = []
    say(f"an outside stopwatch, {sweeps.outside} to {len(schedules)} runs and a cold one")
    with tempfile.TemporaryDirectory() as empty:
        for index, schedule in enumerate([schedules[0], *schedules]):
            cold = index == 0
            # More runs are wanted because the difference is not known, never because it is large.
            if index > sweeps.outside and agreement(inside, outside)["known"]:
                break
            # Each goes first as often as second.
            own: list[Take] = []
            if index % 2:
                own = ours.call("listen", [schedule], None, False, True)
            run = time_command(
                source.name,
                schedule,
                chunk_frames=chunk_frames,
                sample_rate=report["sample_rate"],
                samples_per_frame=report["samples_per_frame"],
                # Long enough for its session to be made and to wait for text.
                rest_s=0.5 + 2 * (warm["session_s"] + warm["first_frame_s"]),
                dtype=dtype,
                environment=cache_environment(empty) if cold else environment,
            )
            if cold:
                cold_start = run.start_s
                continue
            (take,) = own or ours.call("listen", [schedule], None, False, True)
            inside.append(take)
            outside.append(dataclasses.replace(run.take, began=take.began))
            starts.append(run.start_s)
            if (seconds := run.report["first_audio_after_look_ahead"]) is not None:
                said.append(seconds * 1e3)
    found = agreement(inside, outside)
    return {
        "runs": len(inside),
        "cold_start_s": cold_start,
        "warm_start_s": statistics.median(starts),
        **found,
        "command_says_first_playable_ms": statistics.median(said) if said else None,
    }


def _rates(
    step: Mapping[str, float], costs: Mapping[str, float], machine: Mapping[str, float]
) -> dict[str, float]:
    """Speed and bandwidth of a position from its median time and what a frame reads."""
    seconds = step["p50_ms"] / 1e3
    achieved = (costs["weights_gb"] + costs["cache_gb"]) / seconds
    return {
        "x_realtime": costs["frame_ms_of_audio"] / step["p50_ms"],
        "weights_gb": costs["weights_gb"],
        "cache_gb": costs["cache_gb"],
        "weights_gb_per_s": costs["weights_gb"] / seconds,
        "achieved_gb_per_s": achieved,
        "share_of_bandwidth": achieved / machine["best_gb_per_s"],
    }


def _against(
    ours: Side,
    source: Source,
    checkout: str,
    positions: list[int],
    count: int,
    block: int,
    start: Start,
) -> dict[str, Any]:
    """Upstream's frames and ours in turns."""
    say("starting upstream")
    with tempfile.TemporaryDirectory() as folder:
        config = write_config(source.dia2_config(), Path(folder) / "config.json")
        theirs = start(_UPSTREAM, {"checkout": checkout, "config": str(config)}, {})
    try:
        upstream: dict[str, Any] = {"step": {}}
        steps = ", ".join(map(str, positions))
        say(f"{count} frames of either side at each of steps {steps}, {block} a turn")
        both = {"ours": ours, "theirs": theirs}
        sides = {
            f"{name} {position}": frames_at(side, position)
            for position in positions
            for name, side in both.items()
        }
        timed = alternate(sides, count, block)
        for position in positions:
            times = {name: timed[f"{name} {position}"] for name in both}
            upstream["step"][str(position)] = {
                **{name: summary(values) for name, values in times.items()},
                "ratio": ratio(times["ours"], times["theirs"]),
            }
        upstream |= {"memory": theirs.call("memory"), **theirs.call("about")}
    finally:
        theirs.close()
    # Not of all frames together: their median lies anywhere between those of early and late ones.
    ratios = [step["ratio"] for step in upstream["step"].values()]
    return {"upstream": upstream, "ratio": statistics.geometric_mean(ratios)}


def measure_codec(
    source: Source,
    *,
    against: bool,
    seconds: float,
    repeats: int,
    stream_seconds: float,
    start: Start = Child,
) -> dict[str, Any]:
    """All figures of a codec; keys are listed in the module's docstring."""
    with tempfile.TemporaryDirectory() as cache:
        environment = cache_environment(cache)
        ours = start(_OUR_CODEC, {"source": source.name, "cache": True}, environment)
        try:
            report = codec_speed.measure(
                ours,
                (lambda folder: start(_TRANSFORMERS, {"folder": folder}, {})) if against else None,
                seconds=seconds,
                repeats=repeats,
                stream_seconds=stream_seconds,
                progress=say,
            )
        finally:
            ours.close()
    return {"weights": "checkpoint" if source.folder else "random", **report}
