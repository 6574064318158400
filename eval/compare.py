"""Whether one checkpoint speaks better than another: ``python -m eval.compare A B``.

A and B are folders of `eval.naturalness`; the comparison itself is in `eval.scoring.comparison`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from dia2_jax.errors import DataError, Dia2Error, describe
from eval.command import OutputFile, write_json
from eval.scoring.comparison import FEWEST, Difference, compare, differing_settings, read_run
from eval.scoring.registry import METRICS
from eval.scoring.summary import ALL
from train.command import BadInput, Program

EPILOG = f"""\b
Verdicts are of B against A, from a 95 % bootstrap interval of the difference over prompts:
  better, worse   the interval leaves out 0, on that side
  differs         it leaves out 0, and neither direction is better
  no evidence     it holds 0: more prompts or seeds may tell
  no evidence: too few pairs (n of {FEWEST})
                  the runs share n prompts with this figure; below {FEWEST} no interval is believed
Seeds of a prompt are one pair: they make its figure steadier, not more prompts of it.

\b
With some forty figures, one or two leave out 0 by chance alone: trust those that you asked about
before you looked.

\b
Exit status:
  0    compared, whatever came out
  2    a folder holds no run, or the two share no take: the message says why
"""


def table(differences: Sequence[Difference]) -> str:
    """A Markdown table of them."""
    lines = [
        "| figure | unit | better | A | B | B − A (95 %) | verdict | prompts | takes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in differences:
        moved = f"{one.second - one.first:+.3g} ({one.low:+.3g} … {one.high:+.3g})"
        lines.append(
            f"| {one.metric}.{one.figure.name} | {one.figure.unit} | {one.figure.better} "
            f"| {one.first:.4g} | {one.second:.4g} | {moved} | {one.said} | {one.prompts} "
            f"| {one.takes} |"
        )
    return "\n".join(lines)


def as_json(one: Difference) -> dict[str, Any]:
    """A difference as a JSON object."""
    found = {f.name: getattr(one, f.name) for f in dataclasses.fields(one) if f.name != "figure"}
    return {
        **found,
        "figure": one.figure.name,
        "unit": one.figure.unit,
        "better": one.figure.better,
        "too_few": one.prompts < FEWEST,
    }


@click.command(cls=Program, epilog=EPILOG)
@click.argument("first", metavar="A", type=click.Path(path_type=Path))
@click.argument("second", metavar="B", type=click.Path(path_type=Path))
@click.option("--groups", is_flag=True, help="Also by set and kind, not only over all takes.")
@click.option("--json", "target", type=OutputFile(), help="Write everything there.")
def main(first: Path, second: Path, groups: bool, target: Path | None) -> None:
    """Compare the runs in the folders A and B, take by take."""
    try:
        one, two = read_run(first), read_run(second)
        found = compare(one, two, METRICS)
        if not found:
            raise DataError(
                f"{first} and {second} share takes and no figure: run both with the same --metrics"
            )
    except Dia2Error as error:
        raise BadInput(describe(error)) from error
    for line in differing_settings(one, two):
        click.echo(f"note: the runs differ in {line}", err=True)
    for source, group in dict.fromkeys((d.source, d.group) for d in found):
        here = [d for d in found if (d.source, d.group) == (source, group)]
        if group == ALL or groups:
            click.echo(f"## {source}, {group}\n\n{table(here)}\n")
    failed = [sum("error" in row for row in run.rows.values()) for run in (one, two)]
    if any(failed):
        click.echo(
            f"note: takes that failed, and so are left out of both runs: {failed[0]} of A, "
            f"{failed[1]} of B",
            err=True,
        )
    few = [d for d in found if d.group == ALL and d.prompts < FEWEST]
    if few:
        click.echo(
            f"note: {len(few)} of {sum(d.group == ALL for d in found)} figures rest on too few "
            f"pairs for a verdict: it takes {FEWEST} prompts that both runs have",
            err=True,
        )
    if target is not None:
        write_json(target, [as_json(d) for d in found])


if __name__ == "__main__":
    main(prog_name="python -m eval.compare")
