"""A codec of very small shape and recordings to train it on, for the tests of codec training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from dia2_jax.audio import write_wav
from dia2_jax.config import MimiConfig, config_to_dict

RATE = 800


def tiny_shape(**changes: Any) -> MimiConfig:
    """800 samples a second, 8 samples a frame, 3 codebooks of 8."""
    fields: dict[str, Any] = {
        "sampling_rate": RATE,
        "hidden_size": 8,
        "num_filters": 2,
        "upsampling_ratios": (4,),
        "kernel_size": 3,
        "codebook_size": 8,
        "codebook_dim": 4,
        "vector_quantization_hidden_dimension": 4,
        "num_quantizers": 3,
        "upsample_groups": 8,
        "num_hidden_layers": 1,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "sliding_window": 5,
    }
    return MimiConfig(**{**fields, **changes})


def write_recordings(folder: Path, count: int = 6, seconds: float = 0.7) -> Path:
    """Chirps with noise, each of another length, as WAV files."""
    for index in range(count):
        random = np.random.default_rng(index)
        time = np.arange(int(RATE * seconds * (1 + index / 4))) / RATE
        wave = 0.4 * np.sin(2 * np.pi * (30 + 20 * index + 40 * time) * time)
        wave = wave + 0.05 * random.standard_normal(len(time))
        write_wav(folder / f"{index}.wav", wave.astype(np.float32), RATE)
    return folder


def raw_config(folder: Path, **changes: Any) -> dict[str, Any]:
    """A configuration of a few steps over recordings that this writes below `folder`."""
    shape = folder / "mimi.json"
    if not shape.is_file():
        shape.write_text(json.dumps(config_to_dict(tiny_shape())))
        write_recordings(folder / "audio")
    raw: dict[str, Any] = {
        "run": {"folder": str(folder / "run"), "steps": 4, "seed": 3},
        "model": {"shape": str(shape)},
        "data": {
            "train": [str(folder / "audio")],
            "cache": str(folder / "cache"),
            "rows": 3,
            "frames": 16,
            "validation_share": 0.3,
        },
        "codebooks": {"kmeans_rows": 3, "kmeans_iterations": 2},
        "losses": {
            "mel": 1.0,
            "commitment": 0.1,
            "mel_windows": [64],
            "mel_bands": [8],
            "stft_windows": [32],
        },
        "optimizer": {"learning_rate": 0.01, "ema_decay": 0.9, "clip": None},
        "evaluation": {"windows": 5, "frames": 16, "rows": 2, "samples": 2},
    }
    for name, part in changes.items():
        raw[name] = {**raw.get(name, {}), **part} if isinstance(part, dict) else part
    return raw
