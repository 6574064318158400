"""Words with times to what the word machine takes, step by step.

A recording says its words at its own pace; the machine takes them at its own (see
`dia2_jax.text.machine`): after a word of n tokens the next can start n + 1 steps later at the
earliest and ``max(max_padding + 1, n + 1)`` steps later at the latest. `align` lays a recording
out so that the machine, *not* forced, reproduces it when the model acts as the recording does:

* a word that comes too fast is taken late, and its drift is reported;
* a longer gap becomes a break: an entry of the queue and a ``<break>`` in the script. The break
  is taken when the word before it has ended, and runs until the next word is due;
* the text ends when its last word has.

What is trained on is therefore what generation can do, and the script that an alignment writes
out makes generation do it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from dia2_jax.errors import AlignmentError
from dia2_jax.text.script import Break, Entry, Lexer, normalise, parse_script
from dia2_jax.text.tokenizer import SPEAKER_TAGS, Tokenizer


@dataclass(frozen=True)
class SpokenWord:
    """A word of a recording: what, when (seconds from its start), and who (1 or 2)."""

    text: str
    start: float
    end: float
    speaker: int = 1


@dataclass(frozen=True)
class Pace:
    """How the machine walks; recorded with every prepared data set.

    Attributes:
      frame_rate: frames a second.
      word_step_offset: steps from the frame in which a word starts to sound to the step that
        takes it. The published checkpoints use 2: upstream adds 3 to a count that begins one
        early (``dia2_jax.generation.prefix.WORD_STEP_OFFSET``).
      initial_padding: steps before the first entry is taken.
      max_padding: steps without a word after which the machine takes the next on its own.
      delay_spread: largest minus smallest codebook delay; decides how much silence a recording
        needs behind it for every codebook of its last frames.
    """

    frame_rate: float = 12.5
    word_step_offset: int = 2
    initial_padding: int = 2
    max_padding: int = 6
    delay_spread: int = 2

    def step(self, seconds: float) -> int:
        """The step that is to take a word which starts to sound at ``seconds``."""
        return round(seconds * self.frame_rate) + self.word_step_offset

    def earliest(self, tokens: int) -> int:
        """Steps from a word of ``tokens`` tokens to the next at least."""
        return tokens + 1

    def latest(self, tokens: int) -> int:
        """Steps from a word of ``tokens`` tokens to the next entry at most."""
        return max(self.max_padding, tokens) + 1


@dataclass(frozen=True)
class Alignment:
    """A recording as the machine takes it.

    Attributes:
      entries: words and breaks, in order; equal to ``parse_script(script)``.
      steps: the step that takes each entry.
      end_step: the step that finds the text used up.
      script: the text of these entries, speaker tags and breaks written out.
      drift: per word, how many steps late it is taken.
      frames_needed: code frames after which generation of the script has ended by itself; the
        recording is to be that long, silence included.
    """

    entries: tuple[Entry, ...]
    steps: tuple[int, ...]
    end_step: int
    script: str
    drift: tuple[int, ...]
    frames_needed: int

    @property
    def breaks(self) -> int:
        """How many entries are breaks."""
        return sum(not entry.tokens for entry in self.entries)


@dataclass(frozen=True)
class _Timed:
    entry: Entry
    written: str  # the entry's text, behind its speaker tag if it has one
    start: float
    end: float


def align(words: Sequence[SpokenWord], tokenizer: Tokenizer, pace: Pace) -> Alignment:
    """Lay the words of a recording out over the steps of the machine.

    Args:
      words: in the order in which they start. A text with white space counts as several words,
        a sound tag that was cut in two as one.
      tokenizer: of the model to be trained.
      pace: see `Pace`.

    Raises:
      AlignmentError: no words, an impossible or unordered time, a speaker other than 1 and 2, or
        a text that the script grammar cannot say (a tag inside a word).
    """
    _check(words)
    timed = _timed_entries(words, tokenizer, pace.frame_rate)
    entries: list[Entry] = []
    steps: list[int] = []
    written: list[str] = []
    drift: list[int] = []

    def take(entry: Entry, text: str, step: int) -> None:
        entries.append(entry)
        steps.append(step)
        written.append(text)

    due = forced = pace.initial_padding  # where the next entry can be, and is at the latest
    ended = forced  # where the speech before it ends
    for item in timed:
        wanted = pace.step(item.start)
        if wanted > forced:
            begin = min(max(ended, due), forced)
            frames = wanted - begin
            take(Entry((), "", frames), _break_tag(frames, pace.frame_rate), begin)
        step = max(wanted, due)
        take(item.entry, item.written, step)
        drift.append(step - wanted)
        count = len(item.entry.tokens)
        due, forced = step + pace.earliest(count), step + pace.latest(count)
        ended = pace.step(item.end)
    end_step = min(max(ended, due), forced)
    script = " ".join(written)
    if parse_script(script, tokenizer, frame_rate=pace.frame_rate) != entries:
        raise AlignmentError(
            f"the words {script[:80]!r}… do not read back as the entries they were made from: "
            "check them for speaker tags, break tags or parts of sound tags"
        )
    return Alignment(
        entries=tuple(entries),
        steps=tuple(steps),
        end_step=end_step,
        script=script,
        drift=tuple(drift),
        frames_needed=end_step + pace.max_padding + 1 + pace.delay_spread,
    )


def _check(words: Sequence[SpokenWord]) -> None:
    if not words:
        raise AlignmentError("the recording has no words: give its transcript")
    for word in words:
        where = f"word {word.text!r} ({word.start} s to {word.end} s)"
        if not (math.isfinite(word.start) and math.isfinite(word.end) and word.start >= 0):
            raise AlignmentError(f"{where}: times are seconds from the recording's start on")
        if word.end < word.start:
            raise AlignmentError(f"{where}: ends before it starts")
        if word.speaker not in (1, 2):
            raise AlignmentError(f"{where}: speaker {word.speaker}, Dia2 has speakers 1 and 2")
        lexer = Lexer()
        for item in lexer.feed(word.text) + lexer.close():
            if isinstance(item, Break):
                raise AlignmentError(f"{where} holds a <break> tag: pauses follow from the times")
            if item.text in SPEAKER_TAGS:
                raise AlignmentError(
                    f"{where} holds a speaker tag: give the word's speaker instead"
                )
    for before, word in pairwise(words):
        if word.start < before.start:
            raise AlignmentError(
                f"word {word.text!r} starts at {word.start} s, before {before.text!r} in front of "
                f"it ({before.start} s): list words in the order in which they are spoken"
            )


def _timed_entries(
    words: Sequence[SpokenWord], tokenizer: Tokenizer, frame_rate: float
) -> list[_Timed]:
    """The entries that the script parser makes of the words, with the time of their characters."""
    script: list[str] = []
    speaker = 0
    for word in words:
        if word.speaker != speaker:
            speaker = word.speaker
            script.append(SPEAKER_TAGS[speaker - 1])
        script.append(word.text)
    text = " ".join(script)
    entries = iter(parse_script(text, tokenizer, frame_rate=frame_rate))
    times = _character_times(words)
    lexer = Lexer(tokenizer.sound_tags)
    entry = next(entries, None)
    position, tag = 0, ""
    timed: list[_Timed] = []
    for item in lexer.feed(text) + lexer.close():
        if isinstance(item, Break):
            behind = f"behind {timed[-1].written!r}" if timed else "at the start"
            raise AlignmentError(f"the words {behind} write a <break> tag together: remove it")
        if item.text in SPEAKER_TAGS:
            tag = f"{item.text} "
            continue
        length = len("".join(item.text.split()))
        start, end = times[position][0], times[min(position + length, len(times)) - 1][1]
        position += length
        if entry is not None and entry.text == item.text:
            timed.append(_Timed(entry, tag + item.text, start, end))
            entry = next(entries, None)
        tag = ""
    if not timed:
        raise AlignmentError("no word of the recording has a token in this vocabulary")
    return timed


def _character_times(words: Sequence[SpokenWord]) -> list[tuple[float, float]]:
    """Start and end of every character, a word's time spread evenly over its own."""
    times: list[tuple[float, float]] = []
    for word in words:
        count = len("".join(normalise(word.text).split()))
        second = (word.end - word.start) / max(count, 1)
        times += [(word.start + i * second, word.start + (i + 1) * second) for i in range(count)]
    return times


def _break_tag(frames: int, frame_rate: float) -> str:
    seconds = f"{frames / frame_rate:.2f}"
    if round(float(seconds) * frame_rate) != frames:
        seconds = f"{frames / frame_rate:.6f}"
    return f'<break time="{seconds}s"/>'
