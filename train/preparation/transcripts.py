"""What is said in a recording, by whom: from text, tags, word lists and turns to flat words."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from dia2_jax.errors import PrefixError
from dia2_jax.text.script import Lexer, Word
from dia2_jax.text.timing import WordTime, estimate_word_times
from dia2_jax.text.tokenizer import SPEAKER_TAGS
from train.preparation.records import Rejected, TimedWord, Turn
from train.preparation.spoken import spoken_forms

#: A speaker's tag; those beyond [S2], which the model does not know, are speakers and no words too.
_TAG = re.compile(r"\s*(\[S\d+\])\s*", re.IGNORECASE)


@dataclass(frozen=True)
class WrittenWord:
    """A word of a transcript and its speaker's label, if one is known."""

    text: str
    speaker: str | None


def read_turns(content: Mapping[str, Any], where: str) -> tuple[Turn, ...]:
    """The transcript of a record with ``turns``, ``words``, ``alignments`` or ``text``.

    Raises:
      Rejected: a field is of the wrong type, or a word's time is impossible.
    """
    speaker = _label(content.get("speaker"), where)
    if content.get("turns") is not None:
        turns = as_list(content["turns"], f"{where}: turns")
        return tuple(_turn(turn, f"{where}: turn {i}") for i, turn in enumerate(turns))
    words = content.get("words")
    if words is None:
        words = content.get("alignments")
    text = _optional_text(content.get("text"), f"{where}: text")
    timed = None if words is None else read_words(words, where)
    if timed is None and text is None:
        return ()
    return (Turn(text=text, words=timed, speaker=speaker),)


def as_list(value: Any, where: str) -> list[Any]:
    """A list, also from the columns that `datasets` makes of a list of objects.

    Raises:
      Rejected: it is neither.
    """
    if isinstance(value, Mapping) and all(isinstance(v, Sequence) for v in value.values()):
        lengths = {len(column) for column in value.values()}
        if len(lengths) == 1:
            return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return list(value)
    raise Rejected("bad_record", f"{where} must be a list, got {_shown(value)}")


def read_words(value: Any, where: str) -> tuple[TimedWord, ...]:
    """Words with times from a list of ``{"text"|"word", "start", "end"[, "speaker"]}`` or
    ``["word", [start, end][, speaker]]``. Words of nothing but white space are left out.

    Raises:
      Rejected: an item is of another form, or its times are impossible.
    """
    words: list[TimedWord] = []
    for index, item in enumerate(as_list(value, f"{where}: words")):
        try:
            if isinstance(item, Mapping):
                text = item["text"] if item.get("text") is not None else item["word"]
                start, end, speaker = item["start"], item["end"], item.get("speaker")
            else:
                text, (start, end), *rest = item
                speaker = rest[0] if rest else None
            if not isinstance(text, str) or isinstance(start, bool) or isinstance(end, bool):
                raise TypeError
            start, end = float(start), float(end)
        except (KeyError, TypeError, ValueError):
            raise Rejected(
                "bad_record",
                f'{where}: word {index}, {_shown(item)}, is neither {{"text", "start", "end"}} nor '
                '["word", [start, end]]',
            ) from None
        label = _label(speaker, f"{where}: word {index}")
        if not text.strip():
            continue
        try:
            WordTime(text, start, end)
        except PrefixError as error:
            raise Rejected("bad_words", f"{where}: word {index}: {error}") from None
        words += _single_words(TimedWord(text, start, end, label))
    return tuple(words)


def check_order(words: Sequence[TimedWord], where: str) -> None:
    """Refuse words that do not start one after another.

    Raises:
      Rejected: names the first word that starts before the one in front of it.
    """
    for before, word in pairwise(words):
        if word.start < before.start:
            raise Rejected(
                "words_out_of_order",
                f"{where}: word {word.text!r} starts at {word.start:g} s, before {before.text!r} "
                f"in front of it ({before.start:g} s)",
            )


