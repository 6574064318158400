"""The configuration of a corpus: what is said, by whom, how, and how much."""

from __future__ import annotations

import math
from typing import Literal

from pydantic.dataclasses import dataclass

from dia2_jax.config.reading import STRICT, require, require_positive


@dataclass(frozen=True, config=STRICT)
class SourceConfig:
    """A source of sentences.

    Attributes:
      kind: ``chitchat`` and ``chatterbot`` (packages of those names), ``wordnet`` (examples of the
        database in the folder `path`), ``grammar`` (written by the rules in the file `path`),
        ``lines`` (a text file: a sentence a line, a blank line between conversations).
      path: where `kind` needs one.
      share: of the sentences that are drawn singly.
    """

    kind: Literal["chitchat", "chatterbot", "wordnet", "grammar", "lines"]
    share: float
    path: str | None = None

    def __post_init__(self) -> None:
        require(0 <= self.share < math.inf, "share", f"must not be negative, got {self.share}")
        needs = self.kind in ("wordnet", "grammar", "lines")
        require(bool(self.path) == needs, "path", f"{self.kind} {'needs one' if needs else 'none'}")


@dataclass(frozen=True, config=STRICT)
class WordsConfig:
    """Which words are known, and which of them are to be covered.

    Attributes:
      frequencies: ``wordfreq`` (the package), or a text file with a word a line, the commonest
        first.
      target: so many of the commonest are covered evenly.
      trusted: so many are taken for words although WordNet has none of their forms.
      wordnet: folder of the WordNet database, which tells words from noise and parts of speech
        apart; None: every word of the list is known, and none has a part of speech.
    """

    frequencies: str = "wordfreq"
    target: int = 12_000
    trusted: int = 6_000
    wordnet: str | None = None

    def __post_init__(self) -> None:
        require_positive(self, "target", "trusted")


@dataclass(frozen=True, config=STRICT)
class TextConfig:
    """What is said.

    Attributes:
      sources: see `SourceConfig`.
      words: see `WordsConfig`.
      min_words, max_words: of a sentence that is said singly; those of conversations may be
        shorter.
      max_dialogue_words: of a conversation.
      dialogues: share of items that are conversations.
      conversations, scenes: of those, the shares that are passages of the sources' conversations
        and that are written by the grammar; the others put unrelated sentences together.
      contest: of so many candidates the one with the rarest words so far is said.
    """

    sources: tuple[SourceConfig, ...]
    words: WordsConfig = WordsConfig()
    min_words: int = 3
    max_words: int = 20
    max_dialogue_words: int = 45
    dialogues: float = 0.5
    conversations: float = 0.45
    scenes: float = 0.2
    contest: int = 6

    def __post_init__(self) -> None:
        require_positive(self, "min_words", "contest")
        require(len(self.sources) > 0, "sources", "name at least one")
        require(self.min_words <= self.max_words, "max_words", "must not be below min_words")
        require(sum(s.share for s in self.sources) > 0, "sources", "every share is 0")
        for name in ("dialogues", "conversations", "scenes"):
            require(0 <= getattr(self, name) <= 1, name, "must lie in 0 … 1")
        require(self.conversations + self.scenes <= 1, "scenes", "with conversations exceeds 1")


@dataclass(frozen=True, config=STRICT)
class VoiceConfig:
    """How it is spoken.

    Attributes:
      kind: ``piper``, or ``tones``: a stand-in that beeps, for trying the recipe without a voice.
      length_scale: slows speech above 1.
      noise, duration_noise: variation of the sound and of durations; low is more regular.
      workers: processes that speak at once; as many as there are cores is best.
      threads: of the synthesiser in each.
      second_pitch, second_formants, second_range: median in Hz, factor of the formants and factor
        of the pitch range of the second speaker.
      level: of both speakers, in dB below full scale (RMS of speech).
      exchange: record every training item a second time with the speakers exchanged. The second
        speaker is made of the first, so this costs little beside speaking, and voice and text
        become independent of each other.
    """

    kind: Literal["piper", "tones"] = "piper"
    length_scale: float = 1.15
    noise: float = 0.333
    duration_noise: float = 0.3
    workers: int = 1
    threads: int = 1
    second_pitch: float = 190.0
    second_formants: float = 1.18
    second_range: float = 1.1
    level: float = -23.0
    exchange: bool = False

    def __post_init__(self) -> None:
        require_positive(
            self, "length_scale", "workers", "threads", "second_pitch", "second_formants"
        )
        require(min(self.noise, self.duration_noise) >= 0, "noise", "must not be negative")
        require(-60 <= self.level <= -10, "level", f"must lie in -60 … -10, got {self.level}")


@dataclass(frozen=True, config=STRICT)
class PauseConfig:
    """Silences, in seconds.

    Attributes:
      lead: before the first word. Dia2 starts its first word in frame 0, so it is short.
      tail: after the last.
      sentence: shortest and longest between the sentences of a turn.
      turn: the same between turns.
      reach: the start of a word is to follow that of the word before within this, where the pause
        can be shortened for it: what the word machine can do without a break.
      least: no pause is shortened below this.
    """

    lead: float = 0.03
    tail: float = 0.2
    sentence: tuple[float, float] = (0.12, 0.35)
    turn: tuple[float, float] = (0.15, 0.45)
    reach: float = 0.56
    least: float = 0.12

    def __post_init__(self) -> None:
        for name in ("sentence", "turn"):
            low, high = getattr(self, name)
            require(0 <= low <= high < 10, name, "must be [shortest, longest] in seconds")
        for name in ("lead", "tail", "reach", "least"):
            require(0 <= getattr(self, name) < 10, name, "must lie in 0 … 10 s")


@dataclass(frozen=True, config=STRICT)
class SizeConfig:
    """How much is made.

    Attributes:
      hours: of training speech; a longer corpus begins with a shorter one.
      validation, test: items held out, [single lines, dialogues].
      shard: items that are finished together; an interruption loses at most as many.
      first_shard: training shards before this one are neither spoken nor counted: who has the
        codes of a corpus makes only what comes after it.
    """

    hours: float
    validation: tuple[int, int] = (120, 40)
    test: tuple[int, int] = (200, 60)
    shard: int = 64
    first_shard: int = 0

    def __post_init__(self) -> None:
        require_positive(self, "hours", "shard")
        require(self.first_shard >= 0, "first_shard", "must not be negative")
        for name in ("validation", "test"):
            require(min(getattr(self, name)) >= 0, name, "must not be negative")


@dataclass(frozen=True, config=STRICT)
class TokenizerConfig:
    """The tokenizer that is trained on the text.

    Attributes:
      entries: of the vocabulary, special and added ones included.
      items: training items whose text it learns from.
      lowercase: read capitals as small letters, so that a word has one spelling.
    """

    entries: int = 1536
    items: int = 20_000
    lowercase: bool = True

    def __post_init__(self) -> None:
        require(self.entries >= 300, "entries", "must be 300 at least: bytes alone are 256")
        require_positive(self, "items")


@dataclass(frozen=True, config=STRICT)
class CorpusConfig:
    """See the parts. `sample_rate` is of the recordings; `frame_rate` of the phoneme targets."""

    size: SizeConfig
    text: TextConfig
    voice: VoiceConfig = VoiceConfig()
    pauses: PauseConfig = PauseConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    seed: int = 0
    sample_rate: int = 24_000
    frame_rate: float = 12.5

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**32, "seed", f"must be in 0 … 2**32 - 1, got {self.seed}")
        require_positive(self, "sample_rate", "frame_rate")
