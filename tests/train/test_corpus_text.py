"""Text of a corpus: cleaning, grammar, lexicon, what is held out, the order of items."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from corpus_files import LINES, WORDS, write_files

from dia2_jax.errors import ConfigError, DataError
from train.config import read_config
from train.corpus_making.cleaning import Cleaner, key_of, words_of
from train.corpus_making.config import CorpusConfig, WordsConfig
from train.corpus_making.grammar import Grammar, article, load_grammar
from train.corpus_making.lexicon import Lexicon, load_lexicon
from train.corpus_making.scripts import Item, Writer

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def config(tmp_path: Path) -> CorpusConfig:
    return read_config(CorpusConfig, write_files(tmp_path))


@pytest.fixture
def lexicon(config: CorpusConfig) -> Lexicon:
    return load_lexicon(config.text.words)


# ----------------------------------------------------------------------------------------- cleaning


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hello  there", ["Hello there."]),
        ("what is this", ["What is this?"]),
        ("i dont know. ok", ["I don't know.", "Okay."]),
        ("haha yes!!! good...", ["Yes!", "Good."]),
        ("the bus is at 5:30", ["The bus is at five thirty."]),
        ("we have 21 dogs", ["We have twenty one dogs."]),
        ("it is “good”, yes", ["It is good, yes."]),
    ],
)
def test_text_becomes_what_is_read_out(lexicon: Lexicon, text: str, expected: list[str]) -> None:
    assert Cleaner(lexicon).sentences(text) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("see www.example.com", "address or length"),
        ("hello (there)", "odd characters"),
        ("hello zzyzx", "unknown word"),
        ("this is shit", "coarse"),
        ("HELLO there", "capitals"),
        ("this is 5x4 big", "odd characters"),
    ],
)
def test_doubtful_text_is_left_out_and_counted(lexicon: Lexicon, text: str, reason: str) -> None:
    cleaner = Cleaner(lexicon)
    assert cleaner.sentences(text) is None
    assert cleaner.left_out == {reason: 1}


def test_keys_ignore_capitals_and_punctuation() -> None:
    assert key_of("Well, it's here!") == key_of("well it's here") == "well it's here"
    assert words_of("Don't - stop.") == ["don't", "stop"]


# ------------------------------------------------------------------------------------------ lexicon


def test_wordnet_files_tell_forms_and_parts_of_speech(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("the\nwalk\nwalked\nstopping\nhouses\nxqz\nquickly\n")
    for part, lemmas in {
        "noun": ["house", "walk"],
        "verb": ["walk", "stop"],
        "adj": ["quick"],
        "adv": ["quickly"],
    }.items():
        lines = ["  1 a licence", *(f"{lemma} n 1 2 @ ~ 1 0 123" for lemma in lemmas)]
        (tmp_path / f"index.{part}").write_text("\n".join(lines))
    (tmp_path / "noun.exc").write_text("mice mouse\n")
    words = WordsConfig(str(tmp_path / "words.txt"), target=10, trusted=1, wordnet=str(tmp_path))
    lexicon = load_lexicon(words)
    known = ("the", "walked", "stopping", "houses", "mice", "quickly", "don't", "house's")
    assert [word for word in known if not lexicon.knows(word)] == []
    assert [word for word in ("xqz", "lol", "b", "hous") if lexicon.knows(word)] == []
    assert lexicon.lists["any_verbing"] == ["stopping"]
    assert lexicon.lists["any_verbed"] == ["walked"]
    assert lexicon.lists["any_nouns"] == ["houses"]


def test_missing_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("the\n")
    words = WordsConfig(str(tmp_path / "words.txt"), wordnet=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="index.noun: no WordNet database there"):
        load_lexicon(words)


# ------------------------------------------------------------------------------------------ grammar


def test_grammar_fills_slots_articles_memory_and_numbers() -> None:
    rules = {
        "fruit": "apple, pear",
        "scene": ["I want {a fruit:x}. / You get the {=x} at {number 3 3}, on the {ordinal 2 2}."],
    }
    grammar = Grammar(rules, {}, "test")
    texts = {grammar.write("scene", np.random.default_rng(i), Counter()) for i in range(20)}
    assert texts == {
        "I want an apple. / You get the apple at three, on the second.",
        "I want a pear. / You get the pear at three, on the second.",
    }


def test_open_lists_prefer_what_was_said_least() -> None:
    grammar = Grammar({"s": ["{any}"]}, {"any": ["often", "rare"]}, "test")
    rng, said = np.random.default_rng(0), Counter({"often": 9})
    picks = Counter(grammar.write("s", rng, said) for _ in range(100))
    assert picks["rare"] > 80


def test_unknown_names_and_unquoted_yaml_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing is called \{fruits\} in s"):
        Grammar({"s": ["{fruits}"]}, {}, "test")
    path = tmp_path / "grammar.yaml"
    path.write_text("answer: [Yes, Maybe]\n")
    with pytest.raises(DataError, match="quote it"):
        load_grammar(path, {})


@pytest.mark.parametrize(
    ("word", "expected"), [("apple", "an"), ("pear", "a"), ("hour", "an"), ("university", "a")]
)
def test_article_goes_by_sound(word: str, expected: str) -> None:
    assert article(word) == expected


def test_grammar_of_nano_is_whole() -> None:
    kinds = ("noun", "nouns", "verb", "verbing", "verbed", "adjective", "adverb")
    lists = {f"any_{kind}": ["word"] for kind in kinds}
    grammar = load_grammar(ROOT / "configs" / "nano" / "grammar.yaml", lists)
    rng, said = np.random.default_rng(0), Counter()
    texts = [grammar.write(rule, rng, said) for rule in ("sentence", "scene") for _ in range(300)]
    assert not any("{" in text or "  " in text for text in texts)
    assert len(set(texts)) > 500


# -------------------------------------------------------------------------------- pools and scripts


def test_held_out_sentences_are_nowhere_in_training(config: CorpusConfig, lexicon: Lexicon) -> None:
    writer = Writer(config, lexicon)
    held = [item for split in ("validation", "test") for item in writer.held_out(split)]
    keys = {key_of(text) for item in held for turn in item.turns for text in turn.sentences}
    trained = {
        key_of(text)
        for item in islice(writer.train(), 200)
        for turn in item.turns
        for text in turn.sentences
    }
    assert len(writer.held_out("test")) == 4
    assert len(keys) >= 6
    assert keys.isdisjoint(trained)


def test_a_longer_corpus_begins_with_a_shorter_one(config: CorpusConfig, lexicon: Lexicon) -> None:
    first = list(islice(Writer(config, lexicon).train(), 40))
    again = list(islice(Writer(config, lexicon).train(), 90))
    assert again[:40] == first
    assert [item.index for item in again] == list(range(90))


def test_items_are_of_all_kinds_and_speakers(config: CorpusConfig, lexicon: Lexicon) -> None:
    items = list(islice(Writer(config, lexicon).train(), 200))
    kinds = {item.kind for item in items}
    assert kinds == {"lines", "grammar", "passage", "scene", "mixed"}
    assert {turn.speaker for item in items for turn in item.turns} == {1, 2}
    for item in items:
        speakers = [turn.speaker for turn in item.turns]
        assert len(speakers) == 1 or speakers == [1 + i % 2 for i in range(len(speakers))]


def test_every_sentence_is_used_before_one_comes_again(
    config: CorpusConfig, lexicon: Lexicon
) -> None:
    writer = Writer(config, lexicon)
    lines = writer.pools.lines["lines"]
    said: list[str] = []
    for item in writer.train():
        if item.kind in ("lines", "mixed"):
            said += [s for turn in item.turns for s in turn.sentences if s in set(lines)]
        if len(said) > 3 * len(lines):
            break
    counts = Counter(said[: 2 * len(lines)])
    assert set(counts) == set(lines)


def test_script_names_the_speakers(config: CorpusConfig, lexicon: Lexicon) -> None:
    item: Item = Writer(config, lexicon).held_out("test")[-1]
    assert item.script.startswith("[S1] ") and " [S2] " in item.script


def test_sources_without_a_sentence_are_refused(tmp_path: Path) -> None:
    path = write_files(tmp_path)
    (tmp_path / "lines.txt").write_text("zzyzx qwrt plugh\n")
    overrides = [f"text.sources=[{{kind: lines, share: 1, path: {tmp_path / 'lines.txt'}}}]"]
    config = read_config(CorpusConfig, path, overrides)
    with pytest.raises(DataError, match="not one sentence of them can be said"):
        Writer(config, load_lexicon(config.text.words))


def test_config_says_what_is_wrong(tmp_path: Path) -> None:
    path = write_files(tmp_path)
    with pytest.raises(ConfigError, match="lines needs one"):
        read_config(CorpusConfig, path, ["text.sources=[{kind: lines, share: 1}]"])
    with pytest.raises(ConfigError, match="300 at least"):
        read_config(CorpusConfig, path, ["tokenizer.entries=100"])


def test_the_fixture_is_what_the_tests_think(lexicon: Lexicon) -> None:
    assert all(lexicon.knows(word) for line in LINES for word in words_of(line))
    assert len(WORDS) == len(set(WORDS))
