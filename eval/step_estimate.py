"""What a frame would take at least on accelerators: computed, not measured.

    python -m eval.step_estimate --config dia2_1b,dia2_2b

Nothing here runs on an accelerator, or needs one. Of a config the bytes are counted that a frame
must read (weights as often as it multiplies by them: the depformer's layers once a stage; the
caches of both guidance rows) and the floating-point operations that it must do; each of its two
parts then takes the longer of bytes / bandwidth and operations / peak, of the figures that the
makers publish.

That is a bound, not a forecast. Left out are the time to launch many small kernels one after
another (each of the depformer's stages waits for the one before), sampling, the host's round trip
and the codec, and that no program reaches all of a published bandwidth. One thing could make a
frame faster than this: an on-chip cache that keeps part of the depformer between stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import click

from dia2_jax.config import Dia2Config
from dia2_jax.convert.models import abstract_dia2
from eval.command import EPILOG, listed
from eval.latency_measure import default_positions
from eval.latency_models import Source, frame_cache_bytes, frame_weights
from eval.latency_process import MeasurementError
from train.command import Program

#: The package computes in these.
DTYPES = ("float32", "bfloat16", "int8")

_GUIDANCE_ROWS = 2
_FLOAT32_BYTES = 4
#: Audio in a frame of the published codec.
_FRAME_S = 0.08


@dataclass(frozen=True)
class Accelerator:
    """Published figures of one chip.

    Attributes:
      bandwidth: bytes of its memory read in a second.
      peak: operations a second (a multiplication and an addition are two) by dtype, dense.
      source: where they are published.
    """

    name: str
    bandwidth: float
    peak: dict[str, float]
    source: str


ACCELERATORS = (
    Accelerator(
        "H100 SXM",
        3.35e12,
        # The sheet gives tensor cores with 2:4 sparsity (bfloat16 1,979, int8 3,958), twice the
        # dense rate. float32 is that of the ordinary cores: TF32 rounds what it multiplies.
        {"float32": 67e12, "bfloat16": 1979e12 / 2, "int8": 3958e12 / 2},
        "NVIDIA H100 Tensor Core GPU, product specifications, nvidia.com/en-us/data-center/h100",
    ),
    Accelerator(
        "TPU v5e",
        819e9,
        # Nothing is published for float32. At the highest precision, which the package asks for
        # where it matters, a product is six bfloat16 products
        # (jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X6).
        {"float32": 197e12 / 6, "bfloat16": 197e12, "int8": 393e12},
        "TPU v5e, key chip specifications, cloud.google.com/tpu/docs/v5e",
    ),
)


@dataclass(frozen=True)
class Part:
    """What a part of a frame reads and does.

    Attributes:
      weights, cache: bytes.
      operations: floating-point operations, a multiplication and an addition being two.
    """

    weights: int
    cache: int
    operations: int

    def seconds(self, chip: Accelerator, dtype: str) -> float:
        """The longer of reading and computing."""
        return max((self.weights + self.cache) / chip.bandwidth, self.operations / chip.peak[dtype])

    def waits_for_memory(self, chip: Accelerator, dtype: str) -> bool:
        """Whether reading takes longer than computing."""
        reading = (self.weights + self.cache) / chip.bandwidth
        return reading >= self.operations / chip.peak[dtype]


@dataclass(frozen=True)
class Weights:
    """Of one dtype, by part: bytes that a frame multiplies by, and entries, whatever holds them."""

    size: dict[str, int]
    entries: dict[str, int]

    @classmethod
    def of(cls, config: Dia2Config) -> dict[str, Weights]:
        """By dtype."""
        wide = frame_weights(config, abstract_dia2(config)[1])
        narrow = frame_weights(config, abstract_dia2(config, int8=True)[1])
        # Of two bytes each parameter; int8 has scales beside it, and leaves norms as they are.
        sizes = {"float32": wide, "bfloat16": {k: v // 2 for k, v in wide.items()}, "int8": narrow}
        entries = {name: count // _FLOAT32_BYTES for name, count in wide.items()}
        return {dtype: cls(size, entries) for dtype, size in sizes.items()}


def frame_parts(config: Dia2Config, weights: Weights, position: int, dtype: str) -> dict[str, Part]:
    """``decoder`` and ``depformer`` of the frame at a position, with both guidance rows.

    Operations are those of products: weights times rows, and scores and sums of attention.
    The depformer's own cache is held in the activations' dtype, and read whole by every stage.
    """
    int8 = dtype == "int8"
    size = 2 if dtype == "bfloat16" else _FLOAT32_BYTES  # of activations
    decoder, depformer = config.model.decoder, config.model.depformer
    stages = len(config.schedule)
    # For every query head and slot a score and a share of the sum, of H products each.
    scores = 4 * decoder.n_layer * (position + 1) * decoder.gqa_query_heads * decoder.gqa_head_dim
    heads = depformer.gqa_query_heads * depformer.gqa_head_dim
    stage_scores = 4 * depformer.n_layer * heads * stages * (stages + 1) // 2
    keys = depformer.kv_heads * depformer.gqa_head_dim
    stage_cache = 2 * depformer.n_layer * stages * keys * size
    return {
        "decoder": Part(
            weights.size["decoder"],
            frame_cache_bytes(config, position, size, int8=int8),
            _GUIDANCE_ROWS * (2 * weights.entries["decoder"] + scores),
        ),
        "depformer": Part(
            weights.size["depformer"],
            _GUIDANCE_ROWS * stages * stage_cache,
            _GUIDANCE_ROWS * (2 * weights.entries["depformer"] + stage_scores),
        ),
    }


def table(names: Sequence[str], positions: Sequence[int] | None = None) -> str:
    """A Markdown table for configs by name (or folder), a row a step and dtype.

    Raises:
      MeasurementError: no such config, or a position outside its context.
    """
    head = ["", "dtype", "weights", "caches", "operations"]
    head += [f"{chip.name}, computed" for chip in ACCELERATORS]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name in names:
        source = Source.of(name)
        config = source.dia2_config()
        context = config.runtime.max_context_steps
        weights = Weights.of(config)
        for dtype in DTYPES:
            for position in positions or default_positions(context):
                if not 0 <= position < context:
                    raise MeasurementError(
                        f"--at {position}: outside this model's context of {context} steps"
                    )
                parts = frame_parts(config, weights[dtype], position, dtype)
                cells = [
                    f"{name}, step {position}",
                    dtype,
                    f"{sum(part.weights for part in parts.values()) / 1e9:.2f} GB",
                    f"{sum(part.cache for part in parts.values()) / 1e9:.2f} GB",
                    f"{sum(part.operations for part in parts.values()) / 1e9:.1f} G",
                ]
                cells += [_time(parts, chip, dtype) for chip in ACCELERATORS]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _time(parts: dict[str, Part], chip: Accelerator, dtype: str) -> str:
    seconds = {name: part.seconds(chip, dtype) for name, part in parts.items()}
    total = sum(seconds.values())
    busy = [name for name, part in parts.items() if not part.waits_for_memory(chip, dtype)]
    return (
        f"{total * 1e3:.2f} ms (decoder {seconds['decoder'] * 1e3:.2f}), "
        f"{_FRAME_S / total:.0f} × real time"
        + (f"; arithmetic limits the {' and the '.join(busy)}" if busy else "")
    )


def sources() -> str:
    """The figures that times are computed from, and where they are published."""
    lines = []
    for chip in ACCELERATORS:
        peaks = ", ".join(f"{name} {rate / 1e12:.1f}" for name, rate in chip.peak.items())
        lines.append(
            f"- {chip.name}: {chip.bandwidth / 1e9:,.0f} GB/s; T/s {peaks} ({chip.source})"
        )
    return "\n".join(lines)


_STEPS = listed("steps separated by commas, for example 100,1400", int)


@click.command(
    cls=Program,
    epilog=EPILOG,
    help="Bounds of frame times on accelerators, computed; see the module's docstring.",
)
@click.option("--config", "names", required=True, metavar="NAMES", help="Shapes or checkpoints.")
@click.option("--at", callback=_STEPS, metavar="STEPS", help="Positions, e.g. 100,1400.")
def main(names: str, at: list[int] | None) -> None:
    """Command line."""
    text = table(names.split(","), at)
    click.echo(f"{text}\n\nComputed, not measured, from published figures:\n\n{sources()}")


if __name__ == "__main__":
    main(prog_name="python -m eval.step_estimate")
