"""Transcription around a stand-in for faster-whisper, and without it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dia2_jax.errors import AudioError, Dia2Error, HubError
from dia2_jax.transcribe import load_recognizer, transcribe

WAVE = np.zeros(24_000, np.float32)


class FakeWhisper:
    """Answers with fixed segments of (text, start, end) pieces and records what it was given."""

    def __init__(self, segments: list[list[tuple[str, float, float]]]) -> None:
        self.segments = segments
        self.loaded: list[str] = []
        self.calls: list[tuple[Any, dict[str, Any]]] = []

    def load(self, name: str, **_: Any) -> FakeWhisper:
        self.loaded.append(name)
        return self

    def transcribe(self, audio: Any, **settings: Any) -> tuple[Iterator[SimpleNamespace], None]:
        self.calls.append((audio, settings))
        words = (
            [SimpleNamespace(word=text, start=start, end=end) for text, start, end in segment]
            for segment in self.segments
        )
        return (SimpleNamespace(words=segment) for segment in words), None


@pytest.fixture
def whisper(monkeypatch: pytest.MonkeyPatch) -> FakeWhisper:
    fake = FakeWhisper(
        [
            [
                (" Hello", 0.1, 0.4),
                (" there,", 0.4, 0.7),
                (" twenty", 0.8, 1.0),
                ("-one", 1.0, 1.2),
            ],
            [("Then", 1.5, 1.7), (" ", 1.7, 1.7), (" back.", 1.4, 1.3)],
        ]
    )
    module = ModuleType("faster_whisper")
    module.WhisperModel = fake.load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "faster_whisper", module)
    return fake


def test_words_are_joined_stripped_and_in_order(whisper: FakeWhisper) -> None:
    assert transcribe(WAVE) == [
        ("Hello", 0.1, 0.4),
        ("there,", 0.4, 0.7),
        ("twenty-one", 0.8, 1.2),
        ("Then", 1.5, 1.7),  # opens a segment: a new word, with or without a space
        ("back.", 1.5, 1.5),  # Whisper's times may step back; these do not
    ]
    assert whisper.loaded == ["base"]


def test_waveform_arrives_at_16k_with_word_times(whisper: FakeWhisper) -> None:
    transcribe(WAVE, "small.en", sample_rate=24_000)
    [(audio, settings)] = whisper.calls
    assert audio.shape == (16_000,)
    assert audio.dtype == np.float32
    assert settings["word_timestamps"] is True
    assert settings["language"] == "en"
    assert whisper.loaded == ["small.en"]


def test_file_is_passed_by_name(whisper: FakeWhisper, tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(b"RIFF")
    assert transcribe(path)[0][0] == "Hello"
    assert whisper.calls[0][0] == str(path)


def test_loaded_recognizer_serves_many_recordings(whisper: FakeWhisper) -> None:
    recognizer = load_recognizer(Path("models") / "tiny")
    transcribe(WAVE, recognizer)
    transcribe(WAVE, recognizer)
    assert whisper.loaded == [str(Path("models") / "tiny")]
    assert len(whisper.calls) == 2


def test_no_speech_is_no_words(whisper: FakeWhisper) -> None:
    whisper.segments = []
    assert transcribe(WAVE) == []


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    with pytest.raises(Dia2Error, match=r'pip install "dia2-jax\[transcribe\]"'):
        transcribe(WAVE)


def test_model_that_does_not_load(whisper: FakeWhisper, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("Invalid model size 'bse'")

    monkeypatch.setattr(sys.modules["faster_whisper"], "WhisperModel", refuse)
    with pytest.raises(HubError, match="'bse' cannot be loaded .*Invalid model size.*folder"):
        transcribe(WAVE, "bse")


def test_unreadable_recordings(whisper: FakeWhisper, tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="none.wav: no such audio file"):
        transcribe(tmp_path / "none.wav")
    for wave in (np.zeros((2, 100), np.float32), np.zeros(0, np.float32)):
        with pytest.raises(AudioError, match="mono waveform"):
            transcribe(wave)


def test_failure_while_reading_names_the_file(whisper: FakeWhisper, tmp_path: Path) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("Invalid data found when processing input")

    whisper.transcribe = fail  # type: ignore[assignment]
    path = tmp_path / "a.wav"
    path.write_text("not audio")
    with pytest.raises(AudioError, match=r"a\.wav: cannot be transcribed .*Invalid data"):
        transcribe(path)
