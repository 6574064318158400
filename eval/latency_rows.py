"""Several rows at a time: B streams that share every frame step and every decode.

A session has one row. What a server could make of a batch is measured here on the parts that
sessions are made of: one ``Rows`` of B rows, and one streaming decode of their chunks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dia2_jax.compilation_cache import CompileWatch
from dia2_jax.generation.rows import Rows
from dia2_jax.generation.settings import GenerationConfig
from dia2_jax.mimi.runtime import Codec
from eval.latency_listener import Chunk, Take, figures, level_dbfs
from eval.latency_process import MeasurementError
from eval.latency_statistics import summary


@dataclass(frozen=True)
class BatchTake:
    """A batch that spoke.

    Attributes:
      steps_ms: of each frame step of all rows, host round trip included.
      decodes_ms: of each decode of a chunk of all rows.
      takes: one for each row; chunks of all rows arrive together.
    """

    steps_ms: list[float]
    decodes_ms: list[float]
    takes: list[Take]


def speak_together(
    rows: Rows,
    codec: Codec,
    script: str,
    *,
    frames: int,
    chunk_frames: int,
    now: Callable[[], float] = time.perf_counter,
) -> BatchTake:
    """Feed the same script to every row and stream until ``frames`` frames of each are out.

    Args:
      rows: fed nothing so far, without prefixes. Their seeds differ or not.
      codec: decodes the chunks, ``[B, C, chunk_frames]`` at a time.
      script: long enough for ``frames`` frames.
      frames: at least two chunks.
      chunk_frames: frames in a chunk.
      now: a clock, in seconds.

    Raises:
      MeasurementError: the speech of a row ended before two chunks.
    """
    each = rows.rows
    state = codec.init_decode_state(len(each))
    chunks: list[list[Chunk]] = [[] for _ in each]
    steps, decodes, emitted = [], [], 0
    start = now()
    for index in range(len(each)):
        rows.feed(index, script)
        rows.close(index)
    while emitted < frames:
        if min(row.available for row in each) >= emitted + chunk_frames:
            codes = np.stack([row.frames(emitted, emitted + chunk_frames) for row in each])
            before = now()
            wave, state = codec.decode_step(codes, state)
            pcm = np.clip(np.asarray(wave), -1.0, 1.0)
            arrived = now()
            decodes.append((arrived - before) * 1e3)
            for heard, one in zip(chunks, pcm, strict=True):
                seconds = one.size / codec.sample_rate
                heard.append(Chunk(arrived - start, seconds, level_dbfs(one)))
            emitted += chunk_frames
            continue
        if any(row.done for row in each) or not rows.refresh():
            break
        before = now()
        rows.step()
        steps.append((now() - before) * 1e3)
    rows.cancel()
    if len(decodes) < 2:
        raise MeasurementError(
            f"the speech of {len(each)} rows ended after {len(decodes)} chunks of {chunk_frames} "
            "frames: choose smaller --chunks or --chunk-frames"
        )
    takes = [Take((0.0,), 0.0, 0, tuple(heard)) for heard in chunks]
    return BatchTake(steps, decodes, takes)


def change_places(
    rows: Rows,
    config: GenerationConfig,
    script: str,
    *,
    times: int = 20,
    now: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Sessions leave a batch and others join in their places, a frame in between.

    A join is all that happens before the batch can go on with the next frame: the new session, its
    text, and that text on the device.

    Args:
      rows: fed nothing so far.
      config: of the sessions that join, which the batch must have been made for.
      script: fed to every session.

    Returns:
      ``leave`` and ``join`` (spreads), and ``join_programs``, how many programs were compiled.
    """

    def speak(index: int) -> None:
        rows.feed(index, script)
        rows.close(index)

    for index in range(len(rows.rows)):
        speak(index)
    rows.refresh()
    rows.step()
    leaves, joins = [], []
    with CompileWatch() as watch:
        for number in range(times):
            index = number % len(rows.rows)
            start = now()
            rows.leave(index)
            left = now()
            rows.join(index, config, number)
            speak(index)
            rows.refresh()
            joins.append((now() - left) * 1e3)
            leaves.append((left - start) * 1e3)
            rows.step()
    rows.cancel()
    return {
        "leave": summary(leaves),
        "join": summary(joins),
        "join_programs": watch.counts["programs"],
    }


def summed_up(batch: BatchTake) -> dict[str, Any]:
    """The figures of a batch; keys are listed in ``eval.latency``.

    Rows share their arrival times, so any row's figures of time are every row's.
    """
    count = len(batch.takes)
    one = figures(batch.takes[0])
    speed = one.x_realtime or 0.0
    return {
        "step": summary(batch.steps_ms),
        "decode": summary(batch.decodes_ms),
        "first_playable_ms": one.first_playable_ms,
        "jitter_ms": one.jitter_ms,
        "underruns": one.underruns,
        "stall_ms": one.stall_ms,
        "x_realtime": speed,
        "x_realtime_all": speed * count,
    }
