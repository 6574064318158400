"""Guidance filter and draws, for rows with settings of their own.

Every setting is a traced value a row. Only ``bound``, an upper bound of the ranks that
any row asks for, is static: it decides how many entries are sorted, never a result.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from dia2_jax.generation.settings import GenerationConfig
from dia2_jax.typing import Array, Float, Int

# Upstream overwrites pad and bos of codebook 0 with float32's minimum, not with -inf.
MASKED_LOGIT = float(np.finfo(np.float32).min)


@struct.dataclass
class RowSettings:
    """Settings that a frame reads, of B rows, each ``[B]`` (see ``GenerationConfig``)."""

    text_temperature: Float[Array, " B"]
    text_top_k: Int[Array, " B"]
    audio_temperature: Float[Array, " B"]
    audio_top_k: Int[Array, " B"]
    cfg_scale: Float[Array, " B"]
    cfg_filter_k: Int[Array, " B"]
    max_padding: Int[Array, " B"]

    @classmethod
    def of(cls, configs: list[GenerationConfig]) -> RowSettings:
        """Settings of one config a row."""

        def column(values: list[float], dtype: type) -> Array:
            # Not jnp.asarray, which compiles a program for every shape of a numpy array.
            return jax.device_put(np.array(values, dtype))

        return cls(
            text_temperature=column([c.text.temperature for c in configs], np.float32),
            text_top_k=column([c.text.top_k for c in configs], np.int32),
            audio_temperature=column([c.audio.temperature for c in configs], np.float32),
            audio_top_k=column([c.audio.top_k for c in configs], np.int32),
            cfg_scale=column([c.cfg_scale for c in configs], np.float32),
            cfg_filter_k=column([c.cfg_filter_k for c in configs], np.int32),
            max_padding=column([c.max_padding for c in configs], np.int32),
        )


def rank_bound(configs: list[GenerationConfig]) -> int:
    """Ranks to sort so that every config's top-k and filter are exact; 0 for the whole vocabulary.

    Rounded up to a power of two, so that few programs are compiled.
    """
    wanted = [k for c in configs for k in (c.text.top_k, c.audio.top_k)]
    wanted += [c.cfg_filter_k for c in configs if c.cfg_filter_k > 0]
    if min(wanted) == 0:
        return 0
    return 1 << (int(max(wanted)) - 1).bit_length()


def _ranks(limit: Int[Array, " B"], vocabulary: int) -> Int[Array, " B"]:
    """A row's k as a usable rank: 0 and too large a k both mean the whole vocabulary."""
    return jnp.where((limit <= 0) | (limit > vocabulary), vocabulary, limit)


def guide(
    conditional: Float[Array, "B V"],
    unconditional: Float[Array, "B V"],
    scale: Float[Array, " B"],
    filter_k: Int[Array, " B"],
    bound: int,
) -> Float[Array, "B V"]:
    """Guidance as a filter.

    ``lerp(unconditional, conditional, scale)`` chooses the ``filter_k`` best entries (ties at the
    cut survive); the **conditional** logits of the survivors are returned, -inf elsewhere. Rows
    with scale 1.0 exactly, and rows with filter 0, come back as they are.
    """
    vocabulary = conditional.shape[-1]
    scale = scale[:, None]
    # torch.lerp's two branches: exact at either end.
    guided = jnp.where(
        jnp.abs(scale) < 0.5,
        unconditional + scale * (conditional - unconditional),
        conditional - (conditional - unconditional) * (1.0 - scale),
    )
    sorted_k = min(bound or vocabulary, vocabulary)
    best = lax.top_k(guided, sorted_k)[0]
    rank = jnp.minimum(_ranks(filter_k, vocabulary), sorted_k)
    cut = jnp.take_along_axis(best, rank[:, None] - 1, axis=-1)
    keep = (guided >= cut) | (filter_k[:, None] <= 0) | (scale == 1.0)
    return jnp.where(keep, conditional, -jnp.inf)


def draw(
    logits: Float[Array, "B V"],
    temperature: Float[Array, " B"],
    top_k: Int[Array, " B"],
    keys: Array,
    bound: int,
) -> Int[Array, " B"]:
    """One token a row from ``softmax(logits / temperature)`` cut to its ``top_k`` best entries.

    Drawn by the Gumbel-max trick (Gumbel, 1954), which equals renormalising and drawing. The
    noise belongs to vocabulary entries, not to ranks: a row draws the same token whatever
    ``bound`` its batch has. Temperature 0 takes the best entry; among equals the first counts.

    Args:
      keys: one random key a row.
    """
    vocabulary = logits.shape[-1]
    sorted_k = min(bound or vocabulary, vocabulary)
    best, index = lax.top_k(logits, sorted_k)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (vocabulary,), jnp.float32))(keys)
    noise = jnp.take_along_axis(noise, index, axis=-1)
    positive = temperature[:, None] > 0
    scores = best / jnp.where(positive, temperature[:, None], 1.0)
    scores = scores + jnp.where(positive, noise, 0.0)
    allowed = jnp.arange(sorted_k) < _ranks(top_k, vocabulary)[:, None]
    place = jnp.argmax(jnp.where(allowed, scores, -jnp.inf), axis=-1)
    return jnp.take_along_axis(index, place[:, None], axis=-1)[:, 0].astype(jnp.int32)


def distribution(logits: np.ndarray, temperature: float, top_k: int) -> np.ndarray:
    """What :func:`draw` draws from, on the host in float64: probabilities over ``[V]`` logits.

    At temperature 0 it is one-hot at the best entry.
    """
    wide = np.asarray(logits, np.float64)
    if temperature <= 0:
        return np.eye(wide.shape[-1])[np.argmax(wide)]
    scaled = wide / temperature
    weights = np.exp(scaled - scaled.max())
    if 0 < top_k < wide.shape[-1]:
        kept = np.argsort(-weights, kind="stable")[:top_k]
        weights = np.where(np.isin(np.arange(wide.shape[-1]), kept), weights, 0.0)
    probabilities: np.ndarray = weights / weights.sum()
    return probabilities
