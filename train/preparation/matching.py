"""A transcript matched to words that have times: those of a recogniser, or of the data."""

from __future__ import annotations

import difflib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from train.preparation.records import TimedWord
from train.preparation.spoken import normalized


@dataclass(frozen=True)
class Match:
    """Times for the words of a transcript.

    Attributes:
      times: ``(start, end)`` in seconds for each written word; starts never fall.
      agreement: share of the spoken written words that were heard as written, 0 … 1.
    """

    times: list[tuple[float, float]]
    agreement: float


def match_words(
    written: Sequence[str], heard: Sequence[TimedWord], start: float, end: float
) -> Match:
    """Give each written word the time at which it was heard.

    Words that agree take their times over. A run that disagrees shares the time of what was heard
    in its place, by letters; where nothing was heard, words are spread over the gap. What was
    heard beyond the transcript is dropped.

    Args:
      written: the words of the transcript.
      heard: words with times, starts never falling.
      start, end: seconds in which words without any neighbour that was heard may lie.

    Returns:
      The match. Where no written word is spoken, only sounds and signs, nothing disagrees.
    """
    heard = [word for word in heard if normalized(word.text)]
    keys = [normalized(word) for word in written]
    spoken = [index for index, key in enumerate(keys) if key]
    times: list[tuple[float, float] | None] = [None] * len(written)
    matcher = difflib.SequenceMatcher(
        None, [keys[i] for i in spoken], [normalized(word.text) for word in heard], autojunk=False
    )
    agreed = 0
    for kind, first, last, heard_first, heard_last in matcher.get_opcodes():
        block, there = spoken[first:last], heard[heard_first:heard_last]
        if kind == "equal":
            agreed += len(block)
            for index, word in zip(block, there, strict=True):
                times[index] = (word.start, word.end)
        elif kind == "replace":
            agreed += _same_letters(block, keys, there)
            for index, span in zip(block, _by_letters(block, keys, there), strict=True):
                times[index] = span
    share = agreed / len(spoken) if spoken else 1.0
    return Match(spread_unknown(written, times, start, end), share)


def spread_unknown(
    written: Sequence[str], times: Sequence[tuple[float, float] | None], start: float, end: float
) -> list[tuple[float, float]]:
    """Times for all words where some have none: those share the gap between their neighbours.

    Args:
      written: the words; longer ones get more of a gap.
      times: as many, starts never falling.
      start, end: what the neighbours at the ends are taken for.
    """
    spans = list(times)
    index = 0
    while index < len(spans):
        stop = index
        while stop < len(spans) and spans[stop] is None:
            stop += 1
        if stop > index:
            before, after = spans[index - 1] if index else None, None
            if stop < len(spans):
                after = spans[stop]
            low = start if before is None else before[1]
            high = end if after is None else after[0]
            # A word takes the time of its letters and a little for itself.
            shares = [0, *accumulate(len(word) + 2 for word in written[index:stop])]
            edges = [low + max(0.0, high - low) * share / shares[-1] for share in shares]
            spans[index:stop] = pairwise(edges)
        index = stop + 1
    return _in_order([span for span in spans if span is not None])


def _same_letters(block: Sequence[int], keys: Sequence[str], there: Sequence[TimedWord]) -> int:
    """Words of a block that differs in its word boundaries alone: "every one" and "everyone"."""
    ours, theirs = "".join(keys[i] for i in block), "".join(normalized(w.text) for w in there)
    return len(block) if ours == theirs else 0


def _by_letters(
    block: Sequence[int], keys: Sequence[str], there: Sequence[TimedWord]
) -> list[tuple[float, float]]:
    """The time of some heard words, shared among written words by their letters."""
    # Knots of a piecewise linear map from letters heard so far to time.
    bounds = [0, *accumulate(len(normalized(word.text)) for word in there)]

    def at(letters: float, leaving: bool) -> float:
        # A boundary between two words is the end of the one and the start of the other.
        place = bisect_right(bounds, letters) - 1
        if leaving and letters == bounds[place] and place > 0:
            place -= 1
        place = min(place, len(there) - 1)
        word = there[place]
        share = (letters - bounds[place]) / (bounds[place + 1] - bounds[place])
        return word.start + share * (word.end - word.start)

    ours = [0, *accumulate(len(keys[i]) for i in block)]
    places = [letters * bounds[-1] / ours[-1] for letters in ours]
    places[-1] = bounds[-1]  # the division rounds
    return [(at(a, False), at(b, True)) for a, b in pairwise(places)]


def _in_order(times: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same with starts that never fall and ends behind them (what was heard may overlap)."""
    ordered: list[tuple[float, float]] = []
    latest = 0.0
    for first, last in times:
        latest = max(latest, first)
        ordered.append((latest, max(latest, last)))
    return ordered
