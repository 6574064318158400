"""Metrics that a run did not have before: its takes are scored with them as they were kept.

So a package that was missing can be installed, or ``--metrics`` widened, without having everything
spoken again. What a model said is read from the run's folder; recordings, and what a codec makes of
them, come out the same when they are made again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import soundfile

from dia2_jax.audio import SAMPLE_RATE, read_audio, voiced_span
from eval.scoring.evaluation import OF_ONE_TAKE, measure, scores_of
from eval.scoring.metric import Metric, Row
from eval.scoring.prompts import Prompt, PromptSet
from eval.scoring.run_folder import Key, RunFolder
from eval.scoring.scripts import SpokenWord
from eval.scoring.takes import GENERATED, Take


def kept_take(row: Row, prompt: Prompt, folder: Path) -> Take | None:
    """A generated take as its row and file tell it; None if the file is gone or damaged.

    How long the model took is not known any more.
    """
    try:
        wave, rate = soundfile.read(folder / row["audio"], dtype="float32")
    except (soundfile.SoundFileError, OSError):
        return None
    seconds = prompt.seconds
    if prompt.reference is not None:
        first, last = voiced_span(read_audio(prompt.reference), SAMPLE_RATE)
        seconds = last - first
    return Take(
        source=GENERATED,
        prompt=prompt,
        wave=wave,
        rate=rate,
        words=tuple(SpokenWord(**word) for word in row["words"]),
        truncated=row.get("truncated", False),
        reference_seconds=seconds,
        about={"reported_starts": row["reported_starts"]} if "reported_starts" in row else {},
    )


def score_added(
    make: Callable[[str, Prompt, int | None], Take],
    sets: Sequence[PromptSet],
    metrics: Sequence[Metric],
    folder: RunFolder,
    *,
    progress: Callable[[list[Key]], Any] = iter,
) -> None:
    """Complete the rows of a folder by the metrics that it lacked (`RunFolder.added`), if any.

    All rows are written at the end, before ``run.json`` says that they are complete: interrupted,
    it begins again. A take whose audio is gone is made again.

    Args:
      make, progress: as :func:`eval.scoring.evaluation.evaluate` takes them.
      sets: every prompt of the sets, also those that are not asked for this time.
      metrics: all of the run.
    """
    added = [metric for metric in metrics if metric.name in folder.added]
    rows = dict(folder.rows)
    keys = [row_key for row_key, row in rows.items() if "scores" in row]
    if not added or not keys:
        return
    names = ", ".join(metric.name for metric in added)
    click.echo(f"{folder.path}: {len(keys)} takes are there, now scored by {names}, too", err=True)
    prompts = {(each.name, prompt.id): prompt for each in sets for prompt in each.prompts}
    for row_key in progress(keys):
        row, (name, identifier, source, seed) = rows[row_key], row_key
        prompt = prompts[name, identifier]
        try:
            if source == GENERATED:
                take = kept_take(row, prompt, folder.path)
            else:
                take = make(source, prompt, seed)
            found = scores_of(take, added) if take else {}
        except OF_ONE_TAKE:
            take = None
        if take is None:
            rows[row_key] = measure(make, prompt, row_key, metrics, folder)
        else:
            rows[row_key] = {**row, "scores": {**row["scores"], **found}}
    folder.replace_rows(rows)
