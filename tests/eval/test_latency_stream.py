"""Driving sessions in real time: with a clock that only the test moves, and on a tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from small_shapes import load, write_shapes

from eval.latency_cadences import Schedule, at_once, llm_bursts, words_at_once
from eval.latency_listener import AUDIBLE, Chunk, Take, figures
from eval.latency_ours import Ours
from eval.latency_process import MeasurementError
from eval.latency_rows import BatchTake, summed_up
from eval.latency_stream import Client, speak

FRAME = 0.04  # seconds to compute one; it plays 0.08


class World:
    """A session that takes a frame of time for a chunk, on a clock that nothing else moves.

    Two chunks need no text and belong to the warm-up's padding, which is not heard. After that it
    can go on from the third word on, two chunks a word; the first ``silent`` chunks are silent.
    """

    sample_rate = 24_000

    def __init__(self, silent: int = 0) -> None:
        self.now, self.words, self.said, self.silent = 100.0, 0, 0, silent
        self.padding, self.closed = 2, False
        self.asked: list[float] = []

    @property
    def room(self) -> int:
        return 2 * (self.words if self.closed else max(0, self.words - 2))

    @property
    def waiting(self) -> bool:
        return not self.closed and not self.padding and self.said >= self.room

    @property
    def finished(self) -> bool:
        return self.closed and self.said >= self.room

    def feed(self, text: str) -> None:
        self.asked.append(self.now)
        self.words += len(text.split())

    def close(self) -> None:
        self.closed = True

    def __iter__(self) -> Iterator[Any]:
        while self.padding:
            self.padding -= 1
            self.now += FRAME
        while self.said < self.room:
            self.said += 1
            self.now += FRAME
            level = 0.001 if self.said <= self.silent else 0.1
            yield SimpleNamespace(pcm=np.full(1920, level, np.float32))

    def speak(self, schedule: Schedule, **options: Any) -> Take:
        def sleep(seconds: float) -> None:
            assert seconds > 0
            self.now += seconds

        return speak(self, schedule, now=lambda: self.now, sleep=sleep, **options)


def test_times_count_from_the_text_not_from_the_padding_before_it() -> None:
    world = World(silent=3)
    take = world.speak(Schedule(tuple((0.5 * i, f"w{i} ") for i in range(4)), 2.0))
    # The third word comes at 1 s; the padding before the first one was over by then.
    assert (take.began, take.origin, take.ended) == (2, 1.0, 2.0)
    assert take.fed == (0.0, 0.5, 1.0, 1.5)
    assert [chunk.at for chunk in take.chunks] == pytest.approx(
        [1.04, 1.08, 1.54, 1.58, 2.04, 2.08, 2.12, 2.16]
    )
    assert [chunk.seconds for chunk in take.chunks] == [0.08] * 8
    assert [wait for pair in take.waits for wait in pair] == pytest.approx(
        [0.0, 0.5, 0.5, 1.0, 1.08, 1.5, 1.58, 2.0]
    )
    found = figures(take)
    assert found.first_playable_ms == pytest.approx(40)
    assert found.first_audible_ms == pytest.approx(580)
    assert found.leading_silence_ms == pytest.approx(240)
    assert found.starts_before_text_ends is True
    # Between 1.04 and 2.16 s lie seven frames of computing and 0.84 s of waiting for text.
    assert found.x_realtime == pytest.approx(2.0)
    assert found.jitter_ms == pytest.approx(0, abs=1e-6)
    assert (found.stall_ms, found.stall_for_text_ms) == pytest.approx((680, 600))
    assert found.final_text_ms == pytest.approx(160)


def test_text_may_find_a_session_that_has_waited_for_it() -> None:
    world = World()
    take = world.speak(at_once("a b c", 0), rest=5.0)
    assert world.asked == pytest.approx([100 + 2 * FRAME + 5.0])
    assert take.chunks[0].at == pytest.approx(FRAME) and take.waits == ()


def test_a_chunk_is_there_when_it_was_delivered() -> None:
    world = World()
    sizes = []

    def deliver(pcm: np.ndarray) -> None:
        world.now += 0.01
        sizes.append(pcm.size)

    take = world.speak(at_once("a b c", 0), deliver=deliver)
    assert [chunk.at for chunk in take.chunks[:3]] == pytest.approx([0.05, 0.1, 0.15])
    assert sizes == [1920] * len(take.chunks)


def test_a_client_reads_what_it_is_given_and_ends_with_it() -> None:
    with Client() as client:
        for _ in range(50):  # more than a pipe holds
            client.take(np.zeros(1920, np.float32))
    assert client._process.returncode == 0


def test_text_that_arrives_while_it_is_busy_counts_as_arrived() -> None:
    world = World()
    take = world.speak(Schedule(((0.0, "a b c "), (0.01, "d "), (0.02, "e ")), 0.03))
    assert take.fed == (0.0, 0.01, 0.02) and take.ended == 0.03 and take.waits == ()
    assert np.subtract(world.asked, world.asked[0]) == pytest.approx([0, 0.08, 0.16])
    assert figures(take).final_text_ms == pytest.approx(10 * 40 - 30)


def test_the_end_of_a_short_text_can_complete_the_look_ahead() -> None:
    take = World().speak(at_once("two words", 0))
    assert take.began == len(take.fed) == 1 and take.origin == 0.0
    assert len(take.chunks) == 4


def test_it_stops_where_it_is_told() -> None:
    world = World(silent=2)
    take = world.speak(words_at_once("a b c d e", 0), until=lambda c: c.level > AUDIBLE)
    assert [chunk.level > AUDIBLE for chunk in take.chunks] == [False, False, True]
    assert take.ended is None and figures(take).leading_silence_ms == pytest.approx(160)


def test_audio_that_needs_no_text_is_there_at_the_start() -> None:
    class Early(World):
        def __iter__(self) -> Iterator[Any]:
            if self.padding:
                self.now, self.padding = self.now + 7, 0
                yield SimpleNamespace(pcm=np.full(1920, 0.1, np.float32))
            yield from super().__iter__()

    take = Early().speak(words_at_once("a b c d", 0), until=lambda c: c.level > AUDIBLE)
    assert [chunk.at for chunk in take.chunks] == pytest.approx([0, 0.04])
    assert figures(take).first_audible_ms == 0 and take.began == 2


def test_batch_figures() -> None:
    chunks = tuple(Chunk(0.5 + 0.2 * i, 0.08, -20.0) for i in range(3))
    batch = BatchTake([1.0, 3.0], [5.0], [Take((0.0,), 0.0, 0, chunks)] * 4)
    found = summed_up(batch)
    assert found["step"]["p50_ms"] == 2 and found["decode"]["count"] == 1
    assert found["first_playable_ms"] == pytest.approx(500)
    assert found["x_realtime"] == pytest.approx(0.4)
    assert found["x_realtime_all"] == pytest.approx(1.6)
    assert (found["underruns"], found["stall_ms"]) == (2, pytest.approx(240))


# --------------------------------------------------------------------------------- on a tiny model

SCRIPT = "[S1] Hello there my old friends, how are you? [S2] Fine."


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Ours:
    """A model that compiles in little time: two codebooks, a codec of few layers."""
    folder = tmp_path_factory.mktemp("configs")
    write_shapes(folder, "short", delays=[3, 4], context=200)
    return load(folder, "short")


def test_a_take_is_what_the_session_says_however_text_arrives(ours: Ours) -> None:
    session = ours._session()
    session.feed(SCRIPT)
    session.close()
    said = [chunk.pcm for chunk in session]
    schedules = [at_once(SCRIPT, 0), llm_bursts(SCRIPT, 0)]
    (whole,) = ours.listen(schedules[:1])
    (bursts,) = ours.listen(schedules[1:])  # seeds count from 0 in every call
    (piped,) = ours.listen(schedules[:1], client=True)
    for take in (whole, bursts, piped):
        assert [c.seconds for c in take.chunks] == [pcm.size / 600 for pcm in said]
        assert [c.level for c in take.chunks] == pytest.approx([level(p) for p in said], abs=0.01)
        assert take.origin is not None and take.origin <= take.chunks[0].at
    assert (whole.began, whole.ended) == (0, 0.0)
    assert bursts.fed == tuple(at for at, _ in schedules[1].pieces)
    assert bursts.ended == schedules[1].end
    # Real time: what needs the last text is not there before it.
    assert bursts.chunks[-1].at > bursts.ended > bursts.fed[-1]
    (heard,) = ours.listen(schedules[:1], 1, True)
    assert len(heard.chunks) == next(i for i, pcm in enumerate(said, 1) if level(pcm) > AUDIBLE)


def level(pcm: np.ndarray) -> float:
    return 20 * float(np.log10(np.sqrt(np.mean(np.square(pcm.astype(np.float64))))))


def test_rows_that_speak_together(ours: Ours) -> None:
    found = ours.batch(2, 4)
    # Four chunks of a frame each; a frame is complete after the longest delay, of four frames.
    assert found["decode"]["count"] == 4 and found["step"]["count"] == 4 + 4 - 1
    assert found["x_realtime_all"] == pytest.approx(2 * found["x_realtime"])
    assert found["compile_s"] > 0 and found["first_playable_ms"] > 0
    assert found["anonymous_peak_gb"] is None or found["anonymous_peak_gb"] > 0


def test_rows_that_end_too_soon_are_refused(ours: Ours, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "_script", lambda frames: "Yes.")
    monkeypatch.setattr(ours, "_chunk_frames", 40)
    with pytest.raises(MeasurementError, match="of 2 rows ended after 0 chunks of 40 frames"):
        ours.batch(2, 80)
