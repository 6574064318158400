"""Makes the toy task importable, however pytest is started, and quick to start."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def quick_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that are about something else do not measure the machine, which takes 0.2 s."""
    monkeypatch.setattr("train.loop.measure_peak", lambda: 1e9)
