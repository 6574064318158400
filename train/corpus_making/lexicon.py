"""Words: which are known, how common they are, and their parts of speech.

Frequencies come from the package wordfreq or a list, words and parts of speech from WordNet's
database files (``index.*`` and ``*.exc``), which are read as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dia2_jax.errors import DataError, Dia2Error
from train.corpus_making.config import WordsConfig

PARTS = ("noun", "verb", "adj", "adv")

#: Spellings of chats and abbreviations that are read out otherwise than they are written.
_UNSAID = (
    "http https www com org net html php etc vs mr mrs ms dr st co inc ltd jr sr ft re de la le el "
    "il et al des les un une du von van der lol lmao rofl omg wtf idk btw tbh imo imho fyi brb ur "
    "u ya yo im dont didnt cant wont thats whats youre ive id ill isnt doesnt wasnt havent couldnt "
    "wouldnt shouldnt arent werent hasnt hadnt aint theyre theres wanna gotta gimme lemme dunno "
    "cuz coz cos bc b c d e f g h j k l m n o p q r s t v w x y z nd rd th aka ie eg pm hrs "
    "feat gb mb kb km cm mm kg lb lbs oz mph ii iii iv vi vii viii ix xi xii xd n' ha haha hmm hm "
    "uh um er ah eh mm pls plz thx tho thru nite lite til ok usa uk eu un nba nfl nhl mlb bbc cnn "
    "nyc fbi cia dna cd dvd pc hd gps faq diy css xml api sql url pdf usb"
)
_NO_WORDS = frozenset(_UNSAID.split())

#: Suffixes of regular forms and what stands for them in the dictionary.
_ENDINGS = {
    "noun": (("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"),
             ("ies", "y"), ("men", "man")),
    "verb": (("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""),
             ("ing", "e"), ("ing", "")),
    "adj": (("er", ""), ("est", ""), ("er", "e"), ("est", "e"), ("ier", "y"), ("iest", "y")),
    "adv": (),
}  # fmt: skip
_CONTRACTED = re.compile(r"(n't|'s|'re|'ll|'ve|'d|'m|s')$")
_CONTRACTIONS = frozenset(("can't", "won't", "ain't", "let's", "o'clock", "ma'am", "y'all", "'em"))


@dataclass(frozen=True)
class Lexicon:
    """Words known.

    Attributes:
      ranked: by falling frequency.
      target: so many of `ranked` are to be covered.
      forms: lemmas and irregular forms of each part of speech; empty without WordNet.
      trusted: words that need no dictionary.
    """

    ranked: tuple[str, ...]
    target: int
    forms: dict[str, frozenset[str]]
    trusted: frozenset[str]

    @cached_property
    def wanted(self) -> frozenset[str]:
        """The words to be covered."""
        return frozenset(self.ranked[: self.target]) - _NO_WORDS

    def knows(self, word: str) -> bool:
        """Whether a word, in small letters and without punctuation around it, can be said."""
        if word in _CONTRACTIONS:
            return True
        stem = _CONTRACTED.sub("", word)
        if stem != word and stem:
            return stem in ("ca", "wo", "do") or self.knows(stem)
        if "-" in word:
            return all(part and self.knows(part) for part in word.split("-"))
        if word in _NO_WORDS or not word.isalpha():
            return False
        return word in self.trusted or any(self.is_form(word, part) for part in self.forms)

    def is_form(self, word: str, part: str) -> bool:
        """Whether WordNet has the word, or what it is a regular form of, as that part of speech."""
        lemmas = self.forms.get(part, frozenset())
        if word in lemmas:
            return True
        for ending, instead in _ENDINGS[part]:
            if word.endswith(ending) and len(word) > len(ending) + 2:
                stem = word[: -len(ending)] + instead
                if stem in lemmas or (ending in ("ed", "ing") and _undoubled(stem) in lemmas):
                    return True
        return False

    @cached_property
    def lists(self) -> dict[str, list[str]]:
        """Words to be covered by how a sentence can use them: the grammar's open lists."""
        lists: dict[str, list[str]] = {
            name: []
            for name in ("any_word", "any_noun", "any_nouns", "any_verb", "any_verbing")
            + ("any_verbed", "any_adjective", "any_adverb")
        }
        for word in self.ranked[: self.target]:
            if not word.isalpha() or len(word) < 3 or not self.knows(word):
                continue
            lists["any_word"].append(word)
            noun, verb = self.is_form(word, "noun"), self.is_form(word, "verb")
            lemma_noun = word in self.forms.get("noun", ())
            lemma_verb = word in self.forms.get("verb", ())
            if lemma_noun and not word.endswith(("ing", "ed")):
                lists["any_noun"].append(word)
            elif noun and word.endswith("s"):
                lists["any_nouns"].append(word)
            if lemma_verb and not word.endswith(("ing", "ed")):
                lists["any_verb"].append(word)
            elif verb and word.endswith("ing"):
                lists["any_verbing"].append(word)
            elif verb and word.endswith("ed"):
                lists["any_verbed"].append(word)
            if word in self.forms.get("adj", ()):
                lists["any_adjective"].append(word)
            if word in self.forms.get("adv", ()) and word.endswith("ly"):
                lists["any_adverb"].append(word)
        return {name: words for name, words in lists.items() if words}


def load_lexicon(config: WordsConfig) -> Lexicon:
    """The words of a configuration.

    Raises:
      DataError: a list or database that is not there.
      Dia2Error: wordfreq is not installed.
    """
    ranked = tuple(dict.fromkeys(word.lower() for word in _ranked(config) if word.strip()))
    forms: dict[str, frozenset[str]] = {}
    if config.wordnet is not None:
        forms = {part: frozenset(_wordnet_forms(Path(config.wordnet), part)) for part in PARTS}
    trusted = ranked[: config.trusted] if forms else ranked
    return Lexicon(ranked, config.target, forms, frozenset(trusted))


def _ranked(config: WordsConfig) -> Iterable[str]:
    if config.frequencies != "wordfreq":
        return read_lines(Path(config.frequencies))
    try:
        import wordfreq
    except ImportError as error:
        raise Dia2Error(
            f"text.words.frequencies: wordfreq cannot be imported ({error}); install it with: "
            'pip install "dia2-jax[corpus]"'
        ) from error
    return list(wordfreq.top_n_list("en", 4 * max(config.target, config.trusted)))


def read_lines(path: Path) -> list[str]:
    """Lines of a text file, stripped.

    Raises:
      DataError: it cannot be read.
    """
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None


def _wordnet_forms(folder: Path, part: str) -> Iterable[str]:
    index, exceptions = folder / f"index.{part}", folder / f"{part}.exc"
    if not index.is_file():
        raise DataError(
            f"{index}: no WordNet database there; install Debian's wordnet-base, or name the "
            "folder that holds index.noun"
        )
    for line in read_lines(index):
        word = line.split(" ", 1)[0]
        if word.isalpha():
            yield word.lower()
    for line in read_lines(exceptions) if exceptions.is_file() else ():
        word = line.split(" ", 1)[0]
        if word.isalpha():
            yield word.lower()


def _undoubled(stem: str) -> str:
    """ "stopp" as "stop"."""
    return stem[:-1] if len(stem) > 2 and stem[-1] == stem[-2] else stem
