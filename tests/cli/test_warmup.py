"""``dia2-jax warmup`` compiles what `stream` would with the same options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dia2_jax import Dia2


def test_it_warms_up_what_was_asked_for(
    command: Any, tiny_model_folder: Path, tiny_model: Dia2, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(Dia2, "warm_up", lambda self, *a, **given: calls.append((*a, given)))
    options = ("--cfg-scale", 1, "--audio-top-k", 7, "--chunk-frames", 4, "--dtype", "int8")
    run = command("warmup", "-m", tiny_model_folder, *options)
    assert (run.exit_code, run.stdout) == (0, "")
    (settings, given), loaded = calls[0], command.loaded[0]
    assert given == {"voices": None, "chunk_frames": 4} and loaded["dtype"] == "int8"
    assert (settings.cfg_scale, settings.audio.top_k) == (1.0, 7)
    assert settings.text == tiny_model.defaults.text
