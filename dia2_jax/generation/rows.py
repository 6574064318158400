"""The host side of a generation: B rows, each an independent session, one frame at a time.

``Rows`` owns the device state and decides nothing: what a frame does is decided inside
``frame_step``. A ``Row`` collects what came out: the delayed grid, the words, and the
aligned frames that are complete.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import numpy as np

from dia2_jax.config import Dia2Config
from dia2_jax.errors import ConfigError, NonFiniteError
from dia2_jax.generation.machine import QueueBuilder, TextQueue, from_spec
from dia2_jax.generation.prefix import PrefixPlan, WarmUp, warm_up
from dia2_jax.generation.sampling import RowSettings, rank_bound
from dia2_jax.generation.settings import GenerationConfig
from dia2_jax.generation.state import NO_CACHE, GenerationState, initial_rows, initial_state
from dia2_jax.generation.step import (
    FrameOutput,
    FrameTrace,
    Programs,
    StepOptions,
    compiled_ready,
)
from dia2_jax.model.delays import delay
from dia2_jax.text.machine import Machine
from dia2_jax.text.script import Entry, ScriptParser, require_speakable, speakable
from dia2_jax.text.tokenizer import Tokenizer
from dia2_jax.typing import Int

_NOT_GENERATED = -1
# Prefixes are padded to a multiple of this, so that few lengths are compiled.
_PREFILL_STEP = 64


class Row:
    """What the host knows of one session.

    Attributes:
      words: (text, step) of every word that was started, prefix included.
      grid: ``[C, S]`` delayed grid; columns up to ``computed`` are filled.
      computed: last column of the grid that holds codes.
      steps: frames computed so far.
      done, truncated, waiting: see ``FrameOutput``.
    """

    def __init__(
        self,
        model: Dia2Config,
        tokenizer: Tokenizer,
        config: GenerationConfig,
        plan: PrefixPlan | None,
        *,
        frame_rate: float,
        split_sound_tags: bool = False,
    ) -> None:
        data, context = model.data, model.runtime.max_context_steps
        self.config, self.plan = config, plan
        self._model = model
        self._parser = ScriptParser(
            tokenizer, frame_rate=frame_rate, split_sound_tags=split_sound_tags
        )
        self.queue = QueueBuilder(context + 1, data.second_stream_ahead)
        self._script: list[Entry] = []
        self.words: list[tuple[str, int]] = []
        self.grid = np.full((data.codebooks, context + 2), _NOT_GENERATED, np.int32)
        self.computed = 0
        self.steps = 0
        self.started = plan is None
        self.done = self.truncated = False
        self.waiting = True
        self._start = 0
        self._first_word: int | None = None
        if plan is not None:
            self.queue.append(plan.entries)

    @property
    def closed(self) -> bool:
        """The text is complete."""
        return self.queue.closed

    def feed(self, text: str) -> bool:
        """More text; see ``ScriptParser.feed``. True if it completed an entry."""
        entries = self._parser.feed(text)
        self._append(entries)
        return bool(entries)

    def close(self) -> None:
        """The text is complete.

        Raises:
          ScriptError: there is nothing to speak in it.
        """
        if not self.closed:
            self._append(self._parser.close())
            if not speakable(self._script):
                require_speakable(self._script)
            self.queue.close()

    def _append(self, entries: list[Entry]) -> None:
        self._script += entries
        self.queue.append(entries)

    def warm_up(self, machine: Machine) -> WarmUp | None:
        """The row's warm-up, as soon as the text it looks ahead into is known."""
        words = sum(1 for entry in self._script if entry.tokens)
        if self.plan is None or not (self.closed or words >= machine.ahead):
            return None
        warm = warm_up(self.plan, self._script, machine, self._model, closed=self.closed)
        delayed = delay(self.plan.codes, self._model.data.delay_pattern, _NOT_GENERATED)
        self.grid[:, : self.plan.frames] = delayed[:, : self.plan.frames]
        self.computed = self._start = warm.start
        self.words += warm.machine.transcript
        self.started = True
        return warm

    def record(self, output: FrameOutput, index: int) -> bool:
        """Take in what a frame did for this row; True if it advanced."""
        if not self.started:
            return False
        self.done = bool(output.done[index])
        self.waiting = not (self.done or bool(output.ready[index]))
        if not output.advanced[index]:
            return False
        step = int(output.frame[index])
        if not output.finite[index]:
            self.done, self.waiting = True, False
            raise NonFiniteError(
                f"the model produced NaN or infinite logits in frame {step}"
                f" (row {index}): its weights are damaged, or this dtype is too narrow for them; "
                "try dtype='float32'"
            )
        self.truncated = bool(output.truncated[index])
        self.steps += 1
        self.grid[:, step + 1] = output.codes[index]
        self.computed = step + 1
        word = int(output.word[index])
        if word >= 0:
            self.words.append((self.queue.words[word], step))
            if self._first_word is None:
                self._first_word = step
        return True

    @property
    def crop(self) -> int | None:
        """First aligned frame of the output, or None while it is not known.

        Without a second text stream the output begins ``initial_padding`` frames before the
        first word; otherwise where generation began, which is what upstream's test for the first
        word comes to.
        """
        if not self.started:
            return None
        if self.plan is not None and self.config.include_prefix:
            first = 0
        elif self._model.data.second_stream_ahead:
            first = self._start
        elif self._first_word is not None:
            first = max(self._first_word - self.config.initial_padding, 0)
        elif self.done:
            first = self._start
        else:
            return None
        # Column 0 is never generated, so without a delay there is no frame 0.
        return max(
            first, 1 if self.plan is None and min(self._model.data.delay_pattern) == 0 else 0
        )

    @property
    def available(self) -> int:
        """How many output frames are complete."""
        crop = self.crop
        if crop is None:
            return 0
        # The words of a frame are known when its own step ran, also where codes have no delay.
        held = max(self._model.data.max_delay, 0 if self.done else 1)
        return max(0, self.computed + 1 - held - crop)

    def frames(self, start: int, stop: int) -> Int[np.ndarray, "C T"]:
        """Aligned codes of output frames ``start`` to ``stop - 1``, all of them complete."""
        first = (self.crop or 0) + start
        delays = self._model.data.delay_pattern
        rows = [self.grid[c, d + first : d + first + stop - start] for c, d in enumerate(delays)]
        return np.stack(rows)

    def word_steps(self) -> list[tuple[str, int]]:
        """(text, output frame) of every word of the output so far."""
        crop = self.crop
        if crop is None:
            return []
        skip = 0
        if self.plan is not None and not self.config.include_prefix:
            skip = len(self.plan.entries)
        return [(text, step - crop) for text, step in self.words[skip:] if step >= crop]


