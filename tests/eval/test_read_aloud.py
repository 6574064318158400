"""Prompts read by the synthesiser of a corpus."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from corpus_files import write_files

from dia2_jax.audio import read_audio
from eval.read_aloud import main
from eval.scoring.prompts import read_set

SCRIPTS = {
    "one": "[S1] The dog is in the garden. A small bird found this.",
    "two": "[S2] Hello there. [S1] I know, yes.",
}


def write_prompts(folder: Path, scripts: dict[str, str]) -> Path:
    path = folder / "mine.jsonl"
    rows = [{"id": name, "kind": "line", "script": script} for name, script in scripts.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_prompt_set_comes_back_with_readings(tmp_path: Path) -> None:
    config, prompts = write_files(tmp_path), write_prompts(tmp_path, SCRIPTS)
    done = CliRunner().invoke(main, [str(config), str(prompts), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "mine.jsonl: 2 readings" in done.output

    before, after = read_set(str(prompts)), read_set(str(tmp_path / "out" / "mine.jsonl"))
    # Ids and scripts decide what a model is asked for: these stay.
    assert [(p.id, p.kind, p.script, p.seed(3)) for p in after.prompts] == [
        (p.id, p.kind, p.script, p.seed(3)) for p in before.prompts
    ]
    for prompt in after.prompts:
        assert prompt.reference is not None
        wave = read_audio(prompt.reference, 16_000)
        said = [word.text for word in prompt.words]
        assert said == [w for w in prompt.script.split() if w not in ("[S1]", "[S2]")]
        for word in prompt.words:
            part = wave[round(word.start * 16_000) : round(word.end * 16_000)]
            assert abs(part).max() > 0.01, word
    assert {word.speaker for word in after.prompts[1].words} == {"[S1]", "[S2]"}

    # The same again, whatever else is in the set.
    alone = write_prompts(tmp_path, {"two": SCRIPTS["two"]})
    assert CliRunner().invoke(main, [str(config), str(alone), str(tmp_path / "b")]).exit_code == 0
    assert (tmp_path / "b/audio/0000.wav").read_bytes() == (
        tmp_path / "out/audio/0001.wav"
    ).read_bytes()


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"id": "a"}', "mine.jsonl:1: script must be a text"),
        ('{"id": 1, "script": "[S1] Hello."}', "mine.jsonl:1: id must be a text"),
        ('{"id": "a", "script": "Hello."}', "must be turns that begin with [S1] or [S2]"),
        ('{"id": "a", "script": "[S1] [S2] Hello."}', "must be turns that begin with"),
        ('{"id": "a", "script": "[S1] Hello [S3] you."}', "must be turns that begin with"),
        ("", "holds no prompts"),
    ],
)
def test_prompts_that_cannot_be_read_are_one_error(tmp_path: Path, line: str, message: str) -> None:
    config, prompts = write_files(tmp_path), tmp_path / "mine.jsonl"
    prompts.write_text(line + "\n")
    done = CliRunner().invoke(main, [str(config), str(prompts), str(tmp_path / "out")])
    assert done.exit_code == 2
    assert done.output.startswith("error: ") and message in done.output
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_over(tmp_path: Path) -> None:
    config, prompts = write_files(tmp_path), write_prompts(tmp_path, SCRIPTS)
    done = CliRunner().invoke(main, [str(config), str(prompts), str(tmp_path)])
    assert done.exit_code == 2 and "is there already" in done.output
