"""How fast a model speaks, how soon it starts, and what it takes; beside upstream if wanted.

    python -m eval.latency --config dia2_1b
    python -m eval.latency --config dia2_1b --against ~/dia2 --json latency.json
    python -m eval.latency --config checkpoints/Dia2-1B --at 100,700,1400
    python -m eval.latency --config nano
    python -m eval.latency --codec --config mimi --against transformers

``--config`` is a shape of ``configs/`` (random weights are made in memory, no tokenizer is
needed) or a checkpoint folder. Measure on an otherwise idle machine: one busy program beside the
measurement slows the two sides of a comparison unevenly, several times over. The load average at
the start and the share of the processors that other programs took are part of the report.

A model is started twice, each time in a new process: **cold**, with an empty folder for compiled
programs, then **warm**, with the folder that the first one filled. The second process goes on to
stream an utterance, to time frames at chosen positions (the state is put there; a frame's cost
depends on how many steps it attends over, not on their values), and to decode. Both guidance rows
are always computed. A frame's time includes the host's round trip.

With ``--against CHECKOUT`` a third process runs the generation loop of a nari-labs/dia2 checkout
unmodified on random weights of the same config: eager PyTorch on the CPU, fp32, as many threads as
cores. The two sides take turns of a few frames, and the first frame of every turn is dropped on
both. Each lives in a process of its own, so that neither's threads or allocator act on the other;
the one whose turn it is not waits in a read. transformers' Mimi is run in the same way.

The report (``--json``; every number has its unit in its name, GB are 1e9 bytes; null is what the
system does not tell):

    command, config, weights ("random" or "checkpoint"), dtype, versions, backend, context_steps
    machine   cpu, cores, memory_gb, system, load_average_1min (before), others_cpu_share (of all
              cores, by other programs during the run), and the read bandwidth found by several
              reductions in the same run: numpy_max_gb_per_s, numpy_sum_gb_per_s,
              jax_matvec_gb_per_s, best_gb_per_s
    cold, warm  import_s (process start to backend started), load_s, weights_gb (model and codec),
              anonymous_added_gb (peak while loading over before) and anonymous_over_weights;
              ready_s (from having the weights to the first frame and first chunk done) and its
              parts session_s, first_frame_s, first_chunk_s; of these, JAX's trace_s, lower_s and
              xla_s (compiling, or reading a compiled program); programs, cache_hits, cache_misses
    stream    first_audio_ms (feeding the text to the first chunk: delays and one chunk),
              first_audio_frames (frames computed until then), chunk_frames, x_realtime (audio
              seconds a second, codec included), programs_compiled (0 if ready was ready)
    audible   (of a checkpoint, whose speech means something) over 20 sentences of the set
              `everyday`, fed word by word without waiting, in the warm process: first_audible
              (spread) from the feed of the word that completes the look-ahead, which is the first
              to let a frame be computed, to the first chunk above -40 dBFS (RMS);
              leading_silence (spread) of audio before that chunk; silent, how many had none
    step      by position: p25_ms p50_ms p75_ms p95_ms p99_ms min_ms max_ms count, x_realtime
              (without codec), weights_gb and cache_gb read by a frame, weights_gb_per_s,
              achieved_gb_per_s (both), share_of_bandwidth
    decode    the same spread, for a streamed decode, a frame (…_ms of each frame)
    memory    of the warm process: rss_gb, rss_peak_gb, anonymous_gb, anonymous_peak_gb
    upstream  (with --against) by position "ours" and "theirs" spreads and "ratio"; memory,
              versions, threads
    ratio     (with --against) upstream's median frame time over ours, over all positions' frames

With ``--codec``: take (audio_s, frames, codebooks), compile (first_…_s of each kind), encode and
decode (whole take: spread and x_realtime), stream_1 and stream_8 (decode of one and of eight frames
at a time: …_ms_per_frame and x_realtime), stream_8_over_whole (its speed over the whole decode's),
memory (stream_audio_s, stream_x_realtime and stream_growth_mb of a long stream; encode_added_mb and
decode_added_mb of whole runs; rss_gb, …); with ``--against transformers`` also transformers
(encode, decode, memory, versions), ratio_encode and ratio_decode (their median over ours), and
agreement (decode_snr_db, encode_equal_share: the weights are the same).
"""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from dia2_jax.errors import Dia2Error
from eval import codec_speed
from eval.latency_machine import OtherWork, describe
from eval.latency_models import Source, write_config
from eval.latency_process import Child, MeasurementError, Side
from eval.latency_report import table
from eval.latency_statistics import alternate, ratio, summary
from eval.latency_upstream import check_checkout, require
from eval.scoring.prompts import read_sets

