"""Sources of recordings: every layout, every form of audio in it, and what is malformed."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
from prepare_speech import KYUTAI_WORDS, WORDS, speech, write_recording

from dia2_jax.errors import DataError
from train.preparation.dataset_source import load_dataset_source
from train.preparation.recordings import to_mono
from train.preparation.records import Item, Rejected, SourceRow
from train.preparation.sources import Columns, FolderSource, ManifestSource, Source, detect_kind


def rows(source: Source) -> list[SourceRow]:
    return [source.row(index) for index in range(len(source))]


def item(row: SourceRow) -> Item:
    assert row.item is not None, row.rejected
    return row.item


def reasons(source: Source) -> list[str | None]:
    return [row.rejected.reason if row.rejected else None for row in rows(source)]


def write_lines(path: Path, *records: Any) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n")
    return path


# ------------------------------------------------------------------------------------------- folder


def test_a_folder_is_its_audio_with_transcripts_beside_it(tmp_path: Path) -> None:
    write_recording(tmp_path / "b.flac", text="Hi you.")
    write_recording(tmp_path / "deep" / "a.wav", text="Hello there, you.", words=WORDS)
    write_recording(tmp_path / "c.wav", words={"speaker": "Anna", "words": WORDS})
    write_recording(tmp_path / "d.wav")
    write_recording(tmp_path / ".hidden" / "e.wav", text="Not this.")
    (tmp_path / "f.m4a").write_bytes(b"not read by libsndfile")
    (tmp_path / "orphan.txt").write_text("No audio.")
    source = FolderSource(tmp_path)
    found = rows(source)
    assert [row.id for row in found] == [
        "b.flac", "c.wav", "d.wav", "deep/a.wav", "f.m4a", "orphan.txt",
    ]  # fmt: skip
    assert reasons(source) == [None] * 5 + ["missing_audio"]
    assert item(found[0]).turns[0].text == "Hi you."
    (only_words,) = item(found[1]).turns
    assert only_words.text is None and only_words.words is not None
    assert [word.text for word in only_words.words] == ["Hello", "there,", "you."]
    assert only_words.speaker == "Anna"
    assert item(found[2]).turns == ()
    (both,) = item(found[3]).turns
    assert both.text == "Hello there, you." and both.words == only_words.words
    with pytest.raises(Rejected, match=r"f\.m4a: cannot be read as audio .*ffmpeg"):
        item(found[4]).read(100.0)


def test_transcripts_that_cannot_be_read_are_rows_too(tmp_path: Path) -> None:
    write_recording(tmp_path / "a.wav").with_suffix(".txt").write_bytes(b"\xff\xfe\x00")
    write_recording(tmp_path / "b.wav").with_suffix(".json").write_text("{")
    write_recording(tmp_path / "c.wav").with_suffix(".json").write_text('"words"')
    found = rows(FolderSource(tmp_path))
    assert [str(row.rejected).split(": ", 1)[1] for row in found] == [
        "not readable as UTF-8 text ('utf-8' codec can't decode byte 0xff in position 0: invalid "
        "start byte)",
        "not readable as JSON (Expecting property name enclosed in double quotes: line 1 column 2 "
        "(char 1))",
        "must hold a list of words or an object",
    ]


def test_links_and_names_that_are_not_utf8_are_rows_too(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    elsewhere = write_recording(tmp_path / "disk" / "deep" / "a.wav", text="Linked.").parent
    folder.mkdir()
    (folder / "linked").symlink_to(elsewhere)
    (elsewhere / "up").symlink_to(folder)
    (folder / "gone.wav").symlink_to("nowhere.wav")
    (folder / "loop.wav").symlink_to("loop.wav")
    (folder / "folder.wav").mkdir()
    latin = Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.wav"))
    write_recording(folder / "utf8.wav", text="Latin.").rename(latin)
    (folder / "utf8.txt").rename(latin.with_suffix(".txt"))
    assert detect_kind(str(folder)) == "folder"
    source = FolderSource(folder)
    found = rows(source)
    assert [row.id for row in found] == ["caf\udce9.wav", "gone.wav", "linked/a.wav", "loop.wav"]
    assert source.fingerprint() == FolderSource(folder).fingerprint()
    assert len(item(found[0]).read(9.0).samples) == 48_000
    assert item(found[2]).turns[0].text == "Linked."
    for row in (found[1], found[3]):
        with pytest.raises(Rejected, match="there is no such file"):
            item(row).read(9.0)


def test_names_in_capitals(tmp_path: Path) -> None:
    write_recording(tmp_path / "a.wav", text="Hello.").rename(tmp_path / "A.WAV")
    (tmp_path / "a.txt").rename(tmp_path / "A.TXT")
    (tmp_path / "ALONE.TXT").write_text("No audio.")
    source = FolderSource(tmp_path)
    assert [row.id for row in rows(source)] == ["A.WAV", "ALONE.TXT"]
    assert reasons(source) == [None, "missing_audio"]
    assert item(source.row(0)).turns[0].text == "Hello."
    before = source.fingerprint()
    (tmp_path / "A.TXT").write_text("Hallo.")
    assert FolderSource(tmp_path).fingerprint() != before


def test_the_fingerprint_follows_transcripts_and_audio(tmp_path: Path) -> None:
    audio = write_recording(tmp_path / "a.wav", text="Hello.")
    first = FolderSource(tmp_path).fingerprint()
    assert FolderSource(tmp_path).fingerprint() == first
    audio.with_suffix(".txt").write_text("Hallo.")
    second = FolderSource(tmp_path).fingerprint()
    write_recording(audio, seconds=3)
    assert len({first, second, FolderSource(tmp_path).fingerprint()}) == 3


def test_the_fingerprint_sees_audio_of_the_same_size(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    rng = np.random.default_rng(0)
    found = set()
    for gain in (0.1, 0.2):  # as normalising the level does
        soundfile.write(tmp_path / "a.wav", gain * rng.uniform(-1, 1, 24_000), 24_000)
        found.add((FolderSource(tmp_path).fingerprint(), (tmp_path / "a.wav").stat().st_size))
    (first, size), (second, same) = sorted(found)
    assert size == same and first != second


# ----------------------------------------------------------------------------------------- manifest


def test_a_manifest_says_it_or_leaves_it_beside_the_audio(tmp_path: Path) -> None:
    for name in "abcd":
        write_recording(tmp_path / "audio" / f"{name}.wav")
    write_recording(tmp_path / "audio" / "e.wav", text="From beside.")
    manifest = write_lines(
        tmp_path / "all.jsonl",
        {"path": "audio/a.wav", "text": "Hello.", "speaker": 7, "other": "ignored"},
        {"path": "audio/b.wav", "words": WORDS, "id": "bee"},
        "",
        {
            "path": "audio/c.wav",
            "turns": [
                {"speaker": "x", "text": "Hello", "start": 0.1, "end": 0.9},
                {"speaker": "y", "text": "you.", "start": 1.0, "end": 1.9},
            ],
        },
        {"path": str(tmp_path / "audio" / "d.wav"), "text": "[S1] One [S2] two."},
        {"path": "audio/e.wav", "speaker": "Anna"},
        {"path": "audio/a.wav", "text": "Again."},
    )
    found = rows(ManifestSource(manifest))
    assert [row.id for row in found] == [
        "audio/a.wav", "bee", "audio/c.wav", str(tmp_path / "audio" / "d.wav"), "audio/e.wav",
        "audio/a.wav#7",
    ]  # fmt: skip
    assert found[1].source == f"{manifest}:2"
    assert item(found[0]).turns[0].speaker == "7"
    assert [turn.speaker for turn in item(found[2]).turns] == ["x", "y"]
    assert item(found[4]).turns[0].text == "From beside."
    assert item(found[4]).turns[0].speaker == "Anna"
    assert all(len(item(row).read(100.0).samples) == 48_000 for row in found)


def test_kyutais_layout(tmp_path: Path) -> None:
    stereo = np.stack([speech(), 0 * speech()], axis=1)
    for name, speaker in (("a", "SPEAKER_MAIN"), ("b", "SPEAKER_01")):
        soundfile.write(tmp_path / f"{name}.wav", stereo, 24_000)
        words = [*KYUTAI_WORDS, ["yes.", [1.8, 1.9], speaker]]
        (tmp_path / f"{name}.json").write_text(json.dumps({"alignments": words}))
    manifest = write_lines(
        tmp_path / "data.jsonl",
        {"path": "a.wav", "duration": 2.0},
        {"path": "b.wav", "duration": 2.0},
    )
    main, both = (item(row) for row in rows(ManifestSource(manifest)))
    assert main.seconds == 2.0
    assert [word.text for word in main.turns[0].words or ()] == ["Hello", "there,", "you.", "yes."]
    assert {word.speaker for word in both.turns[0].words or ()} == {"SPEAKER_MAIN", "SPEAKER_01"}
    # The other channel is somebody whose words nobody wrote down.
    assert (main.channel, both.channel) == ("left", "mix")
    left = to_mono(main.read(9.0), main.channel, 24_000, "a")
    np.testing.assert_allclose(left, speech(), atol=1e-4)
    mixed = to_mono(both.read(9.0), both.channel, 24_000, "b")
    np.testing.assert_allclose(mixed, speech() / 2, atol=1e-4)


def test_malformed_records_are_rows_too(tmp_path: Path) -> None:
    write_recording(tmp_path / "a.wav")
    source = ManifestSource(
        write_lines(
            tmp_path / "bad.jsonl",
            {"path": "a.wav", "text": "Fine."},
            "not json",
            [1, 2],
            {"text": "No path."},
            {"path": "a.wav", "text": 5},
            {"path": "a.wav", "text": "x", "duration": "long"},
            {"path": "none.wav", "text": "Missing."},
        )
    )
    assert reasons(source) == [None, *["bad_record"] * 5, None]
    assert [row.id for row in rows(source)][1:4] == ["line#2", "line#3", "line#4"]
    with pytest.raises(Rejected, match=r"none\.wav: there is no such file") as error:
        item(source.row(6)).read(9.0)
    assert error.value.reason == "missing_audio"


def test_one_impossible_path_stops_no_manifest(tmp_path: Path) -> None:
    names = ["/", "", ".", "..", "a\0b.wav", "~nobody/a.wav", "\ud800.wav", "long " * 99]
    records = [{"path": name, "text": "Hello."} for name in names]
    nested = "[" * 100_000
    source = ManifestSource(write_lines(tmp_path / "bad.jsonl", *records, nested))
    assert source.fingerprint()
    assert reasons(source) == ["bad_record"] * 2 + [None] * 6 + ["bad_record"]
    for row in rows(source)[2:8]:
        with pytest.raises(Rejected, match="there is no such file"):
            item(row).read(9.0)


def test_a_line_ends_where_json_ends_it(tmp_path: Path) -> None:
    write_recording(tmp_path / "a.wav")
    text = "One\u2028two\x85three."
    line = json.dumps({"path": "a.wav", "text": text}, ensure_ascii=False)
    (tmp_path / "all.jsonl").write_bytes(f"{line}\r\n\r\n{line}\r\n".encode())
    found = rows(ManifestSource(tmp_path / "all.jsonl"))
    assert [row.id for row in found] == ["a.wav", "a.wav#3"]
    assert [item(row).turns[0].text for row in found] == [text, text]


# ---------------------------------------------------------------------------------------- data sets


def encoded(seconds: float = 2.0) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, speech(seconds), 24_000, format="FLAC")
    return file.getvalue()


def load(path: Path, split: str = "train", **columns: str) -> Source:
    return load_dataset_source(
        str(path), config=None, split=split, revision=None, columns=Columns(**columns)
    )


def test_a_saved_data_set_with_an_audio_column(tmp_path: Path) -> None:
    write_recording(tmp_path / "a.wav")
    data = datasets.Dataset.from_dict(
        {
            "audio": [
                {"bytes": encoded(), "path": None},
                {"bytes": None, "path": str(tmp_path / "a.wav")},
            ],
            "text": ["Hello.", None],
            "words": [None, WORDS],
            "speaker": ["x", "x"],
        }
    )
    # Not given at once: `datasets` writes audio through torchcodec, but reads it without.
    data = data.cast_column("audio", datasets.Audio())
    assert isinstance(data.features["audio"], datasets.Audio)
    data.save_to_disk(tmp_path / "saved")
    assert detect_kind(str(tmp_path / "saved")) == "dataset"
    found = rows(load(tmp_path / "saved"))
    assert [row.id for row in found] == ["00000000", "00000001"]
    assert item(found[0]).turns[0].text == "Hello."
    assert [word.text for word in item(found[1]).turns[0].words or ()] == [
        "Hello",
        "there,",
        "you.",
    ]
    for row in found:
        np.testing.assert_allclose(item(row).read(9.0).samples[:, 0], speech(), atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "scale", "problem"),
    [
        ("float32", 1, None),
        ("int16", 2**15, None),
        ("int32", 2**31, None),
        ("int64", 2**15, "samples of type int64, .*: cast the column to int16"),
    ],
)
def test_arrays_keep_their_full_scale(
    tmp_path: Path, kind: str, scale: int, problem: str | None
) -> None:
    values = (speech(0.5) * scale).astype(kind)
    numbers = datasets.Sequence(datasets.Value(kind))
    features = {"audio": {"array": numbers, "sampling_rate": datasets.Value("float32")}}
    data = datasets.Dataset.from_dict(
        {"audio": [{"array": values.tolist(), "sampling_rate": 24_000.0}], "text": ["Hello."]},
        features=datasets.Features(features | {"text": datasets.Value("string")}),
    )
    data.save_to_disk(tmp_path / "saved")
    (row,) = rows(load(tmp_path / "saved"))
    if problem is None:
        np.testing.assert_allclose(item(row).read(9.0).samples[:, 0], speech(0.5), atol=1e-4)
    else:
        with pytest.raises(Rejected, match=problem):
            item(row).read(9.0)


def test_other_columns_are_not_decoded_and_audio_has_a_form(tmp_path: Path) -> None:
    sound = [{"bytes": encoded(), "path": None}]
    data = datasets.Dataset.from_dict({"audio": sound, "noisy": sound, "text": ["Hello."]})
    for column in ("audio", "noisy"):
        data = data.cast_column(column, datasets.Audio())
    data.save_to_disk(tmp_path / "two")  # reading "noisy" would take torchcodec
    (row,) = rows(load(tmp_path / "two"))
    assert len(item(row).read(9.0).samples) == 48_000
    bare = datasets.Dataset.from_dict({"audio": [[0.5, 0.25], None], "text": ["Hello."] * 2})
    bare.save_to_disk(tmp_path / "bare")
    found = rows(load(tmp_path / "bare"))
    for row, message in zip(found, ["audio of type list; it may be", "has no audio"], strict=True):
        with pytest.raises(Rejected, match=message):
            item(row).read(9.0)


def test_parquet_files_with_other_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    sound = {"array": [speech().tolist()] * 2, "sampling_rate": [24_000] * 2}
    data = datasets.Dataset.from_dict(
        {
            "sound": [{k: v[i] for k, v in sound.items()} for i in range(2)],
            "sentence": ["Hello.", "Hi."],
            "name": ["x", "y"],
        }
    )
    (tmp_path / "data").mkdir()
    data.select([0]).to_parquet(str(tmp_path / "data" / "train-00000-of-00001.parquet"))
    data.select([1]).to_parquet(str(tmp_path / "data" / "test-00000-of-00001.parquet"))
    assert detect_kind(str(tmp_path / "data")) == "dataset"
    names = {"audio": "sound", "text": "sentence", "id": "name"}
    (row,) = rows(load(tmp_path / "data", split="test", **names))
    assert row.id == "00000000-y" and item(row).turns[0].text == "Hi."
    np.testing.assert_allclose(item(row).read(9.0).samples[:, 0], speech(), atol=1e-6)


def test_a_data_set_without_what_is_asked_for(tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict({"audio": ["a.wav"], "sentence": ["Hello."]})
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"validation": data}).save_to_disk(tmp_path / "many")
    with pytest.raises(DataError, match="no column says what is spoken; it has audio, sentence"):
        load(tmp_path / "one")
    with pytest.raises(DataError, match=r"no column 'sentense' \(did you mean 'sentence'\?\)"):
        load(tmp_path / "one", text="sentense")
    with pytest.raises(DataError, match="has no split 'train'; it has validation"):
        load(tmp_path / "many")
    with pytest.raises(DataError, match="cannot be loaded as a data set"):
        load(tmp_path / "none")
    (row,) = rows(load(tmp_path / "one", text="sentence"))
    with pytest.raises(Rejected, match=r"a\.wav: there is no such file"):
        item(row).read(9.0)


# ----------------------------------------------------------------------------------------- kinds


def test_kinds_are_told_apart_by_looking(tmp_path: Path) -> None:
    write_recording(tmp_path / "audio" / "deep" / "a.wav")
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "a.parquet").write_text("")
    (tmp_path / "empty").mkdir()
    assert detect_kind(str(tmp_path / "audio")) == "folder"
    assert detect_kind(str(tmp_path / "a.jsonl")) == "manifest"
    assert detect_kind(str(tmp_path / "a.parquet")) == "dataset"
    assert detect_kind("owner/name") == "dataset"
    with pytest.raises(DataError, match=r"empty: the folder holds no audio files and no data set"):
        detect_kind(str(tmp_path / "empty"))
    with pytest.raises(DataError, match=r"a\.wav: not a source of recordings"):
        detect_kind(str(tmp_path / "audio" / "deep" / "a.wav"))
    with pytest.raises(DataError, match="there is no such file or folder"):
        detect_kind("./owner/name")
    with pytest.raises(DataError, match="there is no such file or folder"):
        detect_kind("data/train.jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [("\n\n", "has no lines"), ("path,text\na.wav,Hi\n", "no line is a JSON object; a manifest")],
)
def test_what_is_no_manifest(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        ManifestSource(tmp_path / "a.jsonl")
