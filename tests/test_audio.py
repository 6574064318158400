"""Reading and writing audio files: formats, rates, damage, streams."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from dia2_jax import audio
from dia2_jax.errors import AudioError

RATE = audio.SAMPLE_RATE


def tone(seconds: float, rate: int = RATE, hz: float = 440.0, level: float = 0.5) -> np.ndarray:
    return (level * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype("f4")


def snr(reference: np.ndarray, other: np.ndarray) -> float:
    """Signal to noise in dB, away from the edges where a resampler has half its window."""
    inner = slice(len(reference) // 10, -len(reference) // 10)
    noise = np.square(reference[inner] - other[inner]).sum() + 1e-20
    return float(10 * np.log10(np.square(reference[inner]).sum() / noise))


# ------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 24_000, 44_100, 48_000])
def test_any_rate_and_channel_count_reads_as_24k_mono(
    tmp_path: Path, rate: int, channels: int
) -> None:
    # Each channel holds a share of the tone; their mean is the tone at half its level.
    shares = np.linspace(0.2, 0.8, channels) if channels > 1 else np.array([0.5])
    soundfile.write(tmp_path / "a.wav", tone(0.5, rate)[:, None] * shares, rate, subtype="FLOAT")
    wave = audio.read_audio(tmp_path / "a.wav")
    assert wave.dtype == np.float32
    assert wave.shape == (RATE // 2,)
    assert snr(tone(0.5) * 0.5, wave) > 60


@pytest.mark.parametrize(
    ("suffix", "subtype", "least_snr"),
    [
        ("wav", "PCM_16", 80),
        ("wav", "PCM_24", 80),
        ("wav", "ULAW", 25),
        ("flac", "PCM_16", 80),
        ("ogg", "VORBIS", 15),
        ("mp3", "MPEG_LAYER_III", 15),
    ],
)
def test_formats(tmp_path: Path, suffix: str, subtype: str, least_snr: float) -> None:
    path = tmp_path / f"speech.{suffix}"
    soundfile.write(path, tone(1.0), RATE, subtype=subtype)
    wave = audio.read_audio(path)
    assert abs(len(wave) - RATE) <= (2_400 if suffix == "mp3" else 0)
    n = min(len(wave), RATE)
    assert snr(tone(1.0)[:n], wave[:n]) > least_snr


def test_another_target_rate(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(0.5), RATE)
    assert snr(tone(0.5, 16_000), audio.read_audio(tmp_path / "a.wav", 16_000)) > 60


def message(path: Path | str, **kwargs: int) -> str:
    with pytest.raises(AudioError) as caught:
        audio.read_audio(path, **kwargs)
    text = str(caught.value)
    assert str(path) in text
    return text


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert "no such audio file; give the path" in message(tmp_path / "none.wav")
    assert "is a folder" in message(tmp_path)


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "a.wav").touch()
    assert "empty (0 bytes)" in message(tmp_path / "a.wav")


def test_file_without_samples(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(0, "f4"), RATE)
    assert "holds no samples" in message(tmp_path / "a.wav")


@pytest.mark.parametrize("suffix", ["wav", "mp3", "txt"])
def test_text_is_not_audio(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_text("[S1] Hello there. " * 100)
    assert "cannot be read as audio" in message(path)
    assert "ffmpeg -i 'a." in message(path)


def test_damaged_flac(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    noise = np.random.default_rng(0).normal(0, 0.1, RATE * 2)
    soundfile.write(path, noise, RATE)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "lost sync); it is damaged or of another format: copy it again" in message(path)


def test_non_finite_file(tmp_path: Path) -> None:
    wave = tone(0.1)
    wave[7] = np.nan
    soundfile.write(tmp_path / "a.wav", wave, RATE, subtype="FLOAT")
    assert "1 samples are NaN or infinite, the first at index 7" in message(tmp_path / "a.wav")


def test_impossible_rate(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="sample_rate: 0 samples per second"):
        audio.read_audio(tmp_path / "a.wav", 0)


# --------------------------------------------------------------------------------------- resampling


@given(
    length=st.integers(0, 3_000),
    rates=st.tuples(
        st.sampled_from([8_000, 11_025, 16_000, 22_050, 24_000, 44_100]),
        st.sampled_from([16_000, 24_000, 48_000]),
    ),
)
def test_resampled_length_is_the_rounded_one(length: int, rates: tuple[int, int]) -> None:
    out = audio.resample(np.zeros(length, np.float32), *rates)
    expected = round(length * rates[1] / rates[0])
    assert len(out) == (max(1, expected) if length else 0)
    assert out.dtype == np.float32


def test_resampling_does_not_shift() -> None:
    click = np.zeros(4_800, np.float32)
    click[2_400] = 1.0
    assert abs(int(audio.resample(click, 48_000, 24_000).argmax()) - 1_200) <= 1


def test_equal_rates_change_nothing() -> None:
    assert np.array_equal(audio.resample(tone(0.1), RATE, RATE), tone(0.1))


@pytest.mark.parametrize("wave", [np.zeros((2, 5), np.float32), np.zeros(5, np.int16)])
def test_only_float_mono_resamples(wave: np.ndarray) -> None:
    with pytest.raises(AudioError, match="mono waveform|float samples"):
        audio.resample(wave, RATE, 16_000)


# ------------------------------------------------------------------------------------------ writing


@given(st.lists(st.integers(-32_768, 32_767), max_size=200))
def test_pcm16_survives_the_round_trip_bit_for_bit(samples: list[int]) -> None:
    pcm = np.array(samples, "<i2")
    assert audio.to_pcm16((pcm / 32_768).astype(np.float32)) == pcm.tobytes()


def test_pcm16_clips_and_rounds() -> None:
    wave = np.array([2.0, 1.0, -1.0, -7.0, 0.4 / 32_768, 0.6 / 32_768], np.float32)
    assert np.frombuffer(audio.to_pcm16(wave), "<i2").tolist() == [
        32_767, 32_767, -32_768, -32_768, 0, 1,
    ]  # fmt: skip


def test_written_wav_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "a.wav"
    audio.write_wav(path, tone(0.3), RATE)
    assert np.abs(audio.read_audio(path) - tone(0.3)).max() <= 0.5 / 32_768
    info = soundfile.info(path)
    assert (info.samplerate, info.channels, info.subtype, info.frames) == (RATE, 1, "PCM_16", 7_200)
    assert [item.name for item in path.parent.iterdir()] == ["a.wav"]


def test_written_file_has_ordinary_permissions(tmp_path: Path) -> None:
    audio.write_wav(tmp_path / "a.wav", tone(0.1))
    (tmp_path / "b").touch()
    assert (tmp_path / "a.wav").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_samples_leave_the_old_file(tmp_path: Path, bad: float) -> None:
    path = tmp_path / "a.wav"
    audio.write_wav(path, tone(0.1))
    before = path.read_bytes()
    wave = tone(0.1)
    wave[3:5] = bad
    with pytest.raises(AudioError, match="2 samples are NaN or infinite, the first at index 3"):
        audio.write_wav(path, wave)
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["a.wav"]


def test_failed_write_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(AudioError, match=r"a\.wav: cannot be written \(No space left"):
        audio.write_wav(tmp_path / "a.wav", tone(0.1))
    assert list(tmp_path.iterdir()) == []


def test_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AudioError, match="cannot be written"):
        audio.write_wav(tmp_path / "file" / "a.wav", tone(0.1))
    with pytest.raises(AudioError, match="cannot be written"):
        audio.WavWriter(tmp_path / "file" / "a.wav")


# ---------------------------------------------------------------------------------------- streaming


@given(cuts=st.lists(st.integers(0, 2_400), max_size=5))
def test_streamed_wav_equals_the_whole(tmp_path_factory: pytest.TempPathFactory, cuts) -> None:
    folder = tmp_path_factory.mktemp("stream")
    audio.write_wav(folder / "whole.wav", tone(0.1))
    with audio.WavWriter(folder / "parts.wav") as out:
        for part in np.split(tone(0.1), sorted(cuts)):
            out.write(part)
    assert (folder / "parts.wav").read_bytes() == (folder / "whole.wav").read_bytes()


def test_growing_wav_is_readable_before_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    out = audio.WavWriter(path)
    out.write(tone(0.1))
    assert struct.unpack_from("<I", path.read_bytes(), 4) == (0xFFFFFFFF,)
    assert np.abs(audio.read_audio(path) - tone(0.1)).max() <= 0.5 / 32_768
    out.write(tone(0.1))
    out.close()
    out.close()
    assert soundfile.info(path).frames == 4_800
    with pytest.raises(AudioError, match="after close"):
        out.write(tone(0.1))


def test_an_exception_leaves_a_valid_recording(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    with pytest.raises(KeyboardInterrupt), audio.WavWriter(path) as out:
        out.write(tone(0.1))
        raise KeyboardInterrupt
    assert struct.unpack_from("<I", path.read_bytes(), 40) == (4_800,)
    assert len(audio.read_audio(path)) == 2_400


def test_pipe_gets_samples_at_once_and_keeps_the_unknown_length() -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb", buffering=0) as source, os.fdopen(writing, "wb") as sink:
        with audio.WavWriter(sink, 16_000) as out:
            assert source.read(44)[40:] == b"\xff\xff\xff\xff"
            out.write(np.full(3, 0.25, np.float32))
            assert source.read(6) == struct.pack("<3h", 8_192, 8_192, 8_192)
        assert not sink.closed


def test_standard_output() -> None:
    program = (
        "import numpy as np; from dia2_jax.audio import WavWriter\n"
        "with WavWriter('-') as out: out.write(np.full(5, 0.5, np.float32))"
    )
    data = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout
    assert data[:4] == b"RIFF"
    assert data[44:] == struct.pack("<h", 16_384) * 5


def test_reader_that_leaves_is_not_hidden() -> None:
    reading, writing = os.pipe()
    sink = os.fdopen(writing, "wb", buffering=0)
    out = audio.WavWriter(sink)
    os.close(reading)
    with pytest.raises(BrokenPipeError), out:
        out.write(tone(0.1))
    sink.close()


# ------------------------------------------------------------------------------------- voiced spans


def silence(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * RATE), np.float32)


@pytest.mark.parametrize("noise", [0.0, 0.003])
def test_speech_between_silences_is_found(noise: float) -> None:
    wave = np.concatenate([silence(0.4), tone(1.0), silence(0.1), tone(0.5, level=0.1), silence(2)])
    wave = wave + np.random.default_rng(0).normal(0, noise, len(wave)).astype("f4")
    start, end = audio.voiced_span(wave, RATE)
    assert start == pytest.approx(0.4, abs=0.03)
    assert end == pytest.approx(2.0, abs=0.03)


def test_short_speech_in_a_long_recording() -> None:
    wave = np.concatenate([silence(12), tone(0.3), silence(12)])
    assert audio.voiced_span(wave, RATE) == pytest.approx((12.0, 12.3), abs=0.03)


def test_clicks_and_silence_are_not_speech() -> None:
    clicks = silence(1.0)
    clicks[5_000:5_050] = 0.9
    assert audio.voiced_span(clicks, RATE) == (0.0, 0.0)
    assert audio.voiced_span(silence(1.0), RATE) == (0.0, 0.0)
    assert audio.voiced_span(silence(0), RATE) == (0.0, 0.0)


@given(seconds=st.floats(0.0, 0.5), rate=st.sampled_from([8_000, 24_000, 44_100]))
def test_span_stays_inside_the_recording(seconds: float, rate: int) -> None:
    wave = tone(seconds, rate)
    start, end = audio.voiced_span(wave, rate)
    assert 0 <= start <= end <= len(wave) / rate
    if seconds > 0.1:
        assert end - start > seconds - 0.06


def test_a_constant_offset_is_not_speech() -> None:
    wave = silence(3) + np.float32(0.3)
    assert audio.voiced_span(wave, RATE) == (0.0, 0.0)
    wave[24_000:36_000] += tone(0.5)
    assert audio.voiced_span(wave, RATE) == pytest.approx((1.0, 1.5), abs=0.03)
