"""The weights that codec training begins with: loaded or random, and codebooks by k-means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dia2_jax.errors import ConfigError
from dia2_jax.typing import Array
from train.codec_training.config import CodecConfig
from train.codec_training.generator import (
    Generator,
    load_weights,
    random_codebooks,
    random_params,
)
from train.codec_training.quantizer import initialize_codebooks
from train.codec_training.semantic import make_head
from train.codec_training.windows import WindowSource


def initial_weights(
    config: CodecConfig,
    generator: Generator,
    *,
    source: WindowSource,
    target_width: int,
    keys: tuple[Array, Array],
    put: Callable[[Any], Any],
) -> dict[str, Array]:
    """Parameters, semantic head and codebooks by path, a function of the configuration and keys.

    Args:
      config: of the run.
      generator: the codec.
      source: windows of the whole batch; the first ones give the codebooks their means.
      target_width: of the semantic targets.
      keys: for k-means and for the head.
      put: places a tree on the devices.

    Raises:
      ConfigError: too few windows for k-means.
    """
    every: dict[str, Any]
    if config.model.initial is not None:
        every = load_weights(config.model.initial)
    else:
        seed = config.run.seed
        every = random_params(generator, seed) | random_codebooks(generator, seed)
    if config.semantic is not None:
        inner = generator.config.vector_quantization_hidden_dimension
        every |= make_head(keys[1], inner, target_width)
    every = put(every)
    if config.model.initial is None:
        codebooks = {path: every[path] for path in generator.codebooks}
        fresh = initialize_codebooks(
            generator.mimi(every, codebooks).quantizer,
            codebooks,
            _first_features(config, generator, every, source, put),
            keys[0],
            config.codebooks.kmeans_iterations,
        )
        every |= put(fresh)
    return every


def _first_features(
    config: CodecConfig,
    generator: Generator,
    every: dict[str, Array],
    source: WindowSource,
    put: Callable[[Any], Any],
) -> Array:
    """Features of the first windows of the run, ``[N, D]``."""
    data, entries = config.data, generator.config.codebook_size
    batches = -(-config.codebooks.kmeans_rows // data.rows)
    if batches * data.rows * data.frames < entries:
        raise ConfigError(
            f"codebooks.kmeans_rows: {batches * data.rows} windows of {data.frames} frames are "
            f"fewer than {entries} entries; use more"
        )

    @jax.jit
    def encode(every: dict[str, Array], wave: Array) -> Array:
        return generator.mimi(every, every).encode_latents(wave)

    features = [encode(every, put(source[step]["wave"])) for step in range(batches)]
    return jnp.concatenate(features).reshape(-1, features[0].shape[-1])
