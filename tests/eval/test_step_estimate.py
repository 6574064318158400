"""Computed frame times: bytes and operations of the published shape, counted by hand."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from eval import step_estimate
from eval.latency_models import Source, frame_cache_bytes
from eval.step_estimate import ACCELERATORS, DTYPES, Accelerator, Part, Weights, frame_parts


def test_the_1b_shape_counted_by_hand() -> None:
    config = Source.of("dia2_1b").dia2_config()
    weights = Weights.of(config)
    position, slots = 100, 128
    width, stages = 1024, 31
    layer = 2 * width * 16 * 128 + 2 * width * 8 * 128 + 3 * width * 6144 + 2 * width + 2 * 128
    decoder = 30 * layer + width + (2 + 2050) * width + 2 * width * width
    stage = 4 * width * 1024 + 3 * width * 3072 + 2 * width + 2 * 128
    depformer = stages * (3 * stage + width + 2050 * width) + 3 * width * width
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        parts = frame_parts(config, weights[dtype], position, dtype)
        assert parts["decoder"] == Part(
            weights=size * decoder,
            cache=2 * 2 * 30 * slots * 8 * 128 * size,  # rows, keys and values
            operations=2 * (2 * decoder + 4 * 30 * 101 * 16 * 128),
        )
        assert parts["depformer"] == Part(
            weights=size * depformer,
            cache=2 * stages * 2 * 3 * stages * 1024 * size,
            operations=2 * (2 * depformer + 4 * 3 * 1024 * stages * (stages + 1) // 2),
        )
    int8 = frame_parts(config, weights["int8"], position, "int8")
    assert decoder < int8["decoder"].weights < 1.02 * decoder  # scales and norms
    assert int8["decoder"].cache == frame_cache_bytes(config, position, int8=True)
    assert int8["decoder"].operations == parts["decoder"].operations


def test_a_part_takes_the_longer_of_reading_and_computing() -> None:
    chip = Accelerator("a chip", 100.0, {"float32": 10.0, "int8": 1000.0}, "here")
    part = Part(weights=300, cache=100, operations=200)
    assert part.seconds(chip, "float32") == 20.0 and not part.waits_for_memory(chip, "float32")
    assert part.seconds(chip, "int8") == 4.0 and part.waits_for_memory(chip, "int8")


def test_table_and_refusals() -> None:
    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(step_estimate.main, list(arguments))
        return result.exit_code, result.output

    code, text = run("--config", "tiny", "--at", "3")
    assert code == 0 and text.count("| tiny, step 3 |") == len(DTYPES)
    assert "Computed, not measured" in text and all(chip.source in text for chip in ACCELERATORS)
    assert run("--config", "tiny", "--at", "256") == (
        2, "error: --at 256: outside this model's context of 256 steps\n",
    )  # fmt: skip
    code, text = run("--config", "huge")
    assert code == 2 and text.startswith("error: --config huge: neither a checkpoint folder nor")
    assert "steps separated by commas" in run("--config", "tiny", "--at", "x")[1]


@pytest.mark.parametrize("chip", ACCELERATORS, ids=lambda chip: chip.name)
def test_every_chip_has_a_figure_for_every_dtype(chip: Accelerator) -> None:
    assert set(chip.peak) == set(DTYPES) and chip.source
