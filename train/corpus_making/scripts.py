"""The items of a corpus in their order: who says what.

Item i of the training split is a function of (seed, sources, i): drawing goes item by item and
never looks ahead, so a longer corpus begins with a shorter one. Rare words come early: of several
candidates the one is said whose words have been said least, so any beginning covers much.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from dia2_jax.errors import DataError
from train.corpus_making.cleaning import Cleaner, key_of, words_of
from train.corpus_making.config import CorpusConfig
from train.corpus_making.grammar import Grammar, load_grammar
from train.corpus_making.lexicon import Lexicon
from train.corpus_making.pools import Passage, Pools, Turn, make_pools

Split = Literal["validation", "test", "train"]
SPLITS: tuple[Split, ...] = ("validation", "test", "train")

_Choice = TypeVar("_Choice", str, Passage)

#: Single lines of two sentences; each of these has at most so many words.
_TWO, _TWO_WORDS = 0.3, 10
#: Single lines of the second speaker.
_SECOND = 0.35
_TRIES = 20


@dataclass(frozen=True)
class Item:
    """One recording to be.

    Attributes:
      index: its number in the split.
      kind: of text: a source's kind, ``passage``, ``scene`` or ``mixed``.
      turns: what is said.
    """

    index: int
    kind: str
    turns: tuple[Turn, ...]

    @property
    def script(self) -> str:
        """The text with speaker tags, as the model is given it."""
        return " ".join(f"[S{turn.speaker}] {turn.text}" for turn in self.turns)

    @property
    def exchanged(self) -> str:
        """The script with the speakers exchanged."""
        return " ".join(f"[S{3 - turn.speaker}] {turn.text}" for turn in self.turns)


class Writer:
    """Draws items from pools and grammar."""

    def __init__(self, config: CorpusConfig, lexicon: Lexicon) -> None:
        """
        Raises:
          DataError: a source that is missing, or nothing to be said.
        """
        self._config, self._lexicon = config, lexicon
        self._cleaner = Cleaner(lexicon)
        wanted = {"validation": config.size.validation, "test": config.size.test}
        self.pools: Pools = make_pools(config.text, self._cleaner, wanted)
        self._grammars: list[Grammar] = [
            load_grammar(Path(source.path or ""), lexicon.lists)
            for source in config.text.sources
            if source.kind == "grammar"
        ]
        self._shares = {
            source.kind: source.share
            for source in config.text.sources
            if source.share > 0 and (self.pools.lines.get(source.kind) or source.kind == "grammar")
        }
        if not self._shares:
            raise DataError("text.sources: not one sentence of them can be said; see text.words")

    def held_out(self, split: Split) -> list[Item]:
        """The items of ``validation`` or ``test``, single lines first."""
        rng = self._rng(SPLITS.index(split))
        items: list[tuple[str, tuple[Turn, ...]]] = []
        for text in self.pools.held_lines[split]:
            items.append(("line", (Turn(1 + int(rng.random() < _SECOND), (text,)),)))
        items += [("passage", passage.turns) for passage in self.pools.held_passages[split]]
        return [Item(index, kind, turns) for index, (kind, turns) in enumerate(items)]

    def train(self) -> Iterator[Item]:
        """The training items, without end."""
        left = {kind: list(lines) for kind, lines in self.pools.lines.items()}
        passages = list(self.pools.passages)
        said: Counter[str] = Counter()
        text = self._config.text
        index = 0
        while True:
            rng = self._rng(SPLITS.index("train"), index)
            kind, turns = "", ()  # type: tuple[str, tuple[Turn, ...]]
            if rng.random() >= text.dialogues:
                kind, turns = self._single(rng, left, said)
            else:
                draw = rng.random()
                if draw < text.conversations and self.pools.passages:
                    if not passages:
                        passages = list(self.pools.passages)
                    kind, turns = "passage", self._contest(rng, passages, said).turns
                elif draw < text.conversations + text.scenes and self._has("scene"):
                    kind, turns = "scene", self._scene(rng, said)
                if not turns:
                    kind, turns = "mixed", self._mixed(rng, left, said)
            for turn in turns:
                said.update(words_of(turn.text))
            yield Item(index, kind, turns)
            index += 1

    # -------------------------------------------------------------------------------------- kinds

    def _single(
        self, rng: np.random.Generator, left: dict[str, list[str]], said: Counter[str]
    ) -> tuple[str, tuple[Turn, ...]]:
        kind = self._kind(rng)
        sentences = [self._line(kind, rng, left, said)]
        if rng.random() < _TWO and len(words_of(sentences[0])) <= _TWO_WORDS:
            second = self._line(kind, rng, left, said)
            if len(words_of(second)) <= _TWO_WORDS:
                sentences.append(second)
        return kind, (Turn(1 + int(rng.random() < _SECOND), tuple(sentences)),)

    def _mixed(
        self, rng: np.random.Generator, left: dict[str, list[str]], said: Counter[str]
    ) -> tuple[Turn, ...]:
        turns = []
        words = 0
        for number in range(int(rng.integers(2, 5))):
            sentence = self._line(self._kind(rng), rng, left, said)
            words += len(words_of(sentence))
            if number > 1 and words > self._config.text.max_dialogue_words:
                break
            turns.append(Turn(1 + number % 2, (sentence,)))
        return tuple(turns)

    def _scene(self, rng: np.random.Generator, said: Counter[str]) -> tuple[Turn, ...]:
        """A scene of the grammar; none if what it writes cannot be said."""
        grammar = self._grammars[int(rng.integers(len(self._grammars)))]
        for _ in range(_TRIES):
            turns: list[Turn] = []
            for number, part in enumerate(grammar.write("scene", rng, said).split(" / ")):
                sentences = self._cleaner.sentences(part)
                if not sentences or any(key_of(s) in self.pools.held for s in sentences):
                    break
                turns.append(Turn(1 + number % 2, tuple(sentences)))
            else:
                words = sum(len(words_of(turn.text)) for turn in turns)
                if words <= self._config.text.max_dialogue_words:
                    return tuple(turns)
        return ()

    def _line(
        self,
        kind: str,
        rng: np.random.Generator,
        left: dict[str, list[str]],
        said: Counter[str],
    ) -> str:
        if kind != "grammar":
            if not left[kind]:
                left[kind] = list(self.pools.lines[kind])
            return self._contest(rng, left[kind], said)
        text = self._config.text
        for _ in range(_TRIES):
            grammar = self._grammars[int(rng.integers(len(self._grammars)))]
            sentences = self._cleaner.sentences(grammar.write("sentence", rng, said)) or []
            if len(sentences) != 1 or key_of(sentences[0]) in self.pools.held:
                continue
            if text.min_words <= len(words_of(sentences[0])) <= text.max_words:
                return sentences[0]
        raise DataError(
            "text.sources: the grammar's rule 'sentence' wrote nothing that can be said in "
            f"{_TRIES} tries: its words must be known (text.words)"
        )

    # ------------------------------------------------------------------------------------ drawing

    def _kind(self, rng: np.random.Generator) -> str:
        kinds = list(self._shares)
        weights = np.array([self._shares[kind] for kind in kinds])
        return kinds[int(rng.choice(len(kinds), p=weights / weights.sum()))]

    def _contest(
        self, rng: np.random.Generator, choices: list[_Choice], said: Counter[str]
    ) -> _Choice:
        """Takes one choice out of the list: of some, the one whose words were said least."""
        places = rng.integers(len(choices), size=self._config.text.contest)
        best = max(map(int, places), key=lambda place: self._gain(choices[place], said))
        choices[best], choices[-1] = choices[-1], choices[best]
        return choices.pop()

    def _gain(self, choice: str | Passage, said: Counter[str]) -> float:
        if isinstance(choice, str):
            words: Sequence[str] = words_of(choice)
        else:
            words = [word for key in choice.keys for word in key.split()]
        wanted = self._lexicon.wanted
        return sum(1 / (1 + said[word]) for word in words if word in wanted) / (len(words) + 1)

    def _has(self, rule: str) -> bool:
        return bool(self._grammars) and all(grammar.has(rule) for grammar in self._grammars)

    def _rng(self, *path: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence([self._config.seed, *path]))
