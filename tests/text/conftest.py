"""Golden text: what the PyTorch runtime made of strings, scripts, actions and prefixes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from dia2_jax.text.script import Entry
from dia2_jax.text.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "text"


class Golden(NamedTuple):
    tokenizer: Tokenizer
    values: dict[str, Any]

    def entries(self, recorded: list[dict[str, Any]]) -> list[Entry]:
        return [Entry(tuple(e["tokens"]), e["text"], e["padding"]) for e in recorded]


def load(name: str) -> Golden:
    values = json.loads(gzip.decompress((GOLDEN / name / "text.json.gz").read_bytes()))
    return Golden(Tokenizer.from_folder(GOLDEN / name, token_ids(values["data"])), values)


@pytest.fixture(scope="session", params=["a", "b", "c"])
def golden(request: pytest.FixtureRequest) -> Golden:
    return load(request.param)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load("a").tokenizer


@pytest.fixture
def data() -> SimpleNamespace:
    return token_ids(load("a").values["data"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A writable copy of the tokenizer of golden a."""
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((GOLDEN / "a" / file).read_bytes())
    return tmp_path


def token_ids(data: dict) -> SimpleNamespace:
    """What a tokenizer reads of a config's data section."""
    pad, bos = data["audio_pad_token_id"], data["audio_bos_token_id"]
    return SimpleNamespace(**data, audio_pad=pad, audio_bos=bos)
