"""``dia2_generation.json``: read strictly, written such that it reads back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dia2_jax.errors import ConfigError
from dia2_jax.generation.defaults import read_defaults, write_defaults
from dia2_jax.generation.settings import GenerationConfig, SamplingConfig


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "dia2_generation.json"


def test_what_is_not_said_is_the_library_s(file: Path) -> None:
    assert read_defaults(None) == GenerationConfig()
    file.write_text("{}")
    assert read_defaults(file) == GenerationConfig()
    file.write_text('{"audio": {"temperature": 0.3}, "text": {"top_k": 7}, "max_padding": 12}')
    assert read_defaults(file) == GenerationConfig(
        text=SamplingConfig(0.6, 7), audio=SamplingConfig(0.3, 50), max_padding=12
    )


def test_what_is_written_reads_back(file: Path) -> None:
    settings = GenerationConfig(
        SamplingConfig(0.25, 3), SamplingConfig(0.0, 0), 1.5, 9, initial_padding=0, max_padding=1
    )
    write_defaults(file, settings)
    assert read_defaults(file) == settings
    assert list(json.loads(file.read_text())) == [
        "text", "audio", "cfg_scale", "cfg_filter_k", "initial_padding", "max_padding"
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="include_prefix: its user sets it"):
        write_defaults(file, GenerationConfig(include_prefix=True))
    assert read_defaults(file) == settings


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"max_pading": 6},
            r"unknown key 'max_pading' \(did you mean 'max_padding'\?\); known: te",
        ),
        ({"audio": {"temprature": 1}}, r"audio: unknown key 'temprature' \(did you mean 'temperat"),
        ({"include_prefix": True}, "unknown key 'include_prefix'"),
        ({"seed": 1}, "unknown key 'seed'; known: text, audio, cfg_scale"),
        ({"audio": 0.8}, "audio: must be a JSON object, got 0.8"),
        ({"text": {"temperature": "0.8"}}, r"text\.temperature: must be a finite number"),
        ({"audio": {"top_k": 1.5}}, r"audio\.top_k: must be a whole number"),
        ({"cfg_scale": None}, "cfg_scale: must be a finite number > 0"),
        ({"max_padding": 0}, "max_padding: must be a whole number >= 1, got 0"),
        ([], "must be a JSON object, got "),
        ("{", "not valid JSON"),
    ],
)
def test_mistakes_are_named_with_their_file(file: Path, content: Any, message: str) -> None:
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ConfigError, match=f"dia2_generation.json: {message}"):
        read_defaults(file)
