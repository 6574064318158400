"""Words of a preparation: how they are spoken, matched, aligned, and who speaks them."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dia2_jax.errors import Dia2Error
from train.preparation.aligners import ALIGNERS, EstimateAligner, time_words, transcript_words
from train.preparation.forced import PocketsphinxAligner
from train.preparation.matching import match_words, spread_unknown
from train.preparation.phones import guess_phones, letter_names
from train.preparation.records import Item, Recording, Rejected, TimedWord, Turn
from train.preparation.spoken import normalized, spoken_forms
from train.preparation.transcripts import number_speakers, read_turns, written_words

RATE = 8_000


def noise(seconds: float) -> np.ndarray:
    return (0.1 * np.random.default_rng(0).standard_normal(int(seconds * RATE))).astype(np.float32)


# ------------------------------------------------------------------------------------------- spoken


@pytest.mark.parametrize(
    ("word", "spoken"),
    [
        ("Hello,", "hello"),
        ("don’t", "don't"),
        ("well-known", "well known"),
        ("Café", "cafe"),
        ("21", "twenty one"),
        ("$5", "five dollars"),
        ("£1", "one pound"),
        ("50%", "fifty percent"),
        ("3.14", "three point one four"),
        ("1,200,345", "one million two hundred thousand three hundred forty five"),
        ("1984", "nineteen eighty four"),
        ("2005", "two thousand five"),
        ("1900s", "nineteen hundreds"),
        ("1806", "eighteen oh six"),
        ("21st", "twenty first"),
        ("30th.", "thirtieth"),
        ("007", "zero zero seven"),
        ("R&B", "r and b"),
        ("Mr.", "mister"),
        ("(laughs)", None),
        ("—", None),
    ],
)
def test_words_as_they_are_spoken(word: str, spoken: str | None) -> None:
    forms = spoken_forms(word)
    assert (" ".join(forms[0]) if forms else None) == spoken


def test_a_year_may_be_a_number_too() -> None:
    assert [" ".join(form) for form in spoken_forms("1984")] == [
        "nineteen eighty four",
        "one thousand nine hundred eighty four",
    ]


@given(st.text(max_size=30))
def test_any_text_can_be_asked_for(text: str) -> None:
    for form in spoken_forms(text):
        assert form and all(word and word == word.lower() for word in form)
    guess_phones(text)


def test_phones_of_unknown_words() -> None:
    assert guess_phones("zorblax") == "Z AO R B L AE K S"
    assert guess_phones("cheese") == "CH IY S"
    assert letter_names("bbc") == "B IY B IY S IY"
    assert guess_phones("hmm") == "EY CH EH M EH M"
    assert guess_phones("日本") is None


# ----------------------------------------------------------------------------------------- matching

WORD = st.sampled_from(
    ["the", "cat", "a", "21", "every", "one", "everyone", "(laughs)", "—", "well-known"]
)


@st.composite
def heard_words(draw: st.DrawFn) -> list[TimedWord]:
    words, now = [], 0.0
    for text in draw(st.lists(WORD, max_size=12)):
        start = now + draw(st.floats(0, 1))
        end = start + draw(st.floats(0, 1))
        words.append(TimedWord(text, start, end))
        now = start if draw(st.booleans()) else end
    return words


@given(st.lists(WORD, min_size=1, max_size=12), heard_words())
def test_whatever_is_heard_times_are_in_order_and_inside(
    written: list[str], heard: list[TimedWord]
) -> None:
    end = max([word.end for word in heard], default=0.0) + 1
    match = match_words(written, heard, 0.0, end)
    assert len(match.times) == len(written) and 0 <= match.agreement <= 1
    starts = [start for start, _ in match.times]
    assert starts == sorted(starts)
    assert all(0 <= start <= stop <= end + 1e-9 for start, stop in match.times)


@given(heard_words())
def test_what_is_heard_as_written_keeps_its_times(heard: list[TimedWord]) -> None:
    heard = [word for word in heard if normalized(word.text)]
    written = [f"“{word.text.upper()},”" for word in heard]
    match = match_words(written, heard, 0.0, 99.0)
    assert match.times == [(word.start, word.end) for word in heard]
    assert match.agreement == 1


@given(heard_words(), st.data())
def test_one_misheard_word_moves_no_other(heard: list[TimedWord], data: st.DataObject) -> None:
    heard = [TimedWord(f"{w.text}{i}", w.start, w.end) for i, w in enumerate(heard)]
    if not heard:
        return
    place = data.draw(st.integers(0, len(heard) - 1))
    written = [word.text for word in heard]
    written[place] = "unheard"
    match = match_words(written, heard, 0.0, 99.0)
    assert match.times == [(word.start, word.end) for word in heard]
    assert match.agreement == pytest.approx(1 - 1 / len(heard))


def test_other_word_boundaries_share_the_time_by_letters() -> None:
    heard = [TimedWord("everyone", 1.0, 2.0), TimedWord("else", 2.5, 3.0)]
    match = match_words(["every", "one", "else"], heard, 0.0, 4.0)
    assert match.times == [(1.0, 1.625), (1.625, 2.0), (2.5, 3.0)]
    assert match.agreement == 1
    back = match_words(["everyone"], [TimedWord("every", 1, 2), TimedWord("one", 3, 4)], 0, 4)
    assert back.times == [(1.0, 4.0)]


def test_numbers_match_however_they_are_written() -> None:
    heard = [TimedWord("twenty", 0.0, 1.0), TimedWord("one", 1.0, 2.0), TimedWord("eggs", 2.0, 3.0)]
    match = match_words(["21", "eggs."], heard, 0.0, 3.0)
    assert match.times == [(0.0, 2.0), (2.0, 3.0)] and match.agreement == 1


def test_words_that_were_not_heard_lie_in_the_gap() -> None:
    heard = [TimedWord("one", 1.0, 2.0), TimedWord("four", 4.0, 5.0)]
    match = match_words(["one", "(laughs)", "three", "four"], heard, 0.0, 6.0)
    assert match.times[0] == (1.0, 2.0) and match.times[3] == (4.0, 5.0)
    assert match.times[1][0] == 2.0 and match.times[1][1] == match.times[2][0]
    assert match.times[2][1] == pytest.approx(4.0)
    assert match.agreement == pytest.approx(2 / 3)  # a sound is not spoken
    assert spread_unknown(["a", "b"], [None, None], 1.0, 3.0) == [(1.0, 2.0), (2.0, 3.0)]
    assert match_words(["never", "mind"], [], 0.0, 1.0).agreement == 0


# ---------------------------------------------------------------------------- transcripts, speakers


def words_of(*pairs: tuple[str, str | None]) -> list[TimedWord]:
    return [TimedWord(text, i, i + 1, speaker) for i, (text, speaker) in enumerate(pairs)]


def speakers(words: list[TimedWord]) -> str:
    return "".join(str(word.speaker) for word in number_speakers(words, "here"))


def test_labels_are_numbered_as_they_appear() -> None:
    assert speakers(words_of(("a", "Bob"), ("b", "Anna"), ("c", "Bob"))) == "121"
    assert speakers(words_of(("a", "2"), ("b", "1"))) == "12"
    assert speakers(words_of(("a", None), ("b", None))) == "11"
    assert (
        speakers(words_of(("a", None), ("b", "x"), ("c", None), ("d", "y"), ("e", None))) == "11122"
    )


def test_tags_are_what_they_say() -> None:
    assert speakers(words_of(("a", "[S2]"), ("b", "[S1]"))) == "21"
    assert speakers(words_of(("a", "[S2]"))) == "2"


def test_three_speakers_are_one_too_many() -> None:
    with pytest.raises(Rejected, match=r"here: 3 speakers \('a', 'b', 'c'\)") as error:
        speakers(words_of(("x", "a"), ("y", "b"), ("z", "c")))
    assert error.value.reason == "too_many_speakers"


def test_any_speaker_tag_names_a_speaker() -> None:
    words = written_words(Turn(text="[s1]Hi [S7] you [S1] there."), [])
    assert [word.text for word in words] == ["Hi", "you", "there."]
    timed = [TimedWord(word.text, 0.0, 1.0, word.speaker) for word in words]
    assert speakers(timed) == "121"
    words = written_words(Turn(text="[S1] a [S2] b [S3] c"), [])
    with pytest.raises(Rejected, match=r"3 speakers \('\[S1\]', '\[S2\]', '\[S3\]'\)"):
        speakers([TimedWord(word.text, 0.0, 1.0, word.speaker) for word in words])


def test_tags_in_a_text_name_the_speakers_of_its_words() -> None:
    text = 'Well, [S2]Hello <break time="1s"/> you:\n[S1] (clears throat) Hi.'
    words = written_words(Turn(text=text, speaker="Anna"), ["(clears throat)"])
    assert [(word.text, word.speaker) for word in words] == [
        ("Well,", "[S1]"), ("Hello", "[S2]"), ("you", "[S2]"), ("(clears throat)", "[S1]"),
        ("Hi.", "[S1]"),
    ]  # fmt: skip
    assert written_words(Turn(text="Hi.", speaker="Anna"), [])[0].speaker == "Anna"


@pytest.mark.parametrize(
    ("content", "reason", "message"),
    [
        ({"text": 5}, "bad_record", "x: text must be a string, got 5"),
        ({"words": "no"}, "bad_record", 'x: words must be a list, got "no"'),
        ({"words": [["a", 1]]}, "bad_record", r'word 0, \["a", 1\], is neither'),
        ({"words": [{"text": "a", "start": 0}]}, "bad_record", "word 0, .* is neither"),
        ({"words": [["a", [2, 1]]]}, "bad_words", "'a' ends at 1.0 s, before it starts at 2.0"),
        ({"words": [["a", [-1, 1]]]}, "bad_words", "'a': start is -1.0"),
        ({"words": [["a", [float("nan"), 1]]]}, "bad_words", "start is nan"),
        ({"words": [["a", [0, 1], ["x"]]]}, "bad_record", "a speaker is a string or number"),
        ({"turns": [5]}, "bad_record", "turn 0 must be an object"),
        ({"turns": [{"text": "a", "start": "x"}]}, "bad_record", "start must be a number"),
        ({"turns": [{"text": "a", "start": 2, "end": 1}]}, "bad_words", "before it starts"),
    ],
)
def test_malformed_transcripts(content: dict[str, Any], reason: str, message: str) -> None:
    with pytest.raises(Rejected, match=message) as error:
        read_turns(content, "x")
    assert error.value.reason == reason


def test_columns_of_a_data_set_are_a_list_of_words_too() -> None:
    columns = {"text": ["b b", " "], "start": [0, 2], "end": [1, 3], "speaker": ["x", "y"]}
    (turn,) = read_turns({"words": columns}, "x")
    assert turn.words is not None
    assert [(w.text, w.start, w.end, w.speaker) for w in turn.words] == [
        ("b", 0.0, 0.5, "x"), ("b", 0.5, 1.0, "x"),
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------- aligners


class Counting:
    """Puts word i of n at i / n of what it is given, and remembers that."""

    name = "counting"

    def __init__(self) -> None:
        self.asked: list[tuple[float, list[str]]] = []

    def settings(self) -> dict[str, Any]:
        return {}

    def place(self, wave: Any, rate: int, words: Any, where: str) -> list[tuple[float, float]]:
        seconds = len(wave) / rate
        self.asked.append((seconds, list(words)))
        edges = np.linspace(0, seconds, len(words) + 1).tolist()
        return list(zip(edges, edges[1:], strict=False))


def timed(*turns: Turn, aligner: Any = None, seconds: float = 4.0) -> list[TimedWord]:
    item = Item("a", "here", lambda longest: Recording(noise(1)[:, None], RATE), tuple(turns))
    aligner = aligner or ALIGNERS["data"]("", 0.6)
    return list(time_words(item, noise(seconds), RATE, aligner, [], 0.6))


def test_times_of_the_data_come_first() -> None:
    turn = Turn(words=(TimedWord("a", 1, 2, "x"), TimedWord("b", 2, 3)), speaker="y")
    assert [(w.text, w.start, w.speaker) for w in timed(turn)] == [("a", 1, "x"), ("b", 2, "y")]


def test_text_and_times_together_give_the_written_words() -> None:
    words = (TimedWord("hello", 1, 2, "x"), TimedWord("twenty", 2, 3, "y"), TimedWord("one", 3, 4))
    found = timed(Turn(text="“Hello,” 21!", words=words))
    assert [(w.text, w.start, w.end, w.speaker) for w in found] == [
        ("“Hello,”", 1, 2, "x"), ("21!", 2, 4, "y"),
    ]  # fmt: skip
    with pytest.raises(Rejected, match="here: 0 % of the transcript's words are among those that"):
        timed(Turn(text="Other things entirely", words=words))


def test_words_out_of_order_are_not_sorted() -> None:
    with pytest.raises(Rejected, match="'b' starts at 1 s, before 'a' in front of it") as error:
        timed(Turn(words=(TimedWord("a", 2, 3), TimedWord("b", 1, 2))))
    assert error.value.reason == "words_out_of_order"


def test_text_without_times_needs_an_aligner() -> None:
    with pytest.raises(Rejected, match="no word times; choose --aligner whisper or") as error:
        timed(Turn(text="Hello."))
    assert error.value.reason == "no_times"


def test_turns_are_aligned_where_they_lie() -> None:
    aligner = Counting()
    turns = (
        Turn(text="c d", speaker="y", start=2.0, end=3.0),
        Turn(text="a b", speaker="x", start=0.5, end=1.5),
        Turn(words=(TimedWord("e", 3.5, 3.6, "x"),)),
    )
    found = timed(*turns, aligner=aligner)
    assert [(w.text, w.speaker) for w in found] == [
        ("a", "x"), ("b", "x"), ("c", "y"), ("d", "y"), ("e", "x"),
    ]  # fmt: skip
    assert [seconds for seconds, _ in aligner.asked] == pytest.approx([1.2, 1.2])
    assert [w.start for w in found] == pytest.approx([0.4, 1.0, 1.9, 2.5, 3.5])


def test_turns_without_times_are_aligned_in_one_go() -> None:
    aligner = Counting()
    turns = Turn(text="a b", speaker="x", start=0.5, end=1.0), Turn(text="c", speaker="y")
    found = timed(*turns, aligner=aligner)
    assert aligner.asked == [(4.0, ["a", "b", "c"])]
    assert [(w.text, w.speaker) for w in found] == [("a", "x"), ("b", "x"), ("c", "y")]


def test_a_turn_behind_the_end() -> None:
    with pytest.raises(Rejected, match=r"a turn starts at 9 s, the audio ends at 4\.00 s"):
        timed(Turn(text="a", start=9.0, end=10.0), aligner=Counting())


def test_estimates_fill_the_sounding_part() -> None:
    wave = np.concatenate([np.zeros(RATE, np.float32), noise(2), np.zeros(RATE, np.float32)])
    found = EstimateAligner().place(wave, RATE, ["Hello", "(clears throat)", "you"], "x")
    assert len(found) == 3
    assert found[0][0] == pytest.approx(1, abs=0.05) and found[-1][1] == pytest.approx(3, abs=0.05)
    with pytest.raises(Rejected, match="x: cannot spread"):
        EstimateAligner().place(np.zeros(RATE, np.float32), RATE, ["Hello"], "x")


def test_empty_and_missing_transcripts() -> None:
    def reason(*turns: Turn) -> str:
        item = Item("a", "here", lambda longest: Recording(noise(1)[:, None], RATE), turns)
        with pytest.raises(Rejected) as error:
            transcript_words(item, [])
        return error.value.reason

    assert reason() == "no_transcript"
    assert reason(Turn(text=" \n")) == "empty_transcript"
    assert reason(Turn(text="... —")) == "empty_transcript"
    assert reason(Turn(words=())) == "empty_transcript"


# --------------------------------------------------------- whisper and pocketsphinx, at their doors


def test_whisper_is_asked_for_words_and_matched(monkeypatch: pytest.MonkeyPatch) -> None:
    said = [(" Hello", 0.5, 1.0), (" their", 1.0, 1.5), (" you", 2.0, 2.5)]

    class Model:
        def __init__(self, name: str, **_: Any) -> None:
            self.name = name

        def transcribe(self, wave: np.ndarray, **options: Any) -> Any:
            assert wave.shape == (3 * 16_000,) and options["word_timestamps"]
            assert options["temperature"] == 0  # sampling would make every run another
            words = [types.SimpleNamespace(word=w, start=s, end=e) for w, s, e in said]
            return [types.SimpleNamespace(words=words)], None

    module = types.ModuleType("faster_whisper")
    module.WhisperModel = Model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "faster_whisper", module)
    aligner = ALIGNERS["whisper"]("some/folder", 0.6)
    found = aligner.place(noise(3), RATE, ["Hello,", "there", "you!"], "x")
    assert found == [(0.5, 1.0), (1.0, 1.5), (2.0, 2.5)]
    with pytest.raises(Rejected, match=r"x: 33 % .*recognised \('Hello their you'…\)") as error:
        aligner.place(noise(3), RATE, ["Hello", "Mister", "Smith"], "x")
    assert error.value.reason == "transcript_mismatch"


class _Segment(types.SimpleNamespace):
    word: str
    start_frame: int
    end_frame: int


class _Decoder:
    """As pocketsphinx's: a dictionary, and each word 20 frames long after 10 of silence."""

    def __init__(self, **config: Any) -> None:
        assert config["cmn"] == "batch" and config["bestpath"] is False
        self.words = {"hello": "HH AH L OW", "there": "DH EH R", "one": "W AH N"}
        self.added: list[tuple[str, str]] = []
        self.frames = 0

    def lookup_word(self, word: str) -> str | None:
        return self.words.get(word)

    def add_word(self, word: str, phones: str) -> None:
        self.words[word] = phones
        self.added.append((word, phones))

    def set_align_text(self, text: str) -> None:
        self.text = text.split()
        assert all(word in self.words for word in self.text)

    def reinit_feat(self) -> None:
        pass

    def start_utt(self) -> None:
        self.frames = 0

    def process_raw(self, pcm: bytes, full_utt: bool) -> None:
        assert full_utt
        self.frames = len(pcm) // 320

    def end_utt(self) -> None:
        pass

    def seg(self) -> Any:
        if self.frames < 30 * len(self.text):
            return None
        parts = []
        for index, word in enumerate(self.text):
            parts.append(_Segment(word="<sil>", start_frame=30 * index, end_frame=30 * index + 9))
            name = "there(2)" if word == "there" else word
            start = 30 * index + 10
            parts.append(_Segment(word=name, start_frame=start, end_frame=start + 19))
        return parts


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> PocketsphinxAligner:
    module = types.ModuleType("pocketsphinx")
    module.Decoder = _Decoder  # type: ignore[attr-defined]
    module.set_loglevel = lambda level: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pocketsphinx", module)
    return PocketsphinxAligner()


