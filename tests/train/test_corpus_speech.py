"""Speech of a corpus: word times, assembly, shards, interruptions, tokenizer, program."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner
from corpus_files import write_files

from dia2_jax.config import load_dia2_config
from dia2_jax.data import Pace, SpokenWord, align
from dia2_jax.errors import DataError
from dia2_jax.text.tokenizer import Tokenizer
from train.codec_training.sources import list_recordings, open_corpus
from train.config import read_config
from train.corpus import main
from train.corpus_making import workers
from train.corpus_making.assembly import Unclear, phoneme_targets, record
from train.corpus_making.bpe import train_tokenizer, write_tokenizer
from train.corpus_making.config import CorpusConfig, TokenizerConfig, VoiceConfig
from train.corpus_making.piper import _timed
from train.corpus_making.pools import Turn
from train.corpus_making.program import make_corpus
from train.corpus_making.scripts import Item
from train.corpus_making.speech import CLASSES, Phoneme, Utterance
from train.corpus_making.tones import ToneSynthesiser
from train.corpus_making.word_times import word_times
from train.preparation.sources import ManifestSource

ITEM = Item(
    3,
    "test",
    (
        Turn(1, ("The dog is in the garden.", "Is it good?")),
        Turn(2, ("Yes, it is.",)),
    ),
)


@pytest.fixture
def config(tmp_path: Path) -> CorpusConfig:
    return read_config(CorpusConfig, write_files(tmp_path))


@pytest.fixture
def voice() -> ToneSynthesiser:
    return ToneSynthesiser(VoiceConfig(kind="tones", length_scale=1.0))


def phonemes(text: str) -> list[Phoneme]:
    """A phoneme a letter, 0.1 s each; spaces part groups."""
    found, group = [], 0
    for place, letter in enumerate(text):
        group += letter == " "
        found.append(Phoneme(letter, place / 10, (place + 1) / 10, group))
    return found


# --------------------------------------------------------------------------------------- word times


def test_words_that_are_groups_have_their_times() -> None:
    times = word_times(["so", "mad"], ["so", "mad"], phonemes("so mad"))
    assert times == [(0.0, 0.2), (pytest.approx(0.3), pytest.approx(0.6))]


def test_joined_and_cut_words_are_told_apart() -> None:
    # "of the" as one group, "today" as two, and vowels that change in the sentence.
    words = ["some", "of", "the", "today"]
    times = word_times(words, ["sʌm", "ʌv", "ðə", "tədeɪ"], phonemes("sʌm əvði tə deɪ"))
    assert times is not None
    starts = [round(10 * start) for start, _ in times]
    assert starts == [0, 4, 6, 9]
    assert round(10 * times[-1][1]) == 15


def test_words_that_were_not_spoken_are_noticed() -> None:
    assert word_times(["hello", "there"], ["hɛloʊ", "ðɛɹ"], phonemes("aɪ wɪl biː")) is None
    assert word_times(["a", "-"], ["eɪ", ""], phonemes("eɪ")) is None


def test_durations_of_piper_become_phonemes() -> None:
    symbols = list("hˈoʊ, ʌvðə") + ["ː", "."]
    seconds = np.full(len(symbols) + 2, 0.1)  # begin, each symbol, end
    found, group = _timed(symbols, seconds, 1.0, 4)
    times = [(p.symbol, p.group, round(p.start, 3), round(p.end, 3)) for p in found if p.base]
    assert times == [
        ("h", 4, 1.1, 1.2),
        ("ˈo", 4, 1.2, 1.4),  # a stress mark's time is its vowel's
        ("ʊ", 4, 1.4, 1.5),
        ("ʌ", 5, 1.7, 1.8),
        ("v", 5, 1.8, 1.9),
        ("ð", 5, 1.9, 2.0),
        ("əː", 5, 2.0, 2.2),
    ]
    assert group == 6
    assert found[-1].end == pytest.approx(1.0 + seconds.sum())


# ----------------------------------------------------------------------------------------- assembly


def test_words_sound_where_they_are_said_to(config: CorpusConfig, voice: ToneSynthesiser) -> None:
    (recording,) = record(ITEM, voice, config, np.random.default_rng(0))
    rate = config.sample_rate
    words = recording.words
    assert [word.text for word in words] == [w for turn in ITEM.turns for w in turn.text.split()]
    assert [word.speaker for word in words] == [1] * 9 + [2] * 3
    assert words[0].start == pytest.approx(config.pauses.lead)
    assert all(a.end <= b.start for a, b in zip(words, words[1:], strict=False))
    inside = np.concatenate(
        [recording.wave[round(w.start * rate) + 200 : round(w.end * rate) - 200] for w in words]
    )
    gaps = [(words[8].end, words[9].start), (words[5].end, words[6].start)]
    for begin, end in gaps:
        assert config.pauses.least <= end - begin + 1e-6 < 0.5
        middle = recording.wave[round((begin + 0.09) * rate) : round((end - 0.04) * rate)]
        assert np.abs(middle).max() < 0.01
    assert np.sqrt(np.mean(inside**2)) > 0.03
    assert len(recording.wave) == round((words[-1].end + config.pauses.tail) * rate)


def test_pauses_are_shortened_to_what_the_machine_can_do(
    config: CorpusConfig, voice: ToneSynthesiser
) -> None:
    pauses = replace(config.pauses, turn=(0.4, 0.4), sentence=(0.4, 0.4), reach=0.45, least=0.1)
    (recording,) = record(ITEM, voice, replace(config, pauses=pauses), np.random.default_rng(0))
    words = recording.words
    for before, word in ((words[5], words[6]), (words[8], words[9])):
        gap, last = word.start - before.end, before.end - before.start
        assert gap == pytest.approx(max(0.45 - last, 0.1))


def test_targets_say_which_phonemes_a_frame_holds(
    config: CorpusConfig, voice: ToneSynthesiser
) -> None:
    (recording,) = record(ITEM, voice, config, np.random.default_rng(0))
    targets = phoneme_targets(recording, config)
    assert len(targets) == -(-len(recording.wave) * 25 // (2 * config.sample_rate))
    np.testing.assert_allclose(targets.sum(axis=1), 1.0, atol=1e-5)
    sounding = sum(phoneme.end - phoneme.start for phoneme in recording.phonemes)
    assert targets[:, 1:].sum() / config.frame_rate == pytest.approx(sounding, rel=1e-4)
    assert targets[0].argmax() == CLASSES.index(recording.phonemes[0].base)


def test_speech_without_the_words_is_refused(config: CorpusConfig, voice: ToneSynthesiser) -> None:
    class Mumbling(ToneSynthesiser):
        def speak(self, text: str, rng: np.random.Generator) -> Utterance:
            return super().speak("mmm mmm", rng)

    with pytest.raises(Unclear, match="The dog is in the garden"):
        record(ITEM, Mumbling(config.voice), config, np.random.default_rng(0))


def test_exchanged_speakers_say_the_same_at_the_same_times(
    config: CorpusConfig, voice: ToneSynthesiser
) -> None:
    (alone,) = record(ITEM, voice, config, np.random.default_rng(0))
    first, other = record(ITEM, voice, config, np.random.default_rng(0), exchange=True)
    np.testing.assert_array_equal(first.wave, alone.wave)
    assert first.words == alone.words and other.phonemes == first.phonemes
    assert [replace(word, speaker=3 - word.speaker) for word in other.words] == list(first.words)
    # What the item with speakers exchanged would sound like, but for its noise.
    swapped = replace(
        ITEM, turns=tuple(replace(turn, speaker=3 - turn.speaker) for turn in ITEM.turns)
    )
    assert swapped.script == ITEM.exchanged
    (said,) = record(swapped, voice, config, np.random.default_rng(0))
    np.testing.assert_allclose(other.wave, said.wave, atol=1e-6)
    assert np.abs(other.wave - first.wave).max() > 0.01


# ------------------------------------------------------------------------------------------ program


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_corpus_is_read_by_preparation_and_codec(config: CorpusConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    totals = make_corpus(config, out)
    assert totals["train"].seconds >= 36
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    assert len(rows) == totals["train"].kept == sum(totals["train"].kinds.values())
    source = ManifestSource(out / "train.jsonl")
    row = source.row(0)
    assert row.item is not None and len(source) == len(rows)
    said = [word for turn in row.item.turns for word in turn.words or ()]
    assert [word.text for word in said] == [word["text"] for word in rows[0]["words"]]
    assert {word.speaker for word in said} <= {"[S1]", "[S2]"}
    assert soundfile.info(out / rows[0]["path"]).samplerate == config.sample_rate
    recordings = list_recordings([str(out / "train.jsonl")])
    codec = open_corpus(recordings[:4], tmp_path / "cache", config.sample_rate, 1280)
    assert codec.targets is not None and codec.targets.shape[1] == len(CLASSES)
    assert "Apache-2.0" in (out / "README.md").read_text()


def test_training_items_are_recorded_with_speakers_exchanged(
    config: CorpusConfig, tmp_path: Path
) -> None:
    config = replace(config, voice=replace(config.voice, exchange=True))
    totals = make_corpus(config, tmp_path / "out")
    out = tmp_path / "out"
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    assert len(rows) == totals["train"].kept and 36 <= totals["train"].seconds < 36 + 60
    for row, other in zip(rows[::2], rows[1::2], strict=True):
        assert other["id"] == f"{row['id']}x" and other["targets"] == row["targets"]
        assert other["script"].translate(str.maketrans("12", "21")) == row["script"]
        pairs = zip(row["words"], other["words"], strict=True)
        assert all(word["speaker"] != exchanged["speaker"] for word, exchanged in pairs)
    assert 'x", "path"' not in (out / "test.jsonl").read_text()


def test_a_killed_run_goes_on_to_the_same_corpus(
    config: CorpusConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    make_corpus(config, whole)
    calls = 0

    def dying(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 11:
            raise KeyboardInterrupt
        return record(*arguments, **options)

    monkeypatch.setattr(workers, "record", dying)
    with pytest.raises(KeyboardInterrupt):
        make_corpus(config, broken)
    assert calls == 11
    make_corpus(config, broken)
    # Two held-out shards were finished (items 1 … 7), a third was not.
    assert calls - 11 < sum(1 for _ in (whole / "shards").rglob("*.flac"))
    left = {name for name in contents(broken) if ".partial" in name}
    assert left == set()
    assert contents(broken) == contents(whole)


def test_processes_change_nothing_but_the_time(config: CorpusConfig, tmp_path: Path) -> None:
    make_corpus(config, tmp_path / "one")
    several = replace(config, voice=replace(config.voice, workers=2))
    make_corpus(several, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_more_hours_add_to_what_is_there(config: CorpusConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_corpus(config, out)
    before = contents(out / "shards")
    lines = (out / "train.jsonl").read_text()
    size, voice = replace(config.size, hours=0.015), replace(config.voice, threads=2)
    longer = replace(config, size=size, voice=voice)
    assert make_corpus(longer, out)["train"].seconds >= 54
    after = contents(out / "shards")
    assert {name: after[name] for name in before} == before and len(after) > len(before)
    assert (out / "train.jsonl").read_text().startswith(lines)


def test_what_others_have_is_left_out(config: CorpusConfig, tmp_path: Path) -> None:
    make_corpus(replace(config, size=replace(config.size, hours=0.015)), tmp_path / "whole")
    later = replace(config.size, hours=0.003, first_shard=1)
    make_corpus(replace(config, size=later), tmp_path / "later")
    shards = sorted(path.name for path in (tmp_path / "later" / "shards").glob("train-*"))
    assert shards and shards[0] == "train-00001"
    whole = contents(tmp_path / "whole" / "shards")
    for name, content in contents(tmp_path / "later" / "shards").items():
        assert whole[name] == content


def test_another_corpus_is_not_mixed_in(config: CorpusConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_corpus(config, out, text_only=True)
    with pytest.raises(DataError, match="made with other seed"):
        make_corpus(replace(config, seed=1), out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="is not empty"):
        make_corpus(config, tmp_path / "full")


def test_command_line(tmp_path: Path) -> None:
    path = write_files(tmp_path)
    out = tmp_path / "out"
    run = CliRunner().invoke(main, [str(path), str(out), "size.hours=0.003", "size.shard=2"])
    assert run.exit_code == 0, run.output
    assert "train: " in run.output and "validation: 3 recordings" in run.output
    run = CliRunner().invoke(main, [str(path), str(out), "voice.kind=piano"])
    assert run.exit_code == 2 and "voice.kind" in run.output


# ---------------------------------------------------------------------------------------- tokenizer


def test_tokenizer_is_in_the_published_layout(tmp_path: Path) -> None:
    text = "the dog and the dogs in the garden said hello to other dogs"
    write_tokenizer(train_tokenizer(20 * text.split(), TokenizerConfig(entries=300)), tmp_path)
    data = load_dia2_config(small_model(300)).data
    tokenizer = Tokenizer.from_folder(tmp_path, data)
    ids = tokenizer.ids
    assert (ids.bos, ids.new_word, ids.pad, ids.zero) == (1, 2, 3, 7)
    assert tokenizer.has_speaker_tags == (True, True)
    assert ids.spk2 == ids.spk1 + 1 < 300
    # The same tokens behind a tag, in capitals and alone; nothing is unknown.
    assert tokenizer.encode("[S2] The") == [ids.spk2, *tokenizer.encode("the")]
    assert len(tokenizer.encode("the")) == 1
    assert tokenizer.decode(tokenizer.encode("Größe ☃")) == "größe ☃"


def test_words_of_a_corpus_can_be_aligned(config: CorpusConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_corpus(config, out)
    tokenizer = Tokenizer.from_folder(
        out / "tokenizer", load_dia2_config(small_model(config.tokenizer.entries)).data
    )
    for line in (out / "validation.jsonl").read_text().splitlines():
        row = json.loads(line)
        words = [
            SpokenWord(w["text"], w["start"], w["end"], int(w["speaker"][2])) for w in row["words"]
        ]
        aligned = align(words, tokenizer, Pace())
        assert len(aligned.drift) == len(words)
        assert aligned.steps[0] == 2 and aligned.entries[0].tokens


def small_model(vocabulary: int) -> dict[str, Any]:
    """The repository's tiny configuration with another text vocabulary."""
    import yaml

    root = Path(__file__).parent.parent.parent
    raw: dict[str, Any] = yaml.safe_load((root / "configs" / "tiny.yaml").read_text())
    raw["data"]["text_vocab_size"] = vocabulary
    return raw
