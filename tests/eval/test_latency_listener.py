"""What a listener gets: arithmetic on known times, laws that any times obey, the cadences."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.latency_cadences import CADENCES, Schedule, words, words_at_once
from eval.latency_listener import (
    Chunk,
    Figures,
    Take,
    figures,
    intervals,
    level_dbfs,
    overlap,
    stalls,
    summed_up,
)

LOUD, QUIET = -20.0, -60.0

#: Look-ahead complete at 1 s, its end known at 3 s. The first chunk comes at 1.5 s and is silent.
#: It plays until 1.6 s, but the second is late by 0.2 s; the fourth is late by 0.8 s, 0.6 s of it
#: because there was no text.
TAKE = Take(
    fed=(0.0, 1.0, 2.5),
    ended=3.0,
    began=1,
    chunks=(
        Chunk(1.5, 0.1, QUIET),
        Chunk(1.8, 0.1, LOUD),
        Chunk(1.85, 0.1, QUIET),
        Chunk(2.8, 0.1, LOUD),
    ),
    waits=((0.0, 1.0), (1.9, 2.5), (2.6, 2.7)),
    first_byte=1.4,
)


def ms(**values: float) -> dict[str, object]:
    return {f"{name}_ms": pytest.approx(value) for name, value in values.items()}


def test_figures_of_a_known_take() -> None:
    found = dataclasses.asdict(figures(TAKE))
    between = [300, 50, 250]  # 950 ms to the last chunk, 700 of them without text
    assert found == ms(
        first_byte=400,
        first_playable=500,
        first_audible=800,
        leading_silence=100,
        first_text_to_audio=1500,
        interval_p50=250,
        interval_p95=np.percentile(between, 95),
        interval_p99=np.percentile(between, 99),
        jitter=np.std(between),
        stall=1000,
        stall_for_text=600,
        final_text=-200,
        final_heard=-100,
    ) | {
        "starts_before_text_ends": True,
        "audio_s": pytest.approx(0.4),
        "x_realtime": pytest.approx(0.3 / 0.6),
        "underruns": 2,
    }
    assert stalls(TAKE.chunks) == [pytest.approx((1.6, 1.8)), pytest.approx((2.0, 2.8))]


def test_chunks_that_arrive_whole_have_one_moment_for_byte_and_sample() -> None:
    found = figures(dataclasses.replace(TAKE, first_byte=None))
    assert found.first_byte_ms == found.first_playable_ms == pytest.approx(500)


def test_takes_without_some_of_it() -> None:
    silent = figures(dataclasses.replace(TAKE, chunks=(Chunk(1.5, 0.1, QUIET),)))
    assert silent.first_audible_ms is None and silent.leading_silence_ms is None
    assert silent.x_realtime is None and silent.jitter_ms is None and silent.interval_p50_ms is None
    assert silent.first_playable_ms == pytest.approx(500)
    nothing = figures(Take((0.0,), 0.1, None, ()))
    assert nothing.first_playable_ms is None and nothing.starts_before_text_ends is None
    assert (nothing.audio_s, nothing.underruns, nothing.stall_ms) == (0, 0, 0)
    # The end of the text completed the look-ahead; or the speech ended before the text.
    ended = dataclasses.replace(TAKE, fed=(0.0,), ended=1.2, began=1)
    assert figures(ended).first_playable_ms == pytest.approx(300)
    assert figures(ended).starts_before_text_ends is False
    cut = figures(dataclasses.replace(TAKE, ended=None))
    assert cut.starts_before_text_ends is True and cut.final_text_ms is None


def test_what_comes_out_of_order_is_refused() -> None:
    chunks = (Chunk(1.0, 0.1, LOUD), Chunk(0.9, 0.1, LOUD))
    with pytest.raises(ValueError, match="chunks must be in the order of arrival"):
        figures(Take((0.0,), 0.0, 0, chunks))
    with pytest.raises(ValueError, match="text must be in the order"):
        figures(Take((1.0, 0.5), 1.0, 0, ()))


def test_level() -> None:
    assert level_dbfs(np.full(100, 0.01, np.float32)) == pytest.approx(-40, abs=1e-4)
    assert level_dbfs(np.zeros(100, np.float32)) == level_dbfs(np.zeros(0, np.float32)) == -120
    at_the_bar = dataclasses.replace(TAKE, chunks=(Chunk(2.0, 0.1, -40.0),))
    assert figures(at_the_bar).first_audible_ms is None  # above it, not at it


def test_sum_of_takes() -> None:
    silent = dataclasses.replace(TAKE, ended=1.0, chunks=(Chunk(1.6, 0.1, QUIET),))
    found = summed_up([TAKE, silent])
    assert (found["takes"], found["silent"], found["underruns"]) == (2, 1, 2)
    assert found["starts_before_text_ends"] == 1
    assert found["first_playable"]["p50_ms"] == pytest.approx(550)
    assert found["first_audible"]["count"] == 1
    assert found["interval"]["count"] == 3
    assert found["x_realtime"] == pytest.approx(0.5)
    assert summed_up([silent])["interval"] is None
    names = {f.name.removesuffix("_ms") for f in dataclasses.fields(Figures)}
    # Nothing is lost on the way.
    assert names - set(found) == {"audio_s", "interval_p50", "interval_p95", "interval_p99"}


# -------------------------------------------------------------------------------------------- laws


@st.composite
def takes(draw: st.DrawFn) -> Take:
    """Any take: times on a grid of 1/64 s, so that sums of them are exact."""

    def times(count: int) -> list[float]:
        steps = draw(st.lists(st.integers(0, 64), min_size=count, max_size=count))
        return [total / 64 for total in itertools.accumulate(steps)]

    count = draw(st.integers(1, 12))
    durations = draw(st.lists(st.integers(1, 32), min_size=count, max_size=count))
    levels = draw(st.lists(st.sampled_from([LOUD, QUIET]), min_size=count, max_size=count))
    chunks = [
        Chunk(at, one / 64, level)
        for at, one, level in zip(times(count), durations, levels, strict=True)
    ]
    fed = times(draw(st.integers(1, 5)))
    ends = times(2 * draw(st.integers(0, 4)))
    return Take(
        fed=tuple(fed),
        ended=fed[-1] + draw(st.integers(0, 64)) / 64,
        began=draw(st.integers(0, len(fed))),
        chunks=tuple(chunks),
        waits=tuple(zip(ends[::2], ends[1::2], strict=True)),
    )


@given(takes())
def test_stall_is_the_buffer_that_would_have_prevented_it(take: Take) -> None:
    found, first = figures(take), take.chunks[0].at
    # Written another way: how late the latest chunk is for a listener who never stands still.
    due = itertools.accumulate((c.seconds for c in take.chunks), initial=first)
    late = max(chunk.at - then for chunk, then in zip(take.chunks, due, strict=False))
    assert found.stall_ms == pytest.approx(late * 1e3)
    assert (found.stall_ms > 0) == (found.underruns > 0)
    assert found.underruns < len(take.chunks)  # the first is never late
    assert 0 <= found.stall_for_text_ms <= found.stall_ms + 1e-9
    # With the first chunk held back by so much, nothing stalls.
    held = [dataclasses.replace(c, at=max(c.at, first + late)) for c in take.chunks]
    assert not stalls(held)


@given(takes(), st.integers(-640, 640))
def test_figures_do_not_depend_on_the_clocks_zero(take: Take, by: int) -> None:
    shift = by / 64
    moved = Take(
        tuple(at + shift for at in take.fed),
        None if take.ended is None else take.ended + shift,
        take.began,
        tuple(dataclasses.replace(chunk, at=chunk.at + shift) for chunk in take.chunks),
        tuple((a + shift, b + shift) for a, b in take.waits),
    )
    assert dataclasses.asdict(figures(moved)) == pytest.approx(dataclasses.asdict(figures(take)))


@given(takes(), st.integers(0, 11), st.integers(1, 64))
def test_a_later_chunk_never_helps(take: Take, index: int, by: int) -> None:
    """Everything from a chunk on comes later: nothing that a listener waits for gets shorter."""
    index = 1 + index % max(1, len(take.chunks) - 1)
    later = tuple(
        dataclasses.replace(chunk, at=chunk.at + by / 64) if i >= index else chunk
        for i, chunk in enumerate(take.chunks)
    )
    before, after = figures(take), figures(dataclasses.replace(take, chunks=later))
    assert after.stall_ms >= before.stall_ms
    assert after.final_text_ms >= before.final_text_ms  # type: ignore[operator]
    assert after.final_heard_ms >= before.final_heard_ms  # type: ignore[operator]
    if before.first_audible_ms is not None:
        assert after.first_audible_ms is not None
        assert after.first_audible_ms >= before.first_audible_ms


@given(takes())
def test_figures_hang_together(take: Take) -> None:
    found = figures(take)
    assert found.first_playable_ms is not None
    if found.first_audible_ms is not None and found.leading_silence_ms is not None:
        assert found.first_audible_ms >= found.first_playable_ms
        assert found.leading_silence_ms < found.audio_s * 1e3
    assert found.final_heard_ms >= found.final_text_ms  # type: ignore[operator]
    assert all(ms >= 0 for ms in intervals(take))
    even = tuple(dataclasses.replace(chunk, seconds=0.25) for chunk in take.chunks)
    found = figures(dataclasses.replace(take, chunks=even, waits=()))
    if found.x_realtime is not None and found.x_realtime < 1:
        assert found.stall_ms > 0  # slower than real time: in the end the listener stood still


@given(st.lists(st.integers(0, 20), min_size=4, max_size=4))
def test_overlap_by_counting(ends: list[int]) -> None:
    (a, b), (c, d) = sorted(ends[:2]), sorted(ends[2:])
    assert overlap((a, b), [(c, d)]) == len(set(range(a, b)) & set(range(c, d)))


# ---------------------------------------------------------------------------------------- cadences

SCRIPTS = st.text(st.sampled_from("ab c.\n[S1]"), min_size=1, max_size=60)


@given(SCRIPTS, st.sampled_from([*CADENCES.values(), words_at_once]), st.integers(0, 5))
def test_a_cadence_gives_the_whole_text_in_order(script: str, cadence: object, seed: int) -> None:
    assert callable(cadence)
    schedule: Schedule = cadence(script, seed)
    assert schedule.script == script
    times = [at for at, _ in schedule.pieces]
    assert times[0] == 0 and times == sorted(times) and schedule.end >= times[-1]
    assert all(text for _, text in schedule.pieces)
    assert schedule == cadence(script, seed)


SENTENCE = "[S1] The kettle boils faster, when you put the lid on properly."


def test_cadences_are_what_they_say() -> None:
    at_once = CADENCES["at_once"](SENTENCE, 0)
    assert at_once == Schedule(((0.0, SENTENCE),), 0.0)
    assert words(" one  two\n three ") == [" one", "  two", "\n three "]
    by_word = CADENCES["words_10ms"](SENTENCE, 0)
    assert [text.strip() for _, text in by_word.pieces] == SENTENCE.split()
    assert [at for at, _ in by_word.pieces] == pytest.approx([0.01 * i for i in range(12)])
    bursts = CADENCES["llm_bursts"](SENTENCE * 50, 1)
    assert len(SENTENCE * 50) / 3.5 / bursts.end == pytest.approx(40, rel=0.15)  # tokens a second
    sizes = [len(text) for _, text in bursts.pieces]
    assert max(sizes) <= 72 and len(set(sizes)) > 5
    assert bursts != CADENCES["llm_bursts"](SENTENCE * 50, 2)
    typed = CADENCES["slow_typist"](SENTENCE * 50, 1)
    assert {len(text) for _, text in typed.pieces} == {1}
    assert 150 < len(SENTENCE * 50) / typed.end * 60 < 210  # characters a minute
