"""Two runs beside each other: what differs, utterance by utterance, and how sure that is.

Takes are paired by set, prompt, source and seed; what only one run has is left out. A figure's
difference is that of the two runs' ratios over the same takes. Its interval comes from resampling
**prompts**, with the takes of both runs together: what is hard in one is hard in the other, which
an interval of each run by itself would count as noise.

Below `FEWEST` prompts there is no verdict, however far the interval is from 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dia2_jax.errors import DataError
from eval.scoring.metric import Figure, Metric, Row
from eval.scoring.run_folder import Key, read_rows
from eval.scoring.summary import INTERVAL, RESAMPLES, grouped

Verdict = Literal["better", "worse", "differs", "no evidence"]

#: Paired prompts from which an interval is judged. Where 3 prompts all move one way, which chance
#: does in one case of 4, every resample leaves out 0. Six are what the sign test needs to reach 5 %
#: on two sides: 2 / 2⁶ = 3 %, where 2 / 2⁵ = 6 %.
FEWEST = 6


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, ``run.json`` and rows."""

    path: Path
    about: Mapping[str, Any]
    rows: Mapping[Key, Row]


@dataclass(frozen=True)
class Difference:
    """A figure of two runs over the takes that both have.

    Attributes:
      source, group, metric: where it belongs.
      figure: what it is.
      first, second: value in each run.
      low, high: interval of ``second - first``.
      takes: pairs of takes that it rests on.
      prompts: of these takes, those with something to compare in both runs; a prompt's seeds are
        one.
      verdict: of the second run against the first. ``differs`` where neither direction is better;
        ``no evidence`` of fewer prompts than `FEWEST`.
    """

    source: str
    group: str
    metric: str
    figure: Figure
    first: float
    second: float
    low: float
    high: float
    takes: int
    prompts: int
    verdict: Verdict

    @property
    def said(self) -> str:
        """The verdict, and why there is none where the interval was not even asked."""
        if self.prompts < FEWEST:
            return f"{self.verdict}: too few pairs ({self.prompts} of {FEWEST})"
        return self.verdict


def read_run(path: Path) -> Run:
    """The run in a folder.

    Raises:
      DataError: there is none, or it cannot be read.
    """
    try:
        about = json.loads((path / "run.json").read_text(encoding="utf-8"))
        if not isinstance(about, dict):
            raise DataError(f"{path}: its run.json describes no run (it is no JSON object)")
        return Run(path, about, read_rows(path / "utterances.jsonl"))
    except OSError as error:
        raise DataError(
            f"{path}: holds no run ({error.strerror}: {Path(error.filename).name}); give the --out "
            "folder of eval.naturalness"
        ) from None
    except (UnicodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: its run.json cannot be read ({error})") from None


def differing_settings(first: Run, second: Run) -> list[str]:
    """What the two runs depend on and do not share, besides the checkpoint, as ``name: a | b``."""
    one, two = (dict(run.about.get("identity", {})) for run in (first, second))
    names = [n for n in dict.fromkeys([*one, *two]) if n not in ("checkpoint", "codec", "format")]
    found = []
    for name in names:
        ours, theirs = one.get(name), two.get(name)
        if ours == theirs:
            continue
        if isinstance(ours, dict) and isinstance(theirs, dict):  # only what differs
            ours, theirs = (
                {key: value for key, value in mine.items() if value != other.get(key)}
                for mine, other in ((ours, theirs), (theirs, ours))
            )
        found.append(f"{name}: {_short(ours)} | {_short(theirs)}")
    return found


def compare(first: Run, second: Run, metrics: Sequence[type[Metric]]) -> list[Difference]:
    """Every figure that both runs have, by source and group.

    Raises:
      DataError: the runs share no take.
    """
    shared = [k for k in first.rows if k in second.rows]
    if not shared:
        raise DataError(
            f"{first.path} and {second.path} share no take: run both with the same prompts "
            "and seeds"
        )
    found: list[Difference] = []
    for metric in metrics:
        scored = [k for k in shared if _has(first, k, metric) and _has(second, k, metric)]
        related = [
            dict(zip(scored, metric.relate([run.rows[k] for k in scored]), strict=True))
            for run in (first, second)
        ]
        for source, group, places in grouped([first.rows[k] for k in scored]):
            members = [scored[place] for place in places]
            for figure in metric.figures:
                pairs = [
                    (k[:2], one, two)
                    for k in members
                    if (one := figure.parts(related[0][k])) is not None
                    and (two := figure.parts(related[1][k])) is not None
                ]
                found += _difference(source, group, metric.name, figure, pairs)
    return found


def verdict(figure: Figure, low: float, high: float) -> Verdict:
    """What an interval says: of B - A, or for what is best near 1 of how much further off B is."""
    if low <= 0 <= high:
        return "no evidence"
    if not figure.better:
        return "differs"
    return "better" if (high < 0) == (figure.better != "higher") else "worse"


def _difference(
    source: str, group: str, metric: str, figure: Figure, pairs: Sequence[tuple[Any, Any, Any]]
) -> Iterator[Difference]:
    sums: dict[Any, np.ndarray] = {}
    for cluster, one, two in pairs:
        sums[cluster] = sums.get(cluster, np.zeros(4)) + np.array([*one, *two], np.float64)
    table = np.stack(list(sums.values())) if sums else np.zeros((0, 4))
    whole = table.sum(axis=0)
    if len(table) == 0 or whole[1] <= 0 or whole[3] <= 0:
        return
    first, second = whole[0] / whole[1], whole[2] / whole[3]
    rng = np.random.default_rng(0)
    drawn = table[rng.integers(0, len(table), (RESAMPLES, len(table)))].sum(axis=1)
    drawn = drawn[(drawn[:, 1] > 0) & (drawn[:, 3] > 0)]
    ends = [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2]
    one, two = drawn[:, 0] / drawn[:, 1], drawn[:, 2] / drawn[:, 3]
    low, high = np.quantile(two - one, ends)
    # A change from 0.8 to 1.2 is a large one, and neither better nor worse.
    off = np.quantile(abs(two - 1) - abs(one - 1), ends)
    prompts = int(((table[:, 1] > 0) & (table[:, 3] > 0)).sum())
    judged: Verdict = "no evidence"
    if prompts >= FEWEST:
        judged = verdict(figure, *(off if figure.better == "near 1" else (low, high)))
    yield Difference(
        source, group, metric, figure, float(first), float(second), float(low), float(high),
        len(pairs), prompts, judged,
    )  # fmt: skip


def _has(run: Run, k: Key, metric: type[Metric]) -> bool:
    return bool(run.rows[k].get("scores", {}).get(metric.name))


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 80 else f"{text[:77]}…"
