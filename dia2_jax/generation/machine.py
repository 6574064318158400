"""The word/action machine as arrays, for use inside one compiled frame step.

`dia2_jax.text.machine` says what the machine does; this module does the same to a state of scalars
and a queue of fixed size, without branching on values and without reading anything back to the
host. Everything is written for one row; batch it with ``jax.vmap``.

Two observations keep the state small. All word tokens lie in one pool, in the order of the words.

* The main stream's unread tokens are a range of the pool: a word is taken only after the one
  before was read to its end, so they all belong to one word.
* The second stream's unread tokens are a range of the pool too. Taking word w appends the tokens of
  word w + ahead, if there is one. Words are taken in order and none is skipped, so what is appended
  next are the tokens of word w + 1 + ahead, which lie directly behind. If there is no word
  w + ahead, the text is closed (`ready` waits otherwise), so none is appended later either.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dia2_jax.errors import SessionError
from dia2_jax.text import machine as spec
from dia2_jax.text.script import Entry
from dia2_jax.text.tokenizer import TokenIds
from dia2_jax.typing import Array, ArrayLike, Bool, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TextQueue:
    """The text received so far. Only the session's host side changes it, by replacing it.

    Attributes:
      pool: tokens of all words, in order; beyond the last word undefined.
      word_offset: where each word starts in the pool; entry ``word_count`` is the end of the last.
      entry_word: word of an entry, or -1 for a pause.
      entry_padding: frames of padding that taking an entry brings.
      entry_count, word_count: how many are there.
      closed: no entry will follow.
    """

    pool: Int[ArrayLike, " Q"]
    word_offset: Int[ArrayLike, " words+1"]
    entry_word: Int[ArrayLike, " E"]
    entry_padding: Int[ArrayLike, " E"]
    entry_count: Int[ArrayLike, ""]
    word_count: Int[ArrayLike, ""]
    closed: Bool[ArrayLike, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MachineState:
    """Where the machine is; int32 scalars.

    Attributes:
      head: the entry to take next.
      word: words started so far.
      pending_read, pending_end: range of the pool that the main stream has still to read.
      ahead_read, ahead_end: the same for the second stream.
      padding_budget: frames that may pass before a word is started on its own.
      forced_padding: frames in which no entry may be taken.
      end_step: first step that wanted a word and found no entry; -1 before.
    """

    head: Int[ArrayLike, ""]
    word: Int[ArrayLike, ""]
    pending_read: Int[ArrayLike, ""]
    pending_end: Int[ArrayLike, ""]
    ahead_read: Int[ArrayLike, ""]
    ahead_end: Int[ArrayLike, ""]
    padding_budget: Int[ArrayLike, ""]
    forced_padding: Int[ArrayLike, ""]
    end_step: Int[ArrayLike, ""]


class MachineOutput(NamedTuple):
    """What one step did.

    Attributes:
      main, second: text tokens for the next frame.
      consumed: whether an entry was taken.
      word: index of the word that was started, or -1.
    """

    main: Int[Array, ""]
    second: Int[Array, ""]
    consumed: Bool[Array, ""]
    word: Int[Array, ""]


def init_state(initial_padding: int | Int[Array, ""]) -> MachineState:
    """State before step 0; ``initial_padding`` frames pass before the first word."""
    zero, padding = _int32(0), _int32(initial_padding)
    return MachineState(
        head=zero,
        word=zero,
        pending_read=zero,
        pending_end=zero,
        ahead_read=zero,
        ahead_end=zero,
        padding_budget=padding,
        forced_padding=padding,
        end_step=_int32(-1),
    )


def from_spec(state: spec.State, queue: TextQueue, ahead: int) -> MachineState:
    """The array state that goes on where the specification stopped (after a prefix).

    Args:
      state: the specification's state.
      queue: numpy arrays of a `QueueBuilder` that was given the same entries from the first on.
      ahead: words that the second stream runs ahead.
    """
    # The pool holds the words in reading order, so the number of tokens read is the place in it.
    word_offset, words = np.asarray(queue.word_offset), int(queue.word_count)
    return MachineState(
        head=_int32(state.entries_taken),
        word=_int32(state.words_taken),
        pending_read=_int32(state.pending_read),
        pending_end=_int32(word_offset[state.words_taken]),
        ahead_read=_int32(word_offset[min(ahead, words)] + state.lookahead_read),
        ahead_end=_int32(word_offset[min(ahead + state.words_taken, words)]),
        padding_budget=_int32(state.padding_budget),
        forced_padding=_int32(state.forced_padding),
        end_step=_int32(-1 if state.end_step is None else state.end_step),
    )


def ready(state: MachineState, queue: TextQueue, ahead: int) -> Bool[Array, ""]:
    """Whether the next unforced step's outcome is settled by the text received so far.

    When it is not, the row must wait: a step taken all the same is undefined.

    Args:
      state, queue: of one row.
      ahead: words that the second stream runs ahead; static.
    """
    head_word = _at(queue.entry_word, state.head)
    # A pause is taken alone; a word together with a peek `ahead` words behind it.
    covered = (head_word < 0) | (queue.word_count - head_word > ahead)
    return (
        jnp.asarray(queue.closed)
        | (state.pending_read < state.pending_end)
        | (state.forced_padding > 0)
        | ((state.head < queue.entry_count) & covered)
    )


def process(
    state: MachineState,
    queue: TextQueue,
    step: int | Int[Array, ""],
    action: int | Int[Array, ""],
    *,
    ids: TokenIds,
    ahead: int,
    max_padding: int | Int[Array, ""] = 6,
    forced: bool | Bool[Array, ""] = False,
) -> tuple[MachineState, MachineOutput]:
    """One step of the machine for one row.

    Args:
      state, queue: of one row.
      step: number of the frame; recorded when the text ends.
      action: 1 or the new-word token starts a word, anything else pads.
      ids: special token ids; static.
      ahead: words that the second stream runs ahead, 0 for no second stream; static.
      max_padding: frames without a word before one is started on its own.
      forced: the action comes from a prefix and overrides padding rules.

    Returns:
      The next state, and what the step did.
    """
    action = _int32(action)
    forced = jnp.asarray(forced)
    pending = state.pending_read < state.pending_end

    # What this step is: taking an entry, finding none left, or padding.
    wants = (action == 1) | ((action == ids.new_word) & (action != 0))
    unforced = (state.forced_padding <= 0) & (wants | (state.padding_budget <= 0))
    wants = jnp.where(forced, wants, unforced) & ~pending
    left = state.head < queue.entry_count
    consumed = wants & left
    ended = wants & ~left & (state.end_step < 0)

    # Take the entry.
    head_word = _at(queue.entry_word, state.head)
    starts = consumed & (head_word >= 0)
    word_end = _at(queue.word_offset, head_word + 1)
    state = replace(
        state,
        head=state.head + consumed,
        word=state.word + starts,
        pending_end=jnp.where(starts, word_end, state.pending_end),
        padding_budget=jnp.where(starts, max_padding, state.padding_budget),
        forced_padding=jnp.where(
            consumed, _at(queue.entry_padding, state.head), state.forced_padding
        ),
        end_step=jnp.where(ended, step, state.end_step),
    )
    if ahead:
        peeked = head_word + ahead
        peeks = starts & (peeked < queue.word_count)
        empty = state.ahead_read >= state.ahead_end
        state = replace(
            state,
            ahead_read=jnp.where(peeks & empty, _at(queue.word_offset, peeked), state.ahead_read),
            ahead_end=jnp.where(peeks, _at(queue.word_offset, peeked + 1), state.ahead_end),
        )

    # The token: new-word in the step that starts a word (and, with a second stream, in the first
    # that finds the text used up), otherwise the next one of the word or padding.
    marks = starts | ended if ahead else starts
    token, state = _read_pending(state, queue, ~marks, ids.pad)
    token = jnp.where(marks, ids.new_word, token)
    state = replace(
        state,
        padding_budget=jnp.where(marks, state.padding_budget, _down(state.padding_budget)),
        forced_padding=jnp.where(marks, state.forced_padding, _down(state.forced_padding)),
    )
    if not ahead:
        main = second = token
    else:
        # Compared with the token rather than `marks`: a script may spell the new-word token.
        marked = token == ids.new_word
        spelled, state = _read_pending(state, queue, marked, ids.pad)
        main = jnp.where(marked, spelled, token)
        reads = ~marked & (state.ahead_read < state.ahead_end)
        peeked_token = jnp.where(reads, _at(queue.pool, state.ahead_read), ids.pad)
        second = jnp.where(marked, ids.new_word, peeked_token)
        state = replace(state, ahead_read=state.ahead_read + reads)
    state = jax.tree.map(_int32, state)
    return state, MachineOutput(main, second, consumed, jnp.where(starts, head_word, -1))


def _at(values: Int[ArrayLike, " N"], index: Int[ArrayLike, ""]) -> Int[Array, ""]:
    # Indices run past the end only where the result is masked out.
    return jnp.asarray(values).at[index].get(mode="clip")


def _int32(value: int | ArrayLike) -> Int[Array, ""]:
    return jnp.asarray(value, jnp.int32)


def _down(value: Int[ArrayLike, ""]) -> Int[Array, ""]:
    return jnp.maximum(value - 1, 0)


def _read_pending(
    state: MachineState, queue: TextQueue, allowed: Bool[Array, ""], pad: int
) -> tuple[Int[Array, ""], MachineState]:
    """The main stream's next token where ``allowed`` and there is one, else ``pad``."""
    reads = allowed & (state.pending_read < state.pending_end)
    token = jnp.where(reads, _at(queue.pool, state.pending_read), pad)
    return token, replace(state, pending_read=state.pending_read + reads)


