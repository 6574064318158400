"""Causal convolutions against their definitions, and under the streaming contract."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from streaming_contract import Contract, chunkings, filled, normal, run

from dia2_jax.nn import conv
from dia2_jax.nn.conv import CausalConv1d, CausalConvTranspose1d, GroupedConvTranspose1d


def published_conv(x, weight, bias, stride=1, dilation=1):
    """Definition, on the published ``[F, D, K]``: zeros before, zeros up to a whole stride."""
    _, _, kernel = weight.shape
    left = (kernel - 1) * dilation + 1 - stride
    padded = np.pad(x, ((0, 0), (left, -x.shape[1] % stride), (0, 0)))
    outputs = []
    for start in range(0, padded.shape[1] - (kernel - 1) * dilation, stride):
        window = padded[:, start : start + (kernel - 1) * dilation + 1 : dilation]
        outputs.append(np.einsum("bkd,fdk->bf", window.astype(np.float64), weight) + bias)
    return np.stack(outputs, axis=1)


def published_transpose(x, weight, bias, stride, groups=1):
    """Definition, on the published ``[D, F / G, K]``: scatter, then cut off the end."""
    batch, steps, inputs = x.shape
    _, width, kernel = weight.shape
    y = np.zeros((batch, steps * stride + kernel, groups, width))
    grouped = x.reshape(batch, steps, groups, inputs // groups).astype(np.float64)
    spread = weight.reshape(groups, inputs // groups, width, kernel)
    for t in range(steps):
        y[:, t * stride : t * stride + kernel] += np.einsum("bgd,gdfk->bkgf", grouped[:, t], spread)
    return y[:, : steps * stride].reshape(batch, steps * stride, -1) + bias


def make_conv(inputs, outputs, kernel, **settings):
    layer = filled(lambda: CausalConv1d(inputs, outputs, kernel, rngs=nnx.Rngs(0), **settings))
    bias = np.zeros(outputs) if layer.bias is None else np.asarray(layer.bias[...])
    return layer, np.asarray(layer.weight[...]).swapaxes(1, 2), bias


def make_transpose(inputs, outputs, kernel, stride):
    layer = filled(
        lambda: CausalConvTranspose1d(inputs, outputs, kernel, stride=stride, rngs=nnx.Rngs(0))
    )
    weight = normal(np.random.default_rng(0), inputs, outputs, kernel)
    layer.weight = nnx.Param(jnp.asarray(conv.from_published_transpose(weight, stride)))
    return layer, weight, np.asarray(layer.bias[...])


def make_grouped(inputs, outputs, kernel, stride, groups):
    layer = filled(
        lambda: GroupedConvTranspose1d(
            inputs, outputs, kernel, stride=stride, groups=groups, rngs=nnx.Rngs(0)
        )
    )
    return layer, np.asarray(layer.weight[...])


def whole(layer, x):
    return jax.jit(lambda x: layer(x))(jnp.asarray(x))


@pytest.mark.parametrize(
    ("inputs", "outputs", "kernel", "settings"),
    [
        (4, 2, 3, {"dilation": 3}),
        (1, 4, 7, {}),
        (5, 1, 3, {"use_bias": False}),
        (4, 6, 1, {}),
        (3, 4, 8, {"stride": 4}),
        (3, 4, 3, {"stride": 3}),
        (2, 3, 15, {"stride": 5}),
    ],
)
@pytest.mark.parametrize("steps", [23, 600])
def test_convolution_is_its_definition(inputs, outputs, kernel, settings, steps):
    """600 steps go through the direct convolution, fewer through a matrix product."""
    layer, weight, bias = make_conv(inputs, outputs, kernel, **settings)
    x = normal(np.random.default_rng(1), 2, steps, inputs)
    expected = published_conv(
        x, weight, bias, settings.get("stride", 1), settings.get("dilation", 1)
    )
    assert expected.shape[1] == -(-steps // settings.get("stride", 1))
    np.testing.assert_allclose(whole(layer, x), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("kernel", "stride", "steps"), [(4, 2, 1), (8, 4, 11), (3, 3, 11), (9, 3, 500), (5, 1, 11)]
)
def test_transposed_convolution_is_its_definition(kernel, stride, steps):
    layer, weight, bias = make_transpose(3, 4, kernel, stride)
    x = normal(np.random.default_rng(1), 2, steps, 3)
    expected = published_transpose(x, weight, bias, stride)
    np.testing.assert_allclose(whole(layer, x), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("inputs", "outputs", "groups", "kernel", "stride"),
    [(6, 6, 6, 4, 2), (6, 6, 2, 4, 2), (4, 8, 2, 9, 3)],
)
def test_grouped_transposed_convolution_is_its_definition(inputs, outputs, groups, kernel, stride):
    layer, weight = make_grouped(inputs, outputs, kernel, stride, groups)
    x = normal(np.random.default_rng(1), 2, 7, inputs)
    expected = published_transpose(x, weight, 0, stride, groups)
    np.testing.assert_allclose(whole(layer, x), expected, rtol=0, atol=2e-5)


def test_transposed_weights_go_there_and_back():
    weight = normal(np.random.default_rng(0), 3, 4, 12)
    for stride in (2, 3, 4, 6, 12):
        ours = conv.from_published_transpose(weight, stride)
        assert ours.shape == (stride, 4, 12 // stride, 3)
        np.testing.assert_array_equal(conv.to_published_transpose(ours), weight)


LAYERS = {
    "plain": (lambda: make_conv(3, 4, 7)[0], 1),
    "dilated": (lambda: make_conv(3, 4, 3, dilation=4)[0], 1),
    "pointwise": (lambda: make_conv(3, 4, 1)[0], 1),
    "strided": (lambda: make_conv(3, 4, 8, stride=4)[0], 4),
    "stride only": (lambda: make_conv(3, 4, 3, stride=3)[0], 3),
    "transposed": (lambda: make_transpose(3, 4, 8, 4)[0], 1),
    "transposed wide": (lambda: make_transpose(3, 4, 9, 3)[0], 1),
    "grouped": (lambda: make_grouped(6, 6, 4, 2, 6)[0], 1),
}


@functools.cache
def contract(name):
    layer, block = LAYERS[name]
    made = layer()
    features = made.weight.shape[0 if name == "grouped" else -1]
    x = normal(np.random.default_rng(2), 2, 11 * block, features)
    return Contract(made, x, block=block)


@pytest.mark.parametrize("name", LAYERS)
def test_streaming_contract(name):
    contract(name).check_all()


@settings(max_examples=10)
@given(st.data())
@pytest.mark.parametrize("name", ["dilated", "strided", "transposed wide"])
def test_any_chunking_is_the_whole(name, data):
    held = contract(name)
    held.check_chunks(data.draw(chunkings(held.x.shape[1], held.block)))


def test_both_ways_of_computing_agree_where_they_meet(monkeypatch):
    """Chunks on either side of the switch belong to one stream."""
    layer, weight, bias = make_conv(3, 4, 7)
    x = normal(np.random.default_rng(1), 1, 64, 3)
    expected = published_conv(x, weight, bias)
    monkeypatch.setattr(conv, "_DIRECT_STEPS", 20)
    step = jax.jit(lambda x, state: layer.step(x, state))
    got = run(step, x, layer.init_state(1), [19, 20, 1, 24])
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)


def test_mask_steps_counts_rows_apart():
    x = jnp.ones((3, 4, 2))
    masked = conv.mask_steps(x, jnp.asarray([0, 2, 9]))
    np.testing.assert_array_equal(masked[..., 0], [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    assert conv.mask_steps(x, None) is x


@pytest.mark.parametrize("kernel", [3, 5])
def test_kernels_that_do_not_fold_are_refused(kernel):
    with pytest.raises(ValueError, match=f"kernel_size {kernel} must be a multiple of stride 2"):
        CausalConv1d(2, 2, kernel, stride=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=f"kernel_size {kernel} must be a multiple of stride 2"):
        CausalConvTranspose1d(2, 2, kernel, stride=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=f"kernel_size {kernel} must be a multiple of stride 2"):
        GroupedConvTranspose1d(2, 2, kernel, stride=2, groups=1, rngs=nnx.Rngs(0))
