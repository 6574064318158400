"""How close int8 comes to float32 at every head of a random network, teacher-forced.

    python -m eval.int8_fidelity --config dia2_1b
    python -m eval.int8_fidelity --config dia2_1b --norm 0.2973

Both read the same random tokens. Queries and keys are normalised and not divided by sqrt(H), so
with norms of 1, as random weights have them, scores deviate by sqrt(H) = 11 and softmax is close to
a choice of one slot, which a small difference may turn; ``--norm`` sets the weights of these norms
(H ** -0.25, 0.2973 for 128, makes scores deviate by 1).
"""

from __future__ import annotations

from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dia2_jax import checkpoint
from dia2_jax.convert.models import abstract_dia2
from eval.command import EPILOG, Finite
from eval.latency_models import Source, random_params
from train.command import Program


def heads(source: Source, int8: bool, steps: int, norm: float) -> list[np.ndarray]:
    """Logits of the action, of codebook 0, and of each stage of the depformer."""
    config = source.dia2_config()
    data, rng = config.data, np.random.default_rng(5)
    text = rng.integers(8, data.text_vocab_size, (1, 2, steps))
    audio = rng.integers(0, data.depth_vocab_size, (1, data.codebooks, steps))
    tokens = jnp.asarray(np.concatenate([text, audio], axis=1), jnp.int32)
    graph, abstract = abstract_dia2(config, int8=int8)
    named, structure = checkpoint.flatten_tree(random_params(abstract))
    for name in named:
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            named[name] = named[name] * norm
    params = checkpoint.unflatten_tree(structure, named)

    @jax.jit
    def run(params: Any) -> Any:
        model = nnx.merge(graph, params)
        out = model.transformer(tokens)
        frames = tokens[0].T
        spelled = (frames[:, 0], frames[:, 1])
        stages = model.depformer(frames[:, 2:-1], out.hidden[0], spelled)
        return [out.action, out.cb0, *stages.swapaxes(0, 1)]

    return [np.asarray(logits, np.float64).ravel() for logits in run(params)]


@click.command(
    cls=Program,
    epilog=EPILOG,
    no_args_is_help=False,
    help="Cosines of int8 and float32 logits; see the module's docstring.",
)
@click.option("--config", default="dia2_1b", show_default=True, help="Shape in configs/.")
@click.option("--steps", type=click.IntRange(min=1), default=24, show_default=True)
@click.option(
    "--norm", type=Finite(), default=1.0, show_default=True, help="Weights of query and key norms."
)
def main(config: str, steps: int, norm: float) -> None:
    """Command line."""
    source = Source.of(config)
    pairs = zip(*(heads(source, int8, steps, norm) for int8 in (False, True)), strict=True)
    cosines = [float(a @ b / np.sqrt((a @ a) * (b @ b))) for a, b in pairs]
    click.echo(f"action {cosines[0]:.5f}, codebook 0 {cosines[1]:.5f}")
    click.echo("stages " + " ".join(f"{value:.5f}" for value in cosines[2:]))


if __name__ == "__main__":
    main(prog_name="python -m eval.int8_fidelity")
