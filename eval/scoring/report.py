"""``report.md``: the figures with units and directions, failures, the worst transcripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.scoring.metric import Metric, Row
from eval.scoring.summary import ALL, FEWEST, sources_in
from eval.scoring.takes import GENERATED, RECORDING

#: What stands for a direction where neither is better.
NEITHER = "neither"

#: What a table of figures shows.
VALUES = (
    "A value rests on the takes that have it: n of them, by source where they differ. In brackets, "
    f"95 % bootstrap intervals over prompts; of fewer than {FEWEST} prompts there is none. "
    "From a dozen or fewer they are somewhat too narrow; what eval.compare says of two runs is not."
)

_WORST, _FAILURES, _LONGEST = 10, 100, 400


@dataclass(frozen=True)
class Section:
    """A table that a program has besides those of figures.

    Attributes:
      title, columns: what is above it.
      rows: its cells, as text.
      note: a sentence below it; "" for none.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def report(
    title: str,
    about: Mapping[str, Any],
    summary: Mapping[str, Any],
    rows: Sequence[Row],
    metrics: Sequence[Metric],
    more: Sequence[Section] = (),
    judged: str | None = None,
) -> str:
    """The report of a run in Markdown.

    Args:
      about: what is said at the top, name by name.
      summary: as :func:`eval.scoring.summary.summarise` returns it.
      more: tables at its end.
      judged: source whose worst transcripts are shown; by default what a model generated, else the
        first that is no recording.
    """
    lines = [f"# {title}", ""]
    lines += [f"- {name}: {value}" for name, value in about.items()]
    lines += [
        "",
        VALUES,
        "",
    ]
    for group in groups_of(summary):
        lines += _table(group, summary, metrics)
    lines += [*_failures(summary), *_worst(rows, judged)]
    for section in more:
        lines += _section(section)
    return "\n".join(lines) + "\n"


def groups_of(summary: Mapping[str, Any]) -> list[str]:
    """Groups of takes of which there are figures; with one kind alone, "all" would say the same."""
    groups = list(dict.fromkeys(g for s in sources_in(summary) for g in summary["figures"][s]))
    return [g for g in groups if g != ALL] if len(groups) == 2 else groups


def table_of(group: str, summary: Mapping[str, Any], metrics: Sequence[Metric]) -> dict[str, Any]:
    """The figures of a group of takes.

    Returns:
      ``group``, ``sources``, ``takes`` (how many of each, and failed, as text) and ``rows``, one a
      figure of every metric: ``metric``, ``name``, ``unit``, ``better``, ``about``, ``n``
      (takes that it rests on, by source if they differ), ``cells``. A cell has ``value``, ``low``
      and ``high`` as text, the last two None without an interval; it is None where the source lacks
      the figure.
    """
    sources = sources_in(summary, group)
    takes = ", ".join(f"{s} {_counted(summary['counts'][s][group])}" for s in sources)
    found = []
    for metric in metrics:
        for figure in metric.figures:
            cells = [
                summary["figures"][s][group].get(metric.name, {}).get(figure.name) for s in sources
            ]
            texts = [
                cell
                and {
                    name: None if cell[name] is None else _number(cell[name])
                    for name in ("value", "low", "high")
                }
                for cell in cells
            ]
            counts = [str(cell["takes"]) if cell else "–" for cell in cells]
            found.append(
                {
                    "metric": metric.name,
                    "name": figure.name,
                    "unit": figure.unit,
                    "better": figure.better or NEITHER,
                    "about": figure.about,
                    "n": counts[0] if len(set(counts)) == 1 else " / ".join(counts),
                    "cells": texts,
                }
            )
    return {"group": group, "sources": sources, "takes": takes, "rows": found}


def _table(group: str, summary: Mapping[str, Any], metrics: Sequence[Metric]) -> list[str]:
    table = table_of(group, summary, metrics)
    lines = [f"## {group[0].upper()}{group[1:]}", "", f"Takes: {table['takes']}.", ""]
    lines += ["| figure | unit | better | " + " | ".join(table["sources"]) + " | n | |"]
    lines += ["|---|---|---|" + "---|" * (len(table["sources"]) + 2)]
    for row in table["rows"]:
        shown = " | ".join(_estimate(cell) for cell in row["cells"])
        name = f"{row['metric']}.{row['name']}"
        lines.append(
            f"| {name} | {row['unit']} | {row['better']} | {shown} | {row['n']} | {row['about']} |"
        )
    return [*lines, ""]


def _section(section: Section) -> list[str]:
    rows = [section.columns, ["---"] * len(section.columns), *section.rows]
    lines = ["", f"## {section.title}", "", *(f"| {' | '.join(cells)} |" for cells in rows)]
    return [*lines, "", section.note] if section.note else lines


def _counted(counts: Mapping[str, int]) -> str:
    return f"{counts['takes']}" + (f" (failed: {counts['failed']})" if counts["failed"] else "")


def _estimate(cell: Mapping[str, str | None] | None) -> str:
    if cell is None:
        return "–"
    return f"{cell['value']}" + (f" ({cell['low']} – {cell['high']})" if cell["low"] else "")


def _number(value: float) -> str:
    text = f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
    return "0.00" if text == "-0.00" else text


def _failures(summary: Mapping[str, Any]) -> list[str]:
    found = summary["failures"]
    lines = ["## Failures", "", f"{len(found)} takes." if found else "None.", ""]
    for row in found[:_FAILURES]:
        lines.append(f"- {name_of(row)}: {'; '.join(row['what'])}")
    if len(found) > _FAILURES:
        lines.append(f"- … and {len(found) - _FAILURES} more in summary.json")
    return [*lines, ""]


def _worst(rows: Sequence[Row], judged: str | None) -> list[str]:
    """The worst transcripts of what is judged, else of the first source, but recordings, that was
    transcribed."""
    heard = [row for row in rows if row.get("scores", {}).get("intelligibility")]
    sources = sorted(dict.fromkeys(row["source"] for row in heard), key=_judged_first)
    if not sources:
        return []
    source = judged if judged in sources else sources[0]
    heard = [row for row in heard if row["source"] == source]

    def rate(row: Row) -> float:
        scores = row["scores"]["intelligibility"]
        return float(scores["errors"]) / max(scores["words"], 1)

    wrong = sorted((row for row in heard if rate(row) > 0), key=rate, reverse=True)[:_WORST]
    lines = [f"## Worst transcripts ({source})", ""]
    if not wrong:
        return [*lines, "None has an error."]
    for row in wrong:
        scores = row["scores"]["intelligibility"]
        lines += [
            f"- {name_of(row)}: {100 * rate(row):.0f} %",
            f"  - script: {_cut(scores['script_normalised'])}",
            f"  - heard: {_cut(scores['transcript_normalised']) or '(nothing)'}",
        ]
    return lines


def _judged_first(source: str) -> tuple[bool, bool]:
    return source == RECORDING, source != GENERATED


def _cut(text: str) -> str:
    """A recogniser that loops on noise fills pages."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"


def name_of(row: Mapping[str, Any]) -> str:
    """Set, id, source and seed of a take, to be read."""
    seed = "" if row["seed"] is None else f", seed {row['seed']}"
    return f"{row['set']}/{row['id']} ({row['source']}{seed})"
