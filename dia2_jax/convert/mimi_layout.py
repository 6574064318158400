"""What both published Mimi layouts share: the numbering of SEANet's layers, kernel orders.

Both layouts number the encoder and the decoder like a PyTorch ``Sequential``, activations
included, so a layer's number follows from the config; ours are named stages. Kernels are
``[out, in, taps]`` there and ``[out, taps, in]`` here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dia2_jax.config import MimiConfig
from dia2_jax.convert.rules import IDENTITY, Rule, Shape, Transform, Transpose

KERNEL = Transpose((0, 2, 1))


@dataclass(frozen=True)
class TransposedKernel(Transform):
    """A transposed convolution's ``[in, out, taps * stride]`` as our ``[stride, out, taps, in]``.

    Our taps run from the oldest input to the newest, hence the reversal (see
    :class:`dia2_jax.nn.conv.CausalConvTranspose1d`).
    """

    stride: int

    def to_ours(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        blocks = [array.reshape(*array.shape[:2], -1, self.stride) for array in arrays]
        return [block[:, :, ::-1].transpose(3, 1, 2, 0) for block in blocks]

    def to_published(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        blocks = [array.transpose(3, 1, 2, 0)[:, :, ::-1] for array in arrays]
        return [block.reshape(*block.shape[:2], -1) for block in blocks]

    def shapes_to_ours(self, shapes: Sequence[Shape]) -> list[Shape]:
        return [self._split(shape) for shape in shapes]

    def shapes_to_published(self, shapes: Sequence[Shape]) -> list[Shape]:
        if any(len(shape) != 4 for shape in shapes):
            raise ValueError("is no transposed kernel of four axes")
        return [(inputs, outputs, taps * stride) for stride, outputs, taps, inputs in shapes]

    def _split(self, shape: Shape) -> Shape:
        if len(shape) != 3 or shape[2] % self.stride:
            raise ValueError(f"is {list(shape)}, no kernel of stride {self.stride}")
        inputs, outputs, taps = shape
        return (self.stride, outputs, taps // self.stride, inputs)


@dataclass(frozen=True)
class SeanetLayer:
    """One convolution of SEANet.

    Attributes:
      ours: its module in our tree, e.g. ``encoder.stages.0.down``.
      side: ``encoder`` or ``decoder``.
      index: its number in the published sequence.
      inner: what follows the number inside a residual block (``.block.1``), or nothing.
      stride: of a transposed convolution; None for an ordinary one.
    """

    ours: str
    side: str
    index: int
    inner: str = ""
    stride: int | None = None

    def rules(self, published: str) -> Iterator[Rule]:
        """Rows for kernel and bias of the convolution that is called `published` there."""
        kernel = KERNEL if self.stride is None else TransposedKernel(self.stride)
        yield Rule(f"{published}.weight", f"{self.ours}.weight", kernel)
        yield Rule(f"{published}.bias", f"{self.ours}.bias", IDENTITY)


def seanet_layers(config: MimiConfig) -> Iterator[SeanetLayer]:
    """Every convolution of both sides, with its published number."""
    yield SeanetLayer("encoder.first", "encoder", 0)
    index = 1
    for stage in range(len(config.upsampling_ratios)):
        yield from _residuals(config, "encoder", index, stage)
        index += config.num_residual_layers + 1  # an activation follows
        yield SeanetLayer(f"encoder.stages.{stage}.down", "encoder", index)
        index += 1
    yield SeanetLayer("encoder.last", "encoder", index + 1)

    yield SeanetLayer("decoder.first", "decoder", 0)
    index = 1
    for stage, stride in enumerate(config.upsampling_ratios):
        index += 1  # an activation comes first
        yield SeanetLayer(f"decoder.stages.{stage}.up", "decoder", index, stride=stride)
        yield from _residuals(config, "decoder", index + 1, stage)
        index += 1 + config.num_residual_layers
    yield SeanetLayer("decoder.last", "decoder", index + 1)


def _residuals(config: MimiConfig, side: str, index: int, stage: int) -> Iterator[SeanetLayer]:
    for number in range(config.num_residual_layers):
        block = f"{side}.stages.{stage}.residuals.{number}"
        yield SeanetLayer(f"{block}.dilated", side, index + number, ".block.1")
        yield SeanetLayer(f"{block}.pointwise", side, index + number, ".block.3")
        if config.use_conv_shortcut:
            yield SeanetLayer(f"{block}.shortcut", side, index + number, ".shortcut")
