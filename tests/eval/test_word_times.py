"""Reported word times against forced alignment, on speech whose word times are known."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dia2_jax import Dia2
from dia2_jax.audio import SAMPLE_RATE as RATE
from dia2_jax.audio import read_audio
from eval.scoring.metric import Options, Unavailable
from eval.scoring.prompts import Prompt
from eval.scoring.registry import open_metrics
from eval.scoring.scripts import SpokenWord
from eval.scoring.sources import Studio, sounding_starts
from eval.scoring.stopping import Stopping
from eval.scoring.summary import summarise
from eval.scoring.takes import Take
from eval.scoring.voice_activity import VoiceActivity
from eval.scoring.word_times import FAR, WordTimes

SPEECH = Path(__file__).parent.parent / "golden" / "speech"


@pytest.fixture(scope="module")
def metric() -> WordTimes:
    return WordTimes.open(Options())


def spoken(name: str, moved: Callable[[int, float], float] = lambda index, time: time) -> Take:
    """A recording of the tests with its word times, as they are or moved."""
    times = json.loads((SPEECH / f"{name}.json").read_text())
    words = tuple(
        SpokenWord(word["text"], "[S1]", moved(i, word["start"])) for i, word in enumerate(times)
    )
    prompt = Prompt("set", name, "line", "[S1] …")
    return Take("generated", prompt, read_audio(SPEECH / f"{name}.mp3"), RATE, words)


def with_wave(take: Take, wave: np.ndarray, words: Sequence[SpokenWord] | None = None) -> Take:
    words = take.words if words is None else tuple(words)
    return Take(take.source, take.prompt, wave.astype(np.float32), RATE, words)


@pytest.mark.parametrize("name", ["river", "pause", "tickets"])
def test_true_times_are_near_and_moved_ones_as_far_as_they_were_moved(
    metric: WordTimes, name: str
) -> None:
    true = metric.score(spoken(name))
    assert true is not None
    assert true["difference"] < 20 and abs(true["offset"]) < 20
    assert true["aligned"] == true["within_80"] == true["words"] == len(spoken(name).words)
    assert metric.failures(true) == []
    for shift in (0.12, -0.12, 0.4):
        moved = metric.score(spoken(name, lambda _, time, by=shift: time + by))  # type: ignore[misc]
        assert moved is not None
        assert moved["offset"] - true["offset"] == pytest.approx(1000 * shift, abs=1)
        assert moved["difference"] == pytest.approx(1000 * abs(shift), abs=20)
        assert moved["within_80"] <= 2  # the few that the aligner places 40 ms and more apart
        far = 1000 * abs(shift) > FAR
        assert (moved["within_160"] == 0) == far
        assert len(metric.failures(moved)) == far
    # Every second word 120 ms late: as many within 80 ms, and the median in between.
    half = metric.score(spoken(name, lambda i, time: time + 0.12 * (i % 2)))
    assert half is not None
    assert half["within_80"] == pytest.approx(half["words"] / 2, abs=2)
    assert half["within_160"] == half["words"]


def test_aligned_words_move_with_the_audio(metric: WordTimes) -> None:
    take = spoken("pause")
    before = metric.score(take)
    # Two seconds more at 1.6 s, in the pause after the fifth word.
    place = round(1.6 * RATE)
    longer = np.concatenate([take.wave[:place], np.zeros(2 * RATE), take.wave[place:]])
    after = metric.score(with_wave(take, longer))
    assert before is not None and after is not None
    moved = np.array(after["starts"]) - np.array(before["starts"])
    assert moved[:5] == pytest.approx(np.zeros(5), abs=0.05)
    assert moved[5:] == pytest.approx(np.full(len(moved) - 5, 2.0), abs=0.05)
    assert after["within_160"] == 5 and after["difference"] == pytest.approx(2000, abs=50)


def test_words_that_are_not_there_are_not_aligned(metric: WordTimes) -> None:
    take = spoken("river")
    cut = metric.score(with_wave(take, take.wave[: round(0.8 * RATE)]))
    silent = metric.score(with_wave(take, np.zeros(len(take.wave))))
    for scores in (cut, silent):
        assert scores is not None
        assert (scores["words"], scores["aligned"], scores["within_160"]) == (16, 0, 0)
        assert scores["difference"] is None
        assert metric.failures(scores) == ["its words do not fit what is heard"]
    rows = [
        {"set": "s", "id": str(i), "kind": "line", "source": "generated", "seed": 0,
         "scores": {"word_times": scores}}
        for i, scores in enumerate([cut, metric.score(take)])
    ]  # fmt: skip
    found = summarise(rows, [metric])["figures"]["generated"]["all"]["word_times"]
    assert found["aligned"]["value"] == found["within_80"]["value"] == 50
    assert found["difference"]["takes"] == 1


def test_other_words_than_those_spoken_are_far_or_do_not_fit(metric: WordTimes) -> None:
    river, tickets = spoken("river"), spoken("tickets")
    scores = metric.score(with_wave(river, river.wave, tickets.words))
    assert scores is not None
    assert scores["within_80"] < scores["words"] / 2 and metric.failures(scores)


def test_words_without_a_sound_are_left_out(metric: WordTimes) -> None:
    take = spoken("river")
    laugh = SpokenWord("(laughs)", "[S1]", 1.0)
    with_one = metric.score(with_wave(take, take.wave, [*take.words[:4], laugh, *take.words[4:]]))
    assert with_one == metric.score(take)
    assert metric.score(with_wave(take, take.wave, [laugh])) is None
    assert metric.score(with_wave(take, take.wave, [])) is None


def test_a_model_s_words_are_where_they_sound(metric: WordTimes) -> None:
    """Nano reports a word two frames after it begins, as it was trained to; a take does not."""
    script = "[S1] The meeting starts in five minutes. [S2] Already? I have not opened the slides."
    prompt = Prompt("set", "a", "dialogue", script)
    take = Studio(Dia2.from_pretrained()).take("generated", prompt, 0)
    assert len(take.words) == 13
    starts = [word.start for word in take.words]
    late = np.array(take.about["reported_starts"]) - starts
    assert take.about["reported_starts"][0] == 0.16 and starts[0] == 0
    assert late == pytest.approx(np.full(13, 0.16))
    # Each turn begins at its first word, not two frames into it.
    assert [turn.start for turn in take.turns()] == [starts[0], starts[6]]
    scores = metric.score(take)
    assert scores is not None and scores["aligned"] == 13
    assert abs(scores["offset"]) < 80  # a frame
    assert scores["within_80"] > 13 / 2
    assert scores["reported_offset"] == pytest.approx(scores["offset"] + 160, abs=1)
    # What sounds from the start on is the first word, no noise before it.
    activity = VoiceActivity.open(Options())
    assert activity.failures(activity.score(take)) == []
    assert take.audible[0] < 0.1 and Stopping().failures(Stopping().score(take)) == []


def test_reported_times_are_two_frames_late_whatever_a_frame_is() -> None:
    assert sounding_starts([0.0, 0.08, 0.16, 1.0], 12.5) == pytest.approx([0, 0, 0, 0.84])
    assert sounding_starts([0.16, 1.0], 25.0) == pytest.approx([0.08, 0.92])


def test_without_pocketsphinx_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    lines: list[str] = []
    found: list[Any] = open_metrics(Options(), lines.append, ["stopping", "word_times"])
    assert [each.name for each in found] == ["stopping"]
    (line,) = lines
    assert line.startswith("word_times is left out: needs pocketsphinx (") and "\n" not in line
    assert 'pip install "dia2-jax[align]"' in line
    with pytest.raises(Unavailable):
        WordTimes.open(Options())
