"""Whether a take begins, lasts and ends as its text asks for; by energy and word times alone.

Lengths of silence and of what sounds after the text have no direction: a take that is cut off has
less of both. What is bad of itself has one: no stop, a tail that goes on (``long_tail``), and where
there is a reference, another length than its.
"""

from __future__ import annotations

from typing import Any

from eval.scoring.metric import Figure, Metric, Options, Scores, mean
from eval.scoring.takes import Take

#: A take whose sound goes on longer than this after its text does not know where to stop, seconds.
LONGEST_TAIL = 1.0

#: Lengths, in lengths of the reference, that count as well paced.
LENGTHS = (0.8, 1.25)


class Stopping(Metric):
    """Start, length, end."""

    name = "stopping"
    figures = (
        Figure("truncated", "% of takes", "lower", "cut off by the context", mean("truncated")),
        Figure("silent", "% of takes", "lower", "without any sound", mean("silent")),
        Figure("leading", "s", "", "silence before the first sound", mean("leading")),
        Figure("trailing", "s", "", "silence after the last sound", mean("trailing")),
        Figure("tail", "s", "", "sound after the end of the text", mean("tail")),
        Figure(
            "long_tail", "% of takes", "lower", f"sound over {LONGEST_TAIL:g} s after the text",
            mean("long_tail"),
        ),
        Figure("stops", "% of takes", "higher", "by itself, no long tail", mean("stops")),
        Figure(
            "length", "× reference", "near 1", "first sound to last, over the reference's",
            mean("length"),
        ),
        Figure(
            "paced", "% of takes", "higher", f"{LENGTHS[0]:g}–{LENGTHS[1]:g} × the reference",
            mean("paced"),
        ),
    )  # fmt: skip

    @classmethod
    def open(cls, options: Options) -> Stopping:
        """Needs nothing."""
        return cls()

    def identity(self) -> dict[str, Any]:
        return {"longest_tail": LONGEST_TAIL, "lengths": list(LENGTHS)}

    def score(self, take: Take) -> dict[str, Any]:
        start, end = take.audible
        silent = end <= start
        text_end = take.text_end
        scores: dict[str, Any] = {
            "truncated": take.truncated,
            "silent": silent,
            "leading": None if silent else start,
            "trailing": None if silent else take.seconds - end,
            "text_end": text_end,
            "tail": None,
            "long_tail": None,
            "stops": not take.truncated and not silent,
            "length": None,
            "paced": None,
        }
        if text_end is not None and not silent:
            scores["tail"] = max(0.0, end - text_end)
            scores["long_tail"] = scores["tail"] > LONGEST_TAIL
            scores["stops"] = scores["stops"] and not scores["long_tail"]
        if take.reference_seconds:
            scores["length"] = (end - start) / take.reference_seconds
            scores["paced"] = LENGTHS[0] <= scores["length"] <= LENGTHS[1]
        return scores

    def failures(self, scores: Scores) -> list[str]:
        found = []
        if scores["truncated"]:
            found.append("truncated")
        if scores["silent"]:
            found.append("silent")
        if scores["long_tail"]:
            found.append(f"tail of {scores['tail']:.1f} s")
        if scores["paced"] is False:
            found.append(f"{scores['length']:.2f} × as long as the reference")
        return found