#: Starts a side: target class, its arguments, environment variables of its process.
Start = Callable[[str, Mapping[str, Any], Mapping[str, str | None]], Side]

_OURS = "eval.latency_ours:Ours"
_AUDIBLE_SCRIPTS = 20
_OUR_CODEC = "eval.codec_speed:OurCodec"
_UPSTREAM = "eval.latency_upstream:Upstream"
_TRANSFORMERS = "eval.latency_upstream:TransformersMimi"


def _cache_environment(folder: str) -> dict[str, str | None]:
    """What makes a process keep compiled programs in ``folder``, whatever it inherited."""
    return {
        "DIA2_JAX_CACHE": folder,
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": None,
    }


def _say(text: str) -> None:
    click.echo(f"… {text}", err=True)


def default_positions(context: int) -> list[int]:
    """Early and late in the context: 100 and 1,400 of 1,500 steps."""
    return sorted({min(100, context // 4), max(context - 100, context // 2)})


def measure_model(
    source: Source,
    *,
    dtype: str,
    frames: int,
    positions: list[int] | None,
    chunk_frames: int,
    against: str | None,
    against_frames: int,
    block: int,
    bandwidth_gb: float,
    start: Start = Child,
) -> dict[str, Any]:
    """All figures of a model; keys are listed in the module's docstring."""
    arguments = {
        "source": source.name, "dtype": dtype, "chunk_frames": chunk_frames, "cache": True,
    }  # fmt: skip
    context = source.dia2_config().runtime.max_context_steps
    positions = positions or default_positions(context)
    for position in positions:
        if not 0 <= position < context:
            raise MeasurementError(
                f"--at {position}: outside this model's context of {context} steps"
            )
    report: dict[str, Any] = {"weights": "checkpoint" if source.folder else "random"}
    with tempfile.TemporaryDirectory() as cache:
        environment = _cache_environment(cache)
        ours: Side | None = None
        try:
            for kind in ("cold", "warm"):
                if ours is not None:
                    ours.close()
                _say(f"{kind} start")
                ours = start(_OURS, arguments, environment)
                report[kind] = {**ours.call("load"), **ours.call("prepare")}
            assert ours is not None
            report |= ours.call("about")
            _say("streaming an utterance")
            report["stream"] = ours.call("stream", frames)
            if source.folder is not None:
                report["audible"] = _audible(ours)
            report["step"] = {}
            for position in positions:
                _say(f"{frames} frames at step {position}")
                ours.call("seek", position)
                times = ours.call("frames", frames + 1)[1:]
                report["step"][str(position)] = summary(times)
            report["decode"] = summary(ours.call("decode", frames + 1)[1:])
            report["memory"] = ours.call("memory")
            if against is not None:
                report |= _against(ours, source, against, positions, against_frames, block, start)
            _say("reading memory")
            report["machine"] = ours.call("bandwidth", bandwidth_gb)
            for position in positions:
                step = report["step"][str(position)]
                step |= _rates(step, ours.call("costs", position), report["machine"])
        finally:
            if ours is not None:
                ours.close()
    return report


def _audible(ours: Side) -> dict[str, Any]:
    """How soon a checkpoint is heard, over the first scripts of the everyday set."""
    (scripts,) = read_sets(["everyday"])
    texts = [prompt.script for prompt in scripts.prompts[:_AUDIBLE_SCRIPTS]]
    _say(f"the first audible chunk of {len(texts)} sentences")
    takes = ours.call("first_audible", texts)
    found: dict[str, Any] = {"silent": sum(t["first_audible_ms"] is None for t in takes)}
    for name in ("first_audible_ms", "leading_silence_ms"):
        values = [take[name] for take in takes if take[name] is not None]
        found[name.removesuffix("_ms")] = summary(values) if values else None
    return found


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
    _say("starting upstream")
    with tempfile.TemporaryDirectory() as folder:
        config = write_config(source.dia2_config(), Path(folder) / "config.json")
        theirs = start(_UPSTREAM, {"checkout": checkout, "config": str(config)}, {})
    try:
        upstream: dict[str, Any] = {"step": {}}
        everything: dict[str, list[float]] = {"ours": [], "theirs": []}
        for position in positions:
            _say(f"{count} frames of either side at step {position}, {block} a turn")
            for side in (ours, theirs):
                side.call("seek", position)
            times = alternate(
                {
                    "ours": lambda n: ours.call("frames", n),
                    "theirs": lambda n: theirs.call("frames", n),
                },
                count,
                block,
            )
            upstream["step"][str(position)] = {
                **{name: summary(values) for name, values in times.items()},
                "ratio": ratio(times["ours"], times["theirs"]),
            }
            for name, values in times.items():
                everything[name] += values
        upstream |= {"memory": theirs.call("memory"), **theirs.call("about")}
    finally:
        theirs.close()
    return {"upstream": upstream, "ratio": ratio(everything["ours"], everything["theirs"])}


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
        environment = _cache_environment(cache)
        ours = start(_OUR_CODEC, {"source": source.name, "cache": True}, environment)
        try:
            report = codec_speed.measure(
                ours,
                (lambda folder: start(_TRANSFORMERS, {"folder": folder}, {})) if against else None,
                seconds=seconds,
                repeats=repeats,
                stream_seconds=stream_seconds,
                progress=_say,
            )
        finally:
            ours.close()
    return {"weights": "checkpoint" if source.folder else "random", **report}


def _positions(_: click.Context, __: click.Parameter, value: str | None) -> list[int] | None:
    if value is None:
        return None
    try:
        return sorted({int(part) for part in value.split(",")})
    except ValueError:
        raise click.BadParameter("steps separated by commas, for example 100,1400") from None


_COUNT = click.IntRange(min=1)


@click.command(help="Time a model, or a codec with --codec; see the module's docstring.")
@click.option("--config", "name", metavar="NAME_OR_DIR", help="Shape in configs/, or checkpoint.")
@click.option("--against", metavar="CHECKOUT", help="Upstream checkout; 'transformers' for codecs.")
@click.option("--frames", type=_COUNT, default=60, show_default=True, help="Frames a position.")
@click.option("--at", callback=_positions, metavar="STEPS", help="Positions, e.g. 100,1400.")
@click.option("--chunk-frames", type=_COUNT, default=1, show_default=True, help="Frames a chunk.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32")
@click.option("--against-frames", type=_COUNT, default=24, show_default=True, help="Either side.")
@click.option("--block", type=_COUNT, default=4, show_default=True, help="Frames a turn.")
@click.option("--bandwidth-gb", type=click.FloatRange(min=0.01), default=1.0, show_default=True)
@click.option("--codec", is_flag=True, help="Time the codec alone.")
@click.option("--seconds", type=click.FloatRange(min=0.7), default=10.0, help="Take of the codec.")
@click.option("--repeats", type=_COUNT, default=7, show_default=True, help="Runs of the codec.")
@click.option("--stream-seconds", type=click.FloatRange(min=1.0), default=120.0, show_default=True)
@click.option("--json", "json_path", metavar="FILE", help="Write the report as JSON; - for stdout.")
def main(
    name: str | None,
    against: str | None,
    frames: int,
    at: list[int] | None,
    chunk_frames: int,
    dtype: str,
    against_frames: int,
    block: int,
    bandwidth_gb: float,
    codec: bool,
    seconds: float,
    repeats: int,
    stream_seconds: float,
    json_path: str | None,
) -> None:
    """Command line; everything it measures is in ``measure_model`` and ``measure_codec``."""
    if name is None and not codec:
        raise click.UsageError("Missing option '--config'.")
    command = shlex.join(["python", "-m", "eval.latency", *sys.argv[1:]])
    # Before anything else is running.
    machine, others = describe(), OtherWork()
    if machine["load_average_1min"] > 0.5:
        _say(f"the machine is busy (load average {machine['load_average_1min']:.2f})")
    try:
        source = Source.of(name or "mimi")
        if codec:
            if against is not None:
                if against != "transformers":
                    raise MeasurementError(
                        f"--against {against}: with --codec the other side is 'transformers'"
                    )
                require("torch", "transformers")
            report = measure_codec(
                source,
                against=against is not None,
                seconds=seconds,
                repeats=repeats,
                stream_seconds=stream_seconds,
            )
        else:
            if against is not None:
                check_checkout(against)
                require("torch")
            report = measure_model(
                source,
                dtype=dtype,
                frames=frames,
                positions=at,
                chunk_frames=chunk_frames,
                against=against,
                against_frames=against_frames,
                block=block,
                bandwidth_gb=bandwidth_gb,
            )
    except (Dia2Error, MeasurementError) as error:
        raise click.ClickException(str(error)) from error
    machine["others_cpu_share"] = others.share()
    report = {
        "command": command,
        "config": source.name,
        "dtype": "float32" if codec else dtype,
        **report,
        "machine": {**machine, **report.get("machine", {})},
    }
    # With JSON on stdout the table goes to stderr.
    click.echo(table(report), err=json_path == "-")
    if json_path is not None:
        text = json.dumps(report, indent=2)
        if json_path == "-":
            click.echo(text)
        else:
            Path(json_path).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
