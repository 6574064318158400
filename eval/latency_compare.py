"""Whether one suite of speed is faster than another: ``python -m eval.latency_compare A B``.

A and B are files of ``python -m eval.latency --suite``. Given one alone, its table is printed. The
statistic of a figure is the median over rounds of the median in a round; what is compared is B over
A. Rounds are drawn again, not samples: frames of one process resemble each other, and would make an
interval that is far too narrow.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from eval.needed import needed_from

with needed_from("eval"):
    from eval.command import OutputFile, write_json
    from eval.latency_page import BUSY
    from eval.latency_suite import FIGURES, SUITE
    from train.command import BadInput, Program

#: Rounds on either side below which nothing is concluded: of two times three equal ones, one in ten
#: pairs lies wholly apart by chance; of two times four, one in 35.
FEWEST = 4
#: Ratios this close to 1 are the same, whatever their interval.
SAME = 0.01

_DRAWS = 4000

EPILOG = """\b
Verdicts are of B against A, from a 95 % bootstrap interval of the ratio over rounds:
  faster, slower     of times and speeds; the interval leaves out 1
  smaller, larger    of memory
  same               all of the interval lies within 1 % of 1
  no evidence        the interval holds 1, or a side has fewer than 4 rounds

\b
Of twenty figures one may leave out 1 by chance alone. The interval knows what differs between
processes of one run, not what differs between two evenings: measure A and B close together, on an
idle machine.

\b
Exit status:
  0    compared, whatever came out
  2    a file is no suite, or the two do not measure the same: the message says why
