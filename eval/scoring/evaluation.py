"""A run: every take that is asked for made, scored and kept, then summed up and reported.

What is wrong with one prompt ends its take and not the run: the take's row has an ``error`` in
place of scores, is counted as failed in summary and report, and stays so when the run goes on.
Files that are not there at all are found before anything is loaded, by
`eval.scoring.sources.check_files`.
"""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import click

import dia2_jax
from dia2_jax.audio import write_wav
from dia2_jax.errors import (
    AlignmentError,
    AudioError,
    NonFiniteError,
    PrefixError,
    ScriptError,
)
from eval import latency_machine
from eval.scoring.metric import Metric, Options, Row, Unavailable
from eval.scoring.page import page
from eval.scoring.prompts import Prompt, PromptSet
from eval.scoring.registry import open_metrics
from eval.scoring.report import Section, report
from eval.scoring.run_folder import Key, RunFolder
from eval.scoring.summary import summarise
from eval.scoring.takes import GENERATED, RECORDING, Take

#: What one prompt's script, voice or recording can be the reason of; stress scripts are meant to.
OF_ONE_TAKE = (ScriptError, PrefixError, AlignmentError, AudioError, NonFiniteError)

#: What the two programs end with.
EXIT_STATUS = """\b
A take that cannot be made, because of its script, voice or recording, is a row with an error: it is
counted as failed, and not tried again unless you delete its line from utterances.jsonl.

\b
Exit status:
  0    done, however it sounds; takes that failed are counted in the report
  1    every take failed: the report says why
  2    {unusable} cannot be used, or a file
       that a prompt names is not there: the message says why, and nothing is made
  130  interrupted (Ctrl-C)
"""


def evaluate(
    make: Callable[[str, Prompt, int | None], Take],
    sets: Sequence[PromptSet],
    metrics: Sequence[Metric],
    folder: RunFolder,
    sources: Callable[[Prompt], Iterable[tuple[str, int | None]]],
    *,
    progress: Callable[[list[Key]], Any] = iter,
) -> list[Row]:
    """Make and score every take that the folder lacks.

    Args:
      make: a take, of a source, a prompt and a run seed (None for what no model makes).
      sources: sources of takes of a prompt, with their run seeds.
      progress: wraps the list of what is still to do, such as ``tqdm``.

    Returns:
      The rows of all takes that were asked for, in the order of the prompts. One that could not be
      made (`OF_ONE_TAKE`) has ``error``, the message, and neither audio nor scores.
    """
    prompts = {(s.name, prompt.id): prompt for s in sets for prompt in s.prompts}
    keys: list[Key] = [
        (name, identifier, source, seed)
        for (name, identifier), prompt in prompts.items()
        for source, seed in sources(prompt)
    ]
    for row_key in progress([k for k in keys if k not in folder.rows]):
        folder.add(measure(make, prompts[row_key[:2]], row_key, metrics, folder))
    return [folder.rows[row_key] for row_key in keys]


def measure(
    make: Callable[[str, Prompt, int | None], Take],
    prompt: Prompt,
    row_key: Key,
    metrics: Sequence[Metric],
    folder: RunFolder,
) -> Row:
    """The row of a take that is made, scored, and kept in the folder's ``audio``.

    A recording is not copied: its row has the whole path of it.
    """
    name, identifier, source, seed = row_key
    row: dict[str, Any] = {
        "set": name,
        "id": identifier,
        "source": source,
        "seed": seed,
        "kind": prompt.kind,
        "script": prompt.script,
    }
    try:
        take = make(source, prompt, seed)
        # A metric may read the voice that the prompt names.
        scores = scores_of(take, metrics)
    except OF_ONE_TAKE as error:
        return {**row, "error": str(error)}
    if source == RECORDING:
        assert prompt.reference is not None
        # Runs go on from other directories, too.
        row["audio"] = str(prompt.reference.resolve())
    else:
        place = folder.audio(row_key)
        write_wav(place, take.wave, take.rate)
        row["audio"] = str(place.relative_to(folder.path))
    row["seconds"] = take.seconds
    row["words"] = [
        {"text": word.text, "speaker": word.speaker, "start": word.start, "end": word.end}
        for word in take.words
    ]
    if source == GENERATED:
        row["truncated"] = take.truncated
    return {**row, **take.about, "scores": scores}


def scores_of(take: Take, metrics: Sequence[Metric]) -> dict[str, Any]:
    """Scores of a take by metric, of those that apply to it."""
    found = {metric.name: metric.score(take) for metric in metrics}
    return {name: scores for name, scores in found.items() if scores is not None}


def conclude(
    folder: RunFolder,
    rows: Sequence[Row],
    metrics: Sequence[Metric],
    about: Mapping[str, Any],
    title: str,
    more: Sequence[Section] = (),
    *,
    judged: str | None = None,
    quiet: bool,
) -> None:
    """Write ``summary.json``, ``report.md`` and ``report.html``, and end the program.

    The report goes to standard output; where it is and how many takes failed to standard error.
    Without jinja2 there is no ``report.html``, and a line that says so. The status is 1 if all
    takes failed.

    Args:
      about: what is said at the top, name by name.
      more: tables besides those of figures.
      judged: as :func:`eval.scoring.page.page` takes it.
      quiet: leave standard output alone.
    """
    summary = summarise(rows, metrics)
    folder.write_json("summary.json", summary)
    text = report(title, about, summary, rows, metrics, more, judged)
    folder.write_text("report.md", text)
    try:
        html = page(title, about, summary, rows, metrics, folder.path, more, judged)
    except Unavailable as error:
        (folder.path / "report.html").unlink(missing_ok=True)  # of fewer rows
        click.echo(f"report.html is left out: {error}", err=True)
    else:
        folder.write_text("report.html", html)
    if not quiet:
        click.echo(text)
    failed = sum("error" in row for row in rows)
    told = f", failed: {failed}" if failed else ""
    click.echo(f"{folder.path / 'report.md'}: {len(rows)} takes{told}", err=True)
    if failed == len(rows):
        click.get_current_context().exit(1)


def measuring(options: Options, wanted: Sequence[str]) -> tuple[list[Metric], list[str]]:
    """The metrics that can be had, and a line, told on standard error too, for each other one.

    Raises:
      ConfigError: there is no metric of a name in `wanted`.
    """
    left_out: list[str] = []
    opened = open_metrics(options, left_out.append, wanted)
    for line in left_out:
        click.echo(line, err=True)
    return opened, left_out


def versions() -> dict[str, str | None]:
    """Of this package and what computes its audio and scores, for the run's identity.

    Other versions may round otherwise, and one sampled token that differs changes all that follow:
    a run does not go on under them. Metrics name the versions of their own packages.
    """
    packages = ("jax", "jaxlib", "flax", "numpy", "soxr")
    return {"dia2-jax": dia2_jax.__version__, **latency_machine.package_versions(*packages)}


def start(folder: RunFolder, program: str, about: Mapping[str, Any]) -> None:
    """Write ``run.json``: the command, when, Python, machine, and what `about` says."""
    folder.describe(
        {
            "command": shlex.join(["python", "-m", program, *sys.argv[1:]]),
            **about,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "machine": {**latency_machine.describe(), "node": platform.node()},
        }
    )


def progress(quiet: bool) -> Callable[[list[Key]], Any]:
    """A bar on standard error; into a file, a line now and then is enough."""
    from tqdm import tqdm

    every = 0.1 if sys.stderr.isatty() else 30.0
    return lambda work: tqdm(work, unit="take", mininterval=every, disable=quiet)
