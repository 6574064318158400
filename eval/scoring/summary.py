"""From rows to figures with confidence intervals, by source and by set and kind; and failures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from eval.scoring.metric import Metric, Row
from eval.scoring.takes import SOURCES

#: Resamples of the bootstrap, and the share of them that an interval holds.
RESAMPLES, INTERVAL = 2000, 0.95

#: Prompts from which there is an interval, and that must differ for a verdict between two runs.
#: Where 3 prompts all move one way, which chance does in one case of 4, every resample moves with
#: them. Six are what the sign test needs to reach 5 % on two sides: 2 / 2⁶ = 3 %, where
#: 2 / 2⁵ = 6 %.
FEWEST = 6

ALL = "all"


def summarise(rows: Sequence[Row], metrics: Sequence[Metric]) -> dict[str, Any]:
    """What ``summary.json`` holds.

    Returns:
      ``figures``: by source, group ("all" or "set: kind"), metric and figure: ``value``, ``low``
      and ``high`` (95 % bootstrap over prompts, None below `FEWEST` of them), ``takes`` (those that
      it rests on). ``failures``: a row's set, id, source,
      seed and ``what``. ``counts``: takes, and how many of them failed, by source and group.
    """
    rows = list(rows)
    scored: list[dict[str, Any]] = [{} for _ in rows]
    for metric in metrics:
        places = [i for i, row in enumerate(rows) if row.get("scores", {}).get(metric.name)]
        related = metric.relate([rows[i] for i in places])
        for place, scores in zip(places, related, strict=True):
            scored[place][metric.name] = scores
    figures: dict[str, Any] = {}
    counts: dict[str, Any] = {}
    for source, group, members in grouped(rows):
        counts.setdefault(source, {})[group] = {
            "takes": len(members),
            "failed": sum("error" in rows[i] for i in members),
        }
        here = figures.setdefault(source, {}).setdefault(group, {})
        for metric in metrics:
            for figure in metric.figures:
                parts = [
                    ((rows[i]["set"], rows[i]["id"]), found)
                    for i in members
                    if metric.name in scored[i]
                    and (found := figure.parts(scored[i][metric.name])) is not None
                ]
                estimate = bootstrap(parts, fewest=FEWEST)
                if estimate is not None:
                    here.setdefault(metric.name, {})[figure.name] = estimate
    failures = []
    for row, scores in zip(rows, scored, strict=True):
        what = [f"failed: {row['error']}"] if "error" in row else []
        for metric in metrics:
            if metric.name in scores:
                what += metric.failures(scores[metric.name])
        if what:
            names = ("set", "id", "source", "seed")
            failures.append({**{name: row[name] for name in names}, "what": what})
    return {"counts": counts, "figures": figures, "failures": failures}


def bootstrap(
    parts: Iterable[tuple[Any, tuple[float, float]]],
    resamples: int = RESAMPLES,
    interval: float = INTERVAL,
    fewest: int = 1,
) -> dict[str, Any] | None:
    """The ratio of the sums of numerators and denominators, and a percentile interval.

    What is resampled is **clusters**: takes of the same prompt are no independent draws. The same
    parts give the same interval.

    Args:
      parts: (cluster, (numerator, denominator)) of every take; one of (0, 0) says nothing.
      fewest: clusters below which there is no interval.

    Returns:
      ``value``; ``low`` and ``high``, None of fewer clusters than `fewest`; ``takes``, those that
      say something. None where the denominators sum to 0.
    """
    sums: dict[Any, np.ndarray] = {}
    takes = 0
    for cluster, pair in parts:
        if not any(pair):
            continue
        sums[cluster] = sums.get(cluster, np.zeros(2)) + np.array(pair, np.float64)
        takes += 1
    if not sums or sum(pair[1] for pair in sums.values()) <= 0:
        return None
    table = np.stack(list(sums.values()))
    value = float(table[:, 0].sum() / table[:, 1].sum())
    if len(table) < fewest:
        return {"value": value, "low": None, "high": None, "takes": takes}
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(table), (resamples, len(table)))
    above, below = table[drawn, 0].sum(1), table[drawn, 1].sum(1)
    ratios = above[below > 0] / below[below > 0]
    low, high = np.quantile(ratios, [(1 - interval) / 2, (1 + interval) / 2])
    return {"value": value, "low": float(low), "high": float(high), "takes": takes}


def grouped(rows: Sequence[Row]) -> Iterable[tuple[str, str, list[int]]]:
    """Source, group ("all" or "set: kind") and places of its rows."""
    found: dict[tuple[str, str], list[int]] = {}
    for index, row in enumerate(rows):
        for group in (ALL, group_of(row)):
            found.setdefault((row["source"], group), []).append(index)
    for (source, group), members in found.items():
        yield source, group, members


def sources_in(summary: Mapping[str, Any], group: str | None = None) -> list[str]:
    """Sources that have takes (of a group): generated, recording, resynthesis, then others."""
    found = [s for s, groups in summary["figures"].items() if group is None or group in groups]
    return sorted(found, key=lambda s: SOURCES.index(s) if s in SOURCES else len(SOURCES))


def group_of(row: Mapping[str, Any]) -> str:
    """The set and kind of a row."""
    return f"{row['set']}: {row['kind']}"
