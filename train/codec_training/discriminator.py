"""Multi-scale STFT discriminator (Défossez et al., 2022), hinge losses and feature matching.

One network per window length looks at the real and imaginary part of a spectrogram as a picture of
two channels. Pictures are ``[B, T, F, channels]``: time, then frequency.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from dia2_jax import checkpoint
from dia2_jax.typing import Array, Float
from train.codec_training.config import DiscriminatorConfig
from train.codec_training.losses import stft

#: Kernel, over time and frequency, of the layers that look far, and of the last ones.
_WIDE, _SQUARE = (3, 9), (3, 3)
_SLOPE = 0.2


class NormalizedConv2d(nnx.Module):
    """Convolution with weight normalisation: a direction and a gain (Salimans & Kingma, 2016).

    Attributes:
      direction: ``[height, width, D, F]``.
      gain: ``[F]``.
      bias: ``[F]``.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: tuple[int, int],
        *,
        stride: tuple[int, int] = (1, 1),
        dilation: tuple[int, int] = (1, 1),
        rngs: nnx.Rngs,
    ) -> None:
        self.stride, self.dilation = stride, dilation
        self.padding = tuple(
            ((size - 1) * step // 2,) * 2 for size, step in zip(kernel, dilation, strict=True)
        )
        fan_in = kernel[0] * kernel[1] * inputs
        direction = rngs.params.normal((*kernel, inputs, outputs)) * (2 / fan_in) ** 0.5
        self.direction = nnx.Param(direction)
        self.gain = nnx.Param(jnp.sqrt(jnp.sum(jnp.square(direction), axis=(0, 1, 2))))
        self.bias = nnx.Param(jnp.zeros((outputs,)))

    def __call__(self, x: Float[Array, "B T F D"]) -> Float[Array, "B Y G F"]:
        """The convolved picture."""
        direction = self.direction[...]
        length = jnp.sqrt(jnp.sum(jnp.square(direction), axis=(0, 1, 2)))
        y = lax.conv_general_dilated(
            x,
            direction * (self.gain[...] / length),
            window_strides=self.stride,
            padding=self.padding,
            rhs_dilation=self.dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=lax.Precision.HIGHEST,
        )
        return y + self.bias[...]


class ScaleDiscriminator(nnx.Module):
    """Logits of one window length; its layers grow in time by dilation, in frequency by strides."""

    def __init__(self, window: int, filters: int, *, rngs: nnx.Rngs) -> None:
        self.window = window
        layers = [NormalizedConv2d(2, filters, _WIDE, rngs=rngs)]
        for dilation in (1, 2, 4):
            layers.append(
                NormalizedConv2d(
                    filters, filters, _WIDE, stride=(1, 2), dilation=(dilation, 1), rngs=rngs
                )
            )
        layers.append(NormalizedConv2d(filters, filters, _SQUARE, rngs=rngs))
        self.layers = nnx.List(layers)
        self.last = NormalizedConv2d(filters, 1, _SQUARE, rngs=rngs)

    def __call__(self, wave: Float[Array, "B W"]) -> tuple[Array, list[Array]]:
        """Logits ``[B, T, F', 1]`` and the features of every layer before."""
        # The losses' spectra are per unit amplitude; for a network noise should be of order 1.
        spectrum = stft(wave, self.window) * self.window**0.5
        x = jnp.stack([spectrum.real, spectrum.imag], axis=-1)
        features = []
        for layer in self.layers:
            x = jax.nn.leaky_relu(layer(x), _SLOPE)
            features.append(x)
        return self.last(x), features


class Discriminator(nnx.Module):
    """Scale discriminators of several window lengths."""

    def __init__(self, config: DiscriminatorConfig, *, rngs: nnx.Rngs) -> None:
        self.scales = nnx.List(
            ScaleDiscriminator(window, config.filters, rngs=rngs) for window in config.windows
        )

    def __call__(self, wave: Float[Array, "B W"]) -> tuple[list[Array], list[list[Array]]]:
        """Logits and features of every scale."""
        results = [scale(wave) for scale in self.scales]
        return [logits for logits, _ in results], [features for _, features in results]


def abstract_discriminator(
    config: DiscriminatorConfig,
) -> tuple[Callable[[Mapping[str, Any]], Discriminator], dict[str, jax.ShapeDtypeStruct]]:
    """A function from flat weights to the network, and the shapes of the weights."""
    whole = nnx.eval_shape(lambda: Discriminator(config, rngs=nnx.Rngs(0)))
    graph, abstract = nnx.split(whole)
    leaves, treedef = checkpoint.flatten_tree(abstract)
    shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in leaves.items()}
    return lambda named: nnx.merge(graph, checkpoint.unflatten_tree(treedef, named)), shapes


def random_weights(shapes: Mapping[str, jax.ShapeDtypeStruct], seed: int) -> dict[str, np.ndarray]:
    """Directions of variance 2 / fan-in, gains of their lengths, no biases; drawn by numpy."""
    result: dict[str, np.ndarray] = {}
    for path, leaf in shapes.items():
        if path.endswith("direction"):
            random = np.random.default_rng([seed, zlib.crc32(path.encode())])
            scale = np.float32((2 / np.prod(leaf.shape[:-1])) ** 0.5)
            result[path] = scale * random.standard_normal(leaf.shape, np.float32)
            length = np.sqrt(np.square(result[path]).sum(axis=(0, 1, 2)))
            result[path.removesuffix("direction") + "gain"] = length
        elif path.endswith("bias"):
            result[path] = np.zeros(leaf.shape, np.float32)
    return result


def discriminator_loss(real: list[Array], fake: list[Array]) -> Float[Array, ""]:
    """Hinge: real logits above 1, generated ones below -1; mean over scales."""
    parts = [
        jnp.mean(jax.nn.relu(1 - ours)) + jnp.mean(jax.nn.relu(1 + theirs))
        for ours, theirs in zip(real, fake, strict=True)
    ]
    return sum(parts, jnp.zeros(())) / len(parts)


def adversarial_loss(fake: list[Array]) -> Float[Array, ""]:
    """Hinge of the generator: logits of its waveform above 1; mean over scales."""
    parts = [jnp.mean(jax.nn.relu(1 - logits)) for logits in fake]
    return sum(parts, jnp.zeros(())) / len(parts)


def feature_matching_loss(real: list[list[Array]], fake: list[list[Array]]) -> Float[Array, ""]:
    """L1 between features, relative to the mean size of the real ones; mean over all layers."""
    parts = [
        jnp.mean(jnp.abs(ours - theirs)) / (jnp.mean(jnp.abs(ours)) + 1e-6)
        for a, b in zip(real, fake, strict=True)
        for ours, theirs in zip(a, b, strict=True)
    ]
    return sum(parts, jnp.zeros(())) / len(parts)
