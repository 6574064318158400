"""What a listener of a stream lives through, from when text and audio arrived. No clock in here.

A :class:`Take` is a record of one stream, whoever made it: the driver inside the process
(`eval.latency_stream`) or a client at the other end of a pipe (`eval.latency_stopwatch`). The same
arithmetic turns both into the figures whose definitions are those of :class:`Figures`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dia2_jax.typing import Float
from eval.latency_statistics import summary

#: A chunk is heard from this RMS on, in dB of full scale.
AUDIBLE = -40.0

Span = tuple[float, float]


def level_dbfs(pcm: Float[np.ndarray, " W"]) -> float:
    """RMS of samples within +-1 in dB of full scale; -120 at the least (and for no samples)."""
    power = float(np.mean(np.square(pcm, dtype=np.float64))) if pcm.size else 0.0
    return float(10 * np.log10(max(power, 1e-12)))


@dataclass(frozen=True)
class Chunk:
    """Audio that arrived.

    Attributes:
      at: second at which all of it was there.
      seconds: how long it plays.
      level: dBFS (RMS).
    """

    at: float
    seconds: float
    level: float


@dataclass(frozen=True)
class Take:
    """One stream; all times are seconds on one clock.

    Attributes:
      fed: when each piece of text arrived.
      ended: when it was known that no text follows; None if the speech ended before.
      began: index in ``fed`` of the piece that completes the look-ahead, the first after which a
        frame could be computed; ``len(fed)`` if that took the end of the text; None if nothing was
        said.
      chunks: the audio, in order.
      waits: (from, to) in which nothing could be computed for lack of text.
      first_byte: when the first byte of audio arrived; None where chunks arrive whole.
    """

    fed: tuple[float, ...]
    ended: float | None
    began: int | None
    chunks: tuple[Chunk, ...]
    waits: tuple[Span, ...] = ()
    first_byte: float | None = None

    @property
    def origin(self) -> float | None:
        """When the piece arrived that completed the look-ahead."""
        if self.began is None:
            return None
        return self.fed[self.began] if self.began < len(self.fed) else self.ended


@dataclass(frozen=True)
class Figures:
    """A take in numbers; None where it has no such figure.

    The first four count from the feed of the word that completes the look-ahead.

    Attributes:
      first_byte_ms: to the first byte of audio.
      first_playable_ms: to the first whole chunk, of which a player can play the first sample.
      first_audible_ms: to the first chunk above ``AUDIBLE``.
      leading_silence_ms: of audio before that chunk; a listener sits through it in addition.
      first_text_to_audio_ms: from the first piece of text, needed or not, to the first chunk.
      starts_before_text_ends: the first chunk arrived before the end of the text was known.
      audio_s: all audio of the take.
      x_realtime: audio after the first chunk over the time from that chunk to the last one, waits
        for text left out.
      interval_p50_ms, interval_p95_ms, interval_p99_ms, jitter_ms: of the times between chunks,
        waits for text left out, percentiles and the standard deviation.
      underruns: how often a listener who starts with the first chunk runs dry.
      stall_ms: how long that listener stands still in all. A buffer of so much would have
        prevented it: it is also how late the latest chunk was.
      stall_for_text_ms: the part of it in which text was missing, not speed.
      final_text_ms: from the end of the text to the last chunk.
      final_heard_ms: from the end of the text until that listener has heard everything.
    """

    first_byte_ms: float | None
    first_playable_ms: float | None
    first_audible_ms: float | None
    leading_silence_ms: float | None
    first_text_to_audio_ms: float | None
    starts_before_text_ends: bool | None
    audio_s: float
    x_realtime: float | None
    interval_p50_ms: float | None
    interval_p95_ms: float | None
    interval_p99_ms: float | None
    jitter_ms: float | None
    underruns: int
    stall_ms: float
    stall_for_text_ms: float
    final_text_ms: float | None
    final_heard_ms: float | None


def overlap(span: Span, others: Iterable[Span]) -> float:
    """Seconds of ``span`` that lie in ``others``, which do not overlap each other."""
    return sum(max(0.0, min(span[1], end) - max(span[0], start)) for start, end in others)


def stalls(chunks: Sequence[Chunk]) -> list[Span]:
    """(from, to) in which a listener who starts at the first chunk has nothing to play."""
    found: list[Span] = []
    played = chunks[0].at if chunks else 0.0
    for chunk in chunks:
        if chunk.at > played:
            found.append((played, chunk.at))
        played = max(played, chunk.at) + chunk.seconds
    return found


def intervals(take: Take) -> list[float]:
    """Milliseconds from each chunk to the next one, waits for text left out."""
    times = [chunk.at for chunk in take.chunks]
    pairs = zip(times, times[1:], strict=False)
    # Never negative, also where rounding would have it so.
    return [max(0.0, (b - a - overlap((a, b), take.waits)) * 1e3) for a, b in pairs]


def figures(take: Take) -> Figures:
    """The figures of a take.

    Raises:
      ValueError: chunks or pieces of text do not come in the order of their times.
    """
    chunks, origin = take.chunks, take.origin
    for name, times in (("chunks", [chunk.at for chunk in chunks]), ("text", list(take.fed))):
        if any(b < a for a, b in zip(times, times[1:], strict=False)):
            raise ValueError(f"{name} must be in the order of arrival")
    first = chunks[0].at if chunks else None
    last = chunks[-1].at if chunks else None
    audible = next((i for i, chunk in enumerate(chunks) if chunk.level > AUDIBLE), None)
    gaps, silent = stalls(chunks), chunks[:audible]
    stall = sum(end - start for start, end in gaps)
    audio = sum(chunk.seconds for chunk in chunks)
    between = intervals(take)
    spread: dict[str, float] = summary(between) if between else {}
    speaking = sum(between) / 1e3
    return Figures(
        first_byte_ms=_ms(origin, first if take.first_byte is None else take.first_byte),
        first_playable_ms=_ms(origin, first),
        first_audible_ms=None if audible is None else _ms(origin, chunks[audible].at),
        leading_silence_ms=None if audible is None else sum(c.seconds for c in silent) * 1e3,
        first_text_to_audio_ms=_ms(take.fed[0] if take.fed else None, first),
        starts_before_text_ends=(
            None if first is None else take.ended is None or first < take.ended
        ),
        audio_s=audio,
        x_realtime=(audio - chunks[0].seconds) / speaking if speaking > 0 else None,
        interval_p50_ms=spread.get("p50_ms"),
        interval_p95_ms=spread.get("p95_ms"),
        interval_p99_ms=spread.get("p99_ms"),
        jitter_ms=float(np.std(between)) if len(between) > 1 else None,
        underruns=len(gaps),
        stall_ms=stall * 1e3,
        stall_for_text_ms=sum(overlap(gap, take.waits) for gap in gaps) * 1e3,
        final_text_ms=_ms(take.ended, last),
        final_heard_ms=None if first is None else _ms(take.ended, first + audio + stall),
    )


def _ms(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else (end - start) * 1e3


def summed_up(takes: Sequence[Take]) -> dict[str, Any]:
    """Several takes in one: a spread for each ``…_ms`` figure and speed, counts for the rest.

    Returns:
      By figure without its ``_ms``: its spread over the takes that have it (see ``summary``), or
      None where none has. ``interval`` pools the times between chunks of all takes.
      ``x_realtime`` is the median. Besides, ``takes``, ``silent`` (takes without an audible
      chunk), ``underruns`` of all takes, and ``starts_before_text_ends`` (how many takes did).
    """
    every = [figures(take) for take in takes]
    found: dict[str, Any] = {
        "takes": len(every),
        "silent": sum(one.first_audible_ms is None for one in every),
        "starts_before_text_ends": sum(bool(one.starts_before_text_ends) for one in every),
        "underruns": sum(one.underruns for one in every),
    }
    speeds = [one.x_realtime for one in every if one.x_realtime is not None]
    found["x_realtime"] = float(np.median(speeds)) if speeds else None
    for field in dataclasses.fields(Figures):
        if field.name.endswith("_ms") and not field.name.startswith("interval"):
            values = [value for one in every if (value := getattr(one, field.name)) is not None]
            found[field.name.removesuffix("_ms")] = summary(values) if values else None
    pooled = [ms for take in takes for ms in intervals(take)]
    found["interval"] = summary(pooled) if pooled else None
    return found
