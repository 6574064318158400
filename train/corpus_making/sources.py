"""Conversations and sentences out of packages and files, as they are written there.

What a source gives is raw; `train.corpus_making.cleaning` decides what can be read out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from dia2_jax.errors import DataError, Dia2Error
from train.corpus_making.config import SourceConfig
from train.corpus_making.lexicon import read_lines

#: A message: who says it (any label), and what.
Message = tuple[str, str]


@dataclass(frozen=True)
class SourceCard:
    """What a data card says of a source."""

    title: str
    package: str
    licence: str


CARDS = {
    "chitchat": SourceCard(
        "BYU Perception, Control & Cognition lab's Chit-Chat Challenge: open conversations",
        "PyPI chitchat-dataset",
        "MIT",
    ),
    "chatterbot": SourceCard("ChatterBot's English dialogues", "PyPI chatterbot-corpus", "BSD"),
    "wordnet": SourceCard(
        "Example sentences of WordNet 3.0, copyright 2006 by Princeton University",
        "Debian wordnet-base",
        "WordNet 3.0 licence (use, copy, modify and distribute for any purpose)",
    ),
    "grammar": SourceCard("Written by the rules of this repository", "—", "Apache-2.0"),
    "lines": SourceCard("A text file of the user", "—", "as the file's"),
}


def read_conversations(source: SourceConfig) -> Iterator[list[Message]]:
    """Conversations of a source; a single sentence is one of one message.

    Raises:
      DataError: a file or folder that is missing or not of its form.
      Dia2Error: the package is not installed.
    """
    if source.kind == "chitchat":
        yield from _chitchat()
    elif source.kind == "chatterbot":
        yield from _chatterbot()
    elif source.kind == "wordnet":
        yield from _wordnet(Path(source.path or ""))
    elif source.kind == "lines":
        yield from _lines(Path(source.path or ""))


def _chitchat() -> Iterator[list[Message]]:
    path = _package("chitchat_dataset", "chitchat-dataset") / "dataset.json"
    conversations = json.loads(path.read_text(encoding="utf-8"))
    for name in sorted(conversations):
        messages = [
            message for turn in conversations[name]["messages"] for message in turn if message
        ]
        yield [(str(message["sender"]), str(message["text"])) for message in messages]


#: Files of ChatterBot's corpus that are about everyday things rather than code and quizzes.
_CHATTERBOT = (
    "conversations", "emotion", "food", "gossip", "greetings", "health", "history", "humor",
    "literature", "money", "movies", "psychology", "science", "sports", "trivia",
)  # fmt: skip


def _chatterbot() -> Iterator[list[Message]]:
    import yaml

    folder = _package("chatterbot_corpus", "chatterbot-corpus") / "data" / "english"
    for name in _CHATTERBOT:
        path = folder / f"{name}.yml"
        if not path.is_file():
            continue
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        for conversation in content["conversations"]:
            said = [str(text) for text in conversation if text]
            yield [(str(number % 2), text) for number, text in enumerate(said)]


def _wordnet(folder: Path) -> Iterator[list[Message]]:
    found = False
    for part in ("adj", "adv", "noun", "verb"):
        path = folder / f"data.{part}"
        if not path.is_file():
            continue
        found = True
        for line in read_lines(path):
            _, bar, gloss = line.partition("| ")
            for example in re.findall(r'"([^"]+)"', gloss) if bar else ():
                yield [("", example)]
    if not found:
        raise DataError(
            f"{folder}: no WordNet database there; install Debian's wordnet-base, or name the "
            "folder that holds data.noun"
        )


def _lines(path: Path) -> Iterator[list[Message]]:
    conversation: list[Message] = []
    for line in [*read_lines(path), ""]:
        if line:
            conversation.append((str(len(conversation) % 2), line))
        elif conversation:
            yield conversation
            conversation = []


def _package(module: str, name: str) -> Path:
    """Folder of an installed package, found without running it."""
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise Dia2Error(
            f"text.sources: the package {name} is not installed; install it with: "
            'pip install "dia2-jax[corpus]"'
        )
    return Path(spec.submodule_search_locations[0])
