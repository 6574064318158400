"""Where a frame's time goes: decoder, depformer, guidance and draws, dispatch, and the codec.

    python -m eval.frame_profile --config dia2_1b --dtype int8
    python -m eval.frame_profile --config nano --at 100,1000 --repeats 100

Each part is a program of its own, on the model's weights and a frame's shapes; all of them and the
whole frame are timed in turns. What a call of a program costs by itself (all weights and the state
as arguments, a thread to wake, an answer for the host) is measured as a program that only gives its
state back; it is subtracted from the parts, also from draws, whose arguments are fewer, and has a
line of its own. What the parts do not explain is the last line: the word machine, and whatever one
program does worse or better than several. Bytes are weights, each as often as a frame multiplies by
it, and the decoder's cache.
Measure on an otherwise idle machine; [SPEED.md](SPEED.md) says what was found.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from dia2_jax.generation.sampling import draw, guide
from dia2_jax.generation.state import GenerationState
from dia2_jax.generation.step import decoder_tokens
from dia2_jax.typing import Array
from eval.command import EPILOG, OutputFile, listed, write_json
from eval.latency_machine import OtherWork, describe
from eval.latency_measure import chosen_positions
from eval.latency_models import Source, frame_weights
from eval.latency_ours import Ours
from eval.latency_statistics import alternate, summary
from train.command import Program

_GB = 1e9
#: Times of a part in a turn, behind one more that is dropped.
_BLOCK = 4


class Parts(Ours):
    """A model whose frame is taken apart."""

    def sides(self, position: int) -> dict[str, Callable[[int], list[float]]]:
        """What is timed at a position: name -> milliseconds of each of so many calls."""
        self.seek(position)
        self.frames(1)  # compiles, and makes the state
        leaves, tree = jax.tree.flatten(self._programs.params)
        graph, config, options = self._programs.graph, self._config, self._options
        settings, rows, stages = self._row_settings, 2, config.data.codebooks - 1

        def merged(weights: list[Array]) -> Any:
            return nnx.merge(graph, jax.tree.unflatten(tree, weights))

        @functools.partial(jax.jit, donate_argnums=1)
        def decoder(weights: list[Array], state: GenerationState) -> tuple[GenerationState, Any]:
            at = jnp.tile(state.frame, rows)
            tokens = decoder_tokens(state, config, options)
            out, cache = merged(weights).transformer.step(tokens, at, at, state.cache)
            return dataclasses.replace(state, cache=cache), out.action

        @jax.jit
        def depformer(weights: list[Array], hidden: Array, codes: Array) -> Array:
            network = merged(weights).depformer
            conditions, sums = network.conditions(hidden), jnp.zeros(())
            text, cache = network.text(codes, codes), network.init_cache(rows)
            for run in network.runs():

                def stage(carry: Any, number: Array, run: Any = run) -> tuple[Any, None]:
                    total, cache = carry
                    logits, cache = network.step(
                        number, run.weight_set, codes, conditions, text, cache
                    )
                    return (total + logits[0, 0], cache), None

                (sums, cache), _ = lax.scan(stage, (sums, cache), jnp.arange(run.start, run.stop))
            return sums

        @jax.jit
        def draws(logits: Array, keys: Array) -> Array:
            """Codebook 0's and the stages', each from logits that wait for the one before."""

            def one(before: Array, number: Array) -> tuple[Array, None]:
                now = logits + before.astype(jnp.float32)[:, None]
                chosen = guide(
                    now[:1], now[1:], settings.cfg_scale, settings.cfg_filter_k, options.bound
                )
                own = jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
                audio = (settings.audio_temperature, settings.audio_top_k)
                return draw(chosen, *audio, own, options.bound), None

            return lax.scan(one, jnp.zeros(1, jnp.int32), jnp.arange(stages + 1))[0]

        @functools.partial(jax.jit, donate_argnums=1)
        def nothing(
            weights: list[Array], state: GenerationState, queue: Any, settings: Any
        ) -> tuple[GenerationState, Array]:
            return state, state.frame + 1

        def keeping(program: Any, *more: Any) -> Callable[[], None]:
            """A call that gives the state away and gets it back."""

            def call() -> None:
                self._state, seen = program(leaves, self._state, *more)
                jax.device_get(seen)

            return call

        hidden = jnp.ones((rows, config.model.decoder.n_embd), self._dtype)
        codes = jnp.zeros(rows, jnp.int32)
        logits = jax.random.normal(jax.random.key(0), (rows, config.data.depth_vocab_size))
        keys = jax.random.split(jax.random.key(0), 1)
        calls = {
            "decoder": keeping(decoder),
            "depformer": lambda: depformer(leaves, hidden, codes).block_until_ready(),
            "guidance and draws": lambda: draws(logits, keys).block_until_ready(),
            "dispatch": keeping(nothing, self._queue, settings),
        }
        if not stages:
            del calls["depformer"]
        for call in calls.values():
            call()  # compiles
        timed = {name: functools.partial(_times, call) for name, call in calls.items()}
        return {"frame": self.frames, **timed, "codec": self.decode}

    def gigabytes(self, position: int) -> dict[str, float]:
        """What the parts that read weights read."""
        weights = frame_weights(self._config, self._programs.params)
        cache = self.costs(position)["cache_gb"]
        return {
            "decoder": weights["decoder"] / _GB + cache,
            "depformer": weights["depformer"] / _GB,
            "frame": sum(weights.values()) / _GB + cache,
        }


def _times(call: Callable[[], Any], count: int) -> list[float]:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def measure(model: Parts, position: int, repeats: int) -> dict[str, Any]:
    """Of each part its times, as measured, and what is left of their medians beside a dispatch."""
    found = {
        name: summary(times)
        for name, times in alternate(model.sides(position), repeats, _BLOCK).items()
    }
    dispatch = found["dispatch"]["p50_ms"]
    alone = {name: part["p50_ms"] - dispatch for name, part in found.items()}
    alone |= {"dispatch": dispatch, "codec": found["codec"]["p50_ms"]}
    alone["frame"] = found["frame"]["p50_ms"]
    explained = sum(ms for name, ms in alone.items() if name not in ("frame", "codec"))
    alone["rest"] = alone["frame"] - explained
    return {"position": position, "times": found, "ms": alone, "gb": model.gigabytes(position)}


def table(found: dict[str, Any]) -> list[str]:
    """Markdown of one position, the frame first."""
    lines = [
        f"| step {found['position']} | ms | of the frame | GB | GB/s |",
        "|---|---|---|---|---|",
    ]
    for name, ms in sorted(found["ms"].items(), key=lambda item: item[0] != "frame"):
        share = "beside it" if name == "codec" else f"{ms / found['ms']['frame']:.0%}"
        read = found["gb"].get(name)
        reads = "| |" if read is None else f"{read:.3f} | {read / ms * 1e3:.1f} |"
        lines.append(f"| {name} | {ms:.2f} | {share} | {reads}")
    return lines


@click.command(
    cls=Program,
    epilog=EPILOG,
    no_args_is_help=False,
    help="Time the parts of a frame in turns; see the module's docstring.",
)
@click.option(
    "--config",
    "name",
    default="dia2_1b",
    show_default=True,
    help="A checkpoint folder, nano, or the name of a shape in configs/ (random weights).",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "int8"]),
    default="float32",
    show_default=True,
    help="Of weights and activations, as eval.latency has it.",
)
@click.option(
    "--at",
    "positions",
    callback=listed("steps separated by commas, for example 100,1400", int),
    help="Steps of a take.  [default: early and late in the context]",
)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Times of each part.",
)
@click.option("--json", "target", type=OutputFile(), help="Write everything there.")
def main(
    name: str, dtype: str, positions: list[int] | None, repeats: int, target: Path | None
) -> None:
    """Command line."""
    source = Source.of(name)
    chosen = chosen_positions(positions, source.dia2_config().runtime.max_context_steps)
    others = OtherWork()
    model = Parts(source=name, dtype=dtype, cache=True)
    model.load()
    found = [measure(model, position, repeats) for position in chosen]
    machine = {**describe(), **model.bandwidth(0.5), "other_work": others.share()}
    click.echo(f"{name}, {dtype}, kernels in C: {model.about()['kernels']}; {repeats} times each")
    click.echo(
        f"this machine reads {machine['best_gb_per_s']:.1f} GB/s, "
        f"other programs {machine['other_work']:.0%}"
    )
    for each in found:
        click.echo("\n" + "\n".join(table(each)))
    if target is not None:
        write_json(target, {"model": name, "dtype": dtype, "machine": machine, "parts": found})


if __name__ == "__main__":
    main(prog_name="python -m eval.frame_profile")
