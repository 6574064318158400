"""Prompts whose files are missing or damaged, or that cannot be spoken: the run goes on, or says so
before it begins."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from dia2_jax.errors import AudioError, NonFiniteError, PrefixError
from eval import naturalness
from eval.scoring.evaluation import evaluate
from eval.scoring.prompts import Prompt, PromptVoice, read_sets
from eval.scoring.report import report
from eval.scoring.run_folder import RunFolder
from eval.scoring.sources import Studio, check_files, voice_recognizer
from eval.scoring.stopping import Stopping
from eval.scoring.summary import summarise
from eval.scoring.takes import Take


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(naturalness.main, ["-q", *map(str, arguments)])


def write_prompts(folder: Path, *rows: dict[str, Any]) -> Path:
    file = folder / "own.jsonl"
    file.write_text("".join(json.dumps({"script": "[S1] Hi.", **row}) + "\n" for row in rows))
    return file


def test_missing_files_are_listed_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them, each once, and those of prompts that are not asked for are not looked for."""
    monkeypatch.setattr("eval.naturalness.measuring", lambda *_: pytest.fail("too late"))
    (tmp_path / "there.wav").write_bytes(b"")
    file = write_prompts(
        tmp_path,
        {"id": "a", "reference": "lost.wav"},
        {"id": "b", "reference": "there.wav", "voices": {"[S2]": {"path": "gone.wav"}}},
        {"id": "c", "reference": "lost.wav"},
    )
    found = run("no-model", "-p", file, "-o", tmp_path / "run")
    assert found.exit_code == 2 and not (tmp_path / "run").exists()
    first, *listed = found.stderr.splitlines()
    assert first.startswith("error: 2 of the files that prompts name are not there")
    named = (("lost.wav", "own/a"), ("gone.wav", "own/b"))
    assert listed == [f"  {tmp_path / name} (named by {prompt})" for name, prompt in named]
    (whole,) = read_sets([str(file)])
    check_files([replace(whole, prompts=())])


def test_voices_without_a_text_need_a_recogniser_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eval.naturalness.measuring", lambda *_: pytest.fail("too late"))
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    (tmp_path / "v.wav").write_bytes(b"")
    with_text = {"id": "a", "voices": {"[S1]": {"path": "v.wav", "text": "Hello."}}}
    without = {"id": "b", "voices": {"[S1]": {"path": "v.wav"}}}
    found = run(
        "no-model", "-p", write_prompts(tmp_path, with_text, without), "-o", tmp_path / "run"
    )
    assert found.exit_code == 2 and not (tmp_path / "run").exists()
    (line,) = found.stderr.splitlines()
    assert line.startswith(f"error: own/b: the voice {tmp_path / 'v.wav'} has no text, and ")
    assert 'pip install "dia2-jax[transcribe]"' in line and "give the transcript" in line
    (only,) = read_sets([str(write_prompts(tmp_path, with_text))])
    assert voice_recognizer([only], "base") is None


@pytest.mark.parametrize("kind", [AudioError, PrefixError, NonFiniteError])
def test_what_is_wrong_with_one_prompt_ends_its_take_alone(
    tmp_path: Path, kind: type[Exception]
) -> None:
    made: list[str] = []
    (sets,) = read_sets([str(write_prompts(tmp_path, {"id": "bad"}, {"id": "good"}))])

    def make(source: str, prompt: Prompt, seed: int | None) -> Take:
        made.append(prompt.id)
        if prompt.id == "bad":
            raise kind("bad.wav: is damaged")
        return Take("generated", prompt, np.full(24_000, 0.1, np.float32), 24_000)

    def rows() -> list[Any]:
        folder = RunFolder(tmp_path / "run", {})
        folder.describe({})
        return evaluate(make, [sets], [Stopping()], folder, lambda prompt: [("generated", 0)])

    bad, good = rows()
    assert bad["error"] == "bad.wav: is damaged" and "scores" not in bad
    assert "stopping" in good["scores"] and "error" not in good
    # It is not tried again when the run goes on.
    assert rows() == [bad, good] and made == ["bad", "good"]
    summary = summarise([bad, good], [Stopping()])
    assert summary["counts"]["generated"]["all"] == {"takes": 2, "failed": 1}
    assert summary["figures"]["generated"]["all"]["stopping"]["silent"]["takes"] == 1
    assert "Takes: generated 2 (failed: 1)." in report("T", {}, summary, [bad, good], [Stopping()])


def test_a_damaged_recording_fails_and_nothing_else(tmp_path: Path) -> None:
    """It is told before any time is spent on speaking; where all takes fail, the status is 1."""
    (tmp_path / "river.wav").write_bytes(b"RIFF is no sound")
    file, out = write_prompts(tmp_path, {"id": "river", "reference": "river.wav"}), tmp_path / "run"
    options = ("--codec-only", "--sources", "recording", "--metrics", "stopping")
    found = run("no-model", *options, "-p", file, "-o", out)
    assert found.exit_code == 1, found.output
    assert "report.md: 1 takes, failed: 1" in found.stderr
    (row,) = (out / "utterances.jsonl").read_text().splitlines()
    assert "river.wav" in json.loads(row)["error"]
    assert "recording 1 (failed: 1)" in (out / "report.md").read_text()
    (mine,) = read_sets([str(file)])
    studio = Studio(object())  # type: ignore[arg-type]
    with pytest.raises(AudioError, match=r"river\.wav"):
        studio.take("generated", mine.prompts[0], 0)


def test_an_unusable_voice_is_tried_once_and_named_for_every_prompt(tmp_path: Path) -> None:
    tried: list[str] = []

    class Model:
        def prepare_voice(self, path: Path, **_: Any) -> None:
            tried.append(path.name)
            raise PrefixError(f"{path.name}: no word was found in it")

    studio = Studio(Model())  # type: ignore[arg-type]
    voices = {"[S1]": PromptVoice(tmp_path / "hum.wav")}
    for identifier in ("a", "b"):
        with pytest.raises(PrefixError, match=r"hum\.wav"):
            studio.take("generated", Prompt("s", identifier, "line", "[S1] x", voices=voices), 0)
    assert tried == ["hum.wav"]
