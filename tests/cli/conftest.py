"""A way to run commands in this process, on one loaded model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner, Result

from dia2_jax import Dia2
from dia2_jax.cli import main

Command = Callable[..., Result]


@pytest.fixture
def command(
    tiny_model: Dia2, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Command:
    """Runs ``dia2-jax`` in an empty folder. The model is loaded once for all tests; what
    ``from_pretrained`` was given is in ``command.loaded``."""
    monkeypatch.chdir(tmp_path)
    loaded: list[dict[str, Any]] = []

    def from_pretrained(path: str, **options: Any) -> Dia2:
        assert Path(path) == tiny_model_folder
        loaded.append(options)
        return tiny_model

    monkeypatch.setattr(Dia2, "from_pretrained", from_pretrained)

    def run(*arguments: object, stdin: str | bytes | None = None) -> Result:
        return CliRunner().invoke(
            main, [str(argument) for argument in arguments], stdin, prog_name="dia2-jax"
        )

    run.loaded = loaded  # type: ignore[attr-defined]
    return run


@pytest.fixture
def stdin_pipe() -> Iterator[Callable[[bytes], None]]:
    """File descriptor 0 is a pipe; call with text to write, with b"" to end it."""
    reader, writer = os.pipe()
    saved = os.dup(0)
    os.dup2(reader, 0)
    os.close(reader)
    opened = [writer]

    def write(text: bytes) -> None:
        if text:
            os.write(writer, text)
        else:
            os.close(opened.pop())

    yield write
    for descriptor in opened:
        os.close(descriptor)
    os.dup2(saved, 0)
    os.close(saved)


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """A stereo recording at 44.1 kHz, 2 s."""
    path = tmp_path / "anna.wav"
    noise = 0.1 * np.random.default_rng(0).standard_normal((88_200, 2))
    soundfile.write(path, noise, 44_100)
    return path
