"""Levels, pauses, gaps, pitch, opinion scores: each moves by what was done to the audio."""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest

from dia2_jax.audio import HOP, window_levels
from eval.scoring.dialogue import Dialogue
from eval.scoring.levels import pauses
from eval.scoring.metric import Options, Unavailable
from eval.scoring.prompts import Prompt
from eval.scoring.prosody import LONG, Prosody, drift
from eval.scoring.quality import Quality
from eval.scoring.scripts import SpokenWord
from eval.scoring.signal import Signal
from eval.scoring.summary import summarise
from eval.scoring.takes import Take
from eval.scoring.voice_activity import VoiceActivity, speech_spans

RATE = 24_000


def buzz(seconds: float, pitch: float = 120.0, level: float = -23.0) -> np.ndarray:
    """Harmonics of a pitch in Hz, at an RMS level in dBFS."""
    time = np.arange(round(seconds * RATE)) / RATE
    wave = sum(np.sin(2 * np.pi * pitch * k * time) / k for k in range(1, 9))
    return np.asarray(wave * 10 ** (level / 20) / np.sqrt(np.mean(np.square(wave))), np.float32)


def silence(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * RATE), np.float32)


def noise(seconds: float, level: float) -> np.ndarray:
    size = round(seconds * RATE)
    return np.random.default_rng(0).standard_normal(size, np.float32) * np.float32(
        10 ** (level / 20)
    )


def make_take(*parts: np.ndarray, words: tuple[SpokenWord, ...] = (), name: str = "a") -> Take:
    wave = np.concatenate(parts).astype(np.float32)
    return Take("generated", Prompt("set", name, "line", "[S1] Hello."), wave, RATE, words)


def word(start: float, speaker: int = 1) -> SpokenWord:
    return SpokenWord("so", f"[S{speaker}]", start)


# ------------------------------------------------------------------------------------------- signal


def test_levels_and_clipping_are_what_was_put_in() -> None:
    signal = Signal.open(Options())
    plain = signal.score(make_take(noise(0.5, -60), buzz(1.0), noise(0.5, -60)))
    assert plain is not None
    assert plain["level"] == pytest.approx(-23, abs=0.5)
    assert plain["floor"] == pytest.approx(-60, abs=1)
    assert plain["clipped"] == 0 and signal.failures(plain) == []
    # 20 dB more noise lifts the floor by as much.
    noisy = signal.score(make_take(noise(0.5, -40), buzz(1.0), noise(0.5, -40)))
    assert noisy is not None and noisy["floor"] - plain["floor"] == pytest.approx(20, abs=1)
    loud = np.clip(buzz(1.0, level=3.0), -1, 1)
    clipped = signal.score(make_take(loud))
    assert clipped is not None
    assert clipped["clipped"] == int((np.abs(loud) >= 0.999).sum()) > 2000
    assert clipped["peak"] == pytest.approx(0.0, abs=0.01)
    assert signal.failures(clipped) == [f"{100 * clipped['clipped'] / RATE:.1f} % clipped"]
    assert signal.score(make_take(np.zeros(0))) is None