class Rows:
    """B sessions on one device state.

    Use: ``feed`` and ``close`` rows, then ``while rows.refresh(): rows.step()``. A row that is done
    can be given to another session (:meth:`join`), and one that is not can :meth:`leave`.
    """

    def __init__(
        self,
        programs: Programs,
        tokenizer: Tokenizer,
        configs: Sequence[GenerationConfig],
        seeds: Sequence[int],
        plans: Sequence[PrefixPlan | None],
        *,
        frame_rate: float = 12.5,
        split_sound_tags: bool = False,
        trace: bool = False,
    ) -> None:
        self._programs, self._ids = programs, tokenizer.ids
        self.model = programs.config
        self._configs, self._seeds = list(configs), list(seeds)

        # Not a function of this method's: it would hold its batch, caches and all, for as long as
        # nobody collects cycles.
        self._new_row = functools.partial(
            Row,
            self.model,
            tokenizer,
            frame_rate=frame_rate,
            split_sound_tags=split_sound_tags,
        )
        self.rows = [self._new_row(*each) for each in zip(configs, plans, strict=True)]
        self._settings = RowSettings.of(self._configs)
        self.options = StepOptions(
            ids=tokenizer.ids,
            guided=any(config.cfg_scale != 1.0 for config in configs),
            bound=rank_bound(list(configs)),
            trace=trace,
        )
        state = initial_state(
            programs.model(),
            ids=tokenizer.ids,
            seeds=list(seeds),
            initial_padding=[config.initial_padding for config in configs],
            guided=self.options.guided,
        )
        # A row does nothing before its prefix.
        held = jax.device_put(np.array([not row.started for row in self.rows]))
        self._state: GenerationState | None = replace(state, done=held)
        self._queue: TextQueue | None = None

    def feed(self, index: int, text: str) -> None:
        """More text for one row."""
        if self.rows[index].feed(text):
            self._queue = None

    def close(self, index: int) -> None:
        """The text of one row is complete; see ``Row.close`` for errors."""
        self.rows[index].close()
        self._queue = None

    def join(
        self, index: int, config: GenerationConfig, seed: int, plan: PrefixPlan | None = None
    ) -> None:
        """Begin another session in the place of one, between any two frames.

        Nothing is compiled for it, and the other rows go on as they would have. ``rows[index]`` is
        another :class:`Row` from now on; the one before keeps what it has.

        Raises:
          ConfigError: the batch was not made for these settings.
        """
        assert self._state is not None, "cancelled"
        bound, wanted = self.options.bound, rank_bound([config])
        if (config.cfg_scale != 1.0 and not self.options.guided) or (
            bound and not 0 < wanted <= bound
        ):
            raise ConfigError(
                "config: asks for guidance, or for a larger top_k or cfg_filter_k, that no session "
                "asked for with which this batch began; begin it with such settings in one row"
            )
        self._configs[index], self._seeds[index] = config, seed
        self.rows[index] = self._new_row(config, plan)
        self._settings, self._queue = RowSettings.of(self._configs), None
        # The program that made the batch makes all rows anew, of which this one is taken. Keys
        # are of seeds alone, so those of the others are what they were.
        fresh = initial_rows(
            self.model,
            ids=self._ids,
            seeds=self._seeds,
            initial_padding=[each.initial_padding for each in self._configs],
        )
        new = jax.tree.map(np.asarray, replace(fresh, keys=fresh.frame))

        def begin(small: GenerationState) -> None:
            jax.tree.map(lambda held, one: held.__setitem__(index, one[index]), small, new)
            small.done[index] = plan is not None

        self._state = _edited(replace(self._state, keys=fresh.keys), begin)

    def leave(self, index: int) -> None:
        """End the session of a row between any two frames; what it said so far stays readable."""
        row = self.rows[index]
        row.done, row.waiting = True, False
        if self._state is not None:
            self._state = _edited(self._state, lambda small: small.done.__setitem__(index, True))

    def cancel(self) -> None:
        """Give the device memory back. Nothing is computed afterwards."""
        self._state = self._queue = None

    def refresh(self) -> bool:
        """Take in the text fed since the last frame; True if some row can compute a frame."""
        if self._state is None:
            return False
        if self._queue is None:
            arrays = [row.queue.arrays() for row in self.rows]
            self._queue = jax.tree.map(lambda *fields: jax.device_put(np.stack(fields)), *arrays)
            self._start_rows()
            ahead = self.model.data.second_stream_ahead
            ready = np.asarray(compiled_ready(self._state.machine, self._queue, ahead=ahead))
            for row, now in zip(self.rows, ready, strict=True):
                row.waiting = not (row.done or (row.started and bool(now)))
        return any(not row.done and not row.waiting for row in self.rows)

    def step(self, picks: Int[np.ndarray, "B P"] | None = None) -> FrameTrace | None:
        """Compute one frame of every row that can; call after :meth:`refresh` said so.

        Args:
          picks: replaces the draws, action first, then the codebooks.

        Raises:
          NonFiniteError: a row's logits are not finite.
        """
        assert self._state is not None and self._queue is not None, "refresh() first"
        self._state, output, trace = self._programs.step(
            self._state, self._queue, self._settings, self.options, picks
        )
        seen = jax.device_get(output)
        for index, row in enumerate(self.rows):
            row.record(seen, index)
        return trace

    def _start_rows(self) -> None:
        """Warm up every row whose prefix can run now, all in one pass."""
        assert self._state is not None
        warm = {
            index: found
            for index, row in enumerate(self.rows)
            if not row.started and (found := row.warm_up(self._machine(row))) is not None
        }
        if not warm:
            return
        longest = max(each.tokens.shape[1] for each in warm.values())
        context = self.model.runtime.max_context_steps
        padded = min(-(-longest // _PREFILL_STEP) * _PREFILL_STEP, context)
        shape = (len(self.rows), 2 + self.model.data.codebooks, padded)
        tokens = np.zeros(shape, np.int32)
        for index, each in warm.items():
            tokens[index, :, : each.tokens.shape[1]] = each.tokens
        chosen = np.isin(np.arange(len(self.rows)), list(warm))
        state = self._programs.prefill(self._state, tokens, chosen, self.options)

        def begin(small: GenerationState) -> None:
            for index, each in warm.items():
                machine = from_spec(
                    each.machine,
                    self.rows[index].queue.arrays(),
                    self.model.data.second_stream_ahead,
                )
                fields = (
                    (small.frame, each.start),
                    (small.slot_offset, each.slot_offset),
                    (small.text, each.text),
                    (small.codes, each.column),
                    (small.done, False),
                )
                for array, value in fields:
                    array[index] = value
                jax.tree.map(
                    lambda all_, one, i=index: all_.__setitem__(i, one), small.machine, machine
                )

        self._state = _edited(state, begin)

    def _machine(self, row: Row) -> Machine:
        ahead = self.model.data.second_stream_ahead
        return Machine(self._ids, ahead, row.config.max_padding, row.config.initial_padding)


def _edited(state: GenerationState, edit: Callable[[GenerationState], None]) -> GenerationState:
    """``state`` after ``edit`` of all but its caches and keys, which are numpy arrays to it.

    On the host, where nothing has to be compiled. The caches stay where they are.
    """
    # Keys are no numbers; whatever takes their place is not looked at.
    small = jax.tree.map(np.array, replace(state, cache=NO_CACHE, keys=state.frame))
    edit(small)
    return replace(jax.tree.map(jax.device_put, small), cache=state.cache, keys=state.keys)
