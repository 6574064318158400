"""Floating-point operations of a training step, counted from the shapes of the model.

Counted are the matrix products that the mathematics asks for: two operations a multiply-add;
causal attention at half its square; backward once more for the inputs and once more for each
weight that trains. Embedding look-ups, norms, softmaxes and what rematerialisation computes again
are not counted, so the share of the peak that is reported is a lower bound.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping

from dia2_jax import checkpoint
from dia2_jax.config import Dia2Config
from dia2_jax.convert.models import abstract_dia2
from train.trainable import is_projection


def weight_uses(config: Dia2Config, path: str) -> tuple[int, int]:
    """How often a weight is multiplied with: times a step of a row, times a frame of depth loss."""
    half, name, *rest = path.split(".")
    if half == "transformer":
        return 1, 0
    if name == "layers":
        if "self_attention" in rest:
            return 0, Counter(config.schedule)[int(rest[-2])]
        return 0, len(config.schedule)
    return 0, 1  # heads, input projections, text embedding


def projection_shapes(config: Dia2Config) -> dict[str, tuple[int, int]]:
    """``(out, in)`` of every weight that is multiplied with, by path."""
    abstract = checkpoint.flatten_tree(abstract_dia2(config)[1])[0]
    return {
        path: (leaf.shape[0], leaf.shape[1])
        for path, leaf in abstract.items()
        if is_projection(path, leaf.shape)
    }


def forward_flops(
    config: Dia2Config,
    *,
    rows: int,
    steps: int,
    depth_frames: int,
    shapes: Mapping[str, tuple[int, int]],
) -> tuple[dict[str, float], float]:
    """Operations of the forward pass: of each weight's products, and of all attention.

    Args:
      rows: rows of the batch.
      steps: steps of a row.
      depth_frames: frames with depth loss of a row.
      shapes: :func:`projection_shapes` of the config.
    """
    weights = {}
    for path, shape in shapes.items():
        a_step, a_frame = weight_uses(config, path)
        weights[path] = 2.0 * math.prod(shape) * rows * (steps * a_step + depth_frames * a_frame)
    decoder, depformer = config.model.decoder, config.model.depformer
    stages = len(config.schedule)
    attention = decoder.n_layer * steps**2 * decoder.gqa_query_heads * decoder.gqa_head_dim
    deep = depformer.n_layer * stages**2 * depformer.gqa_query_heads * depformer.gqa_head_dim
    # Scores and values, two operations a multiply-add, half the square.
    return weights, 2.0 * rows * (attention + depth_frames * deep)


def training_flops(
    config: Dia2Config,
    *,
    rows: int,
    steps: int,
    depth_frames: int,
    trained: Collection[str],
    shapes: Mapping[str, tuple[int, int]],
    lora_rank: int | None = None,
) -> float:
    """Operations of forward and backward pass of one optimiser step.

    Args:
      trained: paths of the parameters that train; of a LoRA run those of its adapters.
      lora_rank: of the adapters, if there are any.
      shapes: :func:`projection_shapes` of the config.
    """
    weights, attention = forward_flops(
        config, rows=rows, steps=steps, depth_frames=depth_frames, shapes=shapes
    )
    total = 3 * attention
    for path, count in weights.items():
        total += count * (3 if path in trained else 2)
        stem = path.removesuffix(".weight")
        if lora_rank is not None and f"{stem}.lora_a" in trained:
            outputs, inputs = shapes[path]
            total += 3 * count * lora_rank * (inputs + outputs) / (inputs * outputs)
    return total
