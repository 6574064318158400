"""Whether one checkpoint speaks better than another: ``python -m eval.compare A B``.

A and B are folders of `eval.naturalness`; the comparison itself is in `eval.scoring.comparison`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from eval.needed import needed_from

with needed_from("eval"):
    from dia2_jax.errors import DataError, Dia2Error, describe
    from eval.command import OutputFile, write_json
    from eval.scoring.comparison import (
        Difference,
        compare,
        differing_settings,
        other_scripts,
        read_run,
    )
    from eval.scoring.registry import METRICS
    from eval.scoring.report import name_of
    from eval.scoring.summary import ALL, FEWEST, INTERVAL
    from train.command import BadInput, Program

EPILOG = f"""\b
Verdicts are of B against A, from a 95 % bootstrap interval of the difference over prompts, which
is no narrower than Student's t asks for:
  better, worse   the interval leaves out 0, on that side
  differs         it leaves out 0, and neither direction is better
  no evidence     it holds 0: more prompts or seeds may tell
  no evidence: too few pairs (n of {FEWEST})
                  the runs share n prompts with this figure; below {FEWEST} there is no interval
  no evidence: too few differ (n of {FEWEST})
                  the interval leaves out 0, but only n prompts are not the same in both runs
  not judged      the speed of a run depends on the machine's load, which no interval knows of
Seeds of a prompt are one pair: they make its figure steadier, not more prompts of it.

\b
What is best near 1 is judged by how far each take is from it, |log x|: half is as far as twice. The
interval shown is of the value itself. A pair with a take of 0 is left out.

\b
The last line says how many verdicts there are, and how many of the figures that can have one chance
alone would give: trust those that you asked about before you looked.

\b
Exit status:
  0    compared, whatever came out
  2    a folder holds no run, the two share no take, or their rows mean different things: the
       message says why
"""


def table(differences: Sequence[Difference]) -> str:
    """A Markdown table of them."""
    lines = [
        "| figure | unit | better | A | B | B − A (95 %) | verdict | prompts | takes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in differences:
        moved = f"{one.second - one.first:+.3g}"
        if one.low is not None:
            moved += f" ({one.low:+.3g} … {one.high:+.3g})"
        lines.append(
            f"| {one.metric}.{one.figure.name} | {one.figure.unit} | {one.figure.better} "
            f"| {one.first:.4g} | {one.second:.4g} | {moved} | {one.said} | {one.prompts} "
            f"| {one.takes} |"
        )
    return "\n".join(lines)


def tally(differences: Sequence[Difference]) -> str:
    """How many of them have a verdict, and how many would by chance."""
    possible = sum(one.judgeable for one in differences)
    given = sum(one.judgeable and one.verdict != "no evidence" for one in differences)
    share = 1 - INTERVAL
    return (
        f"{given} verdicts among {len(differences)} figures. {possible} of them can have one: "
        f"{FEWEST} prompts or more differ. Between equals, chance alone would give about "
        f"{share * possible:.1f} ({100 * share:.0f} %)."
    )


def as_json(one: Difference) -> dict[str, Any]:
    """A difference as a JSON object."""
    found = {field.name: getattr(one, field.name) for field in dataclasses.fields(one)}
    del found["figure"], found["interval_verdict"]
    return {
        **found,
        "verdict": one.verdict,
        "said": one.said,
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
    others = other_scripts(one, two)
    if others:
        click.echo(
            f"note: {len(others)} takes are left out, for their scripts differ in the two runs; "
            f"the first is {name_of(one.rows[others[0]])}",
            err=True,
        )
    shown = [d for d in found if d.group == ALL or groups]
    for source, group in dict.fromkeys((d.source, d.group) for d in shown):
        here = [d for d in shown if (d.source, d.group) == (source, group)]
        click.echo(f"## {source}, {group}\n\n{table(here)}\n")
    click.echo(tally(shown))
    failed = [sum("error" in row for row in run.rows.values()) for run in (one, two)]
    if any(failed):
        click.echo(
            f"note: takes that failed, and so are left out of both runs: {failed[0]} of A, "
            f"{failed[1]} of B",
            err=True,
        )
    judged = [d for d in found if d.group == ALL and not d.figure.unjudged]
    few = [d for d in judged if d.prompts < FEWEST]
    if few:
        click.echo(
            f"note: {len(few)} of {len(judged)} figures rest on too few "
            f"pairs for a verdict: it takes {FEWEST} prompts that both runs have",
            err=True,
        )
    if target is not None:
        write_json(target, [as_json(d) for d in found])


if __name__ == "__main__":
    main(prog_name="python -m eval.compare")
