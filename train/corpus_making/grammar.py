"""A grammar that writes sentences and little scenes: rules in a YAML file, words from lists.

A name stands for a list of words (text, separated by commas) or for templates (a YAML list). In a
template ``{name}`` is replaced by one of its words or templates, ``{a name}`` by one behind "a" or
"an", ``{name:x}`` also remembers what it became, which ``{=x}`` repeats; ``{number 2 99}``,
``{ordinal 1 31}`` and ``{year 1950 2030}`` are spelled out. `` / `` parts the turns of a scene.
Lists of the lexicon (``any_noun`` and so on) can be used like those of the file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dia2_jax.errors import DataError
from train.preparation.spoken import spoken_forms

_SLOT = re.compile(
    r"\{(?P<article>a )?(?P<recall>=)?(?P<name>\w+)(?P<span>( \d+)*)(:(?P<as>\w+))?\}"
)
_DEEPEST = 12

#: How many words of an open list are looked at; the one said least is taken.
_CONTEST = 4
_SILENT_H = ("hour", "honest", "honour", "honor", "heir")
_LIKE_YOU = ("uni", "use", "usu", "eu", "one", "once", "u-", "ufo", "util")


class Grammar:
    """Rules and lists. Raises :class:`DataError` where they do not fit together."""

    def __init__(
        self, rules: Mapping[str, Any], lists: Mapping[str, Sequence[str]], where: str
    ) -> None:
        self._rules: dict[str, list[str]] = {}
        self._open = dict(lists)
        for name, value in rules.items():
            if isinstance(value, str):
                value = [item.strip() for item in value.replace("\n", " ").split(",")]
            if not isinstance(value, list) or not value:
                raise DataError(
                    f"{where}: {name} must be a text with commas or a list of templates"
                )
            if not all(isinstance(item, str) for item in (name, *value)):
                raise DataError(f"{where}: {name} holds what YAML takes for no text: quote it")
            self._rules[str(name)] = [item for item in value if item.strip()]
        missing = {
            f"{{{match['name']}}} in {name}"
            for name, templates in self._rules.items()
            for template in templates
            for match in _SLOT.finditer(template)
            if not match["recall"] and not self._has(match["name"])
        }
        if missing:
            raise DataError(f"{where}: nothing is called {', '.join(sorted(missing))}")

    def write(self, name: str, rng: np.random.Generator, said: Counter[str]) -> str:
        """One text of a rule. Words of open lists that are counted least in `said` come first."""
        return self._expand(name, rng, said, {}, 0)

    def has(self, name: str) -> bool:
        """Whether there is such a rule or list."""
        return name in self._rules or name in self._open

    def _has(self, name: str) -> bool:
        return self.has(name) or name in ("number", "ordinal", "year")

    def _expand(
        self,
        name: str,
        rng: np.random.Generator,
        said: Counter[str],
        memory: dict[str, str],
        depth: int,
    ) -> str:
        if depth > _DEEPEST:
            raise DataError(f"grammar: {name} leads back to itself")
        if name in self._open and name not in self._rules:
            words = self._open[name]
            picks = rng.integers(len(words), size=_CONTEST)
            return min((words[i] for i in picks), key=lambda word: said[word])
        templates = self._rules[name]
        template = templates[int(rng.integers(len(templates)))]

        def fill(match: re.Match[str]) -> str:
            slot = match["name"]
            if match["recall"]:
                return memory.get(slot, slot)
            if slot in ("number", "ordinal", "year"):
                text = _number(slot, match["span"].split(), rng)
            else:
                text = self._expand(slot, rng, said, memory, depth + 1)
            if match["as"]:
                memory[match["as"]] = text
            return f"{article(text)} {text}" if match["article"] else text

        return _SLOT.sub(fill, template)


def load_grammar(path: Path, lists: Mapping[str, Sequence[str]]) -> Grammar:
    """The rules of a file.

    Raises:
      DataError: it cannot be read, or names what is not there.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: cannot be read as YAML ({error})") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected names and what they stand for")
    return Grammar(content, lists, str(path))


def article(text: str) -> str:
    """ "a" or "an", by how the text sounds."""
    lower = text.lower()
    if lower.startswith(_SILENT_H):
        return "an"
    return "an" if lower[:1] in "aeiou" and not lower.startswith(_LIKE_YOU) else "a"


def _number(kind: str, span: Sequence[str], rng: np.random.Generator) -> str:
    low, high = (int(bound) for bound in span) if len(span) == 2 else (2, 99)
    number = int(rng.integers(low, high + 1))
    if kind == "year":
        return " ".join(spoken_forms(str(number))[0])
    if kind == "ordinal":
        return " ".join(spoken_forms(f"{number}th")[0])
    # Behind a comma: four digits alone would be read as a year.
    return " ".join(spoken_forms(f"{number:,}")[0])
