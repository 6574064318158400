from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dia2_jax.errors import PrefixError
from dia2_jax.text.timing import (
    WordTime,
    estimate_word_times,
    load_word_times,
    words_to_entries,
)


def test_entries_and_steps_match_golden(golden):
    prefixes = [g["prefix"] for g in golden.values["generations"].values() if "prefix" in g]
    assert len(prefixes) == 3
    for prefix in prefixes:
        entries, steps = [], []
        # Upstream shifts the first speaker's steps by 3 and the second's by the first's frames.
        shift = 3
        for speaker, side in enumerate(prefix["words"], 1):
            words = [WordTime(**word) for word in side["words"]]
            more, starts = words_to_entries(words, golden.tokenizer, speaker=speaker)
            entries += more
            steps += [start + shift for start in starts]
            shift = side["frames"]
        assert entries == golden.entries(prefix["entries"])
        assert steps == prefix["new_word_steps"]


def test_rounding_is_half_to_even(tokenizer):
    def first_step(seconds):
        return words_to_entries([WordTime("a", seconds, seconds)], tokenizer, speaker=1)[1][0]

    # 2.5 frames round to 2 and 3.5 to 4; the step is one before.
    assert first_step(0.2) == 1 and first_step(0.28) == 3
    assert first_step(0.0) == 0  # frame 0 is not a word's


def test_the_last_word_pads_to_its_end_and_others_to_the_next(tokenizer):
    words = [WordTime("a", 0.08, 0.1), WordTime("a", 1.6, 2.4)]
    (first, last), steps = words_to_entries(words, tokenizer, speaker=2)
    assert first.tokens[0] == 601 and last.tokens == (72,)
    assert steps == [0, 19]
    assert first.padding == 20 - 1 - 1 and last.padding == 30 - 20 - 1


def test_words_faster_than_their_tokens_are_pushed_back(tokenizer):
    words = [WordTime("antidisestablishmentarianism", 0.08, 0.1), WordTime("a", 0.12, 0.2)]
    entries, steps = words_to_entries(words, tokenizer, speaker=1)
    assert steps == [0, len(entries[0].tokens) + 1]
    assert entries[0].padding == len(entries[0].tokens)


def test_no_words_give_no_entries(tokenizer):
    assert words_to_entries([], tokenizer, speaker=1) == ([], [])


@pytest.mark.parametrize(
    ("text", "start", "end", "message"),
    [
        ("late", -0.1, 1.0, "word 'late': start is -0.1"),
        ("odd", 0.0, float("nan"), "word 'odd': end is nan"),
        ("odd", 0.0, float("inf"), "word 'odd': end is inf"),
        ("back", 2.0, 1.0, "word 'back' ends at 1.0 s, before it starts at 2.0 s"),
        ("  ", 1.0, 2.0, "a word from 1.0 s to 2.0 s has no text"),
    ],
)
def test_impossible_words_are_refused(text, start, end, message):
    with pytest.raises(PrefixError, match=message):
        WordTime(text, start, end)


def test_words_out_of_order_are_refused(tokenizer):
    words = [WordTime("second", 1.0, 2.0), WordTime("first", 0.5, 1.0)]
    with pytest.raises(PrefixError, match="word 'first' starts at 0.5 s, before 'second'"):
        words_to_entries(words, tokenizer, speaker=1)


@settings(max_examples=100, deadline=None)
@given(
    words=st.lists(
        st.sampled_from(["a", "Hello,", "xylophone", "1984", "你好", "…", "(laughs)", "[S1]"]),
        min_size=1,
    ).filter(lambda words: set(words) != {"[S1]"}),
    start=st.floats(0, 100),
    length=st.floats(0.01, 100),
)
def test_estimates_fill_the_span_in_order(words, start, length):
    end = start + length
    times = estimate_word_times(" ".join(words), start, end)
    assert [time.text for time in times] == [word for word in words if word != "[S1]"]
    assert times[0].start == start and times[-1].end == end
    for before, after in zip(times, times[1:], strict=False):
        assert before.start < before.end <= after.start + 1e-9


def test_estimates_follow_length_and_punctuation(tokenizer):
    def durations(text):
        return {time.text: time.end - time.start for time in estimate_word_times(text, 1.0, 5.0)}

    spoken = durations("I antidisestablishmentarianism am like likely 1984 sixteen")
    assert spoken["antidisestablishmentarianism"] > 3 * spoken["am"] > 0
    assert spoken["like"] < spoken["likely"]
    assert spoken["1984"] > spoken["sixteen"]

    def gap(text):
        first, second = estimate_word_times(text, 0.0, 3.0)
        return second.start - first.end

    assert gap("one two") == pytest.approx(0.0)
    assert 0.1 < gap("one, two") < gap('one." two') < gap('one <break time="1s"/> two')
    # The voiced span ends with the last word, not with the pause behind it.
    assert gap("one, two.") == gap("one, two")
    # With the tokenizer its sound tags stay whole, as they do in a script.
    text = "one (clears throat) two"
    assert len(estimate_word_times(text, 0.0, 3.0)) == 4
    assert len(estimate_word_times(text, 0.0, 3.0, tokenizer)) == 3


def test_estimates_need_words_and_a_span():
    for text in ("", "[S1]", '<break time="1s"/>'):
        with pytest.raises(PrefixError, match="the transcript has no word"):
            estimate_word_times(text, 0.0, 1.0)
    for start, end in ((1.0, 1.0), (2.0, 1.0), (-1.0, 1.0), (0.0, float("nan"))):
        with pytest.raises(PrefixError, match="the voiced span must have a length"):
            estimate_word_times("a", start, end)


PAIR = [["Hello", [0.1, 0.5]], ["you", [0.5, 1]]]
DICT = [{"text": " Hello", "start": 0.1, "end": 0.5}, {"word": "you", "start": 0.5, "end": 1}]


@pytest.mark.parametrize(
    "content",
    [PAIR, DICT, {"words": DICT}, {"alignments": [[*item, "SPEAKER_MAIN"] for item in PAIR]}],
)
def test_word_lists_are_read_in_every_form(tmp_path, content):
    path = tmp_path / "words.json"
    path.write_text(json.dumps(content))
    assert load_word_times(path) == [WordTime("Hello", 0.1, 0.5), WordTime("you", 0.5, 1.0)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "words.json is not valid JSON"),
        ('"a"', "words.json must hold a list of words"),
        ('{"text": []}', "words.json must hold a list of words"),
        ('[["a", [0, 1]], ["b"]]', r'words.json, item 1: \["b"\] is neither'),
        ('[{"text": "a", "start": 0}]', "words.json, item 0: .* is neither"),
        ('[{"text": 3, "start": 0, "end": 1}]', "words.json, item 0: .* is neither"),
        ('[["a", [2, 1]]]', "words.json, item 0: word 'a' ends at 1.0 s"),
        ('[["a", [2, 3]], ["b", [1, 2]]]', "words.json: word 'b' starts at 1.0 s, before 'a'"),
    ],
)
def test_unreadable_word_lists_say_where(tmp_path, content, message):
    path = tmp_path / "words.json"
    path.write_text(content)
    with pytest.raises(PrefixError, match=message):
        load_word_times(path)


def test_a_missing_word_list_is_named(tmp_path):
    with pytest.raises(PrefixError, match="cannot read word times from .*none.json"):
        load_word_times(tmp_path / "none.json")
