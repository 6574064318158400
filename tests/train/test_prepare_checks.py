"""Checks of recordings, each at its threshold, and codes of several lengths at once."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from prepare_speech import speech

from train.preparation.checks import (
    Limits,
    check_channel,
    check_recording,
    check_span,
    check_text_rate,
    loudest_level,
)
from train.preparation.encode import encode_waves, pad_to_frames
from train.preparation.recordings import as_recording, read_recording, to_mono
from train.preparation.records import Recording, Rejected, TimedWord

LIMITS = Limits()


def recording(wave: np.ndarray, rate: int = 24_000) -> Recording:
    return Recording(np.atleast_2d(wave.astype(np.float32)).T, rate)


def refused(wave: np.ndarray, stated: float | None = None, limits: Limits = LIMITS) -> str | None:
    try:
        check_recording(recording(wave), stated, limits, "here")
    except Rejected as error:
        assert str(error).startswith("here: ")
        return error.reason
    return None


def test_lengths() -> None:
    wave = speech(2.0)
    assert refused(wave) is None
    assert refused(wave, limits=replace(LIMITS, min_seconds=2.0, max_seconds=2.0)) is None
    assert refused(wave, limits=replace(LIMITS, min_seconds=2.1)) == "too_short"
    assert refused(wave, limits=replace(LIMITS, max_seconds=1.9)) == "too_long"
    assert refused(wave, stated=2.4) is None
    assert refused(wave, stated=2.6) == "duration_mismatch"


def test_clipping_is_a_share_of_all_channels() -> None:
    wave = speech(2.0)
    wave[:960] = 1.0  # 2 %
    assert refused(wave) == "clipped"
    assert refused(wave, limits=replace(LIMITS, max_clipping=0.02)) is None
    stereo = Recording(np.stack([wave, -wave], axis=1), 24_000)  # whose mix is silent
    with pytest.raises(Rejected, match=r"here: 2\.00 % of the samples are at full scale"):
        check_recording(stereo, None, LIMITS, "here")


def test_silence_is_the_loudest_tenth_of_a_second() -> None:
    quiet = 1e-4 * np.random.default_rng(0).standard_normal(72_000)
    assert refused(np.zeros(72_000)) == "silent"
    assert refused(quiet) == "silent"
    quiet[30_000:40_000] += 0.1
    assert refused(quiet) is None
    tone = 0.5 * np.sqrt(2) * np.sin(2 * np.pi * 100 * np.arange(24_000) / 24_000)
    assert loudest_level(recording(tone)) == pytest.approx(-6.02, abs=0.01)
    assert loudest_level(recording(np.zeros(10))) == -120


def test_an_offset_is_no_sound() -> None:
    assert refused(np.full(72_000, 0.2)) == "silent"
    assert refused(0.2 + 1e-4 * np.random.default_rng(0).standard_normal(72_000)) == "silent"


def test_silence_is_that_of_the_channel_that_is_taken() -> None:
    wave = speech()
    for samples, channel in (([0 * wave, wave], "left"), ([wave, -wave], "mix")):
        stereo = Recording(np.stack(samples, axis=1), 24_000)
        check_recording(stereo, None, Limits(), "here")
        mono = to_mono(stereo, channel, 24_000, "here")
        with pytest.raises(Rejected, match=r"here: its sound .*--channel") as error:
            check_channel(mono, 24_000, Limits(), "here")
        assert error.value.reason == "silent"
    check_channel(to_mono(stereo, "right", 24_000, "here"), 24_000, Limits(), "here")


def test_text_of_another_length_than_the_speech() -> None:
    wave = speech(4.0)

    def rate(text: str, limits: Limits = LIMITS) -> str | None:
        try:
            check_text_rate(text.split(), wave, 24_000, limits, "here")
        except Rejected as error:
            return error.reason
        return None

    assert rate("This is what somebody says.") is None
    assert rate("Yes.") == "text_ratio"
    assert rate("Yes.", replace(LIMITS, min_text_rate=0.5)) is None
    assert rate("on and on " * 20) == "text_ratio"


def test_words_stay_inside_the_audio_in_the_numbers_that_are_stored() -> None:
    words = [TimedWord("a", 0.1, 0.2), TimedWord("b", 0.44, 2.5)]
    found = check_span(words, 2.0, "here")
    assert [(w.start, w.end) for w in found] == [
        (float(np.float32(0.1)), float(np.float32(0.2))),
        (float(np.float32(0.44)), 2.0),
    ]
    with pytest.raises(Rejected, match=r"'b' starts at 0\.44 s, the audio ends at 0\.40 s"):
        check_span(words, 0.4, "here")


# -------------------------------------------------------------------------------------------- audio


def test_damaged_audio_says_why(tmp_path: Path) -> None:
    def reason(source: Path | bytes, longest: float = 9.0) -> tuple[str, str]:
        with pytest.raises(Rejected) as error:
            read_recording(source, "here", longest)
        return error.value.reason, str(error.value)

    (tmp_path / "bad.wav").write_bytes(b"RIFF and nothing else of use")
    (tmp_path / "empty.wav").write_bytes(b"")
    assert reason(tmp_path / "none.wav") == ("missing_audio", "here: there is no such file")
    for name in ("bad.wav", "empty.wav"):
        code, message = reason(tmp_path / name)
        assert code == "unreadable_audio" and name in message
    assert reason(b"no audio") == (
        "unreadable_audio", "here: cannot be read as audio (Format not recognised)",
    )  # fmt: skip
    for wave, word in ((np.zeros(0), "no samples"), (np.full(9, np.nan), "NaN or infinite")):
        file = io.BytesIO()
        soundfile.write(file, wave.astype(np.float32), 24_000, format="WAV", subtype="FLOAT")
        code, message = reason(file.getvalue())
        assert code == "unreadable_audio" and word in message
    soundfile.write(tmp_path / "long.wav", speech(3.0), 24_000)
    assert reason(tmp_path / "long.wav", longest=2.0) == (
        "too_long", "here: 3.0 s, --max-seconds is 2",
    )  # fmt: skip


def test_decoded_samples_of_a_data_set() -> None:
    whole = (speech() * 32_767).astype(np.int16)
    np.testing.assert_allclose(
        as_recording(whole, 24_000, "x", 9).samples[:, 0], speech(), atol=1e-4
    )
    stereo = as_recording(np.stack([speech(), speech()]), 24_000, "x", 9)
    assert stereo.samples.shape == (48_000, 2) and stereo.seconds == 2
    for array, rate in ((np.zeros((2, 2, 2)), 24_000), ([], 24_000), (speech(), None)):
        with pytest.raises(Rejected, match="x: "):
            as_recording(array, rate, "x", 9)


# ----------------------------------------------------------------------------------------- encoding


def test_codes_do_not_depend_on_their_batch(tiny_model: object) -> None:
    codec = tiny_model.codec  # type: ignore[attr-defined]
    lengths = [2.0, 0.7, 1.3, 0.31, 1.0]
    waves = [speech(seconds, seed=i) for i, seconds in enumerate(lengths)]
    found = encode_waves(codec, waves, codebooks=8, batch=2)
    assert [codes.shape for codes in found] == [(25, 8), (9, 8), (17, 8), (4, 8), (13, 8)]
    for wave, codes in zip(waves, found, strict=True):
        (alone,) = encode_waves(codec, [wave], codebooks=8, batch=2)
        np.testing.assert_array_equal(codes, alone)
    # Silence behind it is not heard: the codes of a frame are of what came before.
    padded = np.pad(waves[3], (0, 4 * 1920 - len(waves[3])))
    np.testing.assert_array_equal(encode_waves(codec, [padded], 8, 2)[0], found[3])
    assert encode_waves(codec, [], codebooks=8, batch=2) == []


def test_padding_is_silence_up_to_whole_frames() -> None:
    wave = np.ones(100, np.float32)
    np.testing.assert_array_equal(pad_to_frames(wave, 3, 40), [*[1] * 100, *[0] * 20])
    np.testing.assert_array_equal(pad_to_frames(wave, 2, 40), wave)
