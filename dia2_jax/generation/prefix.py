"""Prefixes: turns that were already spoken, as context for what comes next.

A plan says which words a prefix holds and in which step the word machine takes each;
its warm-up is what the decoder reads while the machine is forced along the plan. The
warm-up depends on no logits, so the decoder takes all of it in one batched pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dia2_jax.config import Dia2Config
from dia2_jax.errors import PrefixError
from dia2_jax.model.delays import delay
from dia2_jax.text.machine import Machine, State, forced_trace
from dia2_jax.text.script import Entry
from dia2_jax.text.timing import WordTime, words_to_entries
from dia2_jax.text.tokenizer import Tokenizer
from dia2_jax.typing import Int

#: Frames from the one in which a word starts to sound to the step that takes it. Upstream adds 3
#: to a count that begins one early, for speaker 1; speaker 2 gets no such offset there.
WORD_STEP_OFFSET = 2


@dataclass(frozen=True)
class PrefixTurn:
    """One turn that was already spoken.

    Attributes:
      speaker: 1 or 2.
      codes: ``[C, T]`` aligned Mimi codes of its audio.
      words: what is said in it; times in seconds from the start of the turn.
    """

    speaker: int
    codes: Int[np.ndarray, "C T"]
    words: tuple[WordTime, ...]


@dataclass(frozen=True)
class PrefixPlan:
    """Which entries a prefix takes, and when.

    Attributes:
      kind: ``"exact"`` or ``"upstream"`` (see ``GenerationConfig.prefix_plan``).
      entries: words of all turns, in order.
      steps: the step in which each entry is to be taken.
      codes: ``[C, P]`` aligned codes of all turns.
    """

    kind: Literal["exact", "upstream"]
    entries: tuple[Entry, ...]
    steps: tuple[int, ...]
    codes: Int[np.ndarray, "C P"]

    @property
    def frames(self) -> int:
        """Length P of the prefix."""
        return int(self.codes.shape[1])


@dataclass(frozen=True)
class WarmUp:
    """A prefix as the decoder reads it, and where generation goes on.

    Attributes:
      tokens: ``[2 + C, T]`` input of steps 0 to T - 1, conditional row.
      start: first step that generation computes.
      slot_offset: cache slot minus position from there on.
      text: main and second token that step ``start`` reads.
      column: ``[C]`` column ``start`` of the delayed grid.
      machine: the word machine after the last forced step.
    """

    tokens: Int[np.ndarray, "C T"]
    start: int
    slot_offset: int
    text: tuple[int, int]
    column: Int[np.ndarray, " C"]
    machine: State


def plan_prefix(
    turns: Sequence[PrefixTurn],
    tokenizer: Tokenizer,
    config: Dia2Config,
    *,
    kind: Literal["exact", "upstream"] = "exact",
    frame_rate: float = 12.5,
) -> PrefixPlan:
    """Lay the words of one or more turns out over the steps of a prefix.

    Raises:
      PrefixError: no turn, only turns of speaker 2, codes of the wrong shape, a prefix as long as
        the model's context, or words that cannot be taken in so few frames.
    """
    _check_turns(turns, config, frame_rate)
    entries: list[Entry] = []
    steps: list[int] = []
    offset = 0
    for index, turn in enumerate(turns):
        turn_entries, turn_steps = words_to_entries(
            turn.words, tokenizer, speaker=turn.speaker, frame_rate=frame_rate
        )
        if kind == "upstream":
            # Upstream shifts the first turn by 3 and later ones by the frames before them.
            steps += [step + (3 if index == 0 else offset) for step in turn_steps]
        else:
            starts = [round(word.start * frame_rate) for word in turn.words]
            steps += [offset + start + WORD_STEP_OFFSET for start in starts]
        entries += turn_entries
        offset += turn.codes.shape[1]
    codes = np.concatenate([turn.codes for turn in turns], axis=1).astype(np.int32)
    if kind == "exact":
        # The machine's own pace from here on: the pauses were spoken, they are not to come.
        entries = [Entry(entry.tokens, entry.text, len(entry.tokens)) for entry in entries]
        ahead = config.data.second_stream_ahead
        steps = _exact_steps(entries, steps, codes.shape[1], frame_rate, needs_gap=ahead == 0)
    return PrefixPlan(kind=kind, entries=tuple(entries), steps=tuple(steps), codes=codes)


def _check_turns(turns: Sequence[PrefixTurn], config: Dia2Config, frame_rate: float) -> None:
    data, context = config.data, config.runtime.max_context_steps
    if not turns:
        raise PrefixError("the prefix has no turn: give at least one voice, or none at all")
    if all(turn.speaker == 2 for turn in turns):
        raise PrefixError(
            "the prefix has only speaker 2: the model needs speaker 1 as well. Give the voice as "
            "speaker 1, or add one for speaker 1"
        )
    for turn in turns:
        if turn.speaker not in (1, 2):
            raise PrefixError(f"speaker {turn.speaker}: Dia2 has speakers 1 and 2")
        if turn.codes.ndim != 2 or turn.codes.shape[0] != data.codebooks:
            raise PrefixError(
                f"codes of a prefix turn have shape {turn.codes.shape}, the model reads "
                f"[{data.codebooks}, frames]: prepare the voice with this model's codec"
            )
        if turn.codes.size and not (
            0 <= turn.codes.min() <= turn.codes.max() < data.depth_vocab_size
        ):
            raise PrefixError(
                f"codes of a prefix turn lie outside 0 to {data.depth_vocab_size - 1}: prepare the "
                "voice with this model's codec"
            )
    frames = sum(turn.codes.shape[1] for turn in turns)
    if frames < 2:
        raise PrefixError(f"the prefix has {frames} frames: it needs at least 2")
    if frames >= context - data.max_delay:
        raise PrefixError(
            f"the prefix has {frames} frames ({frames / frame_rate:.1f} s), the model's context is "
            f"{context} steps with {data.max_delay} for delays: shorten the prefix to leave room "
            "for speech"
        )


def _exact_steps(
    entries: Sequence[Entry],
    wanted: Sequence[int],
    frames: int,
    frame_rate: float,
    *,
    needs_gap: bool,
) -> list[int]:
    """Steps as near to ``wanted`` as the machine can take every word once inside the prefix.

    Consecutive words are at least tokens + 1 steps apart, the machine's own pace (tokens, if only
    that fits and the machine spells a word from the step that takes it), and the last one is
    spelled by the last forced step, ``frames - 2``.
    """
    last = frames - 2
    for slack in (1,) if needs_gap else (1, 0):
        room = [len(entry.tokens) + slack for entry in entries]
        latest = last + 1
        limits = [0] * len(entries)
        for index in reversed(range(len(entries))):
            latest -= room[index]
            limits[index] = latest
        if not entries or limits[0] >= 0:
            break
    else:
        needed = sum(room) + 1
        raise PrefixError(
            f"the prefix says {len(entries)} words, which the model reads in {needed} frames "
            f"({needed / frame_rate:.2f} s) at least, but its audio has {frames}: check that "
            "the words belong to this audio, or leave some out"
        )
    steps: list[int] = []
    for index, step in enumerate(wanted):
        earliest = steps[-1] + room[index - 1] if steps else 0
        steps.append(min(max(step, earliest), limits[index]))
    return steps


def warm_up(
    plan: PrefixPlan,
    script: Sequence[Entry],
    machine: Machine,
    config: Dia2Config,
    *,
    closed: bool,
) -> WarmUp:
    """Force the machine along a plan.

    Args:
      script: entries behind the prefix as far as they are known; the second stream looks into
        them, so ``second_stream_ahead`` words are needed unless ``closed``.
      closed: no entry will follow ``script``.
    """
    data = config.data
    # Upstream forces all P steps, then computes step P - 1 once more without force. The exact
    # plan computes every position once.
    repeats = plan.kind == "upstream"
    forced = plan.frames if repeats else plan.frames - 1
    outcomes, state = forced_trace(
        machine, [*plan.entries, *script], plan.steps, forced, closed=closed
    )
    text = [(machine.ids.bos, machine.ids.pad)]
    text += [(outcome.main, outcome.second) for outcome in outcomes]
    grid = delay(plan.codes, data.delay_pattern, data.audio_bos)[:, : plan.frames]
    tokens = np.concatenate([np.array(text[:forced]).T, grid[:, :forced]])
    start = plan.frames - 1
    return WarmUp(
        tokens=tokens.astype(np.int32),
        start=start,
        slot_offset=1 if repeats else 0,
        text=text[forced],
        column=grid[:, start],
        machine=state,
    )
