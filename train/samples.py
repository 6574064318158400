"""Audio from weights in training: the same engine that speaks for users."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dia2_jax import Dia2, GenerationConfig, SamplingConfig, checkpoint
from dia2_jax.convert.models import abstract_dia2, load_mimi
from train.dia2_config import SampleSettings
from train.starting_point import StartingPoint
from train.task import Sample


def generate_samples(
    start: StartingPoint,
    params: Mapping[str, Any],
    scripts: Sequence[str],
    settings: SampleSettings,
    *,
    max_padding: int,
) -> list[Sample]:
    """Speak every script with these (host) weights; all in one batch.

    Args:
      max_padding: that the training data were aligned with, from which the model knows when words
        start.

    Raises:
      CheckpointError: the codec cannot be used with the model.
    """
    assert start.mimi is not None
    graph, abstract = abstract_dia2(start.config)
    _, treedef = checkpoint.flatten_tree(abstract)
    device = jax.local_devices()[0]
    placed = {path: jax.device_put(leaf, device) for path, leaf in params.items()}
    model = nnx.merge(graph, checkpoint.unflatten_tree(treedef, placed))
    mimi, mimi_config, _ = load_mimi(start.mimi, param_dtype=jnp.float32)
    engine = Dia2(start.config, model, start.tokenizer, mimi_config, mimi)
    sampling = SamplingConfig(settings.temperature, 50)
    generation = GenerationConfig(
        cfg_scale=settings.cfg_scale,
        audio=sampling,
        text=sampling,
        max_padding=max(max_padding, 1),
    )
    results = engine.generate(list(scripts), generation, seed=settings.seed)
    return [
        Sample(f"{index:02d}", np.asarray(result.waveform), result.sample_rate, script)
        for index, (script, result) in enumerate(zip(scripts, results, strict=True))
    ]
