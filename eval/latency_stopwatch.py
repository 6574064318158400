"""An outside stopwatch: a client that starts ``dia2-jax stream`` and times the PCM in its pipe.

It knows of the command what any program would: text goes in at one pipe, samples come out of
another, and a terminal says when it is ready. Its record is a `eval.latency_listener.Take`, so the
figures inside and outside are the same arithmetic on the times of two clocks.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.latency_cadences import Schedule
from eval.latency_listener import Chunk, Take, figures, level_dbfs
from eval.latency_process import MeasurementError

_BYTES_PER_SAMPLE = 2
_READ_BYTES = 65_536
#: How far inside and outside may be apart, as a share.
TOLERANCE = 0.10
#: How well a difference must be known: runs are added while half its interval is wider.
PRECISION = 0.05
#: At most so many times the runs that were asked for.
MOST = 4
#: What both sides measure.
COMPARED = ("first_playable_ms", "first_audible_ms", "last_chunk_ms", "x_realtime")
_RESAMPLES = 2000


@dataclass(frozen=True)
class Outside:
    """What the client saw of one run of the command.

    Attributes:
      take: text and audio at the client's end of the pipes; ``began`` is None, for a client
        cannot see it.
      start_s: from starting the process to the word "ready" on its terminal.
      pcm: ``[W]`` float32 samples within +-1, all that came.
      report: what the command's own ``--json`` says.
    """

    take: Take
    start_s: float
    pcm: np.ndarray
    report: dict[str, Any]


def command_of(
    model: str, *, dtype: str, seed: int, chunk_frames: int, json_path: str
) -> list[str]:
    """The command that is timed: raw samples on standard output."""
    return [
        sys.executable, "-m", "dia2_jax", "stream", "--model", model, "--dtype", dtype,
        "--seed", str(seed), "--chunk-frames", str(chunk_frames), "--raw", "--json", json_path,
    ]  # fmt: skip


def time_command(
    model: str,
    schedule: Schedule,
    *,
    chunk_frames: int,
    sample_rate: int,
    samples_per_frame: int,
    rest_s: float,
    dtype: str = "float32",
    seed: int = 0,
    environment: Mapping[str, str | None] | None = None,
) -> Outside:
    """Run the command once, fed by a schedule, and time what comes out.

    Args:
      model: checkpoint folder, or ``nano``.
      schedule: of the text.
      chunk_frames, dtype, seed: options of the command.
      sample_rate, samples_per_frame: of its audio, to tell chunks apart in the pipe.
      rest_s: seconds between "ready" and the first text, in which the command gets to the point
        where it waits for text.
      environment: variables of the process (None unsets one).

    Raises:
      MeasurementError: the command failed; with what it said.
    """
    variables = dict(os.environ)
    for name, value in (environment or {}).items():
        variables.pop(name, None)
        if value is not None:
            variables[name] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        arguments = command_of(
            model, dtype=dtype, seed=seed, chunk_frames=chunk_frames, json_path=str(path)
        )
        # Notes go to a terminal only, and "ready" is one: its standard error is one.
        terminal, theirs = os.openpty()
        notes = _Notes(terminal)
        began = time.perf_counter()
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=theirs,
            env=variables,
        )
        # From here on it is not left behind, whatever happens, signals among it.
        try:
            os.close(theirs)
            ready = notes.ready()
            if ready is None:
                raise MeasurementError(f"dia2-jax stream ended at once: {notes.text()}")
            time.sleep(rest_s)
            fed, ended, reads = _talk(process, schedule)
            code = process.wait()
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
            notes.close()
        if code != 0:
            raise MeasurementError(f"dia2-jax stream ended with code {code}: {notes.text()}")
        report = json.loads(path.read_text(encoding="utf-8"))
    pcm, chunks = _chunks(reads, chunk_frames * samples_per_frame, sample_rate)
    first_byte = reads[0][0] if reads else None
    take = Take(fed, ended, None, chunks, first_byte=first_byte)
    return Outside(take, ready - began, pcm, report)


def _talk(
    process: subprocess.Popen[bytes], schedule: Schedule
) -> tuple[tuple[float, ...], float, list[tuple[float, bytes]]]:
    """Write by the schedule while reading all that comes.

    Returns:
      When each piece was written, when the end was, and (time, bytes) of each read; seconds since
      the schedule's zero.
    """
    assert process.stdin is not None and process.stdout is not None
    stdin, output = process.stdin, process.stdout.fileno()
    fed: list[float] = []
    ended: list[float] = []
    start = time.perf_counter()

    def wait(due: float) -> float:
        time.sleep(max(0.0, due - (time.perf_counter() - start)))
        return time.perf_counter() - start

    def write() -> None:
        # A command that failed reads no more; what it said is reported by the caller. The caller
        # closes the pipe itself when a signal ends the measurement.
        with contextlib.suppress(BrokenPipeError, ValueError):
            for due, text in schedule.pieces:
                fed.append(wait(due))
                stdin.write(text.encode())
                stdin.flush()
            ended.append(wait(schedule.end))
            stdin.close()

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    reads = []
    while content := os.read(output, _READ_BYTES):
        reads.append((time.perf_counter() - start, content))
    writer.join()
    return tuple(fed), ended[0] if ended else time.perf_counter() - start, reads


def _chunks(
    reads: Sequence[tuple[float, bytes]], samples: int, sample_rate: int
) -> tuple[np.ndarray, tuple[Chunk, ...]]:
    """All samples, and the chunks of ``samples`` each; one is there when its last byte is."""
    data = b"".join(content for _, content in reads)
    data = data[: len(data) // _BYTES_PER_SAMPLE * _BYTES_PER_SAMPLE]
    pcm = np.frombuffer(data, "<i2").astype(np.float32) / 32768
    there = np.cumsum([len(content) for _, content in reads])
    chunks = []
    for start in range(0, len(pcm), samples):
        piece = pcm[start : start + samples]
        read = int(np.searchsorted(there, (start + len(piece)) * _BYTES_PER_SAMPLE))
        chunks.append(Chunk(reads[read][0], len(piece) / sample_rate, level_dbfs(piece)))
    return pcm, tuple(chunks)


class _Notes:
    """The other end of a command's terminal, read by a thread so that it never fills."""

    def __init__(self, terminal: int) -> None:
        self._terminal = terminal
        self._content = b""
        self._ready_at: float | None = None
        self._known = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        # Linux says EIO where other systems say that the file ended.
        with contextlib.suppress(OSError):
            while content := os.read(self._terminal, _READ_BYTES):
                self._content += content
                if self._ready_at is None and b"ready" in self._content.splitlines():
                    self._ready_at = time.perf_counter()
                    self._known.set()
        self._known.set()

    def ready(self) -> float | None:
        """When the command said that it is ready; None if it ended before. Waits for either."""
        self._known.wait()
        return self._ready_at

    def text(self) -> str:
        """The last lines it wrote."""
        lines = self._content.decode(errors="replace").splitlines()
        return " / ".join([line.strip() for line in lines if line.strip()][-3:]) or "no message"

    def close(self) -> None:
        """End reading, after the command ended."""
        self._thread.join()
        os.close(self._terminal)


