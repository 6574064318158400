"""What the word machine did in every step of a generation: its action stream, to look at."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np

from dia2_jax.generation.rows import Rows
from dia2_jax.generation.sampling import distribution
from dia2_jax.typing import Bool, Float, Int


@dataclass(frozen=True)
class ActionStream:
    """The steps of one generation in order, S of them.

    Attributes:
      first: number of the first step; 0 unless a voice went before.
      probability: ``[S]`` with which the action was drawn to start a word: after guidance,
        temperature and top-k.
      drawn: ``[S]`` the action that was drawn was to start a word.
      started: ``[S]`` index of the word that the machine started, or -1.
      text: ``[S, 2]`` token of the main and of the second stream that the step read.
      words: the words that were started, in order.
    """

    first: int
    probability: Float[np.ndarray, " S"]
    drawn: Bool[np.ndarray, " S"]
    started: Int[np.ndarray, " S"]
    text: Int[np.ndarray, "S 2"]
    words: tuple[str, ...]

    @property
    def held(self) -> Bool[np.ndarray, " S"]:
        """A start was drawn and the machine padded: a word or pause was not over, or none left."""
        return self.drawn & (self.started < 0)

    @property
    def pushed(self) -> Bool[np.ndarray, " S"]:
        """Padding was drawn and the machine started a word: ``max_padding`` was used up."""
        return ~self.drawn & (self.started >= 0)


def watch(rows: Rows, script: str) -> ActionStream:
    """Speak a script and keep what the machine did.

    Args:
      rows: a single row, made with ``trace=True`` and fed nothing.
      script: all that it says.

    Raises:
      ScriptError: nothing to speak.
      NonFiniteError: the model produced NaN.
    """
    (row,) = rows.rows
    rows.feed(0, script)
    rows.close(0)
    probability, drawn, text = [], [], []
    while rows.refresh():
        trace = rows.step()
        assert trace is not None, "make the rows with trace=True"
        logits, picks, tokens = jax.device_get((trace.draws[0], trace.picks, trace.tokens))
        sampling = row.config.text
        probability.append(distribution(logits[0], sampling.temperature, sampling.top_k)[1])
        drawn.append(picks[0, 0] == 1)
        text.append(tokens[0, :2])
    first = row.computed - row.steps
    words = [(word, step - first) for word, step in row.words if step >= first]
    started = np.full(row.steps, -1)
    started[[step for _, step in words]] = np.arange(len(words))
    return ActionStream(
        first=first,
        probability=np.array(probability),
        drawn=np.array(drawn, bool),
        started=started,
        text=np.array(text).reshape(-1, 2),
        words=tuple(word for word, _ in words),
    )
