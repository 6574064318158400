"""Small codecs with what `transformers` computes from them (tests/golden/mimi)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from dia2_jax.config import MimiConfig
from dia2_jax.convert.models import load_mimi
from dia2_jax.hub import MimiFiles
from dia2_jax.mimi import runtime
from dia2_jax.mimi.codec import Mimi
from dia2_jax.mimi.runtime import Codec

# Makes the shared streaming contract importable, however pytest is started.
sys.path.insert(0, str(Path(__file__).parents[1] / "nn"))

GOLDEN = Path(__file__).parents[1] / "golden" / "mimi"


class Golden(NamedTuple):
    config: MimiConfig
    mimi: Mimi
    codec: Codec
    values: dict[str, Any]

    @property
    def audio(self) -> np.ndarray:
        """``[1, W]``."""
        return self.values["audio"].astype(np.float32)[None]

    @property
    def codes(self) -> np.ndarray:
        """``[2, C, T]``."""
        return self.values["codes"].astype(np.int32)


def load(name: str) -> Golden:
    folder = GOLDEN / name
    mimi, config, _ = load_mimi(MimiFiles(folder / "model.safetensors", folder / "config.json"))
    with np.load(folder / "expected.npz") as values:
        return Golden(config, mimi, Codec(mimi), dict(values))


@pytest.fixture(scope="session", autouse=True)
def short_segments() -> Iterator[None]:
    """Segments so short that the small takes here are made of several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "SEGMENT", 4)
        patch.setattr(runtime, "QUANTIZED", 12)
        yield


@pytest.fixture(scope="session")
def plain() -> Golden:
    return load("plain")


@pytest.fixture(scope="session")
def branches() -> Golden:
    return load("branches")


@pytest.fixture(scope="session", params=["plain", "branches"])
def golden(request: pytest.FixtureRequest) -> Golden:
    return request.getfixturevalue(request.param)
