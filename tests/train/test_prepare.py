"""Data preparation from end to end: what is kept, what is named, and what interruptions change."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
from click.testing import CliRunner, Result
from prepare_speech import WORDS, speech, write_recording

from dia2_jax.data import Pace, SpokenWord, align
from dia2_jax.errors import ConfigError, DataError
from train.preparation import model_files
from train.preparation.aligners import ALIGNERS
from train.preparation.checks import Limits
from train.preparation.model_files import SpeechModel, load_speech_model
from train.preparation.program import Plan, prepare
from train.preparation.shards import Workshop, plan_shards
from train.preparation.sources import FolderSource
from train.prepare import main

TEXT = "[S1] Hello there, [S2] you. (laughs)"


@pytest.fixture(scope="module")
def speech_model(tiny_model_folder: Path) -> SpeechModel:
    return load_speech_model(
        str(tiny_model_folder),
        tokenizer=None,
        mimi=None,
        word_step_offset=2,
        initial_padding=2,
        max_padding=6,
    )


@pytest.fixture
def program(
    speech_model: SpeechModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """Runs ``train.prepare`` in an empty folder, with the tiny model loaded once for all tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_files, "load_speech_model", lambda name, **options: speech_model)

    def run(*arguments: object) -> Result:
        texts = [str(argument) for argument in arguments]
        return CliRunner().invoke(main, [*texts, "--batch", "2", "--quiet"])

    return run


def write_folder(folder: Path, count: int = 5) -> Path:
    """Recordings of different lengths; the second one is damaged."""
    for index in range(count):
        write_recording(folder / f"{index}.wav", text=TEXT, seconds=1.6 + 0.3 * index, seed=index)
    if count > 1:
        (folder / "1.wav").write_bytes(b"RIFF but no audio")
    return folder


def make_plan(folder: Path, model: SpeechModel, **changes: Any) -> Plan:
    plan = Plan(
        source=FolderSource(folder),
        name="recordings",
        model=model,
        aligner=ALIGNERS["estimate"]("", 0.6),
        listener=None,
        limits=Limits(max_drift=50),
        batch=2,
        shard_rows=2,
    )
    return dataclasses.replace(plan, **changes)


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a data set."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def rejected(folder: Path) -> dict[str, str]:
    lines = (folder / "rejected.jsonl").read_text().splitlines()
    return {line["id"]: line["reason"] for line in map(json.loads, lines)}


# ------------------------------------------------------------------------------- what must hold (7)


