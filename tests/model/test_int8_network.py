"""The network with int8 weights: close to float32 at every head, whole as stepped."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dia2_jax import checkpoint
from dia2_jax.config import Dia2Config
from dia2_jax.convert.models import abstract_dia2
from dia2_jax.model.dia2 import Dia2Model
from dia2_jax.nn.quantized import SCALE_SUFFIX, quantize

STEPS = 12


def rounded(model: Dia2Model) -> Dia2Model:
    """The same model in int8."""
    graph, abstract = abstract_dia2(model.config, int8=True)
    whole, _ = checkpoint.flatten_tree(nnx.state(model))
    leaves, structure = checkpoint.flatten_tree(abstract)
    filled = dict(whole)
    for name in leaves:
        if name + SCALE_SUFFIX in leaves:
            parts = map(jnp.asarray, quantize(np.asarray(whole[name])))
            filled[name], filled[name + SCALE_SUFFIX] = parts
    assert filled.keys() == leaves.keys()
    return nnx.merge(graph, checkpoint.unflatten_tree(structure, filled))


@pytest.fixture(scope="module")
def pair(
    tiny: Callable[..., Dia2Config], random_model: Callable[..., Dia2Model]
) -> tuple[Dia2Model, Dia2Model]:
    model = random_model(tiny())
    return model, rounded(model)


@pytest.fixture(scope="module")
def tokens(pair: tuple[Dia2Model, Dia2Model]) -> jax.Array:
    data, rng = pair[0].config.data, np.random.default_rng(5)
    text = rng.integers(0, data.text_vocab_size, (2, 2, STEPS))
    audio = rng.integers(0, data.audio_vocab_size, (2, data.codebooks, STEPS))
    return jnp.asarray(np.concatenate([text, audio], axis=1), jnp.int32)


@jax.jit
def _decoder(model: Dia2Model, tokens: jax.Array):
    return model.transformer(tokens)


@jax.jit
def _depformer(model: Dia2Model, tokens: jax.Array, hidden: jax.Array):
    frames = tokens.swapaxes(1, 2).reshape(-1, tokens.shape[1])
    text = (frames[:, 0], frames[:, 1])
    return model.depformer(frames[:, 2:-1], hidden.reshape(-1, hidden.shape[-1]), text)


def cosine(a: jax.Array, b: jax.Array) -> float:
    a, b = np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def test_linear_maps_are_int8_and_nothing_else(pair) -> None:
    leaves, _ = checkpoint.flatten_tree(nnx.state(pair[1]))
    narrow = {name for name, leaf in leaves.items() if leaf.dtype == jnp.int8}
    kept = {name for name in leaves if name not in narrow and not name.endswith(SCALE_SUFFIX)}
    assert all("norm" in n or "embed" in n or "action_head" in n for n in kept)
    assert not any("norm" in name or "audio_embeds" in name for name in narrow)
    assert all(leaves[name].dtype == jnp.float32 for name in kept)


def test_every_head_is_close_to_float32(pair, tokens) -> None:
    """Teacher-forced: both read the same tokens at every step."""
    whole, narrow = (_decoder(model, tokens) for model in pair)
    assert cosine(whole.action, narrow.action) >= 0.9999
    assert cosine(whole.cb0, narrow.cb0) >= 0.9999
    stages, rough = (
        _depformer(model, tokens, out.hidden)
        for model, out in zip(pair, (whole, narrow), strict=True)
    )
    for stage in range(stages.shape[1]):
        assert cosine(stages[:, stage], rough[:, stage]) >= 0.9995
    # ... and not the same: it did round.
    assert np.abs(np.asarray(stages - rough)).max() > 1e-4


def test_steps_are_the_whole_sequence(pair, tokens) -> None:
    """A step rounds its query and softmax as well, and sums in another order."""
    model = pair[1]
    step = jax.jit(lambda model, *args: model.transformer.step(*args))
    cache = model.transformer.init_cache(2, STEPS)
    whole = _decoder(model, tokens)
    for t in range(STEPS):
        at = jnp.full(2, t, jnp.int32)
        out, cache = step(model, tokens[..., t], at, at, cache)
        assert cosine(out.cb0, whole.cb0[:, t]) >= 0.99999
        assert cosine(out.hidden, whole.hidden[:, t]) >= 0.99999
