"""Prompt sets: those of the repository, files of one's own, lists of Seed-TTS-eval."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dia2_jax.config import load_dia2_config
from dia2_jax.errors import DataError
from dia2_jax.text.script import parse_script, speakable
from dia2_jax.text.tokenizer import Tokenizer
from eval.scoring.intelligibility import Intelligibility
from eval.scoring.prompts import FOLDER, Prompt, PromptVoice, built_in, read_set, read_sets
from eval.scoring.scripts import script_words
from eval.scoring.takes import Take

TINY = Path(__file__).parent.parent / "golden" / "parity"

SETS = {"lines": 60, "dialogues": 30, "everyday": 200, "long": 12, "stress": 20}


def test_the_prompt_sets_are_those_of_their_readme() -> None:
    assert built_in() == sorted(SETS)
    assert {name: len(read_set(name).prompts) for name in SETS} == SETS
    text = (FOLDER / "README.md").read_text()
    assert all(f"| `{name}` |" in text for name in SETS)


def test_prompts_parse_and_have_something_to_say() -> None:
    config = load_dia2_config(json.loads((TINY / "config.json").read_text()))
    tokenizer = Tokenizer.from_folder(TINY, config.data)
    ids: Counter[str] = Counter()
    for name in SETS:
        for prompt in read_set(name).prompts:
            ids[prompt.id] += 1
            assert prompt.script.startswith(("[S1] ", "[S2] ")), prompt.id
            assert prompt.script == " ".join(prompt.script.split()), prompt.id
            silent = prompt.id == "stress-006"  # punctuation alone: to be refused
            assert speakable(parse_script(prompt.script, tokenizer)) != silent, prompt.id
    assert max(ids.values()) == 1


def turns(prompt: Prompt) -> list[str]:
    speakers = [speaker for _, speaker in script_words(prompt.script)]
    return [s for i, s in enumerate(speakers) if i == 0 or s != speakers[i - 1]]


def test_kinds_and_turns_are_as_promised() -> None:
    everyday = read_set("everyday").prompts
    assert Counter(prompt.kind for prompt in everyday) == {"line": 150, "dialogue": 50}
    for prompt in everyday:
        assert len(turns(prompt)) == (1 if prompt.kind == "line" else 2), prompt.id
        assert 3 <= len(script_words(prompt.script)) <= 16 * len(turns(prompt)) + 16, prompt.id
    assert all(len(turns(prompt)) == 1 for prompt in read_set("lines").prompts)
    dialogue_turns = [len(turns(prompt)) for prompt in read_set("dialogues").prompts]
    assert (min(dialogue_turns), max(dialogue_turns)) == (2, 8)
    # At two and a half words a second, 30 to 100 s.
    lengths = [len(script_words(prompt.script)) / 2.5 for prompt in read_set("long").prompts]
    assert min(lengths) >= 30 and max(lengths) <= 101


def test_a_manifest_of_a_corpus_is_a_prompt_set(tmp_path: Path) -> None:
    word = {"text": "Hi.", "start": 0.1, "end": 0.5, "speaker": "[S2]"}
    row = {"id": "x/1", "path": "a/x.flac", "duration": 1.5, "kind": "line", "script": "[S2] Hi."}
    (tmp_path / "test.jsonl").write_text(json.dumps({**row, "words": [word]}) + "\n\n")
    (prompt,) = read_set(str(tmp_path / "test.jsonl")).prompts
    assert prompt.reference == tmp_path / "a/x.flac" and prompt.seconds == 1.5
    assert (prompt.set, prompt.words[0].speaker, prompt.words[0].end) == ("test", "[S2]", 0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no prompts"),
        ("{", r"p\.jsonl:1: is no JSON"),
        ("[]", "is no JSON object"),
        ('{"id": "a"}', "script must be a text"),
        ('{"id": 1, "script": "b"}', "id must be a text"),
        ('{"id": "a", "script": "b"}\n{"id": "a", "script": "c"}', r":2: id 'a' occurs twice"),
        ('{"id": "a", "script": "b", "seconds": 0}', "seconds must be a number above 0"),
        ('{"id": "a", "script": "b", "words": [{"text": "b"}]}', "a word needs text, start"),
        ('{"id": "a", "script": "b", "words": [{"text": "b", "start": 0, "end": "x"}]}', "seconds"),
        ('{"id": "a", "script": "b", "words": [{"text": 1, "start": 0, "end": 1}]}', "text must"),
        (
            '{"id": "a", "script": "b", "words": [{"text": "b", "start": 1, "end": 0}]}',
            "not before",
        ),
        ('{"id": "a", "script": "b", "words": [{"text": "b", "start": 0, "end": NaN}]}', "seconds"),
        (
            '{"id": "a", "script": "b", "words": [{"text": "b", "speaker": "S1", "start": 0, '
            '"end": 1}]}',
            r"its speaker \[S1\] or \[S2\]",
        ),
        ('{"id": "a", "script": "b", "seconds": 1e999}', "seconds must be a number above 0"),
        ('{"id": "a", "script": "b", "kind": null}', "kind must be a text"),
        ('{"id": "a", "script": "b", "also": "c"}', 'also must be a list of texts .*got "c"'),
        ('{"id": "a", "script": "b", "also": [1]}', "also must be a list of texts"),
        ('{"id": "a", "script": "b", "also": [" "]}', "also must be a list of texts"),
        ('{"id": "a", "script": "b", "also": null}', "also must be a list of texts"),
        ('{"id": "a", "script": "b", "reference": ""}', "reference must be the path"),
        (r'{"id": "a", "script": "\ud83d"}', "is no JSON .*surrogates not allowed"),
        ("[" * 100_000, "is no JSON .*recursion"),
    ],
)
def test_a_bad_prompt_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        read_set(str(tmp_path / "p.jsonl"))


def test_a_text_may_hold_any_line_end_but_its_own(tmp_path: Path) -> None:
    row = json.dumps({"id": "a", "script": "[S1] One.\u2028Two."}, ensure_ascii=False)
    (tmp_path / "p.jsonl").write_bytes(f"\ufeff{row}\r\n\r\n".encode())
    (prompt,) = read_set(str(tmp_path / "p.jsonl")).prompts
    assert prompt.script == "[S1] One.\u2028Two."


def test_a_prompt_may_accept_further_transcripts(tmp_path: Path) -> None:
    row = {"id": "a", "script": "[S1] Baker St.", "also": ["Baker Street."]}
    (tmp_path / "p.jsonl").write_text(f'{json.dumps(row)}\n{{"id": "b", "script": "[S1] Hi."}}')
    a, b = read_set(str(tmp_path / "p.jsonl")).prompts
    assert (a.also, b.also) == (("Baker Street.",), ())


def listener(text: str) -> Intelligibility:
    return Intelligibility(lambda wave, rate: text, {})


def test_a_transcript_that_the_prompt_accepts_has_no_errors() -> None:
    prompt = Prompt(
        "set", "a", "line", "[S1] Baker St. 3, approx.",
        also=("Baker Street 3, approximately.", "Hmm."),
    )  # fmt: skip

    def heard(text: str) -> dict[str, Any]:
        silence = np.zeros(24_000, np.float32)
        return listener(text).score(Take("generated", prompt, silence, 24_000))

    for perfect in ("Baker St. 3, approx.", "Baker Street three approximately"):
        assert heard(perfect)["perfect"] and heard(perfect)["words"] == 4
    # Compared with the one that it is nearest to; no alternative of no words accepts silence.
    far = heard("Baker Street 3 or so")
    assert (far["errors"], far["script_normalised"]) == (2, "baker street 3 approximately")
    assert heard("Baker St. 4")["script_normalised"] == "baker saint 3 approx"
    assert (heard("")["deletions"], heard("")["errors"]) == (4, 4)


@pytest.mark.parametrize(
    ("name", "heard"),
    [
        ("lines/line-004", "Call me back at 555-0147."),
        ("lines/line-004", "Call me back at five, five, five, zero, one, four, seven."),
        ("stress/stress-012", "Dr. Smith lives at 221 Baker Street, approx 3km from St. Mary's."),
        (
            "stress/stress-012",
            "Doctor Smith lives at 221 Baker Street, approximately three kilometres from Saint "
            "Mary's.",
        ),
        (
            "stress/stress-013",
            "The CEO of NASA's IT department met the FBI, the BBC and UNESCO at 7pm.",
        ),
        ("stress/stress-014", "e.g. 5kg at $4.99 per kg, i.e. under $25 including VAT"),
        (
            "stress/stress-014",
            "For example, five kilograms at $4.99 per kilogram, that is under $25 including VAT.",
        ),
        ("stress/stress-020", "Hey, visit https://example.org now, okay?"),
    ],
)
def test_a_perfect_reading_of_numbers_and_abbreviations_has_no_errors(
    name: str, heard: str
) -> None:
    of, identifier = name.split("/")
    (prompt,) = (prompt for prompt in read_set(of).prompts if prompt.id == identifier)
    scores = listener(heard).compare(prompt.script, heard, prompt.also)
    assert scores["perfect"], (scores["script_normalised"], scores["transcript_normalised"])
    # It is the right words that are accepted, not any.
    worse = listener(heard).compare(prompt.script, heard.replace(" at ", " in ", 1), prompt.also)
    assert worse["errors"] == (" at " in heard)


def test_sets_are_told_apart_by_name(tmp_path: Path) -> None:
    shutil.copy(FOLDER / "lines.jsonl", tmp_path / "lines.jsonl")
    with pytest.raises(DataError, match="another prompt set 'lines'"):
        read_sets(["lines", str(tmp_path / "lines.jsonl")])
    with pytest.raises(DataError, match="no such prompt set.*everyday"):
        read_sets(["everyda"])


def test_a_limit_takes_of_every_kind_and_a_larger_one_contains_it() -> None:
    whole = read_set("everyday")
    few, more = (set(p.id for p in whole.limited(n).prompts) for n in (20, 50))
    assert len(few) == 20 and few < more
    assert {p.kind for p in whole.limited(20).prompts} == {"line", "dialogue"}
    assert whole.limited(None) is whole and whole.limited(10**6).prompts == whole.prompts


def test_the_seed_of_a_take_is_of_run_seed_and_id_alone() -> None:
    a, b = Prompt("s", "a", "line", "x"), Prompt("t", "a", "long", "y")
    assert a.seed(3) == b.seed(3) != a.seed(4)
    assert a.seed(3) != Prompt("s", "b", "line", "x").seed(3)
    assert 0 <= a.seed(3) < 2**32


def test_a_list_of_seed_tts_eval_is_a_prompt_set(tmp_path: Path) -> None:
    lines = "a|Hi there.|voices/a.wav|Say this.\nb.wav||voices/b.wav|And that.|wavs/b.wav\n"
    (tmp_path / "meta.lst").write_text(lines)
    a, b = read_set(str(tmp_path / "meta.lst")).prompts
    assert (a.id, a.script, a.reference, a.set) == ("a", "[S1] Say this.", None, "meta")
    assert a.voices == {"[S1]": PromptVoice(tmp_path / "voices/a.wav", "Hi there.")}
    assert (b.id, b.reference) == ("b", tmp_path / "wavs/b.wav")
    assert b.voices["[S1]"].text is None


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.lst", "a|b|c.wav", r"m\.lst:1: needs id\|text of the voice.*got 3 fields"),
        ("m.lst", "a|b||say", "needs id"),
        ("m.jsonl", '{"id": "a", "script": "b", "voices": {"S1": {}}}', r"\[S1\] and \[S2\]"),
        ("m.jsonl", '{"id": "a", "script": "b", "voices": {"[S1]": "x.wav"}}', "of path and"),
        ("m.jsonl", '{"id": "a", "script": "b", "voices": {"[S1]": {"text": "x"}}}', "of path"),
        ("m.jsonl", '{"id": "a", "script": "b", "voices": {"[S1]": {"path": 1}}}', "of path"),
    ],
)
def test_a_bad_voice_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_set(str(tmp_path / name))