def test_a_burst_before_the_first_speech_is_a_failure() -> None:
    def score(*pieces: np.ndarray, speech: float) -> tuple[float | None, list[str]]:
        """With a detector that hears speech from a moment on."""

        def detect(wave: np.ndarray) -> list[float]:
            return [float(i * 0.032 >= speech) for i in range(-(-len(wave) // 512))]

        metric = VoiceActivity(detect, {})
        scores = metric.score(make_take(*pieces))
        return scores["leading_noise"], metric.failures(scores)

    quiet, said = score(noise(0.6, -70), buzz(1.0), speech=0.6)
    assert quiet == pytest.approx(-47, abs=3) and said == []
    pieces = noise(0.2, -70), buzz(0.05, level=-25), noise(0.35, -70), buzz(1.0)
    late = noise(0.4, -70), buzz(0.05, level=-25), noise(0.15, -70), buzz(1.0)
    for each in (pieces, late):
        burst, said = score(*each, speech=0.6)
        assert burst == pytest.approx(-1, abs=1.5) and said == ["noise before the first speech"]
    # Hiss without a pause is noise, too, but not where speech may have begun.
    hiss, _ = score(noise(0.6, -40), buzz(1.0), speech=0.6)
    assert hiss == pytest.approx(-17, abs=3)
    # What goes over into the speech is its onset, which a detector hears late.
    assert score(buzz(1.0), speech=0.19) == (None, [])
    onset, said = score(noise(0.4, -70), buzz(1.0), speech=0.6)
    assert onset is not None and onset < -40 and said == []


def test_pauses_have_their_place_and_length() -> None:
    wave = np.concatenate([buzz(0.5), silence(0.3), buzz(0.5), silence(0.08), buzz(0.4)])
    levels = window_levels(wave, RATE)
    found = pauses(levels, 0.0, 1.78, below=-50, shortest=0.05)
    assert np.array(found) == pytest.approx(np.array([[0.5, 0.8], [1.3, 1.38]]), abs=1.5 * HOP)
    assert len(pauses(levels, 0.0, 1.78, below=-50, shortest=0.1)) == 1
    assert pauses(levels, 0.9, 1.2, below=-50, shortest=0.05) == []
    assert len(window_levels(silence(0.001), RATE)) == 0


# ----------------------------------------------------------------------------------------- dialogue


def loud(wave: np.ndarray) -> list[float]:
    """Hears speech in every 32 ms that sound, which are the steps of the real detector."""
    return [float(np.abs(wave[i : i + 512]).mean() > 0.01) for i in range(0, len(wave), 512)]


@pytest.fixture
def turns() -> Dialogue:
    return Dialogue(loud, {})


def gaps(metric: Dialogue, *parts: np.ndarray, words: tuple[SpokenWord, ...]) -> list[float | None]:
    scores = metric.score(make_take(*parts, words=words))
    assert scores is not None
    return list(scores["gap_lengths"])


def test_gaps_between_speakers_and_turns_without_one(turns: Dialogue) -> None:
    words = (word(0.0), word(0.5), word(1.25, 2), word(2.0, 1))
    # Whole steps of the detector; the last turn is reported 0.17 s early.
    parts = (buzz(0.96), silence(0.256), buzz(0.8, 200), silence(0.16), buzz(0.64))
    take = make_take(*parts, words=words)
    scores = turns.score(take)
    assert scores is not None
    assert scores["gaps_at"] == [1.25, 2.0]
    assert scores["gap_lengths"] == pytest.approx([0.256, 0.16], abs=0.001)
    together = make_take(buzz(1.0), buzz(1.0, 200), words=(word(0.0), word(1.0, 2)), name="b")
    alone = make_take(buzz(1.0), words=(word(0.0), word(0.5)))
    assert turns.score(alone) is None
    assert turns.score(make_take(silence(2.0), words=words)) is None
    rows = [
        {
            "set": "set", "id": each.prompt.id, "kind": "line", "source": "generated", "seed": 0,
            "scores": {"dialogue": turns.score(each)},
        }
        for each in (take, together)
    ]  # fmt: skip
    found = summarise(rows, [turns])["figures"]["generated"]["all"]["dialogue"]
    assert found["gap"]["value"] == pytest.approx(0.208, abs=0.001)
    assert found["gap_spread"]["value"] == pytest.approx(0.048, abs=0.001)
    assert found["overlap_at_most"]["value"] == pytest.approx(100 / 3)


def test_a_pause_inside_a_turn_is_no_gap(turns: Dialogue) -> None:
    """Both pauses are near the change, and longer than what is between the turns."""
    after = (buzz(0.96), buzz(0.16, 200), silence(0.192), buzz(0.64, 200))
    assert gaps(turns, *after, words=(word(0.0), word(0.96, 2), word(1.312, 2))) == [None]
    before = (buzz(0.64), silence(0.32), buzz(0.16), buzz(0.64, 200))
    assert gaps(turns, *before, words=(word(0.0), word(0.96), word(1.12, 2))) == [None]
    # With a gap, too, it is the gap that counts.
    both = (buzz(0.96), silence(0.096), buzz(0.16, 200), silence(0.32), buzz(0.64, 200))
    words = (word(0.0), word(1.056, 2), word(1.536, 2))
    assert gaps(turns, *both, words=words) == pytest.approx([0.096], abs=0.001)


@pytest.mark.parametrize("late", [-0.16, 0.0, 0.16])
def test_a_gap_is_found_though_words_are_reported_two_frames_off(
    turns: Dialogue, late: float
) -> None:
    """The turn's second word follows 0.2 s after the first."""
    parts = (silence(0.32), buzz(0.96), silence(0.256), buzz(0.96, 200))
    words = tuple(word(t + late, n) for t, n in ((0.32, 1), (0.9, 1), (1.536, 2), (1.736, 2)))
    assert gaps(turns, *parts, words=words) == pytest.approx([0.256], abs=0.001)


def test_what_the_detector_wavers_by_is_neither_pause_nor_speech() -> None:
    def spans(*speech: int) -> list[tuple[float, float]]:
        step = 512 / 16_000
        found = speech_spans(lambda wave: [float(x) for x in speech], np.zeros(512), 16_000)
        return [(round(a / step), round(b / step)) for a, b in found]

    assert spans(0, 1, 1, 0, 1, 1, 0) == [(1, 6)]
    assert spans(1, 1, 0, 0, 1, 1) == [(0, 2), (4, 6)]
    assert spans(1, 1, 0, 0, 1, 0, 0, 1, 1) == [(0, 2), (7, 9)]
    assert spans(0, 0) == []


# ------------------------------------------------------------------------------------------ prosody


@pytest.fixture(scope="module")
def prosody() -> Prosody:
    return Prosody.open(Options())


def test_pitch_rate_and_pauses_are_what_was_put_in(prosody: Prosody) -> None:
    words = (*(word(0.25 * i) for i in range(4)), *(word(1.5 + 0.25 * i, 2) for i in range(4)))
    take = make_take(buzz(1.0, 110), silence(0.5), buzz(1.0, 220), words=words)
    scores = prosody.score(take)
    assert scores is not None
    assert scores["f0_s1"] == pytest.approx(110, rel=0.02)
    assert scores["f0_s2"] == pytest.approx(220, rel=0.02)
    assert scores["pause_seconds"] == pytest.approx(0.5, abs=0.03)
    assert scores["words"] / scores["seconds"] == pytest.approx(8 / 2.5, rel=0.03)
    assert scores["range_sum"] / scores["turns"] < 0.5  # monotone
    # Stretched to double length: half the rate.
    slow = make_take(buzz(2.0, 110), silence(1.0), buzz(2.0, 220), words=words)
    slower = prosody.score(slow)
    assert slower is not None
    assert slower["seconds"] / scores["seconds"] == pytest.approx(2, rel=0.03)


def test_sound_tags_are_no_words_of_the_rate(prosody: Prosody) -> None:
    texts = (
        "Well,",
        "(laughs)",
        "yes:",
        "(clears throat)",
        "...",
        "[S1](sighs)",
        "no.",
        "(really)",
    )
    words = tuple(SpokenWord(text, "[S1]", 0.1 * i) for i, text in enumerate(texts))
    scores = prosody.score(make_take(buzz(1.0), words=words))
    assert scores is not None and scores["words"] == 4
    alone = prosody.score(make_take(buzz(1.0), words=words[1:2]))
    assert alone is not None and alone["words"] is None
    # Laughter at the end of a text is no slower speech.
    steady = tuple(word(0.3 * i) for i in range(LONG))
    late = (SpokenWord("(laughs)", "[S1]", 9.0 + i) for i in range(9))
    assert drift(make_take(buzz(20.0), words=(*steady, *late))) == pytest.approx(1)


def test_words_after_the_last_sound_were_not_spoken(prosody: Prosody) -> None:
    words = tuple(word(0.25 * i) for i in range(8))
    whole, cut, silent = (
        prosody.score(make_take(*parts, words=words))
        for parts in ([buzz(2.0)], [buzz(1.1)], [buzz(1.1), silence(0.9)])
    )
    assert whole is not None and cut is not None and silent is not None
    assert (whole["words"], cut["words"], silent["words"]) == (8, 5, 5)
    # Cutting a take is no faster speech.
    assert cut["words"] / cut["seconds"] < 1.2 * whole["words"] / whole["seconds"]
    many = tuple(word(0.1 * i) for i in range(LONG))
    assert drift(make_take(buzz(3.0), words=many)) == pytest.approx(1)
    assert drift(make_take(buzz(2.5), words=many)) is None


def test_a_few_voiced_frames_say_nothing(prosody: Prosody) -> None:
    """Half a second voiced is the least, of a turn, a speaker or a take."""
    few = prosody.score(make_take(buzz(0.3, 120), words=(word(0.0),)))
    assert few is not None and few["turns"] == 0
    for name in ("f0_s1", "f0_s2", "one_tone", "tone", "energy_range"):
        assert few[name] is None, name
    # Two short turns of one speaker are enough together, not each; the other's one is not.
    words = (word(0.0), word(0.4, 2), word(0.7))
    parts = (buzz(0.4, 120), buzz(0.3, 220), buzz(0.4, 120))
    some = prosody.score(make_take(*parts, words=words))
    assert some is not None and some["turns"] == 0
    assert some["f0_s1"] == pytest.approx(120, rel=0.03) and some["f0_s2"] is None
    assert some["one_tone"] is not None and some["energy_range"] is not None


def test_the_hum_of_a_silence_is_no_pitch(prosody: Prosody) -> None:
    parts = (buzz(1.0, 120), buzz(3.0, 200, level=-60))
    scores = prosody.score(make_take(*parts, words=(word(0.0),)))
    assert scores is not None
    assert scores["f0_s1"] == pytest.approx(120, rel=0.02)
    assert scores["seconds"] == pytest.approx(1.0, abs=0.05)


def test_a_falling_pitch_has_a_slope_and_a_range(prosody: Prosody) -> None:
    time = np.arange(2 * RATE) / RATE
    hertz = 200 * 2 ** (-0.25 * time)  # 3 semitones a second
    phase = 2 * np.pi * np.cumsum(hertz) / RATE
    wave = 0.1 * sum(np.sin(k * phase) / k for k in range(1, 9))
    scores = prosody.score(make_take(np.asarray(wave), words=(word(0.0),)))
    assert scores is not None and scores["turns"] == 1
    assert scores["slope_sum"] == pytest.approx(-3, abs=0.2)
    assert scores["range_sum"] == pytest.approx(0.8 * 6, abs=0.4)
    assert prosody.score(make_take(silence(1.0))) is None
    assert scores["one_tone"] < 20 and prosody.failures(scores) == []


def test_a_hum_under_speech_without_a_pitch_is_said_to_be_one(prosody: Prosody) -> None:
    noise = 0.1 * np.random.default_rng(0).standard_normal(2 * RATE)
    scores = prosody.score(make_take(noise + buzz(2.0, 200, level=-16), words=(word(0.0),)))
    assert scores is not None and scores["one_tone"] > 90
    assert scores["tone"] == pytest.approx(200, rel=0.02)
    (reason,) = prosody.failures(scores)
    assert f"is one tone of {scores['tone']:.0f} Hz, as of a hum" in reason


def test_speeding_up_shows_as_drift(prosody: Prosody) -> None:
    steady = tuple(word(0.3 * i) for i in range(LONG))
    assert drift(make_take(buzz(9.0), words=steady)) == pytest.approx(1)
    times = np.cumsum(np.repeat([0.3, 0.25, 0.2], LONG // 3)) - 0.3
    hurried = make_take(buzz(float(times[-1]) + 0.3), words=tuple(word(float(t)) for t in times))
    assert drift(hurried) == pytest.approx(1.5, rel=0.06)
    assert drift(make_take(buzz(9.0), words=steady[:-1])) is None
    scores = prosody.score(hurried)
    assert scores is not None
    reasons = prosody.failures(scores)
    assert reasons[0] == f"its last third is {scores['drift']:.2f} × as fast as its first"
    assert reasons[1].endswith("as of a hum")  # a buzz has one pitch all along


# ------------------------------------------------------------------------------------------ quality


def test_opinions_are_passed_on_and_silence_has_none() -> None:
    heard: list[np.ndarray] = []

    def judge(wave: np.ndarray) -> dict[str, float]:
        heard.append(wave)
        return {"ovrl_mos": 3.1, "sig_mos": 3.5, "bak_mos": 4.0, "p808_mos": 3.7}

    metric = Quality(judge, {})
    scores = metric.score(make_take(buzz(1.0, level=3.0)))
    assert scores == {"overall": 3.1, "speech": 3.5, "background": 4.0, "p808": 3.7}
    assert len(heard[0]) == 16_000 and np.abs(heard[0]).max() <= 1
    assert metric.score(make_take(silence(1.0))) is None


def test_a_missing_judge_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *arguments: Any, **more: Any) -> Any:
        if name == "speechmos":
            raise ImportError(f"No module named {name!r}")
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(Unavailable, match=r'speechmos .*pip install "dia2-jax\[dnsmos\]"'):
        Quality.open(Options())
