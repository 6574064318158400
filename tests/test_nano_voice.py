"""The voice that ships: the files inside the package, and that they speak and stop."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dia2_jax import Dia2, hub
from dia2_jax.audio import voiced_span

FOLDER = hub.nano_folder()
SCRIPT = "[S1] Hello there. [S2] Hi, how are you?"


def test_it_is_whole_small_and_says_what_it_is() -> None:
    assert all((FOLDER / name).is_file() for name in hub.NANO_FILES)
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 25e6
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for part in ("Lessac", "CC0", "MIT", "Apache-2.0", "WER", "x real time"):
        assert part in card
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["data"]["delay_pattern"][0] <= 8  # half of the published 16


@pytest.fixture(scope="module")
def model() -> Dia2:
    return Dia2.from_pretrained()


def test_it_speaks_and_stops_by_itself(model: Dia2) -> None:
    result = model.generate(SCRIPT, seed=0)
    assert not result.truncated
    seconds = len(result.waveform) / result.sample_rate
    start, end = voiced_span(result.waveform, result.sample_rate)
    assert end - start > 1.5 and seconds < 7
    # About as loud as the recordings it learned from, and no steady tone.
    sounding = result.waveform[int(start * 24_000) : int(end * 24_000)]
    assert -35 < 10 * np.log10(np.mean(np.square(sounding))) < -10
    assert [word for word, _ in result.words] == ["Hello", "there.", "Hi,", "how", "are", "you?"]
    assert all(a <= b for (_, a), (_, b) in zip(result.words, result.words[1:], strict=False))
    # More than a few codes: of 512 in each codebook, speech uses many.
    assert all(len(set(row)) > 8 for row in result.codes.tolist())
