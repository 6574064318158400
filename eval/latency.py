"""How fast a model speaks, how soon it starts, and what it takes; beside upstream if wanted.

    python -m eval.latency --config dia2_1b
    python -m eval.latency --config dia2_1b --against ~/dia2 --json latency.json
    python -m eval.latency --config checkpoints/Dia2-1B --at 100,700,1400
    python -m eval.latency --config nano --out latency
    python -m eval.latency --config checkpoints/Dia2-1B --rows 1,2 --cadences llm_bursts --outside 0
    python -m eval.latency --codec --config mimi --against transformers
    python -m eval.latency --config dia2_1b --dtype int8 --suite int8.json

``--suite FILE`` is for regressions: it measures a fixed list of figures in several processes and
keeps every sample (`eval.latency_suite` says which), takes only ``--config``, ``--dtype`` and
``--rounds`` beside it, and prints a Markdown table. ``python -m eval.latency_compare A B`` compares
two such files. The rest of this text is about the other report.

``--config`` is a shape of ``configs/`` (random weights are made in memory, no tokenizer is
needed) or a checkpoint folder. Measure on an otherwise idle machine: one busy program beside the
measurement slows the two sides of a comparison unevenly, several times over. The load average at
the start and the share of the processors that other programs took are part of the report.

A model is started twice, each time in a new process: **cold**, with an empty folder for compiled
programs, then **warm**, with the folder that the first one filled. The second process goes on to
stream an utterance, to time frames at chosen positions (the state is put there; a frame's cost
depends on how many steps it attends over, not on their values), and to decode. Frames at chosen
positions compute both guidance rows; streams do what the checkpoint's settings say, which are the
command's. A frame's time includes the host's round trip.

With ``--against CHECKOUT`` a third process runs the generation loop of a nari-labs/dia2 checkout
unmodified on random weights of the same config: eager PyTorch on the CPU, fp32, as many threads as
cores. The two sides take turns of a few frames, and the first frame of every turn is dropped on
both. Each lives in a process of its own, so that neither's threads or allocator act on the other;
the one whose turn it is not waits in a read. transformers' Mimi is run in the same way.

Listening is measured of a checkpoint, whose speech means something, or if ``--cadences``,
``--chunks``, ``--rows`` or ``--outside`` ask for it. Scripts are those of the set `everyday`, from
its start. Text arrives by a cadence (`eval.latency_cadences`): ``at_once``, ``words_10ms`` (a word
every 10 ms), ``llm_bursts`` (an LLM's tokens in bursts), ``slow_typist`` (single keys), in real
time; drawn from a seed, the same every time. Definitions, as in the field's streaming benchmarks
(all of them in `eval.latency_listener.Figures`):

    first_byte, first_playable, first_audible  from the feed of the word that completes the
              look-ahead (the first to let a frame of speech be computed) to the first byte of
              audio, to the first whole chunk, and to the first chunk above -40 dBFS (RMS). Inside
              the process a chunk arrives whole, so the first two are one moment; in a pipe they
              need not be
    leading_silence  audio before the first audible chunk, apart: a listener sits through it, too
    first_text_to_audio  from the first piece of text to the first chunk
    x_realtime  audio after the first chunk over the time it took, waits for text left out
    interval, jitter  times between chunks, waits for text left out, and their standard deviation
    underruns, stall  how often a listener who starts with the first chunk runs dry, and for how
              long in all (the buffer that would have prevented it); stall_for_text is the part in
              which text was missing, not speed
    final_text  from the end of the text to the last chunk; final_heard until it was heard
    starts_before_text_ends  whether the first chunk arrived before the end of the text

With ``--outside N`` a stopwatch that knows nothing of the inside holds the report to account: this
program starts ``dia2-jax stream --raw`` as a client would, waits for "ready" on its terminal,
writes text into one pipe and times the samples in the other (`eval.latency_stopwatch`), in turns
with the same takes inside a process that has done nothing else, each first as often as second. They
should agree within 10 %; runs are added, up to four times N, until each difference is known to
within 5 points. What is listened to inside is delivered as a command does it: the session has
waited for its text, and a chunk counts when it was written into a pipe that another process reads.
The shortest command that compares them:

    python -m eval.latency --config nano --cadences none --chunks none --rows none --outside 9

The report (``--json``, or ``--out``, which adds the text, a page and a plot; every number has its
unit in its name, GB are 1e9 bytes; null is what the system does not tell):

    command, config, weights ("random" or "checkpoint"), dtype, versions, backend, kernels (in C),
    context_steps, sample_rate, samples_per_frame
    machine   cpu, cores, memory_gb, system, load_average_1min (before), others_cpu_share (of all
              cores, by other programs during the run), and the read bandwidth found by several
              reductions in the same run: numpy_max_gb_per_s, numpy_sum_gb_per_s,
              jax_matvec_gb_per_s, with kernels in C kernel_product_gb_per_s; best_gb_per_s
    cold, warm  import_s (process start to backend started), load_s, weights_gb (model and codec),
              anonymous_added_gb (peak while loading over before) and anonymous_over_weights;
              ready_s (from having the weights to the first frame and first chunk done) and its
              parts session_s, first_frame_s, first_chunk_s; of these, JAX's trace_s, lower_s and
              xla_s (compiling, or reading a compiled program); programs, cache_hits, cache_misses
    stream    first_audio_ms (feeding the text to the first chunk: delays and one chunk),
              first_audio_frames (frames computed until then), chunk_frames, x_realtime (audio
              seconds a second, codec included), programs_compiled (0 if ready was ready),
              growth_mb (highest anonymous memory, over that after the first tenth; --take 1450
              is a take of nearly two minutes)
    audible   (of a checkpoint) over 20 scripts, whose words are all there and given one by one:
              first_audible, leading_silence (spreads), silent, how many had no audible chunk
    cadences  (listening) by cadence, over --scripts scripts: the figures above (spreads of the
              takes; interval pools all chunks; x_realtime is the median; underruns is the sum),
              takes, silent, starts_before_text_ends (takes that did), each (every take's own
              figures), curve (times of the first take's text and chunks, for the plot)
    chunks    (listening) by frames in a chunk, text at once: the same figures
    rows      (listening) by batch rows that speak together: step (spread, a frame of all rows),
              decode (spread, a chunk of all rows), first_playable_ms, jitter_ms, underruns,
              stall_ms, x_realtime (each row's), x_realtime_all (all rows' together), compile_s,
              anonymous_peak_gb (of the process, while they spoke); leave and join (spreads of 20:
              a session leaves, and another joins in its place and has its text on the device),
              join_programs (compiled for these: 0)
    outside   cold_start_s and warm_start_s (process start to "ready", without and with compiled
              programs on disk), runs; first_playable_ms, first_audible_ms, last_chunk_ms,
              x_realtime: inside and outside (medians), ratios (outside over inside, each run),
              difference (median ratio - 1), low and high (its 95 % interval), agrees;
              largest_difference, agrees (all of them), known (two runs or more, narrow
              intervals), doubtful (not agreeing, but within the intervals);
              command_says_first_playable_ms (the command's own --json, to its write)
    step      by position: p25_ms p50_ms p75_ms p95_ms p99_ms min_ms max_ms count, x_realtime
              (without codec), weights_gb and cache_gb read by a frame, weights_gb_per_s,
              achieved_gb_per_s (both), share_of_bandwidth
    decode    the same spread, for a streamed decode, a frame (…_ms of each frame)
    memory    of the warm process once it has streamed one session, before any sweep: rss_gb,
              rss_peak_gb, anonymous_gb, anonymous_peak_gb, and what that is made of: weights_gb
              (model and codec), caches_gb (of one session, guided) and rest_gb
    upstream  (with --against) by position "ours" and "theirs" spreads and "ratio"; memory,
              versions, threads
    ratio     (with --against) geometric mean of the positions' ratios

With ``--codec``: take (audio_s, frames, codebooks), compile (first_…_s of each kind), encode and
decode (whole take: spread and x_realtime), stream_1 and stream_8 (decode of one and of eight frames
at a time: …_ms_per_frame and x_realtime), stream_8_over_whole (its speed over the whole decode's),
memory (stream_audio_s, stream_x_realtime and stream_growth_mb of a long stream; encode_added_mb and
decode_added_mb of whole runs; rss_gb, …); with ``--against transformers`` also transformers
(encode, decode, memory, versions), ratio_encode and ratio_decode (their median over ours), and
agreement (decode_snr_db, encode_equal_share: the weights are the same).
"""

