"""How fast a configuration trains, as a share of what the machine can do.

    python -m train.speed configs/pretrain_small.yaml --synthetic 64

The real task with its real data pipeline, step by step; the machine's matmul peak is measured
before every step, so that both see the same noise of a shared machine.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from train.command import Program
from train.config import read_config
from train.dia2_config import Dia2TrainingConfig
from train.recordings import MANIFEST

#: Words a second of made-up recordings, and how long they are, in seconds.
_WORD_SECONDS = (0.25, 0.55)
_RECORDING_SECONDS = (12.0, 30.0)


@click.command(cls=Program)
@click.argument("config_path", metavar="CONFIG", type=click.Path())
@click.argument("overrides", metavar="[NAME=VALUE ...]", nargs=-1)
@click.option("--steps", default=10, show_default=True, help="Steps that are timed.")
@click.option(
    "--synthetic",
    type=click.IntRange(min=1),
    metavar="N",
    help="Train on N made-up recordings of random codes instead of data.train.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    config_path: str,
    overrides: tuple[str, ...],
    steps: int,
    synthetic: int | None,
    as_json: bool,
) -> None:
    """Time the training steps that CONFIG describes. Nothing is saved."""
    config = read_config(Dia2TrainingConfig, config_path, overrides)
    with ExitStack() as stack:
        if synthetic is not None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            write_synthetic(folder / "data", config, synthetic)
            data = replace(config.data, train=str(folder / "data"), validation=None)
            config = replace(config, data=data)
        report = measure(config, steps)
    click.echo(json.dumps(report) if as_json else _table(report))


def measure(config: Dia2TrainingConfig, steps: int) -> dict[str, Any]:
    """Times of single steps in seconds, and what they are worth."""
    import jax

    from train.dia2_task import Dia2Task
    from train.peak import measure_peak

    task = Dia2Task(config)
    state = task.initial_state()
    batches = task.batches(0)
    rows: list[dict[str, float]] = []
    for step in range(steps + 2):  # two to compile and settle
        peak = measure_peak()
        start = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter()
        state, metrics = task.train_step(state, batch)
        jax.block_until_ready(metrics)
        end = time.perf_counter()
        work = task.work(batch)
        if step >= 2:
            rows.append(
                {
                    "seconds": end - waited,
                    "data_share": (waited - start) / (end - start),
                    "peak": peak,
                    "share": work["flops"] / (end - waited) / peak,
                    "flops": work["flops"],
                    "frames_per_second": work["frames"] / (end - start),
                    "real_share": work["real_share"],
                }
            )
    return {
        "rows": config.data.rows,
        "max_steps": config.data.max_steps,
        "timed_steps": steps,
        **{name: _spread([row[name] for row in rows]) for name in rows[0]},
    }


def write_synthetic(folder: Path, config: Dia2TrainingConfig, count: int) -> None:
    """A prepared data set of random codes and plausible words, for timing alone."""
    from datasets import Dataset, disable_progress_bars

    from train.starting_point import find_start

    disable_progress_bars()
    data = find_start(config.model).config.data
    rng = np.random.default_rng(0)
    rows = []
    for index in range(count):
        starts, end = [], rng.uniform(*_RECORDING_SECONDS)
        at = 0.2
        while at < end:
            starts.append(at)
            at += rng.uniform(*_WORD_SECONDS)
        frames = round((end + 2) * 12.5)
        codes = rng.integers(0, data.depth_vocab_size, frames * data.codebooks)
        rows.append(
            {
                "id": str(index),
                "text": "word",
                "frames": frames,
                "codes": codes.astype(np.uint16),
                "word_text": ["word"] * len(starts),
                "word_start": starts,
                "word_end": [start + 0.2 for start in starts],
                "word_speaker": [1] * len(starts),
            }
        )
    Dataset.from_list(rows).save_to_disk(str(folder))
    manifest = {
        "codebooks": data.codebooks,
        "frame_rate": 12.5,
        "word_step_offset": 2,
        "initial_padding": 2,
        "max_padding": 6,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))


def _spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    )
    return {"median": middle, "low": low, "high": high}


def _table(report: dict[str, Any]) -> str:
    def line(name: str, text: str, scale: float = 1.0) -> str:
        value = report[name]
        low, high = value["low"] * scale, value["high"] * scale
        return f"{text:<34}{value['median'] * scale:10.3f}   ({low:.3f} to {high:.3f})"

    return "\n".join(
        [
            f"{report['rows']} rows x {report['max_steps']} steps, {report['timed_steps']} timed: "
            "medians, quartiles in brackets",
            line("seconds", "step, s"),
            line("flops", "model operations a step, GFLOP", 1e-9),
            line("peak", "matmul peak, GFLOP/s", 1e-9),
            line("share", "share of the peak, %", 100),
            line("data_share", "waiting for data, %", 100),
            line("frames_per_second", "frames a second"),
            line("real_share", "frames that are not padding, %", 100),
        ]
    )


if __name__ == "__main__":
    main()
