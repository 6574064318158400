"""Tiny configs, the golden tokenizer, and recordings of random codes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dia2_jax.config import Dia2Config, load_dia2_config
from dia2_jax.data import SpokenWord
from dia2_jax.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def configs() -> Callable[..., Dia2Config]:
    """``configs(data={...}, runtime={...})``: configs/tiny.yaml of one layer, with changes."""
    raw = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
    for part in ("decoder", "depformer"):
        raw["model"][part]["n_layer"] = 1

    def build(**changes: dict[str, Any]) -> Dia2Config:
        changed = copy.deepcopy(raw)
        for section, values in changes.items():
            changed[section].update(values)
        return load_dia2_config(changed)

    return build


@pytest.fixture(scope="session")
def tokenizer(configs) -> Tokenizer:
    return Tokenizer.from_folder(ROOT / "tests" / "golden" / "text" / "a", configs().data)


@pytest.fixture(scope="session")
def random_codes() -> Callable[..., np.ndarray]:
    """``random_codes(config, frames, seed=0)``: ``[C, frames]``."""

    def build(config: Dia2Config, frames: int, seed: int = 0) -> np.ndarray:
        rng, data = np.random.default_rng(seed), config.data
        return rng.integers(0, data.depth_vocab_size, (data.codebooks, frames))

    return build


@pytest.fixture(scope="session")
def speak() -> Callable[..., list[SpokenWord]]:
    """``speak([("word", start, end), ...])``, optionally with a speaker behind."""

    def build(words: Sequence[tuple[Any, ...]]) -> list[SpokenWord]:
        return [SpokenWord(*word) for word in words]

    return build