from __future__ import annotations

import importlib
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from eval.needed import needed_from

with needed_from("eval"):
    from eval.command import EPILOG, Finite, OutputFile, OutputFolder, listed, size, write_json
    from eval.latency_cadences import CADENCES
    from eval.latency_compare import heading
    from eval.latency_compare import table as suite_table
    from eval.latency_machine import OtherWork, describe
    from eval.latency_measure import Sweeps, measure_codec, measure_model, say
    from eval.latency_models import Source
    from eval.latency_page import BUSY
    from eval.latency_process import MeasurementError, ending_what_was_started
    from eval.latency_report import table, write_folder
    from eval.latency_suite import ROUNDS, measure_suite
    from eval.latency_upstream import check_checkout, require
    from train.command import Program


def _listed(
    what: str, take: Callable[[str], Any]
) -> Callable[[click.Context, click.Parameter, str | None], list[Any] | None]:
    """As :func:`eval.command.listed`; ``none`` is no item."""
    some = listed(what, take)
    return lambda *arguments: [] if arguments[2] == "none" else some(*arguments)


def _cadence(name: str) -> str:
    CADENCES[name]
    return name


def _require_options_of_one_report(suite: Path | None) -> None:
    """A suite is the same whoever measures it: no option may change it."""
    context = click.get_current_context()
    given = {
        parameter.name: parameter.opts[0]
        for parameter in context.command.params
        if context.get_parameter_source(parameter.name or "") == ParameterSource.COMMANDLINE
    }
    if suite is None:
        if "rounds" in given:
            raise click.UsageError("--rounds is of --suite")
    elif extra := [text for name, text in given.items() if name not in _OF_SUITE]:
        raise click.UsageError(
            f"--suite measures a fixed list, without {', '.join(extra)}: it takes --config, "
            "--dtype and --rounds"
        )


