from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from dia2_jax.errors import CheckpointError, HubError
from dia2_jax.text.tokenizer import Tokenizer


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_strings_and_ids_match_golden(golden):
    expected = dict(golden.values["constants"])
    expected.pop("ungenerated")
    assert asdict(golden.tokenizer.ids) == expected
    for case in golden.values["strings"]:
        assert golden.tokenizer.encode(case["text"]) == case["ids"], case["text"]


def test_decode_keeps_special_tokens(tokenizer):
    text = "[S1] Hello (clears throat) café"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sound_tags_are_those_with_white_space(golden, folder, data):
    assert golden.tokenizer.sound_tags == ("(clears throat)",)

    def add(content):
        for index, text in enumerate(["(sighs very deeply)", "<two words>", "(one)"]):
            token = dict(content["added_tokens"][-1], id=620 + index, content=text)
            content["added_tokens"].append(token)

    edit(folder / "tokenizer.json", add)
    tags = Tokenizer.from_folder(folder, data).sound_tags
    assert tags == ("(clears throat)", "(sighs very deeply)")


@pytest.mark.parametrize(
    ("bos", "expected"),
    [
        ("<|endoftext|>", 1),  # id 0 counts as absent
        ("<|im_start|>", 1),
        ("<zero>", 7),
        ({"content": "<zero>", "lstrip": False}, 7),
        ("<never heard of>", 1),
        (None, 1),
    ],
)
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_bos_rule(folder, data, file, bos, expected):
    edit(folder / "tokenizer_config.json", lambda content: content.pop("bos_token"))
    (folder / "special_tokens_map.json").write_text("{}")
    edit(folder / file, lambda content: content.update(bos_token=bos))
    assert Tokenizer.from_folder(folder, data).ids.bos == expected


def test_bos_without_any_file_is_one(folder, data):
    (folder / "tokenizer_config.json").unlink()
    assert Tokenizer.from_file(folder / "tokenizer.json", data).ids.bos == 1


def test_missing_speaker_tags_fall_back_to_new_word(folder, data):
    def rename(content):
        for token in content["added_tokens"]:
            token["content"] = token["content"].replace("[S2]", "[other]")

    edit(folder / "tokenizer.json", rename)
    tokenizer = Tokenizer.from_folder(folder, data)
    assert (tokenizer.ids.spk1, tokenizer.ids.spk2) == (600, data.text_new_word_token_id)
    assert tokenizer.has_speaker_tags == (True, False)
    assert (tokenizer.speaker_prefix(1), tokenizer.speaker_prefix(2)) == ("[S1]", None)


def test_truncation_and_padding_of_the_file_are_ignored(folder, data):
    def limit(content):
        content["truncation"] = {
            "direction": "Right",
            "max_length": 2,
            "strategy": "LongestFirst",
            "stride": 0,
        }

    expected = Tokenizer.from_folder(folder, data).encode("Hello Dia2!")
    edit(folder / "tokenizer.json", limit)
    assert Tokenizer.from_folder(folder, data).encode("Hello Dia2!") == expected


def test_speaker_prefix_refuses_other_speakers(tokenizer):
    with pytest.raises(ValueError, match="speaker must be 1 or 2, not 3"):
        tokenizer.speaker_prefix(3)


def test_missing_file_is_named(folder, data):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(HubError, match="no tokenizer at .*tokenizer.json: copy"):
        Tokenizer.from_folder(folder, data)


def test_corrupt_files_are_named(folder, data):
    config = folder / "tokenizer_config.json"
    good = config.read_bytes()
    for content, message in [
        (b"[]", "tokenizer_config.json must hold one JSON object"),
        (b"{", "tokenizer_config.json is not valid JSON"),
        (b"\xff\xfe{", "tokenizer_config.json is not valid JSON"),
    ]:
        config.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            Tokenizer.from_folder(folder, data)
    config.write_bytes(good)
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="tokenizer.json is not a readable tokenizer"):
        Tokenizer.from_folder(folder, data)


def test_vocabulary_beyond_the_model_is_refused(folder, data):
    data.text_vocab_size = 600
    with pytest.raises(CheckpointError, match="token id 607 does not fit data.text_vocab_size 600"):
        Tokenizer.from_folder(folder, data)