class QueueBuilder:
    """Host side of a row's queue: collects entries, hands out `TextQueue`s of one fixed shape.

    The capacity is that of the machine within ``max_steps`` steps S, so nothing that can be
    reached is lost, however long the text:

    * A step takes at most one entry, so entries behind the first S are never taken. Of their words
      those up to S + ahead may still be peeked at.
    * A step reads at most two tokens from a stream (two only where a script spells the new-word
      token), so a word's tokens behind the first 2 S are never read, nor is padding beyond S
      waited out.
    * A word is taken when the ones before are read, so those hold at most 2 S tokens together;
      it and the ``ahead`` words behind it hold at most 2 S each after that cut. Hence
      (4 + 2 ahead) S tokens suffice, and the first word that does not fit is out of reach, with
      everything behind it.

    Attributes:
      words: text of each word, by the index that `MachineOutput.word` gives.
      full: whether later text is left out because no step can reach it.
      closed: whether the text is complete.
    """

    words: list[str]
    full: bool
    closed: bool

    def __init__(self, max_steps: int, ahead: int) -> None:
        """
        Args:
          max_steps: machine steps a session can take at most. A prefix repeats one position, so
            this is the model's context plus one.
          ahead: words that the second stream runs ahead.
        """
        self.words = []
        self.full = False
        self.closed = False
        self._max_steps = max_steps
        self._pool = np.zeros((4 + 2 * ahead) * max_steps, np.int32)
        self._word_offset = np.zeros(max_steps + ahead + 1, np.int32)
        # One more than can be taken, so that a full queue never looks like the end of the text.
        self._entry_word = np.full(max_steps + 1, -1, np.int32)
        self._entry_padding = np.zeros(max_steps + 1, np.int32)
        self._entry_count = 0

    def append(self, entries: Iterable[Entry]) -> None:
        """Adds entries behind those before.

        Raises:
          SessionError: the queue was closed.
        """
        if self.closed:
            raise SessionError("entries were appended to a closed text queue")
        for entry in entries:
            if self.full:
                return
            word = self._append_word(entry) if entry.tokens else -1
            if not self.full and self._entry_count < len(self._entry_word):
                self._entry_word[self._entry_count] = word
                self._entry_padding[self._entry_count] = min(entry.padding, self._max_steps)
                self._entry_count += 1

    def close(self) -> None:
        """Says that the text is complete. May be repeated."""
        self.closed = True

    def arrays(self) -> TextQueue:
        """The queue as it is now, in numpy arrays of its own."""
        return TextQueue(
            pool=self._pool.copy(),
            word_offset=self._word_offset.copy(),
            entry_word=self._entry_word.copy(),
            entry_padding=self._entry_padding.copy(),
            entry_count=np.asarray(self._entry_count, np.int32),
            word_count=np.asarray(len(self.words), np.int32),
            closed=np.asarray(self.closed),
        )

    def _append_word(self, entry: Entry) -> int:
        """Index of the word; sets ``full`` when it does not fit."""
        word = len(self.words)
        tokens = entry.tokens[: 2 * self._max_steps]
        start = int(self._word_offset[word])
        end = start + len(tokens)
        if word + 1 == len(self._word_offset) or end > len(self._pool):
            self.full = True
            return -1
        self._pool[start:end] = tokens
        self._word_offset[word + 1] = end
        self.words.append(entry.text)
        return word