def compared(take: Take) -> dict[str, float | None]:
    """The figures that are held against each other (``COMPARED``) of a take.

    ``last_chunk_ms`` counts from the feed of the word that completes the look-ahead to the last
    chunk: how long the whole speech took.
    """
    found = figures(take)
    last, origin = take.chunks[-1].at if take.chunks else None, take.origin
    return {
        "first_playable_ms": found.first_playable_ms,
        "first_audible_ms": found.first_audible_ms,
        "last_chunk_ms": None if last is None or origin is None else (last - origin) * 1e3,
        "x_realtime": found.x_realtime,
    }


def agreement(inside: Sequence[Take], outside: Sequence[Take]) -> dict[str, Any]:
    """How the report's figures compare with the stopwatch's, run for run.

    Args:
      inside: takes of the driver in the process.
      outside: takes of the client for the same scripts, seeds and schedules.

    Returns:
      For each of ``COMPARED`` inside and outside (medians), ratios (outside over inside, each
      run), difference (the median ratio - 1), low and high (its 95 % interval, a bootstrap over
      runs) and agrees (within ``TOLERANCE``), or None if no run has the figure; and
      ``largest_difference``, ``agrees`` (all of them), ``known`` (two runs at least, and half
      of every interval at most ``PRECISION``) and ``doubtful`` (not agreeing, but every interval
      reaches into ``TOLERANCE``).
    """
    found: dict[str, Any] = {}
    pairs = [(compared(one), compared(other)) for one, other in zip(inside, outside, strict=True)]
    for name in COMPARED:
        values = [(a, b) for one, other in pairs if (a := one[name]) and (b := other[name])]
        if not values:
            found[name] = None
            continue
        ratios = np.array([b / a for a, b in values])
        drawn = np.random.default_rng(0).integers(0, len(ratios), (_RESAMPLES, len(ratios)))
        low, high = np.quantile(np.median(ratios[drawn], axis=1), [0.025, 0.975]) - 1
        difference = float(np.median(ratios)) - 1
        found[name] = {
            "inside": float(np.median([a for a, _ in values])),
            "outside": float(np.median([b for _, b in values])),
            "ratios": ratios.tolist(),
            "difference": difference,
            "low": float(low),
            "high": float(high),
            "agrees": abs(difference) <= TOLERANCE,
        }
    known = [found[name] for name in COMPARED if found[name]]
    agrees = bool(known) and all(one["agrees"] for one in known)
    return {
        **found,
        "largest_difference": max((abs(one["difference"]) for one in known), default=None),
        "agrees": agrees,
        "known": bool(known)
        and len(pairs) > 1
        and all((one["high"] - one["low"]) / 2 <= PRECISION for one in known),
        "doubtful": bool(known)
        and not agrees
        and all(one["low"] <= TOLERANCE and one["high"] >= -TOLERANCE for one in known),
    }


def verdict(found: Mapping[str, Any]) -> str:
    """What an :func:`agreement` comes to, in words."""
    if found["agrees"]:
        doubt = "" if found["known"] else f", though not known to within {PRECISION:.0%}"
        return f"agrees within {TOLERANCE:.0%}{doubt}"
    if found["doubtful"]:
        return (
            f"NOT KNOWN to agree within {TOLERANCE:.0%}: its runs differ too much among "
            "themselves; measure on a quieter machine, or ask for more"
        )
    return f"DOES NOT AGREE within {TOLERANCE:.0%}"
