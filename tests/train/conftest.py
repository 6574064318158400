"""Makes the helpers beside the tests importable, however pytest is started, and shares them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))

if TYPE_CHECKING:
    from train.dia2_config import Dia2TrainingConfig


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration file of a small run over a small prepared data set; read it only."""
    from small_data import write_small_run

    return write_small_run(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def small_config(small_run: Path) -> Dia2TrainingConfig:
    """That configuration, read."""
    from train.config import read_config
    from train.dia2_config import Dia2TrainingConfig

    return read_config(Dia2TrainingConfig, small_run)
