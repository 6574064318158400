"""Scripts to entries: the words and pauses that the word machine takes one after another.

Owns the script grammar. Words are separated by white space; ``[S1]`` and ``[S2]`` name the
speaker of the next word; ``<break time="1.5s"/>`` is a pause and may touch words; ``’`` reads as
``'`` and ``:`` as a space. Everything works character by character on one state, so cutting a text
into pieces cannot change its entries: what `ScriptParser.feed` returns depends on arrival, the
concatenation of all it returns does not.

Differences from upstream, on purpose: the decimal point of a break is a point (upstream's pattern
takes any character there and then fails on it), a multi-word sound tag stays one entry unless
``split_sound_tags`` asks for upstream's cut, and a word without a single token is dropped.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from dia2_jax.errors import ScriptError, SessionError
from dia2_jax.text.tokenizer import SPEAKER_TAGS, Tokenizer

# A pause longer than this exceeds any model's context by far; the bound keeps "1e400" finite.
_LONGEST_BREAK_SECONDS = 1e6

_NORMALIZE = {
    ord("’"): "'",
    ord(":"): " ",
    0xFEFF: " ",  # a byte order mark would hide the speaker tag behind it
    # Half of a UTF-16 pair cannot be encoded as UTF-8, which the tokenizer insists on.
    **dict.fromkeys(range(0xD800, 0xE000), "\ufffd"),
}


def normalise(text: str) -> str:
    """``text`` with its characters as the grammar reads them (``’`` as ``'``, ``:`` as a space)."""
    return text.translate(_NORMALIZE)


@dataclass(frozen=True)
class Entry:
    """One item of the word queue.

    Attributes:
      tokens: token ids of the word, speaker tag included; empty for a pause.
      text: the word as written (normalised); empty for a pause.
      padding: frames after the one that takes the entry in which no other may be taken.
    """

    tokens: tuple[int, ...]
    text: str
    padding: int = 0


@dataclass(frozen=True)
class Word:
    """A word as written, before tokenisation."""

    text: str


@dataclass(frozen=True)
class Break:
    """A pause in seconds."""

    seconds: float


_TAG_DONE = -1


def _break_tag_table() -> dict[tuple[int, str], int]:
    """Transitions (state, character class) of ``<break\\s+time="D+(.D*)?s"\\s*/?>``."""
    table: dict[tuple[int, str], int] = {}
    opening, name = "<break", 'time="'
    for state, character in enumerate(opening):
        table[state, character] = state + 1
    spaces = len(opening)
    table[spaces, " "] = table[spaces + 1, " "] = spaces + 1
    for state, character in enumerate(name, spaces + 1):
        table[state, character] = state + 1
    number = spaces + 1 + len(name)
    whole, point, unit, closing, slash = (number + k for k in range(1, 6))
    table[number, "0"] = table[whole, "0"] = whole
    table[whole, "."] = table[point, "0"] = point
    table[whole, "s"] = table[point, "s"] = unit
    table[unit, '"'] = table[closing, " "] = closing
    table[closing, "/"] = slash
    table[closing, ">"] = table[slash, ">"] = _TAG_DONE
    return table


_TAG_TABLE = _break_tag_table()


def _tag_class(character: str) -> str:
    if character in "0123456789":
        return "0"
    return " " if character.isspace() else character


class Lexer:
    """Characters to words and pauses, one character at a time.

    ``sound_tags`` are joined to one word although they contain white space, with whatever
    touches them: ``(clears`` ``throat).`` is the word ``(clears throat).``.
    """

    def __init__(self, sound_tags: Iterable[str] = ()) -> None:
        self._sound_tags = [(tag, tag.split()) for tag in sound_tags]
        self._word: list[str] = []  # characters of the word being written
        self._tag: list[str] = []  # "<…" that may still become a break
        self._tag_state = 0
        self._held: list[str] = []  # complete words that may still become a sound tag

    def feed(self, text: str) -> list[Word | Break]:
        """Words and pauses that ``text`` completes."""
        return [item for c in normalise(text) for item in self._take(c)]

    def close(self) -> list[Word | Break]:
        """What was still open; afterwards the lexer is as new."""
        tag = self._abandon_tag() if self._tag else ()
        return [*tag, *self._end_word(), *self._release()]

    def _take(self, character: str) -> Iterator[Word | Break]:
        if self._tag:
            following = _TAG_TABLE.get((self._tag_state, _tag_class(character)))
            if following is None:
                yield from self._abandon_tag()
                yield from self._take(character)
                return
            self._tag.append(character)
            self._tag_state = following
            if following == _TAG_DONE:
                seconds = "".join(self._tag).split('"')[1].removesuffix("s")
                self._tag = []
                yield from self._end_word()
                yield from self._release()
                yield Break(min(float(seconds), _LONGEST_BREAK_SECONDS))
        elif character == "<":
            self._tag, self._tag_state = ["<"], 1
        elif character.isspace():
            yield from self._end_word()
        else:
            self._word.append(character)

    def _abandon_tag(self) -> Iterator[Word | Break]:
        """Reads a "<…" that cannot become a break as ordinary text."""
        # The grammar has "<" in its first place only, so the rest opens no other tag and the
        # work stays linear.
        bracket, *rest = self._tag
        self._tag = []
        self._word.append(bracket)
        for character in rest:
            yield from self._take(character)

    def _end_word(self) -> Iterator[Word]:
        if self._word:
            word = "".join(self._word)
            self._word = []
            yield from self._complete(word)

    def _complete(self, word: str) -> Iterator[Word]:
        """Takes a complete word; holds it back while it may be part of a sound tag."""
        waiting = [word]
        while waiting:
            self._held.append(waiting.pop(0))
            whole, possible = self._match_held()
            if whole is not None:
                # The joined word may itself open another tag: "(clears throat)(clears throat)".
                self._held = []
                waiting.insert(0, whole)
            elif not possible:
                first, *rest = self._held
                self._held = []
                yield Word(first)
                waiting[:0] = rest

    def _match_held(self) -> tuple[str | None, bool]:
        """(the joined word when the held ones complete a tag, whether they may begin one)."""
        first, last, count = self._held[0], self._held[-1], len(self._held)
        possible = False
        for tag, parts in self._sound_tags:
            if not first.endswith(parts[0]) or self._held[1:-1] != parts[1 : count - 1]:
                continue
            if count == len(parts) and last.startswith(parts[-1]):
                return first.removesuffix(parts[0]) + tag + last.removeprefix(parts[-1]), True
            possible |= count < len(parts) and (count == 1 or last == parts[count - 1])
        return None, possible

    def _release(self) -> Iterator[Word]:
        held, self._held = self._held, []
        yield from (Word(word) for word in held)


class ScriptParser:
    """Incremental script parser of one line of one script.

    A string is one line whatever it contains; its newlines are white space. The first word of a
    line gets a speaker tag of its own by line number (even: ``[S1]``, odd: ``[S2]``), unless it
    starts with that tag or the line before was given the same one.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        frame_rate: float = 12.5,
        split_sound_tags: bool = False,
        line: int = 0,
    ) -> None:
        """
        Args:
          tokenizer: encodes words and knows the sound tags.
          frame_rate: frames per second, for the length of pauses.
          split_sound_tags: cut ``(clears throat)`` at its white space, as upstream does.
          line: number of the line, which decides the speaker forced at its start.
        """
        self._tokenizer = tokenizer
        self._frame_rate = frame_rate
        self._lexer = Lexer(() if split_sound_tags else tokenizer.sound_tags)
        self._line = line
        self._forced_speaker: int | None = None  # 0 or 1, the last one that was forced
        self._begin_line()

    def feed(self, text: str) -> list[Entry]:
        """Entries that ``text`` completes.

        Raises:
          SessionError: the parser was closed.
        """
        if self._closed:
            raise SessionError("text was fed after close(): start a new session to say more")
        return self._entries(self._lexer.feed(text))

    def close(self) -> list[Entry]:
        """Entries that were still open. A speaker tag that no word follows says nothing."""
        self._closed = True
        return self._entries(self._lexer.close())

    def next_line(self) -> list[Entry]:
        """Closes this line and begins the next of the same script."""
        entries = self.close()
        self._line += 1
        self._begin_line()
        return entries

    def _begin_line(self) -> None:
        self._closed = False
        self._at_start = True
        self._pending_tag: str | None = None

    def _entries(self, items: Iterable[Word | Break]) -> list[Entry]:
        return [entry for item in items if (entry := self._entry(item)) is not None]

    def _entry(self, item: Word | Break) -> Entry | None:
        if isinstance(item, Break):
            # Python's round, half to even, is part of the format.
            frames = round(item.seconds * self._frame_rate)
            return Entry((), "", frames) if frames > 0 else None
        if item.text in SPEAKER_TAGS:
            self._pending_tag = item.text
            return None
        tag, self._pending_tag = self._pending_tag, None
        ids = self._tokenizer.ids
        if tag is not None and ids.spk1 == ids.spk2:
            # A vocabulary without the tags: upstream compares ids and so writes the first one.
            tag = SPEAKER_TAGS[0]
        tokens = self._tokenizer.encode(item.text if tag is None else f"{tag} {item.text}")
        if self._at_start:
            self._at_start = False
            tokens = self._force_speaker(tokens)
        # As many quiet frames as tokens: the word's own, of which the first falls on the frame
        # that takes it, and one between words.
        return Entry(tuple(tokens), item.text, len(tokens)) if tokens else None

    def _force_speaker(self, tokens: list[int]) -> list[int]:
        speaker = self._line % 2
        if speaker == self._forced_speaker:
            return tokens
        self._forced_speaker = speaker
        token = (self._tokenizer.ids.spk1, self._tokenizer.ids.spk2)[speaker]
        return tokens if tokens[:1] == [token] else [token, *tokens]


def parse_script(
    lines: str | Sequence[str],
    tokenizer: Tokenizer,
    *,
    frame_rate: float = 12.5,
    split_sound_tags: bool = False,
) -> list[Entry]:
    """Entries of a whole script.

    Args:
      lines: a string is a script of one line; a sequence of strings is the lines of **one**
        script, in which the speaker forced at a line's start alternates.
      tokenizer, frame_rate, split_sound_tags: as for `ScriptParser`.
    """
    parser = ScriptParser(tokenizer, frame_rate=frame_rate, split_sound_tags=split_sound_tags)
    entries: list[Entry] = []
    for line in [lines] if isinstance(lines, str) else lines:
        entries += parser.feed(line) + parser.next_line()
    return entries


def speakable(entries: Iterable[Entry]) -> bool:
    """Whether any entry holds a letter, a digit or a symbol, so that there is something to say."""
    return any(entry.tokens and _has_sound(entry.text) for entry in entries)


def _has_sound(text: str) -> bool:
    for tag in SPEAKER_TAGS:  # a tag that touches its word is part of the text
        text = text.replace(tag, "")
    return any(unicodedata.category(c)[0] in "LNS" or c in "&%@#" for c in text)


def require_speakable(entries: Sequence[Entry]) -> None:
    """Refuses what would run the model without a word to say.

    Raises:
      ScriptError: ``entries`` is empty, or holds only pauses and punctuation.
    """
    if not entries:
        raise ScriptError("the script is empty: give it at least one word to speak")
    if not speakable(entries):
        shown = " ".join(entry.text or "<break>" for entry in entries[:8])
        raise ScriptError(
            f"the script has no speakable word, only pauses or punctuation ({shown!r}): "
            "give it at least one word"
        )
