"""A corpus configuration with its text files, small enough to speak in a second."""

from __future__ import annotations

from pathlib import Path

_OPENINGS = ("The dog", "My old friend", "That tall man", "A small bird", "Your sister")
_ENDINGS = (
    "is in the garden.",
    "wants a cup of tea.",
    "will be here on Monday.",
    "has never seen the sea.",
    "likes to sing in the rain.",
    "found this under the bridge.",
)
#: Single sentences of the file; conversations come besides.
LINES = [f"{opening} {ending}" for opening in _OPENINGS for ending in _ENDINGS]
_CONVERSATIONS = [
    [
        f"Did you see {thing} today?",
        f"No, but I heard {thing} was lost.",
        f"I hope you find {thing} soon.",
    ]
    for thing in ("the red car", "our new boat", "her black cat", "his long letter", "the big ship")
]
_EXTRA = """
hello there what this i don't know okay yes good bus at five thirty we have twenty one dogs it here
well stop apple pear three second get want eat can walk cars see eating
"""
WORDS = list(
    dict.fromkeys(
        word.strip(".,?").lower()
        for line in [*LINES, *(text for talk in _CONVERSATIONS for text in talk)]
        for word in line.split()
    )
)
WORDS += [word for word in dict.fromkeys(_EXTRA.split()) if word not in WORDS]

_GRAMMAR = """\
fruit: apple, pear
sentence: ["I want {a fruit}.", "We have {number 2 9} dogs here.", "Can you see the {fruit}?"]
scene: ["Do you want {a fruit:x}? / Yes, a {=x} is good.", "Hello there. / Hello. What is this?"]
"""

_CONFIG = """\
size: {{hours: 0.01, validation: [2, 1], test: [3, 1], shard: 4}}
text:
  sources:
    - {{kind: lines, share: 0.6, path: {folder}/lines.txt}}
    - {{kind: grammar, share: 0.4, path: {folder}/grammar.yaml}}
  words: {{frequencies: {folder}/words.txt, target: 50, trusted: 1000}}
voice: {{kind: tones, length_scale: 1.0}}
tokenizer: {{entries: 320, items: 50}}
sample_rate: 16000
"""


def write_files(folder: Path) -> Path:
    """Writes them all; the path of the configuration."""
    talks = ["\n".join(talk) for talk in _CONVERSATIONS]
    (folder / "lines.txt").write_text("\n\n".join([*LINES, *talks]) + "\n")
    (folder / "words.txt").write_text("\n".join(WORDS) + "\n")
    (folder / "grammar.yaml").write_text(_GRAMMAR)
    path = folder / "corpus.yaml"
    path.write_text(_CONFIG.format(folder=folder))
    return path
