"""Tiny random speakers, compiled once, and recorded runs of them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import nnx

from dia2_jax.config import Dia2Config, load_dia2_config
from dia2_jax.generation.prefix import PrefixPlan, PrefixTurn, plan_prefix
from dia2_jax.generation.rows import Rows
from dia2_jax.generation.settings import GenerationConfig
from dia2_jax.generation.step import FrameTrace, Programs
from dia2_jax.model.dia2 import Dia2Model
from dia2_jax.text.timing import WordTime
from dia2_jax.text.tokenizer import Tokenizer

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
GOLDEN_TEXT = Path(__file__).parents[1] / "golden" / "text" / "a"

# Every frame program takes seconds to compile, so tests share these few.
SPEAKERS: dict[str, dict[str, dict[str, Any]]] = {
    # A delay of 0, a context of more than one block of cache, both text embeddings.
    "main": {
        "data": {"channels": 6, "delay_pattern": [2, 0, 3, 1], "second_stream_ahead": 2},
        "runtime": {"weights_schedule": [0, 1, 1], "max_context_steps": 140},
    },
    "no second stream": {
        "data": {"channels": 5, "delay_pattern": [1, 2, 2], "second_stream_ahead": 0},
        "runtime": {"weights_schedule": [0, 0], "max_context_steps": 60},
    },
    "two codebooks": {
        "data": {"channels": 4, "delay_pattern": [0, 0], "second_stream_ahead": 3},
        "runtime": {"weights_schedule": [7], "max_context_steps": 60},
    },
    "one codebook": {
        "data": {"channels": 3, "delay_pattern": [2], "second_stream_ahead": 1},
        "runtime": {"weights_schedule": [], "max_context_steps": 60},
    },
}


def speaker_config(name: str) -> Dia2Config:
    raw = copy.deepcopy(yaml.safe_load(TINY.read_text()))
    for section, values in SPEAKERS[name].items():
        raw[section].update(values)
    for part in ("decoder", "depformer"):
        raw["model"][part]["n_layer"] = 1
    return load_dia2_config(raw)


def random_weights(config: Dia2Config, seed: int = 0) -> Dia2Model:
    """Weights that leave no layer without influence, and logits spread by about 1."""
    rng = np.random.default_rng(seed)
    graph, state = nnx.split(nnx.eval_shape(lambda: Dia2Model(config, rngs=nnx.Rngs(0))))
    for path, variable in nnx.to_flat_state(state):
        name, shape = ".".join(map(str, path)), variable.shape
        value = rng.standard_normal(shape, np.float32)
        if len(shape) == 1:
            value = 1 + 0.3 * value
        elif "embed" not in name or "proj" in name:
            value = value * shape[1] ** -0.5
        variable.set_value(jnp.asarray(value))
    return nnx.merge(graph, state)


@dataclass
class Run:
    """Rows that were driven to their end, and the trace of every frame, on the host."""

    rows: Rows
    traces: list[FrameTrace]

    def stack(self, field: str) -> np.ndarray:
        return np.stack([getattr(trace, field) for trace in self.traces])


def drive(rows: Rows, picks: np.ndarray | None = None, frames: int | None = None) -> list[Any]:
    """Compute every frame that can be computed, or at most ``frames`` of them."""
    traces: list[Any] = []
    while (frames is None or len(traces) < frames) and rows.refresh():
        given = None if picks is None else picks[len(traces)]
        traces.append(jax.device_get(rows.step(given)))
    return traces


@pytest.fixture(scope="session")
def speaker() -> Callable[[str], Programs]:
    """``speaker(name)``: the compiled programs of one of SPEAKERS."""
    return functools.cache(lambda name: Programs(random_weights(speaker_config(name))))


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(GOLDEN_TEXT, speaker_config("main").data)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def make_rows(speaker, tokenizer) -> Callable[..., Rows]:
    """``make_rows(name, configs, seeds=..., plans=...)``; frames are traced."""

    def build(
        name: str,
        configs: Sequence[GenerationConfig],
        seeds: Sequence[int] | None = None,
        plans: Sequence[PrefixPlan | None] | None = None,
    ) -> Rows:
        seeds = range(len(configs)) if seeds is None else seeds
        plans = [None] * len(configs) if plans is None else plans
        return Rows(speaker(name), tokenizer, configs, seeds, plans, trace=True)

    return build


@pytest.fixture(scope="session")
def run(make_rows) -> Callable[..., Run]:
    """``run(name, configs, scripts, ...)``: whole scripts, each given at once, to the end."""

    def whole(
        name: str,
        configs: Sequence[GenerationConfig],
        scripts: Sequence[str],
        picks: np.ndarray | None = None,
        **kinds: Any,
    ) -> Run:
        rows = make_rows(name, configs, **kinds)
        for index, script in enumerate(scripts):
            rows.feed(index, script)
            rows.close(index)
        return Run(rows, drive(rows, picks))

    return whole


@pytest.fixture(scope="session")
def driver() -> Callable[..., list[Any]]:
    return drive


@pytest.fixture(scope="session")
def make_plan(speaker, tokenizer) -> Callable[..., PrefixPlan]:
    """``make_plan(name, kind)``: two short turns of random codes."""

    def build(name: str, kind: str, seed: int = 0) -> PrefixPlan:
        config, rng = speaker(name).config, np.random.default_rng(seed)
        said = (
            (1, 17, (("good", 0.1, 0.3), ("morning,", 0.35, 0.9))),
            (2, 12, (("hello", 0.2, 0.4), ("you", 0.45, 0.6))),
        )
        turns = [
            PrefixTurn(
                number,
                rng.integers(0, config.data.depth_vocab_size, (config.data.codebooks, frames)),
                tuple(WordTime(*word) for word in words),
            )
            for number, frames, words in said
        ]
        return plan_prefix(turns, tokenizer, config, kind=kind)  # type: ignore[arg-type]

    return build
