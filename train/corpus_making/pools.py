"""Clean sentences and passages of conversation, and which of them are held out.

What is held out is decided by a hash of the words alone, among what is said only once in all
sources: more sources or a longer corpus never move a sentence across.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from train.corpus_making.cleaning import Cleaner, key_of, words_of
from train.corpus_making.config import TextConfig
from train.corpus_making.sources import read_conversations

#: Turns of a passage at most, words of one of its turns at most, and of a sentence held out.
_TURNS, _TURN_WORDS = 5, 24
_HELD_WORDS = range(4, 19)


@dataclass(frozen=True)
class Turn:
    """What one speaker (1 or 2) says in one go, sentence by sentence."""

    speaker: int
    sentences: tuple[str, ...]

    @property
    def text(self) -> str:
        """The sentences in one string."""
        return " ".join(self.sentences)


@dataclass(frozen=True)
class Passage:
    """A stretch of a conversation of two."""

    turns: tuple[Turn, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of its sentences."""
        return tuple(key_of(text) for turn in self.turns for text in turn.sentences)


@dataclass(frozen=True)
class Pools:
    """What can be said.

    Attributes:
      lines: per source, the sentences that training may say singly; in the sources' order.
      passages: of conversations, for training.
      held_lines: per split (``validation``, ``test``), sentences held out.
      held_passages: the same of passages.
      held: keys of everything that is held out.
      left_out: texts that cannot be read out, by reason.
    """

    lines: dict[str, list[str]]
    passages: list[Passage]
    held_lines: dict[str, list[str]]
    held_passages: dict[str, list[Passage]]
    held: frozenset[str]
    left_out: dict[str, int]


def make_pools(config: TextConfig, cleaner: Cleaner, wanted: dict[str, tuple[int, int]]) -> Pools:
    """Reads, cleans and splits all sources.

    Args:
      config: see `TextConfig`.
      cleaner: decides what can be said.
      wanted: per split, single lines and passages to hold out; fewer where the sources have not
        as many.
    """
    lines: dict[str, dict[str, str]] = {}
    passages: list[Passage] = []
    uses: Counter[str] = Counter()
    for source in config.sources:
        if source.kind == "grammar":
            continue
        mine = lines.setdefault(source.kind, {})
        known = {key for texts in lines.values() for key in texts}
        for conversation in read_conversations(source):
            cleaned = [(speaker, cleaner.sentences(text)) for speaker, text in conversation]
            for _, texts in cleaned:
                for text in texts or ():
                    key = key_of(text)
                    uses[key] += 1
                    fits = config.min_words <= len(words_of(text)) <= config.max_words
                    if fits and key not in known:
                        known.add(key)
                        mine[key] = text
            passages += _passages(cleaned, config.max_dialogue_words)
    return _split(lines, passages, uses, cleaner, wanted)


def _split(
    lines: dict[str, dict[str, str]],
    passages: list[Passage],
    uses: Counter[str],
    cleaner: Cleaner,
    wanted: dict[str, tuple[int, int]],
) -> Pools:
    once = {key for key, count in uses.items() if count == 1}
    rare = [p for p in passages if all(k in once and len(k.split()) > 2 for k in p.keys)]
    rare.sort(key=lambda passage: _place(" / ".join(passage.keys)))
    held_passages: dict[str, list[Passage]] = {}
    for split, (_, count) in wanted.items():
        held_passages[split], rare = rare[:count], rare[count:]
    held = {key for some in held_passages.values() for passage in some for key in passage.keys}
    free = once - held
    # Every source gives its part, in turns, so that none is tested by another's sentences.
    ranked = [
        sorted((key for key in texts if key in free and _fits(key)), key=_place)
        for texts in lines.values()
    ]
    queue = [
        (kind, key)
        for rank in range(max(map(len, ranked), default=0))
        for kind, keys in zip(lines, ranked, strict=True)
        for key in keys[rank : rank + 1]
    ][: sum(count for count, _ in wanted.values())]
    held_lines: dict[str, list[str]] = {}
    for split, (count, _) in wanted.items():
        held_lines[split] = [lines[kind][key] for kind, key in queue[:count]]
        held |= {key for _, key in queue[:count]}
        queue = queue[count:]
    return Pools(
        lines={
            kind: [text for key, text in texts.items() if key not in held]
            for kind, texts in lines.items()
        },
        passages=[p for p in passages if not held.intersection(p.keys)],
        held_lines=held_lines,
        held_passages=held_passages,
        held=frozenset(held),
        left_out=dict(cleaner.left_out),
    )


def _fits(key: str) -> bool:
    return len(key.split()) in _HELD_WORDS


def _place(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _passages(
    messages: Iterable[tuple[str, Sequence[str] | None]], most_words: int
) -> list[Passage]:
    """Cuts of a conversation between two, without what could not be cleaned."""
    passages: list[Passage] = []
    turns: list[Turn] = []
    words = 0

    def finish() -> None:
        nonlocal words
        if len(turns) > 1:
            passages.append(Passage(tuple(turns)))
        turns.clear()
        words = 0

    for _, said in groupby(messages, key=lambda message: message[0]):
        texts = [text for _, text in said]
        if any(text is None for text in texts):
            finish()
            continue
        sentences = tuple(sentence for text in texts for sentence in text or ())
        count = sum(len(words_of(sentence)) for sentence in sentences)
        if count > _TURN_WORDS:
            finish()
            continue
        if len(turns) == _TURNS or words + count > most_words:
            finish()
        turns.append(Turn(1 + len(turns) % 2, sentences))
        words += count
    finish()
    return passages
