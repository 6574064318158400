"""An aligned recording as the decoder reads it and what it is to predict, frame by frame.

The word machine is run along the alignment, so a row holds the very frames that generation feeds
when it takes the same actions (a test compares it with the prefix warm-up). Step t reads column t
of the delayed grid and predicts the action of step t and column t + 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dia2_jax.config import Dia2Config
from dia2_jax.data.alignment import Alignment, Pace
from dia2_jax.errors import AlignmentError, DataError
from dia2_jax.model.delays import delay
from dia2_jax.text.machine import Machine
from dia2_jax.text.tokenizer import TokenIds
from dia2_jax.typing import Bool, Int


@dataclass(frozen=True)
class Row:
    """One training row of L steps.

    Attributes:
      tokens: ``[2 + C, L]`` what the decoder reads: main text, second text, delayed codes.
      spoken: ``[2, L]`` main and second token that the machine answers each step with (what the
        decoder reads one step later, and the depformer's text embedding at once).
      actions: ``[L]`` 1 where an entry (or the end) is taken, else 0.
      free: ``[L]`` whether the machine listens to the action; elsewhere it would do the same
        whatever the model says.
      codes: ``[C, L]`` column t + 1 of the delayed grid.
      known: ``[C, L]`` where that is a code of the recording, not a beginning or an end.
    """

    tokens: Int[np.ndarray, "C L"]
    spoken: Int[np.ndarray, "2 L"]
    actions: Int[np.ndarray, " L"]
    free: Bool[np.ndarray, " L"]
    codes: Int[np.ndarray, "C L"]
    known: Bool[np.ndarray, "C L"]

    @property
    def steps(self) -> int:
        """Length L."""
        return int(self.tokens.shape[1])


def build_row(
    alignment: Alignment,
    codes: Int[np.ndarray, "C T"],
    config: Dia2Config,
    ids: TokenIds,
    pace: Pace,
    *,
    max_steps: int | None = None,
) -> Row:
    """The frames of a recording from its first step on.

    A row ends where generation would, where the least delayed codebook has no more code, at the
    end of the model's context, or after ``max_steps``, whichever comes first.

    Args:
      codes: aligned codes of the recording.

    Raises:
      DataError: the codes do not fit the model.
      AlignmentError: the machine does not follow the alignment (it was made for another pace).
    """
    data = config.data
    _check_codes(codes, config)
    grid = delay(codes.astype(np.int32), data.delay_pattern, data.audio_bos)
    grid[:, 0] = data.audio_bos  # a codebook without delay has no code yet at step 0
    frames, delays = codes.shape[1], np.array(data.delay_pattern)
    steps = min(
        alignment.end_step + data.max_delay + pace.max_padding,
        frames + int(delays.min()) - 1,
        config.runtime.max_context_steps,
    )
    if max_steps is not None:
        steps = min(steps, max_steps)

    machine = Machine(ids, data.second_stream_ahead, pace.max_padding, pace.initial_padding)
    state = machine.new_state(alignment.entries)
    takes = {step: index for index, step in enumerate(alignment.steps)}
    text = np.empty((2, steps + 1), np.int32)
    text[:, 0] = ids.bos, ids.pad
    actions, free = np.zeros(steps, np.int32), np.zeros(steps, bool)
    for step in range(steps):
        free[step] = not (
            state.pending
            or state.forced_padding > 0
            or state.padding_budget <= 0
            or state.end_step is not None
        )
        wanted = takes.get(step)
        actions[step] = wanted is not None or step == alignment.end_step
        taken = state.entries_taken
        outcome = machine.process(state, step, int(actions[step]))
        if (state.entries_taken > taken) != (wanted is not None):
            raise AlignmentError(
                f"step {step}: the machine does not take the words where the alignment does; "
                "align with the pace of this model"
            )
        text[:, step + 1] = outcome.main, outcome.second

    columns = np.arange(1, steps + 1)
    return Row(
        tokens=np.concatenate([text[:, :steps], grid[:, :steps]]),
        spoken=text[:, 1:],
        actions=actions,
        free=free,
        codes=grid[:, 1 : steps + 1],
        known=(columns >= delays[:, None]) & (columns - delays[:, None] < frames),
    )


def _check_codes(codes: np.ndarray, config: Dia2Config) -> None:
    data = config.data
    if codes.ndim != 2 or codes.shape[0] != data.codebooks:
        raise DataError(
            f"a recording has codes of shape {codes.shape}, the model reads "
            f"[{data.codebooks}, frames]: prepare the data with this model's codec"
        )
    if codes.size and not 0 <= codes.min() <= codes.max() < data.depth_vocab_size:
        raise DataError(
            f"codes of a recording lie outside 0 to {data.depth_vocab_size - 1}: prepare the data "
            "with this model's codec"
        )
    if codes.shape[1] + min(data.delay_pattern) < 2:
        raise DataError(f"a recording of {codes.shape[1]} frames holds no step to train on")
