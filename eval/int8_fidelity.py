"""How close int8 comes to float32 at every head of a random network, teacher-forced.

    python -m eval.int8_fidelity --config dia2_1b
    python -m eval.int8_fidelity --config dia2_1b --weights fan_in --part int8,weights,bfloat16

All read the same random tokens. How far a difference grows on its way through random layers depends
on how they are drawn, so ``--weights`` says how:

    upstream  with the variances that PyTorch gives the modules of upstream's code: 1 of embeddings,
              1 / 3 of 1 / fan-in of linear maps
    fan_in    as the random weights of the other programs here: 1 / fan-in of both. What a layer
              adds then exceeds what the embedding put there, and no layer listens to its input
              alone

Norms are 1. Queries and keys are normalised and not divided by sqrt(H), so scores deviate by
sqrt(H) = 11 and softmax is close to a choice of one slot, which a small difference may turn.
``--norm`` sets the weights of their norms (H ** -0.25, 0.2973 for 128, makes scores deviate by 1).

``--part`` takes int8 apart: ``weights``, ``activations`` and ``cache`` round these alone, as int8
does; ``bfloat16`` is the control, weights and activations in bfloat16.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import click
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dia2_jax import checkpoint
from dia2_jax.convert.models import abstract_dia2
from dia2_jax.model.dia2 import Dia2Model
from dia2_jax.nn import linear
from dia2_jax.nn.int8_cache import nearest
from dia2_jax.nn.quantized import BASE, SCALE_SUFFIX, round_rows_twice
from dia2_jax.typing import Array, Float
from eval.command import EPILOG, Finite, listed
from eval.latency_models import Source, random_params
from train.command import Program

PARTS = ("int8", "weights", "activations", "cache", "bfloat16")
WEIGHTS = ("upstream", "fan_in")


def drawn(abstract: Any, weights: str, norm: float) -> Any:
    """Random values for every leaf; the same for int8 leaves as for others, but rounded."""
    named, structure = checkpoint.flatten_tree(random_params(abstract))
    for name, leaf in named.items():
        factor = 1.0
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            factor = norm
        elif weights == "upstream" and ("audio_embeds" in name or "embedding" in name):
            factor = leaf.shape[1] ** 0.5
        elif weights == "upstream" and (
            name.endswith(SCALE_SUFFIX) or (leaf.ndim > 1 and leaf.dtype != jnp.int8)
        ):
            factor = 3**-0.5
        if factor != 1.0:
            named[name] = (leaf * factor).astype(leaf.dtype)
    return checkpoint.unflatten_tree(structure, named)


def rounded_twice(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """``x`` as an int8 product reads it."""
    first, second, step = round_rows_twice(x)
    return (first + second / BASE) * step[..., None]


def heads(
    source: Source, part: str | None, *, weights: str, steps: int, norm: float
) -> list[np.ndarray]:
    """Logits of the action, of codebook 0, and of each stage of the depformer.

    Args:
      part: of PARTS, None for float32.
    """
    config = source.dia2_config()
    data, rng = config.data, np.random.default_rng(5)
    text = rng.integers(8, data.text_vocab_size, (1, 2, steps))
    audio = rng.integers(0, data.depth_vocab_size, (1, data.codebooks, steps))
    tokens = jnp.asarray(np.concatenate([text, audio], axis=1), jnp.int32)
    kind = jnp.bfloat16 if part == "bfloat16" else jnp.float32
    graph, abstract = abstract_dia2(config, dtype=kind, param_dtype=kind, int8=part == "int8")
    model: Dia2Model = nnx.merge(graph, drawn(abstract, weights, norm))
    if part == "cache":
        for layer in model.transformer.layers:
            layer.attn.int8 = True
    project = linear.project
    changed = {
        "weights": lambda x, weight: project(x, nearest(weight)),
        "activations": lambda x, weight: project(rounded_twice(x), weight),
    }
    # Not as one program: equal layers share the small ones, and nothing large is compiled.
    with mock.patch.object(linear, "project", changed.get(part or "", project)):
        out = model.transformer(tokens)
        frames = tokens[0].T
        spelled = (frames[:, 0], frames[:, 1])
        stages = model.depformer(frames[:, 2:-1], out.hidden[0], spelled)
    every = [out.action, out.cb0, *stages.swapaxes(0, 1)]
    return [np.asarray(logits, np.float64).ravel() for logits in every]


def _part(name: str) -> str:
    if name not in PARTS:
        raise ValueError(name)
    return name


@click.command(
    cls=Program,
    epilog=EPILOG,
    no_args_is_help=False,
    help="Cosines of int8 and float32 logits; see the module's docstring.",
)
@click.option("--config", default="dia2_1b", show_default=True, help="Shape in configs/.")
@click.option(
    "--weights",
    type=click.Choice(WEIGHTS),
    default="upstream",
    show_default=True,
    help="How random weights are drawn.",
)
@click.option(
    "--norm", type=Finite(), default=1.0, show_default=True, help="Weights of query and key norms."
)
@click.option(
    "--part",
    "parts",
    callback=listed(f"of {', '.join(PARTS)}, separated by commas", _part),
    default=",".join(PARTS),
    show_default=True,
    help="What is rounded.",
)
@click.option("--steps", type=click.IntRange(min=1), default=24, show_default=True)
def main(config: str, weights: str, norm: float, parts: list[str], steps: int) -> None:
    """Command line."""
    source = Source.of(config)

    def run(part: str | None) -> list[np.ndarray]:
        return heads(source, part, weights=weights, steps=steps, norm=norm)

    whole = run(None)
    click.echo(f"{'':12}  action   cb 0     worst and median of {len(whole) - 2} stages")
    for part in parts:
        pairs = zip(whole, run(part), strict=True)
        action, first, *stages = (float(a @ b / np.sqrt((a @ a) * (b @ b))) for a, b in pairs)
        worst, middle = (float(found(stages)) for found in (np.min, np.median))
        click.echo(f"{part:12}  {action:.5f}  {first:.5f}  {worst:.5f}  {middle:.5f}")


if __name__ == "__main__":
    main(prog_name="python -m eval.int8_fidelity")