def written_words(turn: Turn, sound_tags: Sequence[str]) -> list[WrittenWord]:
    """The words of a turn's text. Where tags name speakers, what precedes the first is ``[S1]``."""
    text = turn.text or ""
    tagged = _TAG.search(text) is not None
    speaker = SPEAKER_TAGS[0] if tagged else turn.speaker
    words: list[WrittenWord] = []
    lexer = Lexer(sound_tags)
    text = _TAG.sub(r" \1 ", text)  # "[S1]Hello" is two words to the reader and one to the grammar
    for item in lexer.feed(text) + lexer.close():
        if not isinstance(item, Word):
            continue  # a pause: the times of the words say it
        if _TAG.fullmatch(item.text):
            speaker = item.text.upper()
        else:
            words.append(WrittenWord(item.text, speaker))
    return words


def has_speech(words: Sequence[WrittenWord | TimedWord]) -> bool:
    """Whether there is a letter, digit or sound to be heard in any word."""
    return any(spoken_forms(w.text) or any(c.isalnum() for c in w.text) for w in words)


def number_speakers(words: Sequence[TimedWord], where: str) -> tuple[TimedWord, ...]:
    """The words with speakers "1" and "2".

    ``[S1]`` and ``[S2]`` are what they say; other labels are numbered as they appear. A word
    without a label is its predecessor's speaker.

    Raises:
      Rejected: there are more than two.
    """
    labels = list(dict.fromkeys(word.speaker for word in words if word.speaker is not None))
    if len(labels) > 2:
        shown = ", ".join(repr(label) for label in labels[:6])
        raise Rejected(
            "too_many_speakers", f"{where}: {len(labels)} speakers ({shown}), the model knows two"
        )
    if set(labels) <= set(SPEAKER_TAGS):
        numbers = {tag: str(i + 1) for i, tag in enumerate(SPEAKER_TAGS)}
    else:
        numbers = {label: str(i + 1) for i, label in enumerate(labels)}
    current = labels[0] if labels else None
    numbered = []
    for word in words:
        current = word.speaker if word.speaker is not None else current
        number = "1" if current is None else numbers[current]
        numbered.append(replace(word, speaker=number))
    return tuple(numbered)


def _single_words(word: TimedWord) -> list[TimedWord]:
    """A listed word as the grammar's words: "New York" is two that share its time."""
    lexer = Lexer()
    items = [item for item in lexer.feed(word.text) + lexer.close() if isinstance(item, Word)]
    if len(items) < 2 or word.end <= word.start:
        return [replace(word, text=item.text) for item in items]
    text = " ".join(item.text for item in items)
    spread = estimate_word_times(text, word.start, word.end)
    return [TimedWord(part.text, part.start, part.end, word.speaker) for part in spread]


def _turn(value: Any, where: str) -> Turn:
    if not isinstance(value, Mapping):
        raise Rejected("bad_record", f"{where} must be an object, got {_shown(value)}")
    words = value.get("words")
    start, end = (_seconds(value.get(name), f"{where}: {name}") for name in ("start", "end"))
    if start is not None and end is not None and end < start:
        raise Rejected("bad_words", f"{where} ends at {end:g} s, before it starts at {start:g} s")
    return Turn(
        text=_optional_text(value.get("text"), f"{where}: text"),
        words=None if words is None else read_words(words, where),
        speaker=_label(value.get("speaker"), where),
        start=start,
        end=end,
    )


def _optional_text(value: Any, where: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise Rejected("bad_record", f"{where} must be a string, got {_shown(value)}")


def _label(value: Any, where: str) -> str | None:
    if value is None:
        return None
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        return str(value)
    raise Rejected("bad_record", f"{where}: a speaker is a string or number, got {_shown(value)}")


def _seconds(value: Any, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if math.isfinite(value) and value >= 0:
            return float(value)
        raise Rejected("bad_words", f"{where} is {value}, times are seconds from 0 on")
    raise Rejected("bad_record", f"{where} must be a number of seconds, got {_shown(value)}")


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