def test_forced_alignment_knows_words_their_sounds_and_what_is_silent(
    forced: PocketsphinxAligner,
) -> None:
    words = ["“Hello,", "(laughs)", "there", "Zorblax", "BBC", "1,001"]
    found = forced.place(noise(3), RATE, words, "x")
    decoder: Any = forced._decoder
    middle = 0.0078
    spoken = [0, 2, 3, 4, 5]
    for place, index in enumerate(spoken):
        start = 0.3 * place + 0.1 + middle
        assert found[index] == pytest.approx((start, start + 0.2))
    assert found[1] == pytest.approx((found[0][1], found[2][0]))
    assert [phones for _, phones in decoder.added] == [
        "Z AO R B L AE K S",
        "B IY B IY S IY",
        "W AH N TH AW S AE N D W AH N",
    ]
    names = [name for name, _ in decoder.added]
    assert decoder.text == ["hello", "there", *names]
    forced.place(noise(3), RATE, words, "x")
    assert len(decoder.added) == 3  # known by now


def test_forced_alignment_that_does_not_fit(forced: PocketsphinxAligner) -> None:
    with pytest.raises(Rejected, match="x: the 2 words of the transcript do not fit") as error:
        forced.place(noise(0.3), RATE, ["hello", "there"], "x")
    assert error.value.reason == "alignment_failed"
    with pytest.raises(Rejected, match="no word of it has a sound"):
        forced.place(noise(1), RATE, ["(laughs)", "日本"], "x")


def test_without_the_extra_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    with pytest.raises(Dia2Error, match=r'pip install "dia2-jax\[align\]"'):
        ALIGNERS["pocketsphinx"]("", 0.6)


def test_every_reason_is_in_the_table(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown reason 'typo'"):
        Rejected("typo", "x")
