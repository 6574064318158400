"""Words with times: what a voice prefix and a training recording say, and when.

Owns the check of word times, reading them from JSON, estimating them for a plain transcript, and
the rule that turns them into entries and the frames in which they start.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from dia2_jax.errors import PrefixError
from dia2_jax.text.script import Break, Entry, Lexer
from dia2_jax.text.tokenizer import SPEAKER_TAGS, Tokenizer


@dataclass(frozen=True)
class WordTime:
    """A word and where it sounds, in seconds from the start of its recording.

    Raises:
      PrefixError: the text is blank, a time is negative or not finite, or it ends before it
        starts.
    """

    text: str
    start: float
    end: float

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise PrefixError(
                f"a word from {self.start} s to {self.end} s has no text: remove it or write it"
            )
        for name, value in (("start", self.start), ("end", self.end)):
            if not (math.isfinite(value) and value >= 0):
                raise PrefixError(
                    f"word {self.text!r}: {name} is {value}, times are seconds from 0 on"
                )
        if self.end < self.start:
            raise PrefixError(
                f"word {self.text!r} ends at {self.end} s, before it starts at {self.start} s: "
                "swap or correct the two times"
            )


def check_order(words: Sequence[WordTime]) -> None:
    """Refuses words that do not start one after another (overlaps are fine).

    Raises:
      PrefixError: names the first word that starts before the one in front of it.
    """
    for before, word in pairwise(words):
        if word.start < before.start:
            raise PrefixError(
                f"word {word.text!r} starts at {word.start} s, before {before.text!r} in front of "
                f"it ({before.start} s): list words in the order in which they are spoken"
            )


def words_to_entries(
    words: Sequence[WordTime],
    tokenizer: Tokenizer,
    *,
    speaker: int,
    frame_rate: float = 12.5,
) -> tuple[list[Entry], list[int]]:
    """Entries of one speaker's words, and the step in which the machine is to take each.

    Upstream's rule. With ``round`` half to even, a word starts at frame
    ``max(end of the word before + 1, round(start · frame_rate))``, at least 1, ends one frame a
    token later, and is taken one step before its frame. Its padding reaches to the next word's
    start (for the last word: to its own end in time).

    Args:
      words: in spoken order.
      tokenizer: the first word gets the speaker's tag if the vocabulary has one.
      speaker: 1 or 2.
      frame_rate: frames per second.

    Returns:
      The entries, and as many steps, counted from the start of the recording.

    Raises:
      PrefixError: words out of order, or one without a single token.
    """
    check_order(words)
    entries: list[Entry] = []
    steps: list[int] = []
    tag = tokenizer.speaker_prefix(speaker)
    before = 0  # end frame of the word before
    for index, word in enumerate(words):
        text = f"{tag} {word.text}" if tag is not None and index == 0 else word.text
        tokens = tuple(tokenizer.encode(text))
        if not tokens:
            raise PrefixError(f"word {word.text!r} has no token in this vocabulary: remove it")
        start = max(before + 1, round(word.start * frame_rate))
        end = start + len(tokens)
        last = index == len(words) - 1
        following = word.end if last else words[index + 1].start
        reach = max(end + 1, round(following * frame_rate))
        entries.append(Entry(tokens, word.text, reach - start - 1))
        steps.append(start - 1)
        before = end
    return entries, steps


# Lengths of speech in syllables. Only their proportions matter: an estimate is stretched to the
# span it is given.
_WORD_SYLLABLES = 0.4  # what a word costs beyond its syllables
_LETTER_SYLLABLES = 0.08  # consonant clusters take time
_SOUND_SYLLABLES = 4.0  # "(laughs)"
_BREAK_SYLLABLES = 4.5  # a second of pause, at common conversational speed
_PAUSES = {",": 1.0, ";": 1.2, "-": 1.0, "–": 1.0, "—": 1.0, ".": 2.0, "!": 2.0, "?": 2.0, "…": 2.0}
_VOWELS = re.compile(r"[aeiouyàáâãäåæèéêëìíîïòóôõöøùúûüýÿœ]+")
_CLOSING = "\"'”’)]}»"


def estimate_word_times(
    text: str, start: float, end: float, tokenizer: Tokenizer | None = None
) -> list[WordTime]:
    """Times for the words of a plain transcript spoken from ``start`` to ``end``.

    Deterministic and rough: each word gets a share by its syllables and letters, punctuation and
    ``<break>`` tags between words get pauses, and the whole fills the span exactly. Speaker tags
    are left out.

    Args:
      text: what is said, in the script grammar.
      start, end: the voiced span in seconds.
      tokenizer: if given, its multi-word sound tags stay one word.

    Raises:
      PrefixError: no word in the text, or the span is empty or impossible.
    """
    if not (math.isfinite(start) and math.isfinite(end) and 0 <= start < end):
        raise PrefixError(
            f"cannot spread a transcript over {start} s to {end} s: the voiced span must have a "
            "length, check that the recording is not silent"
        )
    lexer = Lexer(() if tokenizer is None else tokenizer.sound_tags)
    words: list[str] = []
    pauses: list[float] = []  # after each word
    for item in lexer.feed(text) + lexer.close():
        if isinstance(item, Break):
            if pauses:
                pauses[-1] += _BREAK_SYLLABLES * item.seconds
        elif item.text not in SPEAKER_TAGS:
            words.append(item.text)
            pauses.append(_PAUSES.get(item.text.rstrip(_CLOSING)[-1:], 0.0))
    if not words:
        raise PrefixError("the transcript has no word: write what the recording says")
    lengths = [_syllables(word) for word in words]
    pauses[-1] = 0.0  # the voiced span ends with its last word
    second = (end - start) / (sum(lengths) + sum(pauses))
    times: list[WordTime] = []
    position = 0.0
    for word, length, pause in zip(words, lengths, pauses, strict=True):
        begin = min(end, start + position * second)
        times.append(WordTime(word, begin, max(begin, start + (position + length) * second)))
        position += length + pause
    # The sums round; the span's end is exact.
    times[-1] = WordTime(words[-1], times[-1].start, end)
    return times


def _syllables(word: str) -> float:
    if word.startswith("(") and word.rstrip(".,!?").endswith(")"):
        return _SOUND_SYLLABLES
    lower = word.lower()
    groups = len(_VOWELS.findall(lower))
    if groups > 1 and re.search(r"[^aeiouyl]e\W*$", lower):
        groups -= 1  # the silent e of "like"
    letters = sum(c.isalpha() for c in word)
    digits = sum(c.isdigit() for c in word)
    # A script without Latin vowels counts by its letters; a spoken digit has 1 to 2 syllables.
    syllables = groups if groups else letters / 2
    return _WORD_SYLLABLES + syllables + 1.5 * digits + _LETTER_SYLLABLES * letters


def load_word_times(path: str | Path) -> list[WordTime]:
    """Word times from a JSON file.

    Read are a list, or an object with the list under ``words`` or ``alignments``; an item is
    ``{"text": …, "start": …, "end": …}`` (``word`` for ``text`` too) or ``["word", [start, end]]``
    with anything behind.

    Raises:
      PrefixError: names the file, and the item that cannot be read.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise PrefixError(f"cannot read word times from {path}: {error.strerror}") from error
    except ValueError as error:
        raise PrefixError(f"{path} is not valid JSON: {error}") from error
    if isinstance(content, dict):
        content = content.get("words", content.get("alignments"))
    if not isinstance(content, list):
        raise PrefixError(
            f'{path} must hold a list of words, each {{"text": "…", "start": s, "end": s}} or '
            '["word", [s, s]]'
        )
    words = []
    for index, item in enumerate(content):
        try:
            words.append(_word_time(item))
        except PrefixError as error:
            raise PrefixError(f"{path}, item {index}: {error}") from error
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise PrefixError(
                f'{path}, item {index}: {json.dumps(item)} is neither {{"text", "start", "end"}} '
                'nor ["word", [start, end]]'
            ) from error
    try:
        check_order(words)
    except PrefixError as error:
        raise PrefixError(f"{path}: {error}") from error
    return words


def _word_time(item: Any) -> WordTime:
    if isinstance(item, dict):
        text = item["text"] if "text" in item else item["word"]
        start, end = item["start"], item["end"]
    else:
        text, (start, end) = item[0], item[1]
    if not isinstance(text, str):
        raise TypeError("a word's text is a string")
    return WordTime(text.strip(), float(start), float(end))
