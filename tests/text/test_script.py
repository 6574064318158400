from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dia2_jax.errors import ScriptError, SessionError
from dia2_jax.text.script import (
    Break,
    Entry,
    Lexer,
    ScriptParser,
    Word,
    parse_script,
    require_speakable,
    speakable,
)

# Pieces that meet in every order: tags whole, cut and broken, and what they may touch.
PIECES = [
    "[S1]", "[S2]", " ", " ", " ", "\n", "\r\n", "\t", "\u00a0", "Hello", "a", "it’s", "3:45",
    '<break time="0.5s"/>', '<break time="1s">', '<break  time="2.s" />', "<break", "<br", "<", ">",
    "...", "<break ", ' time="', "time=\"1", '.5s"', 's"/>', "/", "(clears throat)", "(clears",
    "throat)", "throat).", "(laughs)", "(", "é", "\u4f60\u597d", "🙂", "\ud83d",
]  # fmt: skip
scripts = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)


def texts(entries):
    return [entry.text or f"<{entry.padding}>" for entry in entries]


def test_scripts_match_golden(golden):
    for case in golden.values["scripts"]:
        parsed = parse_script(case["lines"], golden.tokenizer, split_sound_tags=True)
        assert parsed == golden.entries(case["entries"]), case["lines"]


def cut(text, cuts):
    places = [0, *sorted(c % (len(text) + 1) for c in cuts), len(text)]
    return [text[a:b] for a, b in zip(places, places[1:], strict=False)]


@settings(max_examples=300, deadline=None)
@given(text=scripts, cuts=st.lists(st.integers(0, 10**6), max_size=6), split=st.booleans())
def test_any_cutting_gives_the_entries_of_the_whole(tokenizer, text, cuts, split):
    whole = parse_script(text, tokenizer, split_sound_tags=split)
    for pieces in (cut(text, cuts), list(text)):
        parser = ScriptParser(tokenizer, split_sound_tags=split)
        entries = [entry for piece in pieces for entry in parser.feed(piece)]
        assert entries + parser.close() == whole


@settings(max_examples=300, deadline=None)
@given(text=scripts)
def test_lexer_agrees_with_a_regular_expression(text):
    lexer = Lexer()
    found = lexer.feed(text) + lexer.close()
    expected = []
    plain = text.replace("’", "'").replace(":", " ").replace("\ud83d", "\ufffd")
    position = 0
    tag = re.compile(r'<break\s+time="([0-9]+(?:\.[0-9]*)?)s"\s*/?>')
    for match in tag.finditer(plain):
        expected += [Word(word) for word in plain[position : match.start()].split()]
        expected.append(Break(float(match[1])))
        position = match.end()
    assert found == expected + [Word(word) for word in plain[position:].split()]


def test_words_are_emitted_at_white_space_and_not_before(tokenizer):
    parser = ScriptParser(tokenizer)
    assert texts(parser.feed("Hel")) == []
    assert texts(parser.feed("lo")) == []
    assert texts(parser.feed(" wor")) == ["Hello"]
    assert texts(parser.feed('ld<break time="1s"/')) == []
    assert texts(parser.feed(">")) == ["world", "<12>"]
    assert texts(parser.feed("[S2]")) == []
    assert texts(parser.close()) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('foo<break time="1s"/>bar', ["foo", "<12>", "bar"]),
        ('<break\r\ntime="1.5s"\t/>', ["<19>"]),
        ('<break time="2.s">', ["<25>"]),
        ('<break time="0.02s"/>x', ["x"]),  # rounds to no frame
        ('<break time="0.04s"/>x', ["x"]),  # half to even: 0.5 frames round to 0 ...
        ('<break time="0.12s"/>x', ["<2>", "x"]),  # ... and 1.5 to 2
        ('<break time="1x5s"/>', ["<break", 'time="1x5s"/>']),  # crashes upstream
        ('<break time="1 5s"/>', ["<break", 'time="1', '5s"/>']),
        ('<break time=".5s"/>', ["<break", 'time=".5s"/>']),
        ('<breaktime="1s"/>', ['<breaktime="1s"/>']),
        ('<<break time="1s"/>', ["<", "<12>"]),
        ('<bre<break time="<break time="1s"/>>', ["<bre<break", 'time="', "<12>", ">"]),
        ("1 < 2 <", ["1", "<", "2", "<"]),
        ('<break time="' + "9" * 400 + 's"/>', ["<12500000>"]),
        ("it’s 3:45", ["it's", "3", "45"]),
        ("\ufeff[S1] a\r\nb\u2003c", ["a", "b", "c"]),
    ],
)
def test_grammar(tokenizer, text, expected):
    assert texts(parse_script(text, tokenizer)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a (clears throat) b", ["a", "(clears throat)", "b"]),
        ("(clears \r\n\t throat). b", ["(clears throat).", "b"]),
        ('"(clears throat)," b', ['"(clears throat),"', "b"]),
        ("(clears throat)(clears  throat)", ["(clears throat)(clears throat)"]),
        ("(clears (clears throat) b", ["(clears", "(clears throat)", "b"]),
        ("(clears the throat)", ["(clears", "the", "throat)"]),
        ('(clears <break time="1s"/> throat)', ["(clears", "<12>", "throat)"]),
        ("(clears [S2] throat)", ["(clears", "throat)"]),
        ("(clears", ["(clears"]),
    ],
)
def test_sound_tags(tokenizer, text, expected):
    assert texts(parse_script(text, tokenizer)) == expected


