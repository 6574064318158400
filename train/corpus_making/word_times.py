"""When each word of a sentence sounds, from the times of its phonemes.

A synthesiser's phonemes come in groups, mostly a word each, but some words are joined ("of the")
and some cut in two. The words said alone, one after another, are therefore laid over the phonemes
that were spoken, by the cheapest edits (dynamic programming); that a word begins where a group
does is cheap, that it begins elsewhere costs.
"""

from __future__ import annotations

from collections.abc import Sequence

from train.corpus_making.speech import Phoneme

_EDGE = "|"
_VOWELS = frozenset("aeiouæɐɑɔəɚɛɜɪʊʌᵻ")

#: Costs: of a phoneme without counterpart, of an edge without one, of unlike phonemes.
_MISSING, _MISSING_EDGE, _UNLIKE, _UNLIKE_VOWELS = 1.0, 0.6, 1.5, 0.5

#: A sentence whose edits cost more than this a phoneme is not what its words say.
_WORST = 0.5


def word_times(
    words: Sequence[str], alone: Sequence[Sequence[str]], spoken: Sequence[Phoneme]
) -> list[tuple[float, float]] | None:
    """Start and end of each word in seconds; None if they cannot be told apart.

    Args:
      words: as written.
      alone: base symbols of each word when it is said alone.
      spoken: the sentence's phonemes; silence and spaces among them are passed over.
    """
    heard = [phoneme for phoneme in spoken if phoneme.base]
    row: list[int | None] = []  # of `heard`; None is an edge between groups
    for number, phoneme in enumerate(heard):
        if number and phoneme.group != heard[number - 1].group:
            row.append(None)
        row.append(number)
    column: list[tuple[int, str]] = []
    for index, symbols in enumerate(alone):
        if not symbols:
            return None
        if index:
            column.append((index, _EDGE))
        column += [(index, symbol) for symbol in symbols]
    bases = [_EDGE if n is None else heard[n].base for n in row]
    pairs, cost = _lay(bases, [symbol for _, symbol in column])
    if not heard or cost > _WORST * len(column):
        return None
    members: list[list[int]] = [[] for _ in words]
    owner: int | None = None
    for place, other in pairs:
        if other is not None:
            owner = column[other][0]
        which = None if place is None else row[place]
        if which is not None:
            members[owner or 0].append(which)
    if not all(members):
        return None
    return [(heard[mine[0]].start, heard[mine[-1]].end) for mine in members]


def _lay(a: Sequence[str], b: Sequence[str]) -> tuple[list[tuple[int | None, int | None]], float]:
    """The cheapest way to lay `b` over `a`: pairs of places, None for no counterpart."""
    lone_a = [_MISSING_EDGE if symbol == _EDGE else _MISSING for symbol in a]
    lone_b = [_MISSING_EDGE if symbol == _EDGE else _MISSING for symbol in b]
    costs = [[0.0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, lone in enumerate(lone_a):
        costs[i + 1][0] = costs[i][0] + lone
    for j, lone in enumerate(lone_b):
        costs[0][j + 1] = costs[0][j] + lone
    for i, x in enumerate(a):
        above, line, lone = costs[i], costs[i + 1], lone_a[i]
        for j, y in enumerate(b):
            best = min(above[j + 1] + lone, line[j] + lone_b[j])
            line[j + 1] = min(best, above[j] + _unlike(x, y))
    pairs: list[tuple[int | None, int | None]] = []
    i, j = len(a), len(b)
    while i or j:
        here = costs[i][j]
        if i and j and abs(here - costs[i - 1][j - 1] - _unlike(a[i - 1], b[j - 1])) < 1e-9:
            i, j = i - 1, j - 1
            pairs.append((i, j))
        elif i and abs(here - costs[i - 1][j] - lone_a[i - 1]) < 1e-9:
            i -= 1
            pairs.append((i, None))
        else:
            j -= 1
            pairs.append((None, j))
    return pairs[::-1], costs[-1][-1]


def _unlike(x: str, y: str) -> float:
    if x == y:
        return 0.0
    if _EDGE in (x, y):
        return 9.0
    return _UNLIKE_VOWELS if x in _VOWELS and y in _VOWELS else _UNLIKE
