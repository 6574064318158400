"""Speech that is made worse on purpose: each metric moves by what was done, and others stay.

Recorded speech of known words and times goes through the real metrics, then a whole run and its
degraded copy through `eval.compare`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import pytest

from dia2_jax.audio import SAMPLE_RATE as RATE
from dia2_jax.audio import read_audio
from eval.scoring.comparison import compare, read_run
from eval.scoring.dialogue import Dialogue
from eval.scoring.evaluation import evaluate
from eval.scoring.metric import Metric, Options
from eval.scoring.prompts import Prompt, PromptSet
from eval.scoring.prosody import Prosody
from eval.scoring.quality import Quality
from eval.scoring.run_folder import RunFolder
from eval.scoring.scripts import SpokenWord, script_words
from eval.scoring.signal import Signal
from eval.scoring.speakers import Speakers
from eval.scoring.stopping import Stopping
from eval.scoring.takes import Take
from eval.scoring.voice_activity import VoiceActivity
from eval.scoring.word_times import WordTimes

SPEECH = Path(__file__).parent.parent / "golden" / "speech"
NAMES = ("garden", "harbour", "pause", "river", "tickets")
#: Those of whole runs: phrases of them, by the first word and the one after the last. Short, and as
#: many as `compare` asks for.
PHRASES = (
    ("river", 0, 6), ("garden", 0, 8), ("garden", 8, 16), ("harbour", 8, 20), ("tickets", 0, 11),
    ("pause", 5, 15),
)  # fmt: skip
KINDS = (Quality, Signal, Stopping, VoiceActivity, WordTimes, Dialogue, Prosody)

Degrade = Callable[[Take], Take]


@pytest.fixture(scope="module")
def metrics() -> dict[str, Metric]:
    return {kind.name: kind.open(Options()) for kind in KINDS}


def recorded(name: str) -> Take:
    """A recording, its words with times and speakers, and its length as that of the reference."""
    script = (SPEECH / f"{name}.txt").read_text().strip()
    times = json.loads((SPEECH / f"{name}.json").read_text())
    words = tuple(
        SpokenWord(word["text"], speaker, word["start"], word["end"])
        for word, (_, speaker) in zip(times, script_words(script), strict=True)
    )
    take = Take("generated", Prompt("speech", name, "line", script),
                read_audio(SPEECH / f"{name}.mp3"), RATE, words)  # fmt: skip
    start, end = take.audible
    return replace(take, reference_seconds=end - start)


def phrase(name: str, first: int, end: int) -> Take:
    """Some words of a recording, each side cut 0.1 s before the next word, in a pause."""
    whole = recorded(name)
    words = whole.words[first:end]
    edges = [0.0, *(w.start - 0.1 for w in whole.words[1:]), whole.seconds]
    begin, stop = edges[first], edges[end]
    moved = tuple(replace(w, start=w.start - begin, end=(w.end or 0) - begin) for w in words)
    script = " ".join(f"{word.speaker} {word.text}" for word in words)
    take = replace(
        whole,
        prompt=Prompt("speech", f"{name}-{first}", "line", script),
        wave=whole.wave[round(begin * RATE) : round(stop * RATE)],
        words=moved,
    )
    first_sound, last_sound = take.audible
    return replace(take, reference_seconds=last_sound - first_sound)


def noisy(take: Take, below: float = 10.0) -> Take:
    """White noise, so many dB below the speech."""
    noise = np.random.default_rng(0).standard_normal(len(take.wave))
    level = np.sqrt(np.mean(take.wave**2)) * 10 ** (-below / 20)
    return replace(take, wave=(take.wave + level * noise).astype(np.float32))


def stretched(take: Take, times: float = 1.25) -> Take:
    """As long as `times` before, the pitch kept, the words where they are then."""
    wave = librosa.effects.time_stretch(take.wave, rate=1 / times)
    words = tuple(replace(w, start=times * w.start, end=times * (w.end or 0)) for w in take.words)
    return replace(take, wave=wave, words=words)


def higher(take: Take, times: float = 1.25) -> Take:
    """Pitch times so much, the length kept."""
    wave = librosa.effects.pitch_shift(take.wave, sr=RATE, n_steps=12 * np.log2(times))
    return replace(take, wave=wave)


def cut(take: Take, seconds: float = 1.5) -> Take:
    """Without its last seconds."""
    return replace(take, wave=take.wave[: -round(seconds * RATE)])


def repeating(take: Take, seconds: float = 1.5) -> Take:
    """Its last seconds of speech twice."""
    end = round(take.audible[1] * RATE)
    tail = take.wave[end - round(seconds * RATE) : end]
    return replace(take, wave=np.concatenate([take.wave[:end], tail, take.wave[end:]]))


def changes(take: Take) -> list[int]:
    """Places of the words at which another speaker begins."""
    speakers = [word.speaker for word in take.words]
    return [n for n in range(1, len(speakers)) if speakers[n] != speakers[n - 1]]


def apart(take: Take, places: Sequence[int], seconds: float = 0.512) -> Take:
    """More silence before some words (16 steps of the detector); all are reported where they are
    then. Less than none moves what follows back over what is before, and mixes them."""
    wave, words, added = take.wave, [], 0.0
    for place, word in enumerate(take.words):
        if place in places:
            at = round((word.start - 0.05 + added) * RATE)
            moved = at + round(seconds * RATE)
            together = np.zeros(len(wave) + moved - at, np.float32)
            together[:at] = wave[:at]
            together[moved:] += wave[at:]
            wave, added = together, added + seconds
        words.append(replace(word, start=word.start + added, end=(word.end or 0) + added))
    return replace(take, wave=wave, words=tuple(words))


def late(take: Take, seconds: float = 0.3) -> Take:
    """All words reported later than they are."""
    return replace(take, words=tuple(replace(w, start=w.start + seconds) for w in take.words))


def score(metric: Metric, take: Take) -> dict[str, Any]:
    found = metric.score(take)
    assert found is not None
    return found


# ---------------------------------------------------------------------------------- single metrics


def test_noise_costs_opinion_scores_by_how_loud_it_is(metrics: dict[str, Metric]) -> None:
    take = recorded("river")
    clean, soft, loud = (
        score(metrics["quality"], one) for one in (take, noisy(take, 20), noisy(take, 10))
    )
    for figure, first, second in (
        ("overall", 0.5, 0.3), ("background", 1.0, 0.4), ("p808", 0.5, 0.5),
    ):  # fmt: skip
        assert clean[figure] - soft[figure] > first, figure
        assert soft[figure] - loud[figure] > second, figure
    assert clean["overall"] > 3
    # The floor is the noise; the words are still there.
    level = 20 * np.log10(np.sqrt(np.mean(take.wave**2)))
    assert score(metrics["signal"], noisy(take, 10))["floor"] == pytest.approx(level - 10, abs=1)
    assert score(metrics["word_times"], noisy(take, 20))["difference"] < 60


def test_stretching_changes_rate_and_length_and_keeps_pitch(metrics: dict[str, Metric]) -> None:
    take, times = recorded("river"), 1.25
    before, after = (score(metrics["prosody"], one) for one in (take, stretched(take, times)))
    rate = [one["words"] / one["seconds"] for one in (before, after)]
    assert rate[1] / rate[0] == pytest.approx(1 / times, rel=0.03)
    assert after["f0_s1"] == pytest.approx(before["f0_s1"], rel=0.03)
    length = score(metrics["stopping"], stretched(take, times))["length"]
    assert length == pytest.approx(times, rel=0.03)
    # Words that are reported where they were before are wrong by as much as they moved.
    assert score(metrics["word_times"], stretched(take, times))["difference"] < 30
    unmoved = score(metrics["word_times"], replace(stretched(take, times), words=take.words))
    moved = np.median([abs(times - 1) * word.start for word in take.words])
    assert unmoved["difference"] == pytest.approx(1000 * moved, rel=0.2)


@pytest.mark.parametrize(("name", "figure"), [("river", "f0_s1"), ("pause", "f0_s2")])
def test_a_higher_pitch_changes_pitch_alone(
    metrics: dict[str, Metric], name: str, figure: str
) -> None:
    take = recorded(name)
    before, after = (score(metrics["prosody"], one) for one in (take, higher(take, 1.25)))
    assert after[figure] / before[figure] == pytest.approx(1.25, rel=0.03)
    assert after["seconds"] == pytest.approx(before["seconds"], rel=0.03)


def test_what_is_cut_off_is_missing_at_the_end(metrics: dict[str, Metric]) -> None:
    take = recorded("river")
    spoken = take.audible[1] - take.audible[0]
    lost = 1.5 - (take.seconds - take.audible[1])
    shorter = score(metrics["stopping"], cut(take))
    assert shorter["length"] == pytest.approx(1 - lost / spoken, abs=0.03)
    assert score(metrics["stopping"], take)["paced"] and not shorter["paced"]
    ends = [score(metrics["voice_activity"], one)["end"] for one in (take, cut(take))]
    assert ends[0] - ends[1] == pytest.approx(lost, abs=0.15)


def test_speech_that_is_cut_off_is_no_faster(metrics: dict[str, Metric]) -> None:
    take = recorded("garden")
    before, after = (
        score(metrics["prosody"], one) for one in (take, cut(take, 0.45 * take.seconds))
    )
    rate = [one["words"] / one["seconds"] for one in (before, after)]
    assert after["words"] < 0.7 * before["words"]
    assert rate[1] / rate[0] == pytest.approx(1, abs=0.15)


def test_a_repeated_tail_is_sound_and_speech_after_the_text(metrics: dict[str, Metric]) -> None:
    take = recorded("river")
    before, after = (score(metrics["stopping"], one) for one in (take, repeating(take)))
    assert before["stops"] and not before["long_tail"]
    assert after["long_tail"] and not after["stops"]
    assert after["tail"] - before["tail"] == pytest.approx(1.5, abs=0.1)
    tails = [score(metrics["voice_activity"], one)["tail"] for one in (take, repeating(take))]
    assert tails[1] - tails[0] == pytest.approx(1.5, abs=0.2)


def test_gaps_grow_by_what_is_put_in(metrics: dict[str, Metric]) -> None:
    take = recorded("tickets")
    wider = apart(take, changes(take), 0.512)
    before, after = (score(metrics["dialogue"], one)["gap_lengths"] for one in (take, wider))
    # By the recording's own word times 0.34 and 0.37 s, which the detector hears 0.05 s shorter.
    assert before == pytest.approx([0.29, 0.32], abs=0.035)
    assert np.array(after) - before == pytest.approx([0.512, 0.512], abs=0.05)
    # The audio and what is reported of it moved together.
    assert score(metrics["word_times"], wider)["difference"] < 40


def test_a_pause_inside_a_turn_leaves_the_gaps(metrics: dict[str, Metric]) -> None:
    take = recorded("tickets")
    (first, second) = changes(take)
    # After "Yes," and before "newspaper." and "dinner.".
    hesitant = apart(take, [first + 1, second - 1, len(take.words) - 1], 0.608)
    before, after = (score(metrics["dialogue"], one)["gap_lengths"] for one in (take, hesitant))
    assert after == pytest.approx(before, abs=0.05)


@pytest.mark.parametrize("moved", [0.36, 0.64])
def test_overlapping_and_touching_turns_are_changes_without_a_gap(
    metrics: dict[str, Metric], moved: float
) -> None:
    """Turns that meet, and turns that overlap by 0.3 s: both count, nothing tells them apart."""
    take = recorded("tickets")
    closer = apart(take, changes(take), -moved)
    scores = [score(metrics["dialogue"], one) for one in (take, closer)]
    assert scores[1]["gap_lengths"] == [None, None]
    rows = [{"source": str(n), "scores": {"dialogue": one}} for n, one in enumerate(scores)]
    related = Dialogue.relate(rows)
    assert [(one["run_on"], one["changes"]) for one in related] == [(0, 2), (2, 2)]


def test_swapped_voices_are_heard_by_resemblyzer() -> None:
    pytest.importorskip("resemblyzer", reason="runs with the extra naturalness")
    metric = Speakers.open(Options())

    def row(take: Take) -> dict[str, Any]:
        scores = {"speakers": score(metric, take)}
        return {"set": "s", "id": take.prompt.id, "source": take.source, "scores": scores}

    other = {"[S1]": "[S2]", "[S2]": "[S1]"}
    takes = [replace(recorded(name), source="recording") for name in NAMES]
    spoken = [recorded(name) for name in ("tickets", "garden", "harbour")]
    swapped = [
        replace(t, words=tuple(replace(w, speaker=other[w.speaker]) for w in t.words))
        for t in spoken
    ]
    right = metric.relate([row(t) for t in (*takes, *spoken)])[len(takes) :]
    wrong = metric.relate([row(t) for t in (*takes, *swapped)])[len(takes) :]
    compared = sum(one["compared"] for one in right)
    assert compared >= 3
    assert sum(one["nearest"] for one in right) == compared
    assert sum(one["nearest"] for one in wrong) == 0
    nearness = [sum(one["own"] for one in found) / compared for found in (right, wrong)]
    assert nearness[0] - nearness[1] > 0.1


# --------------------------------------------------------------------------------------- whole runs


def make_run(
    folder: Path,
    metrics: list[Metric],
    degrade: Degrade = lambda take: take,
    count: int | None = None,
) -> Path:
    """A run over the phrases as if a model had spoken them."""
    takes = {take.prompt.id: take for take in (phrase(*one) for one in PHRASES[:count])}
    prompts = PromptSet("speech", folder, "0", tuple(take.prompt for take in takes.values()))
    run = RunFolder(folder, {"checkpoint": folder.name})
    run.describe({})
    evaluate(
        lambda source, prompt, seed: degrade(takes[prompt.id]),
        [prompts],
        metrics,
        run,
        lambda prompt: [("generated", 0)],
    )
    return folder


def verdicts(first: Path, second: Path) -> dict[str, str]:
    found = compare(read_run(first), read_run(second), list(KINDS))
    return {f"{d.metric}.{d.figure.name}": d.verdict for d in found if d.group == "all"}


def test_word_times_do_not_depend_on_what_was_judged_before(metrics: dict[str, Metric]) -> None:
    takes = [recorded(path.stem) for path in sorted(SPEECH.glob("*.mp3"))]
    judge = metrics["word_times"]
    first = [judge.score(take) for take in takes]
    for take in takes:
        judge.score(noisy(take, 5))
    assert [judge.score(take) for take in takes] == first


def test_runs_agree_and_a_degraded_copy_is_worse_where_it_was_degraded(
    tmp_path: Path, metrics: dict[str, Metric]
) -> None:
    used = [metrics[kind.name] for kind in KINDS if kind is not Prosody]
    plain, again = make_run(tmp_path / "plain", used), make_run(tmp_path / "again", used, count=2)
    rows, repeated = (list(read_run(folder).rows.values()) for folder in (plain, again))
    for one, two in zip(rows[:2], repeated, strict=True):
        for name in one["scores"]:  # which of them differs is the question, if one does
            assert two["scores"][name] == one["scores"][name], name
        assert two == one
    found = verdicts(plain, plain)
    assert {"quality.overall", "dialogue.gap", "word_times.difference"} <= set(found)
    assert set(found.values()) == {"no evidence"}

    worse = make_run(tmp_path / "worse", used, lambda take: late(noisy(repeating(take), 20)))
    found = verdicts(plain, worse)
    changed = {name for name, what in found.items() if what != "no evidence"}
    # DNSMOS's opinion of the speech apart from the background may rise with soft noise.
    assert {name for name in changed if found[name] == "better"} <= {"quality.speech"}
    assert {name for name in changed if found[name] == "worse"} >= {
        "quality.overall", "quality.background", "quality.p808", "signal.floor",
        "stopping.long_tail", "stopping.stops", "stopping.length", "stopping.paced",
        "word_times.difference", "word_times.within_80", "word_times.within_160",
    }  # fmt: skip
    # Longer is neither better nor worse of itself; over a second is, which is said above.
    assert found["stopping.tail"] == found["voice_activity.speech_tail"] == "differs"
    # What was not touched.
    assert {"signal.clipping", "stopping.silent", "stopping.truncated"} & changed == set()
    back = verdicts(worse, plain)
    assert back["quality.overall"] == back["word_times.difference"] == "better"


@pytest.mark.parametrize(
    "degrade", [lambda take: cut(take, 0.45 * take.seconds), noisy], ids=["cut", "noise"]
)
def test_a_run_that_is_cut_off_or_noisy_is_better_nowhere(
    tmp_path: Path, metrics: dict[str, Metric], degrade: Degrade
) -> None:
    used = [metrics[kind.name] for kind in (Signal, Stopping, VoiceActivity, WordTimes, Dialogue)]
    plain = make_run(tmp_path / "plain", used)
    found = verdicts(plain, make_run(tmp_path / "worse", used, degrade))
    assert [name for name, what in found.items() if what == "better"] == []
    assert found["stopping.length"] == "worse"
