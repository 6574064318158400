"""How text arrives: the writers of a stream, as schedules that a seed decides.

A schedule is drawn before anything is measured, so the same script and seed are fed in the same
way to a session inside the process and to a command behind a pipe.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Schedule:
    """When the text of a stream arrives.

    Attributes:
      pieces: (second since the start, text), in order; joined they are the script.
      end: second at which it is known that no text follows.
    """

    pieces: tuple[tuple[float, str], ...]
    end: float

    @property
    def script(self) -> str:
        """The whole text."""
        return "".join(text for _, text in self.pieces)


def words(script: str) -> list[str]:
    """The script cut before every word; joined it is the script again."""
    return re.findall(r"\s*\S+\s*\Z|\s*\S+", script) or ([script] if script else [])


def at_once(script: str, seed: int) -> Schedule:
    """Everything is there at the start, and its end is known."""
    return Schedule(((0.0, script),) if script else (), 0.0)


def words_at_once(script: str, seed: int) -> Schedule:
    """Everything is there at the start, given word by word."""
    return Schedule(tuple((0.0, word) for word in words(script)), 0.0)


def words_every_10_ms(script: str, seed: int) -> Schedule:
    """One word every 10 ms; the end is known with the last."""
    pieces = tuple((0.01 * index, word) for index, word in enumerate(words(script)))
    return Schedule(pieces, pieces[-1][0] if pieces else 0.0)


def llm_bursts(script: str, seed: int) -> Schedule:
    """A language model behind a network: bursts of 1 to 12 tokens, 40 tokens a second on average.

    Tokens are 1 to 6 characters and cut words anywhere. A burst comes as long after the one before
    as its tokens took to be made, times 0.5 to 1.5 for the network. The end comes as a message of
    its own, 20 ms after the last burst.
    """
    rng = np.random.default_rng(seed)

    def bursts() -> Iterator[tuple[float, str]]:
        at, position = 0.0, 0
        while position < len(script):
            tokens = int(rng.integers(1, 13))
            length = int(rng.integers(1, 7, tokens).sum())
            if position:
                at += tokens / 40 * rng.uniform(0.5, 1.5)
            yield at, script[position : position + length]
            position += length

    pieces = tuple(bursts())
    return Schedule(pieces, pieces[-1][0] + 0.02 if pieces else 0.0)


def slow_typist(script: str, seed: int) -> Schedule:
    """A person: one character at a time, about 40 words (200 characters) a minute.

    The time before a character is 0.3 s at the median, log-normal with sigma 0.4; after ``.``,
    ``,``, ``!`` and ``?`` half a second more. The end is a key, too.
    """
    rng = np.random.default_rng(seed)
    at, pieces = 0.0, []
    for character in script:
        pieces.append((at, character))
        at += 0.3 * float(rng.lognormal(0.0, 0.4)) + (0.5 if character in ".,!?" else 0.0)
    return Schedule(tuple(pieces), at)


#: The cadences of the report, by name; each takes a script and a seed.
CADENCES: dict[str, Callable[[str, int], Schedule]] = {
    "at_once": at_once,
    "words_10ms": words_every_10_ms,
    "llm_bursts": llm_bursts,
    "slow_typist": slow_typist,
}
