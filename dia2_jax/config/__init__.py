"""Model configurations: the published ``config.json`` files of Dia2 and of Mimi.

Frozen dataclasses with the field names of the published files, read strictly: an
unknown key, a missing field or an impossible value is a ``ConfigError`` that names the
field. Keys that nobody reads but that published files carry are kept
(``bookkeeping``), so that an exported file says what the original said.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from dia2_jax.config.dia2 import (
    ACTIVATIONS,
    AssetsConfig,
    DataConfig,
    DecoderConfig,
    DepformerConfig,
    Dia2Config,
    LinearConfig,
    ModelConfig,
    RuntimeConfig,
    load_dia2_config,
)
from dia2_jax.config.mimi import MimiConfig, load_mimi_config

__all__ = [
    "ACTIVATIONS",
    "AssetsConfig",
    "DataConfig",
    "DecoderConfig",
    "DepformerConfig",
    "Dia2Config",
    "LinearConfig",
    "MimiConfig",
    "ModelConfig",
    "RuntimeConfig",
    "config_to_dict",
    "load_dia2_config",
    "load_mimi_config",
]


def config_to_dict(config: Dia2Config | MimiConfig) -> dict[str, Any]:
    """The published form of a config: every field, carried keys included, JSON-ready."""
    raw = dataclasses.asdict(config)
    bookkeeping = raw.pop("bookkeeping")
    if isinstance(config, MimiConfig):
        if "rope_parameters" in bookkeeping:
            raw.pop("rope_theta")
        if "_frame_rate" in bookkeeping:
            raw.pop("frame_rate")
    else:
        if raw["assets"] is None:
            raw.pop("assets")
        # Upstream derives these when they are absent, and stumbles over null.
        for name in ("audio_pad_token_id", "audio_bos_token_id"):
            if raw["data"][name] is None:
                raw["data"].pop(name)
    merged: dict[str, Any] = json.loads(json.dumps({**raw, **bookkeeping}))
    return merged
