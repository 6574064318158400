"""Tiny random networks, whose weights leave no layer without influence."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import nnx
from safetensors.numpy import load_file

from dia2_jax.config import Dia2Config, load_dia2_config
from dia2_jax.model.dia2 import Dia2Model

GOLDEN = Path(__file__).parents[1] / "golden" / "network"
TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


def filled(
    config: Dia2Config, weight: Callable[[str, tuple[int, ...]], Any], **dtypes
) -> Dia2Model:
    """A model whose weights are ``weight(name, shape)``."""
    model = nnx.eval_shape(lambda: Dia2Model(config, rngs=nnx.Rngs(0), **dtypes))
    graph, state = nnx.split(model)
    for path, variable in nnx.to_flat_state(state):
        value = np.asarray(weight(".".join(map(str, path)), variable.shape))
        variable.set_value(jnp.asarray(value, variable.dtype))
    return nnx.merge(graph, state)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Dia2Config]:
    """``tiny({"model.decoder.n_layer": 1, ...})``: configs/tiny.yaml with changes."""
    published = yaml.safe_load(TINY.read_text())

    def build(changes: dict[str, Any] | None = None) -> Dia2Config:
        raw = copy.deepcopy(published)
        for path, value in (changes or {}).items():
            *parents, last = path.split(".")
            target = raw
            for name in parents:
                target = target[name]
            target[last] = value
        return load_dia2_config(raw)

    return build


@pytest.fixture(scope="session")
def random_model() -> Callable[..., Dia2Model]:
    """``random_model(config, seed=0, dtype=..., param_dtype=...)``."""

    def build(config: Dia2Config, seed: int = 0, **dtypes) -> Dia2Model:
        rng = np.random.default_rng(seed)

        def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
            normal = rng.standard_normal(shape, np.float32)
            if len(shape) == 1:
                return 1 + 0.3 * normal
            return normal if "embed" in name and "proj" not in name else normal * shape[1] ** -0.5

        return filled(config, weight, **dtypes)

    return build


@pytest.fixture(scope="session", params=["published", "branches"])
def golden(request: pytest.FixtureRequest) -> tuple[Dia2Model, dict[str, np.ndarray]]:
    """A golden checkpoint, every tensor of which is used once, and its recorded values."""
    folder = GOLDEN / request.param
    tensors = load_file(folder / "model.safetensors")
    model = filled(load_dia2_config(folder), lambda name, shape: tensors.pop(name))
    assert not tensors
    with np.load(folder / "network.npz") as values:
        return model, dict(values)
