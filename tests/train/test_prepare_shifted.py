"""Rows that begin a part of a frame late."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from dia2_jax.errors import DataError
from train.preparation.shifted import ShiftedSource
from train.preparation.sources import ManifestSource

RATE = 24_000


@pytest.fixture
def source(tmp_path: Path) -> ManifestSource:
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, RATE).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", wave, RATE)
    words = [
        {"text": "Hello", "start": 0.1, "end": 0.4},
        {"text": "there.", "start": 0.5, "end": 0.9},
    ]
    rows = [
        {"path": "a.wav", "id": "a", "words": words, "duration": 1.0},
        {"path": "a.wav", "id": "b", "turns": [{"text": "Hello.", "start": 0.1, "end": 0.9}]},
        {"path": "missing.wav", "id": "c", "text": "Nothing."},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ManifestSource(tmp_path / "rows.jsonl")


def test_sound_and_times_are_late_together(source: ManifestSource) -> None:
    shifted = ShiftedSource(source, 4, 12.5)
    assert len(shifted) == 12 and shifted.kind == "manifest"
    assert [shifted.row(i).id for i in range(4)] == ["a", "a+1", "a+2", "a+3"]
    plain = source.row(0).item
    assert plain is not None
    original = plain.read(10.0).samples
    for part in range(4):
        item = shifted.row(part).item
        assert item is not None and item.id == shifted.row(part).id
        late = round(part / 4 * RATE / 12.5)
        samples = item.read(10.0).samples
        assert not samples[:late].any()
        np.testing.assert_array_equal(samples[late:], original)
        assert item.seconds == pytest.approx(len(samples) / RATE)
        words = item.turns[0].words
        assert words is not None
        assert [(w.text, round(w.start - late / RATE, 6)) for w in words] == [
            ("Hello", 0.1), ("there.", 0.5),
        ]  # fmt: skip
        assert words[1].end == pytest.approx(0.9 + late / RATE)
    turn = shifted.row(5).item
    assert turn is not None
    assert (turn.turns[0].start, turn.turns[0].end) == pytest.approx((0.12, 0.92))


def test_rows_that_cannot_be_used_stay_so(source: ManifestSource) -> None:
    shifted = ShiftedSource(source, 2, 12.5)
    assert shifted.row(5).id == "c+1"
    item, refused = shifted.row(5).item, shifted.row(5).rejected
    assert (item is None) == (source.row(2).item is None)
    assert (refused is None) == (source.row(2).rejected is None)
    with pytest.raises(DataError, match="shifts"):
        ShiftedSource(source, 0, 12.5)


def test_fingerprint_knows_the_shifts(source: ManifestSource) -> None:
    prints = {ShiftedSource(source, n, 12.5).fingerprint() for n in (1, 2, 3)}
    assert len(prints) == 3
    assert ShiftedSource(source, 2, 12.5).fingerprint() in prints
