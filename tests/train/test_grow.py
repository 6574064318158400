"""A checkpoint that grew computes what it did (train.grow)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result

from dia2_jax.config import load_dia2_config
from dia2_jax.convert.models import load_dia2
from train.grow import main


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def larger(folder: Path, change: dict[str, dict[str, Any]]) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((folder / "config.json").read_text())
    for name, values in change.items():
        part = raw
        for key in name.split("."):
            part = part[key]
        part |= values
    return raw


def outputs(folder: Path) -> list[np.ndarray]:
    """Of decoder and depformer, for the same random input."""
    config = load_dia2_config(folder / "config.json")
    model, _ = load_dia2(config, folder / "model.safetensors")
    rng = np.random.default_rng(0)
    data = config.data
    tokens = rng.integers(0, data.depth_vocab_size, (1, data.channels, 5), np.int32)
    out = model.transformer(jnp.asarray(tokens))
    codes = rng.integers(0, data.depth_vocab_size, (3, data.codebooks - 1), np.int32)
    hidden = rng.standard_normal((3, config.model.decoder.n_embd), np.float32)
    text = jnp.zeros(3, jnp.int32)
    depth = model.depformer(jnp.asarray(codes), jnp.asarray(hidden), (text, text))
    return [np.asarray(leaf) for leaf in (out.hidden, out.cb0, out.action, depth)]


def test_it_computes_the_same(tiny_model_folder: Path, tmp_path: Path) -> None:
    raw = larger(tiny_model_folder, {})
    model, schedule = raw["model"], raw["runtime"]["weights_schedule"]
    assert len(set(schedule)) < len(schedule)  # stages that share weights are told apart
    for part in ("decoder", "depformer"):
        model[part]["n_layer"] += 1
        model[part]["n_hidden"] += 8
    raw["runtime"]["weights_schedule"] = list(range(len(schedule)))
    shape = tmp_path / "shape.yaml"
    shape.write_text(yaml.safe_dump(raw))

    done = run(tiny_model_folder, shape, tmp_path / "grown")
    assert done.exit_code == 0, done.output
    assert load_dia2_config(tmp_path / "grown/config.json") == load_dia2_config(raw)
    for was, now in zip(outputs(tiny_model_folder), outputs(tmp_path / "grown"), strict=True):
        np.testing.assert_allclose(now, was, rtol=0, atol=2e-5 * np.abs(was).max())
    assert (tmp_path / "grown/tokenizer.json").is_file()
    assert (tmp_path / "grown/mimi/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.decoder": {"n_layer": 1}}, "n_layer: 1 is less than"),
        ({"model.depformer": {"n_embd": 32}}, "model.depformer: only n_layer and n_hidden"),
        ({"data": {"second_stream_ahead": 5}}, "second_stream_ahead"),
        ({"runtime": {"weights_schedule": "joined"}}, "can be split and not joined"),
    ],
)
def test_what_cannot_be_kept_is_named(
    tiny_model_folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    raw = larger(tiny_model_folder, change)
    if raw["runtime"]["weights_schedule"] == "joined":
        stages = raw["data"]["channels"] - 3
        raw["runtime"]["weights_schedule"] = [0] * stages
    shape = tmp_path / "shape.yaml"
    shape.write_text(yaml.safe_dump(raw))
    done = run(tiny_model_folder, shape, tmp_path / "grown")
    assert done.exit_code == 2
    assert message in done.output
    assert not (tmp_path / "grown").exists()
