"""A run of Dia2 training at the smallest size: random recordings as `train.prepare` writes them,
a network of three codebooks, and a configuration that joins them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ROOT = Path(__file__).parents[2]
CODEBOOKS, CODES, FRAME_RATE = 3, 64, 12.5

_VOCABULARY = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "nine")


def write_recordings(
    folder: Path,
    *,
    count: int = 12,
    codebooks: int = CODEBOOKS,
    codes: int = CODES,
    seconds: tuple[float, float] = (1.8, 4.5),
    seed: int = 0,
) -> Path:
    """A prepared data set of two voices with random codes and lengths."""
    from datasets import Dataset, Features, Sequence, Value

    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for index in range(count):
        length, time, words = rng.uniform(*seconds), 0.3, []
        while time < length - 1 or not words:
            end = time + rng.uniform(0.2, 0.45)
            words.append((rng.choice(_VOCABULARY), time, end, 1 if time < length / 2 else 2))
            time = end + rng.choice([0.05, 0.1, 0.9], p=[0.6, 0.3, 0.1])
        frames = int((time + 1) * FRAME_RATE)
        row = {"id": f"r{index}", "source": f"r{index}.wav", "text": "[S1] hello", "drift": 0}
        row |= {"duration": time, "frames": frames, "breaks": 0}
        row["codes"] = rng.integers(0, codes, frames * codebooks)
        columns = ("word_text", "word_start", "word_end", "word_speaker")
        rows.append(row | dict(zip(columns, zip(*words, strict=True), strict=True)))
    kinds = {"id": "string", "source": "string", "text": "string", "duration": "float32"}
    kinds |= {"frames": "int32", "drift": "int32", "breaks": "int32"}
    lists = {"codes": "uint16", "word_text": "string", "word_start": "float32"}
    lists |= {"word_end": "float32", "word_speaker": "int8"}
    features = {name: Value(kind) for name, kind in kinds.items()}
    features |= {name: Sequence(Value(kind)) for name, kind in lists.items()}
    Dataset.from_list(rows, features=Features(features)).save_to_disk(str(folder))
    manifest = {
        "format": 1,
        "codebooks": codebooks,
        "codebook_size": codes,
        "frame_rate": FRAME_RATE,
        "word_step_offset": 2,
        "initial_padding": 2,
        "max_padding": 6,
    }
    (folder / "dia2_jax.json").write_text(json.dumps(manifest))
    return folder


def small_shape() -> dict[str, Any]:
    """`configs/tiny.yaml` with one layer in each half and three codebooks: compiles in seconds.

    Every width divides by 8 (over ``fsdp``) and by 2 (over ``tensor``).
    """
    raw: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
    raw["data"] |= {"channels": 2 + CODEBOOKS, "delay_pattern": [2, 3, 4]}
    raw["model"]["decoder"]["n_layer"] = raw["model"]["depformer"]["n_layer"] = 1
    raw["runtime"]["weights_schedule"] = [0, 1]
    return raw


def write_small_run(folder: Path) -> Path:
    """The configuration file of a small run: 8 rows of at most 40 steps, all randomness on.

    Its run folder is ``folder / "run"``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_recordings(folder / "data")
    shape = folder / "shape.yaml"
    shape.write_text(yaml.safe_dump(small_shape()))
    config = {
        "model": {"config": str(shape), "tokenizer": str(ROOT / "tests/golden/text/a")},
        "data": {
            "train": str(folder / "data"),
            "rows": 8,
            "max_steps": 40,
            "depth_share": 0.5,
            "text_dropout": 0.25,
            "code_noise": 0.1,
        },
        "loss": {"first_codebook_multiplier": 2.0, "z_loss": 1e-4},
        "optimizer": {"learning_rate": 3e-3, "schedule": {"kind": "constant"}},
        "run": {"folder": str(folder / "run"), "steps": 4, "log_every": 1},
    }
    config["run"]["hooks"] = {"progress": False, "curve": False}
    path = folder / "pretrain.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
