"""Sounds and files that the tests of data preparation share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile


def speech(seconds: float = 2.0, rate: int = 24_000, seed: int = 0) -> np.ndarray:
    """Noise in the rhythm of words, with silence around it; float32 [W]."""
    time = np.arange(round(seconds * rate)) / rate
    loud = (np.sin(2 * np.pi * 3 * time) > -0.5) & (time > 0.2) & (time < seconds - 0.2)
    noise = np.random.default_rng(seed).standard_normal(len(time))
    return (0.1 * noise * loud).astype(np.float32)


def write_recording(path: Path, text: str | None = None, words: Any = None, **kind: Any) -> Path:
    """A 24 kHz recording with its transcript beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, speech(**kind), 24_000)
    if text is not None:
        path.with_suffix(".txt").write_text(text)
    if words is not None:
        path.with_suffix(".json").write_text(json.dumps(words))
    return path


#: Words of two seconds of :func:`speech`, in the two forms that are read.
WORDS = [
    {"text": "Hello", "start": 0.2, "end": 0.6},
    {"text": "there,", "start": 0.7, "end": 1.0},
    {"text": "you.", "start": 1.3, "end": 1.7},
]
KYUTAI_WORDS = [[word["text"], [word["start"], word["end"]], "SPEAKER_MAIN"] for word in WORDS]
