"""Voices: prepared from recordings of every kind, kept in a file, refused if they cannot serve."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import soundfile

from dia2_jax import Dia2, Turn, Voice
from dia2_jax.errors import AudioError, Dia2Error, PrefixError
from dia2_jax.generation.prefix import PrefixTurn
from dia2_jax.text.timing import WordTime
from dia2_jax.voice import codec_fingerprint, prefix_turns

WORDS = [WordTime("Hello", 0.2, 0.6), WordTime("there.", 0.7, 1.2)]


def speech(seconds: float = 2.0, rate: int = 24_000, seed: int = 0) -> np.ndarray:
    """Noise in the rhythm of words, with silence around it."""
    time = np.arange(round(seconds * rate)) / rate
    loud = (np.sin(2 * np.pi * 3 * time) > -0.5) & (time > 0.2) & (time < seconds - 0.2)
    noise = np.random.default_rng(seed).standard_normal(len(time))
    return (0.1 * noise * loud).astype(np.float32)


@pytest.fixture(scope="module")
def voice(tiny_model: Dia2) -> Voice:
    return tiny_model.prepare_voice(speech(), words=WORDS)


# ---------------------------------------------------------------------------------------- preparing


def test_a_voice_is_the_codes_and_the_words(tiny_model: Dia2, voice: Voice) -> None:
    assert voice.codes.dtype == np.int32 and voice.codes.shape == (8, 25)
    np.testing.assert_array_equal(voice.codes, tiny_model.codec.encode(speech()[None])[0])
    assert voice.words == tuple(WORDS)
    assert voice.codec == codec_fingerprint(tiny_model.codec)


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3"])
def test_recordings_of_any_rate_and_channels(tiny_model: Dia2, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"anna.{suffix}"
    stereo = np.stack([speech(rate=44_100), 0.5 * speech(rate=44_100)], axis=1)
    soundfile.write(path, stereo, 44_100)
    found = tiny_model.prepare_voice(path, transcript="Hello there, it is me.")
    # MP3 pads: its frames are 1,152 samples.
    assert 25 <= found.codes.shape[1] <= (27 if suffix == "mp3" else 25)
    assert [word.text for word in found.words] == ["Hello", "there,", "it", "is", "me."]
    assert found.words[0].start == pytest.approx(0.2, abs=0.1)
    assert found.words[-1].end == pytest.approx(1.8, abs=0.2)


def test_without_words_the_recording_is_transcribed(
    tiny_model: Dia2, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recognised(wave: np.ndarray, model: object, *, sample_rate: int) -> list:
        assert wave.shape == (48_000,) and model == "tiny.en" and sample_rate == 24_000
        return [("Hello", 0.2, 0.6), ("you", 0.8, 1.1)]

    monkeypatch.setattr("dia2_jax.voice.transcribe", recognised)
    found = tiny_model.prepare_voice(speech(), recognizer="tiny.en")
    assert found.words == (WordTime("Hello", 0.2, 0.6), WordTime("you", 0.8, 1.1))
    monkeypatch.setattr("dia2_jax.voice.transcribe", lambda *_, **__: [])
    with pytest.raises(PrefixError, match="no word was found in it; give words or a transcript"):
        tiny_model.prepare_voice(speech())


def test_without_the_extra_it_says_how_to_install_it(
    tiny_model: Dia2, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "faster_whisper", None)
    with pytest.raises(Dia2Error, match=r'pip install "dia2-jax\[transcribe\]".*transcript'):
        tiny_model.prepare_voice(speech())


def test_what_cannot_be_a_voice(tiny_model: Dia2, tmp_path: Path) -> None:
    prepare = tiny_model.prepare_voice
    with pytest.raises(PrefixError, match="words with times or a transcript, not both"):
        prepare(speech(), words=WORDS, transcript="Hello there.")
    with pytest.raises(PrefixError, match=r"'late' starts at 2\.5 s but the recording ends at 2"):
        prepare(speech(), words=[*WORDS, WordTime("late", 2.5, 2.6)])
    with pytest.raises(PrefixError, match="'one' starts at 0.1 s, before 'two'"):
        prepare(speech(), words=[WordTime("two", 0.5, 0.6), WordTime("one", 0.1, 0.2)])
    with pytest.raises(PrefixError, match="the recording: the transcript has no word"):
        prepare(speech(), transcript=" ... ".replace(".", " "))
    with pytest.raises(AudioError, match="no such audio file"):
        prepare(tmp_path / "none.wav", words=WORDS)
    with pytest.raises(AudioError, match=r"mono waveform \[W\], got shape \(24000, 2\)"):
        prepare(np.zeros((24_000, 2), np.float32), words=WORDS)
    with pytest.raises(AudioError, match="expected float samples of full scale ±1, got int16"):
        prepare(np.zeros(48_000, np.int16), words=WORDS)
    broken = speech()
    broken[7] = np.nan
    with pytest.raises(AudioError, match="NaN or infinity"):
        prepare(broken, words=WORDS)
    soundfile.write(tmp_path / "silent.wav", np.zeros(48_000), 24_000)
    with pytest.raises(PrefixError, match=r"silent\.wav: .*check that the recording is not silent"):
        prepare(tmp_path / "silent.wav", transcript="Hello there.")


# ----------------------------------------------------------------------------------------- the file


def test_a_voice_file_gives_the_voice_back(voice: Voice, tmp_path: Path) -> None:
    odd = dataclasses.replace(voice, words=(*WORDS, WordTime("naïve “日本”", 1.25, 1.3)))
    odd.save(tmp_path / "anna.voice")
    found = Voice.load(tmp_path / "anna.voice")
    assert found.codes.tobytes() == odd.codes.tobytes() and found.codes.dtype == np.int32
    assert (found.words, found.codec) == (odd.words, odd.codec)
    assert (tmp_path / "anna.voice").stat().st_size < 2_000
    assert [path.name for path in tmp_path.iterdir()] == ["anna.voice"]


def test_no_part_of_a_voice_file_passes_for_the_whole(voice: Voice, tmp_path: Path) -> None:
    path = tmp_path / "anna.voice"
    voice.save(path)
    content = path.read_bytes()
    for length in (0, 5, 9, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(PrefixError, match=r"anna\.voice.*prepare the voice again"):
            Voice.load(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'[[\\"Hello\\", 0.2', b'[[\\"Hello\\", nul'),
        (b'[[\\"Hello\\"', b"[[       5 "),
        (b'[[\\"Hello\\", 0.2', b'[[\\"Hello\\", 9.2'),
        (b'"codec"', b'"cobec"'),
        (b'"I32"', b'"F32"'),
        (b"[8,25]", b"[200] "),
    ],
)
def test_damaged_voice_files_are_named(
    voice: Voice, tmp_path: Path, old: bytes, new: bytes
) -> None:
    path = tmp_path / "anna.voice"
    voice.save(path)
    content = path.read_bytes()
    assert content.count(old) == 1 and len(old) == len(new)
    path.write_bytes(content.replace(old, new))
    with pytest.raises(PrefixError, match=r"anna\.voice: damaged voice file .*prepare the voice"):
        Voice.load(path)


def test_other_files_are_no_voices(voice: Voice, tmp_path: Path, tiny_model_folder: Path) -> None:
    with pytest.raises(PrefixError, match="no such voice file; make one with `dia2-jax voice`"):
        Voice.load(tmp_path / "none.voice")
    with pytest.raises(PrefixError, match="not a voice file of this version"):
        Voice.load(tiny_model_folder / "model.safetensors")
    soundfile.write(tmp_path / "a.wav", speech(), 24_000)
    with pytest.raises(PrefixError, match=r"no voice file: .*a\.wav"):
        Voice.load(tmp_path / "a.wav")


# ------------------------------------------------------------------------------- what voices= takes


def test_every_way_to_name_voices(voice: Voice) -> None:
    other = dataclasses.replace(voice, codes=voice.codes[:, ::-1])

    def turns(voices: object) -> list[tuple[int, int]]:
        found: list[PrefixTurn] = prefix_turns(voices, voice.codec)  # type: ignore[arg-type]
        return [(turn.speaker, int(turn.codes[0, 0] == other.codes[0, 0]) + 1) for turn in found]

    assert voice.codes[0, 0] != other.codes[0, 0]
    assert turns(None) == turns([]) == turns([None, None]) == []
    assert turns(voice) == turns([voice]) == turns({1: voice}) == [(1, 1)]
    assert turns([voice, other]) == turns({2: other, 1: voice}) == [(1, 1), (2, 2)]
    assert turns([None, other]) == turns({2: other}) == [(2, 2)]
    talk = [Turn(2, other), Turn(1, voice), Turn(2, other)]
    assert turns(talk) == [(2, 2), (1, 1), (2, 2)]
    for wrong in ([voice, voice, voice], [voice, Turn(2, other)], ["a.wav"], "a.wav"):
        with pytest.raises(PrefixError, match="voices: give a Voice"):
            turns(wrong)


def test_a_voice_of_another_codec_is_refused(tiny_model: Dia2, voice: Voice) -> None:
    foreign = dataclasses.replace(voice, codec="0123456789abcdef")
    with pytest.raises(
        PrefixError, match="voice of speaker 2 was prepared with another codec.*from its recording"
    ):
        tiny_model.session(voices=[voice, foreign])
