"""Two runs beside each other: what differs, utterance by utterance, and how sure that is.

Takes are paired by set, prompt, source and seed; what only one run has is left out, and takes of
another script under the same id (`other_scripts`). A figure's difference is that of the two runs'
ratios over the same takes. Its interval comes from resampling **prompts**, with the takes of both
runs together: what is hard in one is hard in the other, which an interval of each run by itself
would count as noise.

What is best near 1 is judged by how far each take is from it, |log x|, so that takes on both sides
of 1 do not make up for each other; a pair with a take of 0 is left out.

Of fewer than `FEWEST` prompts there is neither interval nor verdict, and where fewer than `FEWEST`
of them differ no verdict, however far the interval is from 0: a yes or no that changes in four
prompts of sixty, all one way, does so by chance in one case of eight.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.special import stdtrit

from dia2_jax.errors import DataError
from dia2_jax.typing import Float
from eval.scoring.metric import Figure, Metric, Row
from eval.scoring.report import name_of
from eval.scoring.run_folder import Key, read_rows
from eval.scoring.summary import FEWEST, INTERVAL, RESAMPLES, grouped

Verdict = Literal["better", "worse", "differs", "no evidence", "not judged"]

#: A prompt, and numerator and denominator of a take of it in the first and in the second run.
Pair = tuple[Any, tuple[float, float], tuple[float, float]]


#: Paired prompts from which one that is far off shall not decide; of fewer it is too large a part.
MANY = 20


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
      low, high: interval of ``second - first``; None of fewer prompts than `FEWEST`.
      takes: pairs of takes that it rests on.
      prompts: of these takes, those with something to compare in both runs; a prompt's seeds are
        one.
      differing: of these prompts, those where the two runs are not the same.
      interval_verdict: what the interval says by itself of the second run against the first.
    """

    source: str
    group: str
    metric: str
    figure: Figure
    first: float
    second: float
    low: float | None
    high: float | None
    takes: int
    prompts: int
    differing: int
    interval_verdict: Verdict

    @property
    def judgeable(self) -> bool:
        """Whether there could be a verdict."""
        return not self.figure.unjudged and min(self.prompts, self.differing) >= FEWEST

    @property
    def verdict(self) -> Verdict:
        """Of the second run against the first.

        ``differs`` where neither direction is better; ``no evidence`` of fewer prompts than
        `FEWEST`, or that differ; ``not judged`` of figures that are not meant to be.
        """
        if self.figure.unjudged:
            return "not judged"
        return self.interval_verdict if self.judgeable else "no evidence"

    @property
    def said(self) -> str:
        """The verdict, and why there is none where the interval was not even asked."""
        if self.figure.unjudged:
            return f"{self.verdict}: {self.figure.unjudged}"
        if self.prompts < FEWEST:
            return f"{self.verdict}: too few pairs ({self.prompts} of {FEWEST})"
        if self.verdict != self.interval_verdict:
            return f"{self.verdict}: too few differ ({self.differing} of {FEWEST})"
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
      DataError: the runs share no take of the same script, or their rows are of another format.
    """
    formats = [run.about.get("identity", {}).get("format") for run in (first, second)]
    if formats[0] != formats[1]:
        raise DataError(
            f"{first.path} and {second.path}: their rows mean different things (format "
            f"{formats[0]} and {formats[1]}): run the older one again, into another folder"
        )
    others = other_scripts(first, second)
    left_out = set(others)
    shared = [k for k in first.rows if k in second.rows and k not in left_out]
    if not shared:
        why = ""
        if others:
            why = f" (the scripts of {len(others)} differ, first {name_of(first.rows[others[0]])})"
        raise DataError(
            f"{first.path} and {second.path} share no take{why}: run both with the same prompts "
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


def other_scripts(first: Run, second: Run) -> list[Key]:
    """Takes of one name in both runs whose scripts differ: these are no pairs."""
    return [
        k
        for k, row in first.rows.items()
        if k in second.rows and row.get("script") != second.rows[k].get("script")
    ]


def verdict(figure: Figure, low: float, high: float) -> Verdict:
    """What an interval says: of B - A, or for what is best near 1 of how much further off B is."""
    if low <= 0 <= high:
        return "no evidence"
    if not figure.better:
        return "differs"
    return "better" if (high < 0) == (figure.better != "higher") else "worse"


def _difference(
    source: str, group: str, metric: str, figure: Figure, pairs: Sequence[Pair]
) -> Iterator[Difference]:
    near_1 = figure.better == "near 1"
    if near_1:
        pairs = [pair for pair in pairs if min(*pair[1], *pair[2]) > 0]
    else:
        pairs = [pair for pair in pairs if any(pair[1]) or any(pair[2])]  # the others say nothing
    table = _by_prompt(pairs)
    whole = table.sum(axis=0)
    if len(table) == 0 or whole[1] <= 0 or whole[3] <= 0:
        return
    # From 0.8 to 1.2 is a large change, and neither better nor worse.
    judged = _by_prompt([_distances(pair) for pair in pairs]) if near_1 else table
    comparable = judged[(judged[:, 1] > 0) & (judged[:, 3] > 0)]
    low: float | None = None
    high: float | None = None
    says: Verdict = "no evidence"
    if len(comparable) >= FEWEST:
        low, high = _interval(table)
        says = verdict(figure, *(_interval(judged) if near_1 else (low, high)))
    yield Difference(
        source, group, metric, figure, float(whole[0] / whole[1]), float(whole[2] / whole[3]),
        low, high, len(pairs), len(comparable),
        int((comparable[:, 0] * comparable[:, 3] != comparable[:, 2] * comparable[:, 1]).sum()),
        says,
    )  # fmt: skip


def _by_prompt(pairs: Sequence[Pair]) -> Float[np.ndarray, "P 4"]:
    """Numerator and denominator of the first run, then of the second, summed over a prompt."""
    sums: dict[Any, np.ndarray] = {}
    for cluster, one, two in pairs:
        sums[cluster] = sums.get(cluster, np.zeros(4)) + np.array([*one, *two], np.float64)
    return np.stack(list(sums.values())) if sums else np.zeros((0, 4))


def _distances(pair: Pair) -> Pair:
    """Of both takes how far they are from 1, |log x|: half as long is as far as twice as long."""
    cluster, *takes = pair
    one, two = ((abs(math.log(above / below)), 1.0) for above, below in takes)
    return cluster, one, two


def _interval(table: Float[np.ndarray, "P 4"]) -> tuple[float, float]:
    """Interval of the second ratio minus the first, by prompts resampled.

    It reaches as many standard errors to both sides as 95 % of the resamples stay within, each by
    its own standard error (the symmetric percentile-t bootstrap, Hall 1988), but no fewer than
    Student's t asks for. Percentiles of the resampled differences themselves would be too narrow
    where prompts are few. How often it is wrong, ``tests/eval/test_compare.py`` measures.

    One prompt far off is in two of three resamples; the others have errors so small that no verdict
    would be left, however many prompts agree. So from `MANY` prompts on a resample's error counts
    as half the table's at least.
    """
    count = int(((table[:, 1] > 0) & (table[:, 3] > 0)).sum())
    (moved,), (error,) = _moved(table[None], count)
    rng = np.random.default_rng(0)
    drawn = table[rng.integers(0, len(table), (RESAMPLES, len(table)))]
    drawn = drawn[(drawn[:, :, 1].sum(axis=1) > 0) & (drawn[:, :, 3].sum(axis=1) > 0)]
    others, errors = _moved(drawn, count)
    reach = float(stdtrit(count - 1, (1 + INTERVAL) / 2))
    if error > 0:
        # A resample of prompts that are all alike knows of no error, but for rounding.
        errors = np.where(errors > 1e-6 * error, errors, error)
        if count >= MANY:
            errors = np.maximum(errors, error / 2)
        reach = max(reach, float(np.quantile(abs(others - moved) / errors, INTERVAL)))
    return float(moved - reach * error), float(moved + reach * error)


def _moved(
    tables: Float[np.ndarray, "R P 4"], count: int
) -> tuple[Float[np.ndarray, " R"], Float[np.ndarray, " R"]]:
    """Second ratio minus first, and its standard error by the ratios' linear expansion.

    Args:
      count: prompts that have both.
    """
    above_1, below_1, above_2, below_2 = np.moveaxis(tables, 2, 0)
    sum_1, sum_2 = below_1.sum(1, keepdims=True), below_2.sum(1, keepdims=True)
    one, two = above_1.sum(1, keepdims=True) / sum_1, above_2.sum(1, keepdims=True) / sum_2
    off = (above_2 - two * below_2) / sum_2 - (above_1 - one * below_1) / sum_1
    return (two - one)[:, 0], np.sqrt((off**2).sum(1) * count / (count - 1))


def _has(run: Run, k: Key, metric: type[Metric]) -> bool:
    return bool(run.rows[k].get("scores", {}).get(metric.name))


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 80 else f"{text[:77]}…"