"""


@dataclass(frozen=True)
class Difference:
    """A figure in both reports.

    Attributes:
      name: key of ``FIGURES``.
      first, second: the statistic of A and of B.
      ratio: second over first.
      low, high: 95 % interval of the ratio; None where a side has too few rounds.
      verdict: see the command's help.
      rounds: of A and of B.
    """

    name: str
    first: float
    second: float
    ratio: float
    low: float | None
    high: float | None
    verdict: str
    rounds: tuple[int, int]


def medians(rounds: Sequence[Sequence[float]]) -> list[float]:
    """The median of each round that has a sample."""
    return [float(np.median(samples)) for samples in rounds if samples]


def difference(
    name: str, first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]
) -> Difference:
    """Compare the rounds of a figure, each with its samples."""
    a, b = medians(first), medians(second)
    middle = float(np.median(a)), float(np.median(b))
    ratio = middle[1] / middle[0]
    low = high = None
    if min(len(a), len(b)) >= FEWEST:
        rng = np.random.default_rng(0)
        drawn = [
            np.median(rng.choice(np.array(side), (_DRAWS, len(side))), axis=1) for side in (a, b)
        ]
        low, high = (float(x) for x in np.percentile(drawn[1] / drawn[0], [2.5, 97.5]))
    return Difference(name, *middle, ratio, low, high, _verdict(name, low, high), (len(a), len(b)))


def _verdict(name: str, low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return "no evidence"
    if low >= 1 - SAME and high <= 1 + SAME:
        return "same"
    if low <= 1 <= high:
        return "no evidence"
    less = high < 1
    if FIGURES[name].unit == "GB":
        return "smaller" if less else "larger"
    return "faster" if less == (FIGURES[name].better == "lower") else "slower"


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Difference]:
    """Every figure that both reports have."""
    return [
        difference(name, first["figures"][name]["rounds"], second["figures"][name]["rounds"])
        for name in FIGURES
        if name in first["figures"] and name in second["figures"]
    ]


_TEXT, _OBJECT = (str, "a text"), (dict, "an object")
#: What a report must hold, and of which kind.
_KINDS: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("command", "config", "dtype", "weights", "backend"), _TEXT),
    **dict.fromkeys(("machine", "versions", "figures"), _OBJECT),
    "positions": (list, "a list"),
}
_MACHINE_KINDS: dict[str, tuple[Any, str]] = {
    "cpu": _TEXT,
    "cores": (int, "a whole number"),
    "others_cpu_share": (int | float, "a number"),
}


def read_suite(path: Path) -> dict[str, Any]:
    """A report of ``eval.latency --suite``.

    Raises:
      BadInput: the file is none; says what is wrong and how to write one.
    """
    remedy = "write one with python -m eval.latency --config NAME --suite FILE"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not JSON ({error}); {remedy}") from error
    if not isinstance(report, dict) or "suite" not in report:
        raise BadInput(f"{path}: not a report of a suite; {remedy}")
    if report["suite"] != SUITE:
        raise BadInput(
            f"{path}: suite {report['suite']!r}, where this program knows suite {SUITE}; {remedy}"
        )
    for part, kinds in ("", _KINDS), ("machine.", _MACHINE_KINDS):
        content = report["machine"] if part else report
        if lacking := sorted(kinds.keys() - content.keys()):
            names = ", ".join(part + name for name in lacking)
            raise BadInput(f"{path}: lacks {names}; {remedy}")
        for name, (kind, text) in kinds.items():
            if not isinstance(content[name], kind) or isinstance(content[name], bool):
                raise BadInput(f"{path}: {part}{name} is not {text}; {remedy}")
    positions = report["positions"]
    if len(positions) != 2 or not all(type(step) is int for step in positions):
        raise BadInput(f"{path}: positions are not two steps; {remedy}")
    for name, figure in report["figures"].items():
        rounds = figure.get("rounds") if isinstance(figure, dict) else None
        if name not in FIGURES or not _sound(rounds):
            raise BadInput(
                f"{path}: figures.{name}: needs a known name and rounds of positive numbers; "
                f"{remedy}"
            )
    return report


def _sound(rounds: Any) -> bool:
    if not isinstance(rounds, list) or not all(isinstance(one, list) for one in rounds):
        return False
    samples = [value for one in rounds for value in one]
    return bool(samples) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e300
        for value in samples
    )


def settings(report: Mapping[str, Any]) -> dict[str, Any]:
    """What two reports must share: what was measured, and on what."""
    machine = report["machine"]
    return {
        **{name: report[name] for name in ("config", "weights", "positions", "dtype", "backend")},
        "cpu": machine["cpu"],
        "cores": machine["cores"],
    }


#: Of `settings`, what ``--across`` lets differ; the rest makes two reports incomparable.
_ACROSS = ("config", "weights", "dtype", "backend", "cpu", "cores")


def require_same(first: Mapping[str, Any], second: Mapping[str, Any], *, across: bool) -> list[str]:
    """What differs, for a warning.

    Raises:
      BadInput: something differs that must not.
    """
    one, two = settings(first), settings(second)
    differing = {
        name: f"{name} (A {one[name]!r}, B {two[name]!r})" for name in one if one[name] != two[name]
    }
    if bad := [text for name, text in differing.items() if not across or name not in _ACROSS]:
        free = all(name in _ACROSS for name in differing)
        hint = (
            "; measure both alike, or say --across if the difference is what you ask about"
            if free
            else "; measure both alike"
        )
        raise BadInput(f"the two were not measured alike: {', '.join(bad)}{hint}")
    return list(differing.values())


def heading(report: Mapping[str, Any]) -> str:
    """What a report is of, in a line or two of Markdown."""
    machine, found = report["machine"], report["versions"]
    lines = [
        f"{report['config']}, {report['weights']} weights, {report['dtype']}; {machine['cpu']}, "
        f"{machine['cores']} cores, {report['backend']}, jax {found.get('jax')}, kernels in C: "
        f"{report.get('kernels', 'none yet')}; "
        f"`{report['command']}`; other programs took {machine['others_cpu_share']:.0%}.",
    ]
    return "\n".join(lines)


def table(report: Mapping[str, Any]) -> str:
    """A Markdown table of one report."""
    early, late = report["positions"]
    labels = {"frame_early_ms": f"frame at step {early}", "frame_late_ms": f"frame at step {late}"}
    lines = [
        "| | median | rounds from … to | samples from … to | rounds |",
        "|---|---|---|---|---|",
    ]
    for name, figure in FIGURES.items():
        if name not in report["figures"]:
            continue
        rounds = report["figures"][name]["rounds"]
        middles = medians(rounds)
        samples = [value for one in rounds for value in one]
        cells = [
            labels.get(name, figure.label),
            f"{np.median(middles):.4g} {figure.unit}",
            f"{min(middles):.4g} … {max(middles):.4g}",
            f"{min(samples):.4g} … {max(samples):.4g}",
            str(len(middles)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def comparison_table(differences: Sequence[Difference]) -> str:
    """A Markdown table of a comparison."""
    lines = ["| | A | B | B / A (95 %) | verdict | rounds |", "|---|---|---|---|---|---|"]
    for one in differences:
        figure = FIGURES[one.name]
        spread = "" if one.low is None else f" ({one.low:.3f} … {one.high:.3f})"
        lines.append(
            f"| {figure.label} | {one.first:.4g} {figure.unit} | {one.second:.4g} {figure.unit} "
            f"| {one.ratio:.3f}{spread} | {one.verdict} | {one.rounds[0]}, {one.rounds[1]} |"
        )
    return "\n".join(lines)


@click.command(cls=Program, epilog=EPILOG)
@click.argument("first", metavar="A", type=click.Path(path_type=Path))
@click.argument("second", metavar="[B]", required=False, type=click.Path(path_type=Path))
@click.option("--across", is_flag=True, help="Compare although model, dtype or machine differ.")
@click.option("--json", "target", type=OutputFile(), help="Write the comparison.")
def main(first: Path, second: Path | None, across: bool, target: Path | None) -> None:
    """Print the table of suite A, or compare suite B with it."""
    one = read_suite(first)
    if second is None:
        if target is not None or across:
            raise BadInput("--json and --across are of a comparison: name a second file")
        click.echo(f"{heading(one)}\n\n{table(one)}")
        return
    two = read_suite(second)
    for text in require_same(one, two, across=across):
        click.echo(f"warning: not measured alike: {text}", err=True)
    for side, report in (("A", one), ("B", two)):
        if (share := report["machine"]["others_cpu_share"]) > BUSY:
            click.echo(
                f"warning: {side} was measured on a busy machine (other programs took "
                f"{share:.0%}): its times mean little",
                err=True,
            )
    found = one["versions"], two["versions"]
    for name in sorted(found[0].keys() | found[1].keys()):
        if (a := found[0].get(name)) != (b := found[1].get(name)):
            click.echo(f"note: {name} {a} in A, {b} in B", err=True)
    differences = compare(one, two)
    click.echo(f"A: {heading(one)}\n\nB: {heading(two)}\n\n{comparison_table(differences)}")
    if target is not None:
        write_json(target, [dataclasses.asdict(each) for each in differences])


if __name__ == "__main__":
    main(prog_name="python -m eval.latency_compare")
