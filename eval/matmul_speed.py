"""How fast a few rows are multiplied by a weight: by XLA, by how the product is written, and by the
kernels in C, where there are any.

    python -m eval.matmul_speed
    python -m eval.matmul_speed --rows 2,8 --shapes 12288x1024,1024x6144 --json matmul.json

Weights are ``OUTxIN`` matrices of the 1B shape; as many different ones are read in turn as fill
``--megabytes`` of int8, each product waits for the one before, and the time of all is divided by
their number. It includes what each way does to the activations. GB/s are of weights as stored.
Measure on an otherwise idle machine; [SPEED.md](SPEED.md) says what was found.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dia2_jax.nn.kernels import kernels, product_float32, product_int8
from dia2_jax.nn.quantized import multiply_in_xla, quantize, round_rows
from dia2_jax.typing import Array
from eval.command import EPILOG, OutputFile, listed, size, write_json
from eval.latency_machine import describe, read_bandwidth, versions
from eval.latency_statistics import summary
from train.command import Program

SHAPES = "2048x1024,1024x2048,12288x1024,1024x6144,3072x1024,1024x1024,6144x1024,1024x3072"

#: Makes what is held of a float32 weight, and ``[rows, out]`` float32 of it and the activations.
Way = tuple[Callable[[np.ndarray], Any], Callable[[Any, Array], Array]]

_LAST = (((1,), (1,)), ((), ()))


def _narrow(held: tuple[Array, Array], x: Array, *, weights_left: bool) -> Array:
    """int8 products without what makes them float32 again, by the order of the operands."""
    weight, _ = held
    rounded, _ = round_rows(x)
    if weights_left:
        return lax.dot_general(weight, rounded, _LAST, preferred_element_type=jnp.int32)
    return lax.dot_general(rounded, weight, _LAST, preferred_element_type=jnp.int32)


def _int8(weight: np.ndarray) -> tuple[Array, Array]:
    return jax.tree.map(jnp.asarray, quantize(weight))


def _unsigned(weight: np.ndarray) -> tuple[Array, Array]:
    rounded, scale = quantize(weight)
    return jnp.asarray((rounded.astype(np.int16) + 128).astype(np.uint8)), jnp.asarray(scale)


def _float(weight: Array, x: Array, *, weights_left: bool = True) -> Array:
    exact = lax.Precision.HIGHEST
    if weights_left:
        return lax.dot_general(weight, x, _LAST, precision=exact)
    return lax.dot_general(x, weight, _LAST, precision=exact)


def _halves(weight: Array, x: Array) -> Array:
    halves = weight.reshape(2, -1, weight.shape[1])
    both = jnp.broadcast_to(x, (2, *x.shape))
    return jnp.einsum("nFD,nBD->nFB", halves, both, precision=lax.Precision.HIGHEST)


def _bfloat16(weight: Array, x: Array) -> Array:
    narrow = x.astype(jnp.bfloat16)
    return lax.dot_general(weight, narrow, _LAST, preferred_element_type=jnp.float32)


def _reduced(held: tuple[Array, Array], x: Array) -> Array:
    return jnp.sum(held[0][None].astype(jnp.int32) * jnp.round(x)[:, None].astype(jnp.int32), -1)


WAYS: dict[str, Way] = {
    "float32, weights right": (jnp.asarray, lambda w, x: _float(w, x, weights_left=False)),
    "float32, weights left": (jnp.asarray, _float),
    "float32, weights left in halves": (jnp.asarray, _halves),
    "bfloat16, weights left": (lambda w: jnp.asarray(w, jnp.bfloat16), _bfloat16),
    "int8, two digits": (_int8, lambda held, x: multiply_in_xla(x, *held)),
    "int8, weights left": (_int8, lambda w, x: _narrow(w, x, weights_left=True)),
    "int8, weights right": (_int8, lambda w, x: _narrow(w, x, weights_left=False)),
    "uint8, weights left": (_unsigned, lambda w, x: _narrow(w, x, weights_left=True)),
    "int8, widened to float32": (_int8, lambda w, x: _float(w[0].astype(jnp.float32), x)),
    "int8, multiplied and summed": (_int8, _reduced),
}


def ways_here() -> dict[str, Way]:
    """All of them, and the kernels that this processor has."""
    found = dict(WAYS)
    if kernels().float32:
        found["kernel, float32"] = (jnp.asarray, lambda w, x: product_float32(x, w))
    if kernels().int8:
        found["kernel, int8, two digits"] = (_int8, lambda held, x: product_int8(x, *held))
    return found


def measure(way: Way, shape: tuple[int, int], rows: int, count: int, repeats: int) -> Any:
    """Times of one product, and GB/s of weights as they are held."""
    make, product = way
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(shape, np.float32)
    # Rolled, so that every one is memory of its own.
    held = [make(np.roll(weight, index, axis=0)) for index in range(count)]
    x = jnp.asarray(rng.standard_normal((rows, shape[1]), np.float32))

    @jax.jit
    def run(held: list[Any], x: Array) -> Array:
        for one in held:
            # Each needs the one before, in a way that no compiler can see through.
            total = jnp.sum(product(one, x)).astype(jnp.float32)
            x = x + jnp.where(total == 12345.5, total, 0)
        return x

    run(held, x).block_until_ready()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run(held, x).block_until_ready()
        times.append((time.perf_counter() - start) * 1e3 / count)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(held)) / count
    spread = summary(times)
    return {**spread, "weights_gb_per_s": size / spread["p50_ms"] / 1e6}


def _shape(text: str) -> tuple[int, int]:
    outputs, inputs = (size(part) for part in text.split("x"))
    return outputs, inputs


_COUNT = click.IntRange(min=1)


@click.command(
    cls=Program,
    epilog=EPILOG,
    no_args_is_help=False,
    help="Time products of few rows; see the module's docstring.",
)
@click.option(
    "--rows",
    default="2,8",
    show_default=True,
    callback=listed("whole numbers from 1 on separated by commas, for example 2,8", size),
    help="Rows of activations.",
)
@click.option(
    "--shapes",
    default=SHAPES,
    show_default=True,
    callback=listed("OUTxIN separated by commas, for example 2048x1024,1024x1024", _shape),
    help="Weights, OUTxIN.",
)
@click.option("--ways", help="Only the ways whose names begin so, separated by semicolons.")
@click.option(
    "--megabytes", type=_COUNT, default=100, show_default=True, help="int8 weights read in turn."
)
@click.option(
    "--repeats", type=_COUNT, default=9, show_default=True, help="Times all of them are read."
)
@click.option("--json", "target", type=OutputFile(), help="Write everything there.")
def main(
    rows: list[int],
    shapes: list[tuple[int, int]],
    ways: str | None,
    megabytes: int,
    repeats: int,
    target: Path | None,
) -> None:
    """Command line."""
    wanted = ("",) if ways is None else tuple(ways.split(";"))
    there = ways_here()
    if not any(name.startswith(wanted) for name in there):
        raise click.BadParameter(f"--ways {ways}: none begins so; there are {'; '.join(there)}")
    found: list[dict[str, Any]] = []
    for outputs, inputs in shapes:
        text = f"{outputs}x{inputs}"
        count = max(megabytes * 1_000_000 // (outputs * inputs), 1)
        for row_count in rows:
            for name, way in there.items():
                if not name.startswith(wanted):
                    continue
                one = measure(way, (outputs, inputs), row_count, count, repeats)
                found.append({"way": name, "shape": [outputs, inputs], "rows": row_count, **one})
                click.echo(
                    f"{text:>11} {row_count} rows  {name:32} {one['p50_ms']:8.3f} ms "
                    f"({one['p25_ms']:.3f} to {one['p75_ms']:.3f})  "
                    f"{one['weights_gb_per_s']:6.2f} GB/s"
                )
    machine = {**describe(), **read_bandwidth(0.5), **versions("jax", "jaxlib")}
    click.echo(f"this machine reads {machine['best_gb_per_s']:.1f} GB/s")
    if target is not None:
        write_json(target, {"machine": machine, "products": found})


if __name__ == "__main__":
    main(prog_name="python -m eval.matmul_speed")
