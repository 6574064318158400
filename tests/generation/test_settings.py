"""Settings: upstream's defaults, and every refusal names the setting."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from dia2_jax.errors import ConfigError
from dia2_jax.generation.sampling import RowSettings, rank_bound
from dia2_jax.generation.settings import GenerationConfig, SamplingConfig


def test_defaults_are_upstream_s() -> None:
    config = GenerationConfig()
    assert config.text == SamplingConfig(0.6, 50) and config.audio == SamplingConfig(0.8, 50)
    assert (config.cfg_scale, config.cfg_filter_k, config.initial_padding) == (2.0, 50, 2)
    assert (config.include_prefix, config.prefix_plan, config.max_padding) == (False, "exact", 6)
    assert hash(config) == hash(GenerationConfig())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.cfg_scale = 3.0  # type: ignore[misc]


def test_numpy_numbers_are_numbers() -> None:
    sampling = SamplingConfig(np.float32(0.5), np.int64(20))  # type: ignore[arg-type]
    config = GenerationConfig(sampling, sampling, cfg_filter_k=np.int32(3))  # type: ignore[arg-type]
    assert rank_bound([config]) == 32
    assert RowSettings.of([config]).text_top_k[0] == 20


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, 1e39, "0.8", None, True])
def test_a_bad_temperature_is_named(value: Any) -> None:
    with pytest.raises(ConfigError, match="temperature: must be a finite number >= 0"):
        SamplingConfig(temperature=value)


@pytest.mark.parametrize("value", [-1, 2.5, 50.0, math.nan, "50", None, True, 2**31])
def test_a_bad_count_is_named(value: Any) -> None:
    with pytest.raises(ConfigError, match="top_k: must be a whole number >= 0"):
        SamplingConfig(top_k=value)
    for name in ("cfg_filter_k", "initial_padding"):
        with pytest.raises(ConfigError, match=f"{name}: must be a whole number >= 0"):
            GenerationConfig(**{name: value})


@pytest.mark.parametrize("value", [0, -1, 6.0, "6", None, True, 2**31])
def test_a_bad_pause_is_named(value: Any) -> None:
    with pytest.raises(ConfigError, match="max_padding: must be a whole number >= 1"):
        GenerationConfig(max_padding=value)


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, 1e39, "2", None, True])
def test_a_bad_scale_is_named(value: Any) -> None:
    with pytest.raises(ConfigError, match="cfg_scale: must be a finite number > 0"):
        GenerationConfig(cfg_scale=value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefix_plan": "Exact"}, "prefix_plan: must be 'exact' or 'upstream', got 'Exact'"),
        ({"text": 0.6}, "text: must be a SamplingConfig, got 0.6"),
        ({"audio": None}, "audio: must be a SamplingConfig, got None"),
    ],
)
def test_other_bad_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GenerationConfig(**changes)
