"""Word errors as the real recogniser hears them; runs where DIA2_JAX_ASR names its folder.

That is a folder of faster-whisper's `base` model. `.ci/run` has one.
"""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
from test_degraded_speech import NAMES, RATE, recorded

from eval.scoring.intelligibility import Intelligibility
from eval.scoring.metric import Options

FOLDER = os.environ.get("DIA2_JAX_ASR")
pytestmark = pytest.mark.skipif(not FOLDER, reason="runs where DIA2_JAX_ASR is set")


@pytest.fixture(scope="module")
def metric() -> Intelligibility:
    pytest.importorskip("faster_whisper")
    return Intelligibility.open(Options(asr=str(FOLDER)))


def test_recordings_are_heard_as_they_are_written(metric: Intelligibility) -> None:
    """At most a word in fifty wrong over all of them, and most without an error."""
    scores = [metric.score(recorded(name)) for name in NAMES]
    assert sum(one["errors"] for one in scores) <= sum(one["words"] for one in scores) / 50
    assert sum(one["perfect"] for one in scores) >= len(NAMES) - 1


def test_what_is_missing_or_was_not_asked_for_is_counted_as_such(metric: Intelligibility) -> None:
    perfect = next(take for name in NAMES if metric.score(take := recorded(name))["perfect"])
    # The end cut off: words of the script are not heard.
    cut = metric.score(replace(perfect, wave=perfect.wave[: len(perfect.wave) // 2]))
    assert cut["deletions"] >= cut["words"] // 4 and cut["insertions"] == 0
    # Everything said twice: as many words again are heard.
    pause = np.zeros(RATE // 2, np.float32)
    twice = metric.score(replace(perfect, wave=np.concatenate([perfect.wave, pause, perfect.wave])))
    assert twice["insertions"] >= 0.9 * twice["words"] and twice["deletions"] == 0


def test_noise_is_not_understood(metric: Intelligibility) -> None:
    take = recorded(NAMES[0])
    noise = np.random.default_rng(0).normal(0, 0.3, len(take.wave)).astype(np.float32)
    scores = metric.score(replace(take, wave=take.wave + noise))
    assert scores["errors"] > scores["words"] / 4
