"""SEANet and the resampling between its rate and the frame rate."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from streaming_contract import Contract, chunkings, filled, normal

from dia2_jax.config import MimiConfig
from dia2_jax.mimi.resample import Downsample, Upsample
from dia2_jax.mimi.seanet import SeanetDecoder, SeanetEncoder, elu

CONFIG = MimiConfig(
    hidden_size=6,
    num_attention_heads=1,
    num_key_value_heads=1,
    num_filters=2,
    num_residual_layers=2,
    use_conv_shortcut=True,
    upsampling_ratios=(3, 2),
    upsample_groups=6,
)
HOP = 6
MAKERS = {
    "encoder": (lambda: SeanetEncoder(CONFIG, rngs=nnx.Rngs(0)), 1, HOP),
    "decoder": (lambda: SeanetDecoder(CONFIG, rngs=nnx.Rngs(0)), 6, 1),
    "downsample": (lambda: Downsample(CONFIG, rngs=nnx.Rngs(0)), 6, 2),
    "upsample": (lambda: Upsample(CONFIG, rngs=nnx.Rngs(0)), 6, 1),
}


@pytest.fixture(scope="module", params=MAKERS)
def contract(request):
    make, features, block = MAKERS[request.param]
    x = normal(np.random.default_rng(0), 2, 11 * block, features)
    return Contract(filled(make), x, block=block)


def test_streaming_contract(contract):
    contract.check_all()


@settings(max_examples=8)
@given(st.data())
def test_any_chunking_is_the_whole(contract, data):
    contract.check_chunks(data.draw(chunkings(contract.x.shape[1], contract.block)))


def test_elu():
    x = np.linspace(-9, 3, 200, dtype=np.float32)
    np.testing.assert_allclose(elu(x), np.where(x > 0, x, np.expm1(x)), rtol=0, atol=1e-7)


@pytest.mark.parametrize("steps", [1, 2, 5, 8])
def test_downsampling_repeats_both_ends(steps):
    layer = filled(MAKERS["downsample"][0])
    weight = np.asarray(layer.conv.weight[...], np.float64)
    x = normal(np.random.default_rng(0), 2, steps, 6)
    padded = np.concatenate([x[:, :1], x[:, :1], x, x[:, -1:]], axis=1)
    expected = np.stack(
        [np.einsum("bkd,fkd->bf", padded[:, t : t + 4], weight) for t in range(0, steps, 2)], axis=1
    )
    np.testing.assert_allclose(jax.jit(lambda x: layer(x))(x), expected, rtol=0, atol=1e-5)
    # The same row in a longer batch, ended by its length: what follows it does not count.
    longer = np.concatenate([x, 9 + np.zeros((2, 3 + steps % 2, 6), np.float32)], axis=1)
    longer = longer[:, : longer.shape[1] // 2 * 2]
    lengths = np.array([steps, steps])
    got = jax.jit(lambda x, lengths: layer(x, lengths))(longer, lengths)
    np.testing.assert_allclose(got[:, : -(-steps // 2)], expected, rtol=0, atol=1e-5)


def layer_by_layer(encoder, x):
    """Every layer in its own whole form, which fills up a ragged end with zeros."""
    y = encoder.first(x)
    for stage in encoder.stages:
        for block in stage.residuals:
            y = block(y)
        y = stage.down(elu(y))
    return encoder.last(elu(y))


def test_a_ragged_end_is_zeros_at_every_stride():
    encoder, samples = filled(MAKERS["encoder"][0]), 13
    rows = normal(np.random.default_rng(3), 2, 24, 1)
    cut = rows[:1, :samples]
    expected, whole = jax.jit(lambda x: (layer_by_layer(encoder, x), encoder(x)))(cut)
    assert expected.shape[1] == 3
    np.testing.assert_allclose(whole, expected, rtol=0, atol=1e-5)
    # And beside a longer row, whatever follows its end.
    by_rows = jax.jit(lambda x, lengths: encoder(x, lengths))
    got = by_rows(rows, np.array([samples, 24]))
    np.testing.assert_allclose(got[:1, :3], expected, rtol=0, atol=1e-5)
    alone = by_rows(rows[[1, 1]], np.array([24, 24]))
    np.testing.assert_allclose(got[1], alone[1], rtol=0, atol=1e-5)