def test_a_sound_tag_is_its_one_token(tokenizer):
    (entry,) = parse_script("(clears  throat)", tokenizer)
    assert entry == Entry((600, 605), "(clears throat)", 2)
    first, second = parse_script("(clears  throat)", tokenizer, split_sound_tags=True)
    assert 605 not in first.tokens + second.tokens
    # A tag of the next word waits for the whole of it.
    spoken = parse_script("[S2] (clears throat) a", tokenizer)[0]
    assert spoken.tokens[:2] == (600, 601) and spoken.tokens[-1] == 605


def test_longer_sound_tags():
    lexer = Lexer(["(a b)", "(a b c)", "(b c)", "(a long way off)"])
    text = "(a b) (a b c) (a (b c) (a long (a long way off)! (a long way"
    words = [word.text for word in lexer.feed(text) + lexer.close()]
    assert words == [
        "(a b)", "(a b c)", "(a", "(b c)", "(a", "long", "(a long way off)!", "(a", "long", "way",
    ]  # fmt: skip

    # Words that were held in vain come out in order, whatever may begin inside them.
    lexer = Lexer(["(a (b (c d)", "(b x y)"])
    assert [word.text for word in lexer.feed("(a (b (c z ")] == ["(a", "(b", "(c", "z"]


def test_speaker_tags(tokenizer):
    def tokens(lines):
        return [entry.tokens for entry in parse_script(lines, tokenizer)]

    hello, spaced = tokenizer.encode("Hello"), tokenizer.encode("[S1] Hello")[1:]
    assert hello != spaced
    assert tokens("[S1]Hello") == [(600, *hello)]
    assert tokens("Hello") == [(600, *hello)]
    assert tokens("[S1] Hello") == [(600, *spaced)]
    assert tokens("[S2] Hello") == [(600, 601, *spaced)]  # line 0 forces the first speaker
    assert tokens("[S1] [S2] Hello") == [(600, 601, *spaced)]  # the last tag counts
    assert tokens("Hello [S1] <break time='1'> Hello")[1][:1] == (600,)
    # Lines alternate; a tag at the end of a line does not reach the next.
    assert tokens(["Hello [S1]", "Hello", "Hello"]) == [(600, *hello), (601, *hello), (600, *hello)]
    # An empty line forces nobody, so the speaker of the line after it is already set.
    assert tokens(["Hello", " ", "Hello"]) == [(600, *hello), tuple(hello)]
    assert ScriptParser(tokenizer, line=3).feed("Hello ")[0].tokens == (601, *hello)


def test_padding_and_frame_rate(tokenizer):
    for entry in parse_script("[S2] some unusual words", tokenizer):
        assert entry.padding == len(entry.tokens) > 0
    assert texts(parse_script('<break time="1s"/>', tokenizer, frame_rate=25.0)) == ["<25>"]


@pytest.mark.parametrize("text", ["", " \n", "[S1]", "[S1] [S2] ", '<break time="0s"/>'])
def test_nothing_to_say_gives_no_entries(tokenizer, text):
    entries = parse_script(text, tokenizer)
    assert entries == [] and not speakable(entries)
    with pytest.raises(ScriptError, match="the script is empty: give it"):
        require_speakable(entries)


@pytest.mark.parametrize("text", ['<break time="1s"/>', "...", "[S1] ?! -- ", "[S2]… \u200b"])
def test_a_script_without_a_speakable_word_is_refused(tokenizer, text):
    entries = parse_script(text, tokenizer)
    assert entries and not speakable(entries)
    with pytest.raises(ScriptError, match="no speakable word, only pauses or punctuation"):
        require_speakable(entries)


@pytest.mark.parametrize("text", ["a", "(laughs)", "... 7", "你好", "&", "... [S2] é"])
def test_speakable_scripts_pass(tokenizer, text):
    require_speakable(parse_script(text, tokenizer))


def test_feeding_after_close_is_refused(tokenizer):
    parser = ScriptParser(tokenizer)
    parser.close()
    with pytest.raises(SessionError, match="fed after close"):
        parser.feed("more")


@pytest.mark.parametrize("text", ["<" * 3000, "<break " + " " * 3000, "(clears " * 500])
def test_odd_input_costs_linear_work(text):
    calls = 0

    class Counting(Lexer):
        def _take(self, character):
            nonlocal calls
            calls += 1
            return super()._take(character)

        def _match_held(self):
            nonlocal calls
            calls += 1
            return super()._match_held()

    lexer = Counting(["(clears throat)", "(clears the throat)"])
    items = lexer.feed(text) + lexer.close()
    assert "".join(word.text for word in items) == "".join(text.split())
    assert len(text) <= calls <= 3 * len(text)
