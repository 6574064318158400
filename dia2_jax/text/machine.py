"""The word/action machine as a readable specification.

Once a frame the decoder draws an *action*: start the next word, or pad. The machine turns the
action into the two text tokens that the decoder reads in the next frame. The main stream spells
the word that was just started, one token a frame; the second stream marks the frames in which a
word starts with the new-word token and otherwise spells the word ``second_stream_ahead`` words
later, so that the model hears what is coming. Without a second stream both carry the main one.

The machine may overrule the action:

* while tokens of a word are left it pads (even when the action is forced);
* after taking an entry it pads for the entry's ``padding`` frames (not when forced);
* after ``max_padding`` frames without a word it starts the next one (not when forced).

`dia2_jax.generation.machine` is the same machine as arrays, for use inside a compiled frame step;
property tests hold the two equal. This one runs voice prefixes on the host.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from dia2_jax.errors import SessionError
from dia2_jax.text.script import Entry
from dia2_jax.text.tokenizer import TokenIds


@dataclass
class State:
    """Where the machine is. Entries may be appended while it runs (see `Machine.ready`).

    Attributes:
      entries: not taken yet.
      padding_budget: frames that may pass before a word is started on its own.
      forced_padding: frames in which no entry may be taken.
      pending: tokens of the current word not yet in the main stream.
      lookahead: tokens not yet in the second stream.
      end_step: first step that wanted a word and found no entry; None before.
      transcript: (text, step in which it was started) of each word.
      words_taken, pending_read, lookahead_read: how many words were started, and how many tokens
        left ``pending`` and ``lookahead`` so far. They place the state in the token pool of the
        array machine.
    """

    entries: deque[Entry]
    padding_budget: int
    forced_padding: int
    pending: deque[int] = field(default_factory=deque)
    lookahead: deque[int] = field(default_factory=deque)
    end_step: int | None = None
    transcript: list[tuple[str, int]] = field(default_factory=list)
    entries_taken: int = 0
    words_taken: int = 0
    pending_read: int = 0
    lookahead_read: int = 0

    def next_pending(self) -> int:
        self.pending_read += 1
        return self.pending.popleft()

    def next_lookahead(self) -> int:
        self.lookahead_read += 1
        return self.lookahead.popleft()


class Outcome(NamedTuple):
    """What one step did.

    Attributes:
      main, second: text tokens for the next frame.
      consumed: the entry that was taken in this step, or None.
    """

    main: int
    second: int
    consumed: Entry | None


class Machine:
    """The rules; everything that changes is in `State`."""

    def __init__(
        self,
        ids: TokenIds,
        second_stream_ahead: int,
        max_padding: int = 6,
        initial_padding: int = 2,
    ) -> None:
        """
        Args:
          ids: special token ids.
          second_stream_ahead: words that the second stream runs ahead; 0 for no second stream.
          max_padding: frames without a word before one is started on its own.
          initial_padding: frames of padding before the first word.
        """
        self.ids = ids
        self.ahead = second_stream_ahead
        self.max_padding = max_padding
        self.initial_padding = initial_padding

    def new_state(self, entries: Iterable[Entry] = ()) -> State:
        """State before step 0 with the entries known so far."""
        return State(deque(entries), self.initial_padding, self.initial_padding)

    def ready(self, state: State, closed: bool, *, forced: bool = False) -> bool:
        """Whether the next step's outcome is settled by the entries received so far.

        A step that is taken only when ready gives the same outcome however late later text
        arrives. When not ready, wait for more entries; do not step.

        Args:
          state: where the machine is.
          closed: no entry will follow those in ``state.entries``.
          forced: the next step is a forced one, which forced padding does not hold back.
        """
        if closed or state.pending:
            return True
        if state.forced_padding > 0 and not forced:
            return True
        # An entry may be taken, and a word needs the words that the second stream peeks at.
        if not state.entries:
            return False
        if not state.entries[0].tokens:
            return True
        return sum(1 for entry in state.entries if entry.tokens) > self.ahead

    def process(self, state: State, step: int, action: int, forced: bool = False) -> Outcome:
        """Runs one step, changing ``state``.

        Args:
          state: where the machine is.
          step: number of the frame; recorded for words and the end.
          action: 1 or the new-word token starts a word, anything else pads.
          forced: the action comes from a prefix and overrides padding rules.
        """
        token = self._constrain(state, self._as_token(action), forced)
        consumed = None
        if token == self.ids.new_word:
            if state.entries:
                consumed = self._take_entry(state, step)
                if not consumed.tokens:
                    token = self.ids.pad
            else:
                # The first step to find the text used up marks the end in the second stream.
                if not self.ahead or state.end_step is not None:
                    token = self.ids.pad
                if state.end_step is None:
                    state.end_step = step
        if token == self.ids.pad:
            state.padding_budget = max(0, state.padding_budget - 1)
            state.forced_padding = max(0, state.forced_padding - 1)
            if state.pending:
                token = state.next_pending()
        return Outcome(*self._two_streams(state, token), consumed)

    def _as_token(self, action: int) -> int:
        if action == 1:
            return self.ids.new_word
        if action == 0:
            return self.ids.pad
        return self.ids.new_word if action == self.ids.new_word else self.ids.pad

    def _constrain(self, state: State, token: int, forced: bool) -> int:
        if state.pending:
            return self.ids.pad
        if forced:
            return token
        if state.forced_padding > 0:
            return self.ids.pad
        return self.ids.new_word if state.padding_budget <= 0 else token

    def _take_entry(self, state: State, step: int) -> Entry:
        entry = state.entries.popleft()
        state.entries_taken += 1
        state.forced_padding = entry.padding
        if entry.tokens:
            state.words_taken += 1
            state.transcript.append((entry.text, step))
            state.pending.extend(entry.tokens)
            state.lookahead.extend(self._peek(state))
            state.padding_budget = self.max_padding
        return entry

    def _peek(self, state: State) -> tuple[int, ...]:
        """Tokens of the word ``ahead`` words behind the one just taken; pauses do not count."""
        words = [entry.tokens for entry in state.entries if entry.tokens]
        return words[self.ahead - 1] if 0 < self.ahead <= len(words) else ()

    def _two_streams(self, state: State, token: int) -> tuple[int, int]:
        if not self.ahead:
            return token, token
        if token == self.ids.new_word:
            # The second stream says that a word starts; the main one spells it at once.
            return state.next_pending() if state.pending else self.ids.pad, token
        return token, state.next_lookahead() if state.lookahead else self.ids.pad


def forced_trace(
    machine: Machine,
    entries: Iterable[Entry],
    steps: Sequence[int],
    frames: int,
    *,
    closed: bool = True,
) -> tuple[list[Outcome], State]:
    """Runs the forced steps of a prefix.

    A forced start is ignored while tokens of the word before are left, so the words lag behind
    their steps where these are too close.

    Args:
      machine: the rules.
      entries: the prefix's entries, followed by those of the script as far as it is known: the
        second stream looks ahead into it.
      steps: the steps at which a word is started; order and repetition do not matter.
      frames: number of steps to run, from 0.
      closed: no entry will follow.

    Returns:
      An outcome a step, and the state in which generation goes on.

    Raises:
      SessionError: not closed, and an outcome depends on text not yet received. With
        ``second_stream_ahead`` words of script behind the prefix this cannot happen.
    """
    state = machine.new_state(entries)
    starts = frozenset(steps)
    outcomes = []
    for step in range(frames):
        starting = step in starts
        if starting and not machine.ready(state, closed, forced=True):
            raise SessionError(
                f"step {step} of the prefix looks ahead into text that was not fed yet: feed "
                f"{machine.ahead} words of the script, or close it, before the prefix runs"
            )
        outcomes.append(machine.process(state, step, int(starting), forced=True))
    return outcomes, state