_OF_SUITE = ("name", "dtype", "suite", "rounds", "debug")
_COUNT = click.IntRange(min=1)
_SIZES = _listed("whole numbers from 1 on separated by commas, for example 1,2,4,8; or none", size)
_CADENCES = _listed(f"of {', '.join(CADENCES)}, separated by commas; or none", _cadence)
_POSITIONS = _listed("steps separated by commas, for example 100,1400", int)


@click.command(
    cls=Program,
    epilog=EPILOG,
    help="Time a model, or a codec with --codec; see the module's docstring.",
)
@click.option("--config", "name", metavar="NAME_OR_DIR", help="Shape in configs/, or checkpoint.")
@click.option("--against", metavar="CHECKOUT", help="Upstream checkout; 'transformers' for codecs.")
@click.option("--frames", type=_COUNT, default=60, show_default=True, help="Frames a position.")
@click.option("--at", callback=_POSITIONS, metavar="STEPS", help="Positions, e.g. 100,1400.")
@click.option(
    "--take",
    type=_COUNT,
    metavar="FRAMES",
    show_default="--frames",
    help="Frames of the utterance that is streamed; 1450 are almost two minutes.",
)
@click.option("--chunk-frames", type=_COUNT, default=1, show_default=True, help="Frames a chunk.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "int8"]), default="float32")
@click.option("--against-frames", type=_COUNT, default=24, show_default=True, help="Either side.")
@click.option("--block", type=_COUNT, default=4, show_default=True, help="Frames a turn.")
@click.option("--bandwidth-gb", type=Finite(min=0.01), default=1.0, show_default=True)
@click.option(
    "--cadences",
    callback=_CADENCES,
    metavar="NAMES",
    show_default="all of a checkpoint, none of a shape",
    help=f"How text arrives: {', '.join(CADENCES)}, or none.",
)
@click.option(
    "--chunks",
    callback=_SIZES,
    metavar="SIZES",
    show_default="1,2,4,8 of a checkpoint, none of a shape",
    help="Chunk sizes to compare, in frames.",
)
@click.option(
    "--rows",
    callback=_SIZES,
    metavar="COUNTS",
    show_default="1,2,4,8 of a checkpoint, none of a shape",
    help="Batch rows to compare; each adds its caches to memory.",
)
@click.option(
    "--scripts",
    type=click.IntRange(min=1, max=150),
    default=3,
    show_default=True,
    help="Scripts a cadence and a chunk size.",
)
@click.option(
    "--outside",
    type=click.IntRange(min=0, max=150),
    metavar="RUNS",
    show_default="5 of a checkpoint, 0 of a shape",
    help="Runs of `dia2-jax stream` timed from outside, up to 4 times as many if they differ much; "
    "0 for none.",
)
@click.option("--codec", is_flag=True, help="Time the codec alone.")
@click.option("--seconds", type=Finite(min=0.7), default=10.0, help="Take of the codec.")
@click.option("--repeats", type=_COUNT, default=7, show_default=True, help="Runs of the codec.")
@click.option("--stream-seconds", type=Finite(min=1.0), default=120.0, show_default=True)
@click.option(
    "--suite",
    metavar="FILE",
    type=OutputFile(),
    help="Measure the fixed list for comparisons instead, and write all samples there.",
)
@click.option(
    "--rounds", type=_COUNT, default=ROUNDS, show_default=True, help="Processes of --suite."
)
@click.option(
    "--json",
    "json_path",
    metavar="FILE",
    type=OutputFile(stdout=True),
    help="Write the report as JSON; - for stdout.",
)
@click.option(
    "--out",
    "folder",
    metavar="DIR",
    type=OutputFolder(),
    help="Write report.json, report.txt, report.html and, of listening, latency.png there.",
)
@ending_what_was_started()
def main(
    name: str | None,
    against: str | None,
    frames: int,
    take: int | None,
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
    cadences: list[str] | None,
    chunks: list[int] | None,
    rows: list[int] | None,
    scripts: int,
    outside: int | None,
    json_path: Path | str | None,
    folder: Path | None,
    suite: Path | None,
    rounds: int,
) -> None:
    """Command line; everything it measures is in `eval.latency_measure`."""
    _require_options_of_one_report(suite)
    if name is None and not codec:
        raise click.UsageError("Missing option '--config'.")
    if folder is not None:
        with needed_from("eval"):  # what draws its page, before anything is measured
            importlib.import_module("jinja2")
            importlib.import_module("matplotlib")
    command = shlex.join(["python", "-m", "eval.latency", *sys.argv[1:]])
    # Before anything else is running.
    machine, others = describe(), OtherWork()
    if machine["load_average_1min"] > 0.5:
        say(f"the machine is busy (load average {machine['load_average_1min']:.2f})")
    source = Source.of("mimi" if name is None else name)
    if suite is not None:
        report = measure_suite(source, dtype=dtype, rounds=rounds)
    elif codec:
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
        report = measure_model(
            source,
            dtype=dtype,
            frames=frames,
            take=take,
            positions=at,
            chunk_frames=chunk_frames,
            against=against,
            against_frames=against_frames,
            block=block,
            bandwidth_gb=bandwidth_gb,
            sweeps=Sweeps.of(
                source,
                cadences=cadences,
                rows=rows,
                chunks=chunks,
                scripts=scripts,
                outside=outside,
            ),
        )
    machine["others_cpu_share"] = others.share()
    report = {
        "command": command,
        "config": source.name,
        "dtype": "float32" if codec else dtype,
        **report,
        "machine": {**machine, **report.get("machine", {})},
    }
    if suite is not None:
        if machine["others_cpu_share"] > BUSY:
            say("not an idle machine: measure again before you compare")
        write_json(suite, report)
        click.echo(f"{heading(report)}\n\n{suite_table(report)}")
        return
    # With JSON on stdout the table goes to stderr.
    click.echo(table(report), err=json_path == "-")
    if json_path is not None:
        write_json(json_path, report)
    if folder is not None:
        write_folder(report, folder)


if __name__ == "__main__":
    main(prog_name="python -m eval.latency")