def test_a_folder_of_good_and_bad_recordings(program: Callable[..., Result]) -> None:
    folder = Path("recordings")
    write_recording(folder / "good.wav", text="[S1] Hello there, [S2] you.", words=WORDS)
    write_recording(folder / "estimated.flac", text=TEXT)
    stereo = np.stack([speech(rate=44_100), 0.5 * speech(rate=44_100)], axis=1)
    soundfile.write(folder / "stereo.mp3", stereo, 44_100)
    (folder / "stereo.txt").write_text(TEXT)
    (folder / "corrupt.wav").write_bytes(np.random.default_rng(0).bytes(4000))
    (folder / "corrupt.txt").write_text("Hello.")
    write_recording(folder / "empty.wav", text=" \n")
    soundfile.write(folder / "silence.wav", np.zeros(72_000), 24_000)
    (folder / "silence.txt").write_text("Hello there.")
    write_recording(folder / "disorder.wav", words=[WORDS[1], WORDS[0]])

    result = program(
        folder, "data", "--model", "tiny", "--aligner", "estimate", "--max-drift", 50,
        "--license", "cc-by-4.0",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "data: 3 of 7 recordings" in result.output
    reasons = "1 empty_transcript, 1 silent, 1 unreadable_audio, 1 words_out_of_order"
    assert f"left out 4 ({reasons}): see data/rejected.jsonl" in result.output
    assert rejected(Path("data")) == {
        "corrupt.wav": "unreadable_audio",
        "disorder.wav": "words_out_of_order",
        "empty.wav": "empty_transcript",
        "silence.wav": "silent",
    }
    data = datasets.load_from_disk("data")
    assert data["id"] == ["estimated.flac", "good.wav", "stereo.mp3"]
    card = Path("data", "README.md").read_text()
    assert 'license: "cc-by-4.0"' in card and "| recordings | 3 of 7 |" in card
    assert "| `silent` | 1 |" in card and "| with two speakers | 3 |" in card
    assert not Path("data.preparing").exists()


def test_rows_are_what_the_schema_says(
    program: Callable[..., Result], speech_model: SpeechModel
) -> None:
    write_recording(Path("in/good.wav"), text="[S1] Hello there, [S2] you.", words=WORDS)
    result = program("in", "data", "--model", "tiny", "--max-drift", 50)
    assert result.exit_code == 0, result.output
    (row,) = datasets.load_from_disk("data")
    about = json.loads(Path("data/dia2_jax.json").read_text())
    assert row["word_text"] == ["Hello", "there,", "you."] and row["word_speaker"] == [1, 1, 2]
    np.testing.assert_allclose(row["word_start"], [0.2, 0.7, 1.3], atol=1e-6)
    np.testing.assert_allclose(row["word_end"], [0.6, 1.0, 1.7], atol=1e-6)
    assert row["duration"] == 2.0 and row["source"] == "in/good.wav"

    # A reader of the columns finds the alignment that the row was written with.
    names = ("frame_rate", "word_step_offset", "initial_padding", "max_padding", "delay_spread")
    pace = Pace(**{name: about[name] for name in names})
    columns = (row[f"word_{name}"] for name in ("text", "start", "end", "speaker"))
    words = [SpokenWord(*values) for values in zip(*columns, strict=True)]
    found = align(words, speech_model.tokenizer, pace)
    assert (found.script, max(found.drift), found.breaks) == (
        row["text"], row["drift"], row["breaks"],
    )  # fmt: skip
    assert row["frames"] == max(25, found.frames_needed)
    assert json.loads(Path("data/scripts.jsonl").read_text()) == {
        "id": "good.wav", "text": found.script,
    }  # fmt: skip

    codec = speech_model.codec
    wave, _ = soundfile.read("in/good.wav", dtype="float32")
    wave = np.pad(wave, (0, row["frames"] * codec.samples_per_frame - len(wave)))
    codes = np.array(row["codes"]).reshape(row["frames"], about["codebooks"])
    batch = codec.encode(np.stack([wave, 0 * wave]), codebooks=8)
    np.testing.assert_array_equal(codes, batch[0].T)
    assert about["rows"] == 1 and about["rejected"] == {} and about["aligner"] == "data"


# --------------------------------------------------------------------------------- interruptions


class Killed(BaseException):
    """The end of the process."""


@pytest.mark.parametrize("where", ["between", "inside", "merging", "renamed"])
def test_interrupted_and_rerun_it_is_the_same_data_set(
    speech_model: SpeechModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    plan = make_plan(write_folder(tmp_path / "in"), speech_model)
    prepare(plan, tmp_path / "whole" / "data")
    out = tmp_path / "parts" / "data"
    with monkeypatch.context() as patch:
        interrupt(patch, where)
        with pytest.raises(Killed):
            prepare(plan, out)
    assert out.exists() == (where == "renamed")
    asked: list[int] = []
    count_rows(monkeypatch, asked)
    outcome = prepare(plan, out)
    assert content(out) == content(tmp_path / "whole" / "data")
    assert [path.name for path in out.parent.iterdir()] == ["data"]
    assert outcome.totals is not None and (outcome.totals.rows, outcome.totals.kept) == (5, 4)
    # Finished shards are not prepared again.
    assert asked == {"between": [2, 3, 4], "inside": [2, 3, 4]}.get(where, [])
    assert prepare(plan, out).already and outcome.already == (where == "renamed")


def interrupt(patch: pytest.MonkeyPatch, where: str) -> None:
    """End the process after the first shard, while the second is written, or at the end."""
    write, from_dict = Workshop.write, datasets.Dataset.from_dict
    calls: list[int] = []

    def after_one(self: Workshop, shard: Any, *rows: Any) -> None:
        if shard.index == 1:
            raise Killed
        write(self, shard, *rows)

    def on_second(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return from_dict(*arguments, **options)

    def never(self: Workshop, *arguments: Any) -> None:
        raise Killed

    if where == "between":
        patch.setattr(Workshop, "write", after_one)
    elif where == "inside":
        patch.setattr(datasets.Dataset, "from_dict", on_second)
    elif where == "merging":
        patch.setattr(datasets.Dataset, "save_to_disk", fail_on(datasets.Dataset.save_to_disk, 4))
    else:
        patch.setattr(Workshop, "discard", never)


def fail_on(method: Callable[..., Any], call: int) -> Callable[..., Any]:
    calls: list[int] = []

    def failing(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return method(*arguments, **options)

    return failing


def count_rows(patch: pytest.MonkeyPatch, asked: list[int]) -> None:
    row = FolderSource.row

    def counted(self: FolderSource, index: int) -> Any:
        asked.append(index)
        return row(self, index)

    patch.setattr(FolderSource, "row", counted)


def test_shares_of_several_hosts_make_the_same_data_set(
    program: Callable[..., Result], tmp_path: Path
) -> None:
    write_folder(Path("in"))
    command = (
        "in", "data", "--model", "tiny", "--aligner", "estimate", "--max-drift", 50,
        "--shard-rows", 2,
    )  # fmt: skip
    assert program(*command).exit_code == 0
    whole = content(Path("data"))
    shutil.rmtree("data")
    result = program(*command, "--shard", "2/2")
    assert result.exit_code == 0 and "1 of 3 shards are finished" in result.output
    result = program(*command, "--shard", "1/2")
    assert result.exit_code == 0 and "3 of 3 shards are finished" in result.output
    assert not Path("data").exists()
    assert program(*command).exit_code == 0
    assert content(Path("data")) == whole


def test_settings_cannot_change_halfway(
    speech_model: SpeechModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = write_folder(tmp_path / "in"), tmp_path / "data"
    plan = make_plan(folder, speech_model)
    with monkeypatch.context() as patch:
        interrupt(patch, "between")
        with pytest.raises(Killed):
            prepare(plan, out)
    other = make_plan(folder, speech_model, limits=Limits(max_drift=40))
    with pytest.raises(DataError, match=r"unfinished .*limits\.max_drift: 50 -> 40.*--overwrite"):
        prepare(other, out)
    (folder / "4.txt").write_text("Something else was said.")
    changed = make_plan(folder, speech_model)
    with pytest.raises(DataError, match=r"other settings \(source\.fingerprint"):
        prepare(changed, out)
    prepare(changed, out, overwrite=True)
    script = datasets.load_from_disk(str(out))[3]["text"]
    assert "[S1] Something " in script and script.endswith(" said.")
    with pytest.raises(DataError, match=r"finished data set .*limits\.max_drift.*--overwrite"):
        prepare(dataclasses.replace(changed, limits=other.limits), out)
    prepare(make_plan(folder, speech_model, limit=1), out, overwrite=True)
    assert len(datasets.load_from_disk(str(out))) == 1


def test_replacing_a_data_set_goes_on_after_an_interruption(
    speech_model: SpeechModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = write_folder(tmp_path / "in"), tmp_path / "data"
    first = make_plan(folder, speech_model)
    prepare(first, out)
    second = make_plan(folder, speech_model, limits=Limits(max_drift=40))
    with monkeypatch.context() as patch:
        interrupt(patch, "between")
        with pytest.raises(Killed):
            prepare(second, out, overwrite=True)
    assert prepare(first, out).already  # which leaves the other's unfinished work alone
    asked: list[int] = []
    count_rows(monkeypatch, asked)
    prepare(second, out, overwrite=True)
    assert asked == [2, 3, 4]
    about = json.loads((out / "dia2_jax.json").read_text())
    assert about["settings"]["limits"]["max_drift"] == 40
    prepare(second, out, overwrite=True)  # once more: now nothing of the last time is taken
    assert asked == [2, 3, 4, 0, 1, 2, 3, 4]


def test_two_processes_do_not_work_on_the_same(speech_model: SpeechModel, tmp_path: Path) -> None:
    plan, out = make_plan(write_folder(tmp_path / "in", count=1), speech_model), tmp_path / "data"
    with Workshop(out).open(plan.settings(), overwrite=False, shared=True):
        prepare(plan, out, share=(1, 2))  # shares may, next to each other
        with pytest.raises(DataError, match=r"data\.preparing: another process is at work on it"):
            prepare(plan, out)
    with Workshop(out).open(plan.settings(), overwrite=False):
        for options in ({"share": (1, 2)}, {"overwrite": True}, {}):
            with pytest.raises(DataError, match="another process is at work on it"):
                prepare(plan, out, **options)
    prepare(plan, out)
    # Nor is the work taken away from one that replaces a finished data set.
    with Workshop(out).open(plan.settings(), overwrite=True):
        assert prepare(plan, out).already
        assert Workshop(out).path.is_dir()


def test_nothing_of_anybody_else_is_touched(speech_model: SpeechModel, tmp_path: Path) -> None:
    plan = make_plan(write_folder(tmp_path / "in", count=1), speech_model)
    for name in ("data", "other.preparing"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="not a data set of this program; nothing in it is touched"):
        prepare(plan, tmp_path / "data", overwrite=True)
    with pytest.raises(DataError, match=r"other\.preparing: is in the way"):
        prepare(plan, tmp_path / "other", overwrite=True)
    assert (tmp_path / "data" / "thesis.tex").exists()
    assert (tmp_path / "other.preparing" / "thesis.tex").exists()
    (tmp_path / "empty").mkdir()
    prepare(plan, tmp_path / "empty")
    assert len(datasets.load_from_disk(str(tmp_path / "empty"))) == 1


def test_every_row_is_somewhere(speech_model: SpeechModel, tmp_path: Path) -> None:
    plan = make_plan(write_folder(tmp_path / "in"), speech_model)
    workshop = Workshop(tmp_path / "data")
    rows = pytest.raises(AssertionError, match="2 rows became 0 kept, 0 rejected")
    with workshop.open({}, overwrite=False), rows:
        workshop.write(plan_shards(plan.rows, 2)[0], [], [])
    assert [path.name for path in workshop.path.iterdir()] == ["settings.json"]


# ------------------------------------------------------------------------------------- command line


def test_when_nothing_can_be_kept_it_says_so_and_may_be_tried_again(
    program: Callable[..., Result],
) -> None:
    write_recording(Path("in/a.wav"), text="Hello there.")
    result = program("in", "data", "--model", "tiny")
    assert result.exit_code == 1
    assert result.output.startswith(
        "error: none of 1 rows could be kept (1 no_times); for example in/a.wav: has text but no "
        "word times; choose --aligner whisper or pocketsphinx."
    )
    assert not Path("data").exists()
    again = program("in", "data", "--model", "tiny", "--aligner", "estimate", "--max-drift", 50)
    assert again.exit_code == 0, again.output


def test_a_full_disk_says_where_and_what_to_do(
    program: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(Path("in"))
    command = ("in", "data", "-m", "tiny", "--aligner", "estimate", "--max-drift", 50)
    with monkeypatch.context() as patch:
        full = OSError(errno.ENOSPC, "No space left on device")
        patch.setattr(datasets.Dataset, "save_to_disk", lambda *_: raise_error(full))
        result = program(*command)
    assert result.exit_code == 2
    assert result.output.startswith("error: data.preparing: No space left on device; free some")
    assert not Path("data").exists() and not list(Path("data.preparing").glob("shard-*"))
    assert program(*command).exit_code == 0


def raise_error(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "data", "-m", "tiny"], "error: nowhere: there is no such file or folder"),
        (["in", "data"], "Missing option '--model'"),
        (["in", "in", "-m", "tiny"], "error: in: is there already, and not a data set of this"),
        (["in", "data", "-m", "tiny", "--shard", "3/2"], "'3/2' is not i/n with 1 <= i <= n"),
        (["in", "data", "-m", "tiny", "--shard", "1/2", "--overwrite"], "would delete the work of"),
        (["in", "data", "-m", "tiny", "--aligner", "magic"], "'magic' is not one of 'data'"),
        (["in", "data", "-m", "tiny", "--min-level", "nan"], "'nan' is not a finite number"),
        (["in", "data", "-m", "tiny", "--min-agreement", "2"], "2.0 is not in the range 0<=x<=1"),
        (["in", "data", "-m", "tiny", "--kind", "manifest"], "error: in: cannot be read"),
    ],
)
def test_wrong_use_is_one_message(
    program: Callable[..., Result], arguments: list[str], message: str
) -> None:
    write_recording(Path("in/a.wav"), text="Hello there.")
    result = program(*arguments)
    assert result.exit_code == 2 and message in result.output
    assert "Traceback" not in result.output
    assert sorted(path.name for path in Path().iterdir()) == ["in"]


def test_a_model_without_weights_and_a_config_alone(
    tiny_model_folder: Path, tmp_path: Path, speech_model: SpeechModel
) -> None:
    def load(model: Path, **options: Any) -> SpeechModel:
        given = {"tokenizer": None, "mimi": None} | options
        return load_speech_model(
            str(model), word_step_offset=2, initial_padding=2, max_padding=6, **given
        )

    folder = tmp_path / "untrained"
    shutil.copytree(
        tiny_model_folder, folder, ignore=lambda _, names: {"mimi", "model.safetensors"}
    )
    with pytest.raises(ConfigError, match=r"untrained/mimi: there is no codec .* give --mimi"):
        load(folder)
    shutil.copytree(tiny_model_folder / "mimi", folder / "mimi")
    assert load(folder).settings == speech_model.settings
    alone = tiny_model_folder / "config.json"
    with pytest.raises(ConfigError, match="give --tokenizer too"):
        load(alone)
    places = {"tokenizer": str(tiny_model_folder), "mimi": str(tiny_model_folder / "mimi")}
    assert load(alone, **places).settings == speech_model.settings
