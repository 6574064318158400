"""Going on in a run's folder: one at a time, from anywhere, and with more metrics than before."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from dia2_jax.audio import read_audio, write_wav
from dia2_jax.errors import ConfigError
from eval import codec, naturalness
from eval.scoring.added_metrics import score_added
from eval.scoring.evaluation import evaluate
from eval.scoring.metric import Figure, Metric, Options, Row, mean
from eval.scoring.prompts import Prompt, PromptSet, read_sets
from eval.scoring.run_folder import RunFolder, open_run, read_rows, taken
from eval.scoring.scripts import SpokenWord
from eval.scoring.signal import Signal
from eval.scoring.stopping import Stopping
from eval.scoring.takes import Take

ROOT = Path(__file__).parent.parent
RIVER = read_audio(ROOT / "golden" / "speech" / "river.mp3")[: 2 * 24_000]


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """librosa compiles itself for the first spectrogram, which takes a minute."""
    monkeypatch.setattr("eval.scoring.page.spectrogram", lambda *_, **__: "data:,")


# ------------------------------------------------------------------------------------ one at a time


def test_a_folder_is_one_run_s_and_then_the_next_one_s(tmp_path: Path) -> None:
    out = tmp_path / "new" / "run"
    with open_run(out, {}) as folder:
        folder.describe({})
        with pytest.raises(ConfigError, match=f"^{out}: another run works in it"), taken(out):
            pass
        # What a row is being written to is left as it is.
        (out / "utterances.jsonl").write_text('{"set": ')
        with pytest.raises(ConfigError), open_run(out, {}):
            pass
        assert (out / "utterances.jsonl").read_text() == '{"set": '
    with open_run(out, {}) as folder:
        assert folder.rows == {}
    assert sorted(path.name for path in out.iterdir()) == ["run.json", "utterances.jsonl"]


@pytest.mark.parametrize("program", [naturalness.main, codec.main])
def test_a_second_start_is_one_line_before_anything_is_loaded(tmp_path: Path, program: Any) -> None:
    out = tmp_path / "run"
    with open_run(out, {}) as folder:
        folder.describe({})
        found = CliRunner().invoke(program, ["no-model", "-p", "lines", "-o", str(out)])
    assert found.exit_code == 2 and found.stdout == ""
    (line,) = found.stderr.splitlines()
    assert line.startswith(f"error: {out}: another run works in it")


def test_the_lock_ends_with_a_killed_process(tmp_path: Path) -> None:
    program = (
        "import pathlib, sys, time\n"
        "from eval.scoring.run_folder import open_run\n"
        "with open_run(pathlib.Path(sys.argv[1]), {}) as folder:\n"
        "    folder.describe({})\n"
        "    print('working', flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT.parent) as process:
        assert process.stdout is not None and process.stdout.readline() == b"working\n"
        with pytest.raises(ConfigError, match="another run"), open_run(tmp_path / "run", {}):
            pass
        process.kill()
        process.wait()
    with open_run(tmp_path / "run", {}) as folder:
        assert folder.rows == {}


# ------------------------------------------------------------------------------------- other places


def write_prompts(folder: Path) -> Path:
    """Two prompts, the second with a recording."""
    write_wav(folder / "river.wav", RIVER)
    rows = [
        {"id": "said", "script": "[S1] The river.", "seconds": 1.0},
        {"id": "river", "script": "[S1] The river.", "reference": "river.wav"},
    ]
    file = folder / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run(*arguments: str | Path) -> Result:
    """Of recordings alone: no model is needed."""
    options = ["-q", "no-model", "--codec-only", "--sources", "recording"]
    return CliRunner().invoke(naturalness.main, [*options, *map(str, arguments)])


def test_recordings_are_found_from_another_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_prompts(tmp_path)
    monkeypatch.chdir(tmp_path)
    first = run("-p", "mine.jsonl", "-o", "run", "--metrics", "signal")
    assert first.exit_code == 0, first.output
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = run("-p", tmp_path / "mine.jsonl", "-o", tmp_path / "run", "--metrics", "signal")
    assert again.exit_code == 0, again.output
    (row,) = read_rows(tmp_path / "run" / "utterances.jsonl").values()
    assert row["audio"] == str(tmp_path / "river.wav")
    assert (tmp_path / "run" / "report.html").read_text().count("<audio ") == 1


# ------------------------------------------------------------------------------------- more metrics


class Heard(Metric):
    """Says what it was given, and may be interrupted."""

    name = "heard"
    figures = (Figure("words", "words", "", "", mean("words")),)
    interrupted = False

    @classmethod
    def open(cls, options: Options) -> Heard:
        return cls()

    def identity(self) -> dict[str, Any]:
        return {"ear": 1}

    def score(self, take: Take) -> dict[str, Any] | None:
        if self.interrupted:
            raise KeyboardInterrupt
        return {
            "words": [(word.text, word.start) for word in take.words],
            "truncated": take.truncated,
            "reference": take.reference_seconds,
            "peak": float(np.abs(take.wave).max()),
            "rate": take.rate,
        }


class Maker:
    """Makes takes, and notes which."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def __call__(self, source: str, prompt: Prompt, seed: int | None) -> Take:
        self.made.append(f"{prompt.id} {source}")
        words = (SpokenWord("river", "[S1]", 0.5),)
        wave = RIVER if source == "recording" else np.full(12_000, 0.5, np.float32)
        return Take(source, prompt, wave, 24_000, words, truncated=source == "generated")

    def sources(self, prompt: Prompt) -> Iterable[tuple[str, int | None]]:
        return [("generated", 0), *([("recording", None)] if prompt.reference else [])]


def go_on(out: Path, sets: list[PromptSet], maker: Maker, metrics: Sequence[Metric]) -> list[Row]:
    """What a program does in its folder."""
    with open_run(out, {"metrics": {m.name: m.identity() for m in metrics}}) as folder:
        score_added(maker, sets, metrics, folder)
        folder.describe({})
        return evaluate(maker, sets, metrics, folder, maker.sources)


def test_added_metrics_hear_what_is_kept(tmp_path: Path) -> None:
    sets, out = read_sets([str(write_prompts(tmp_path))]), tmp_path / "run"
    maker = Maker()
    before = go_on(out, sets, maker, [Stopping()])
    assert maker.made == ["said generated", "river generated", "river recording"]
    again = Maker()
    rows = go_on(out, sets, again, [Stopping(), Heard()])
    # A recording is read again, and nothing is spoken again.
    assert again.made == ["river recording"]
    for row, old in zip(rows, before, strict=True):
        assert row["scores"]["stopping"] == old["scores"]["stopping"]
        assert {**row, "scores": None} == {**old, "scores": None}
    said, river, recording = (row["scores"]["heard"] for row in rows)
    assert said == {
        "words": [("river", 0.5)], "truncated": True, "reference": 1.0, "peak": 0.5, "rate": 24_000,
    }  # fmt: skip
    assert river["reference"] == pytest.approx(2, abs=0.5) and recording["truncated"] is False
    on_disk = read_rows(out / "utterances.jsonl")
    assert list(on_disk.values()) == json.loads(json.dumps(rows))
    assert len((out / "utterances.jsonl").read_text().splitlines()) == 3
    # From now on it is a metric of this run: other settings, or none of it, are another.
    assert go_on(out, sets, (last := Maker()), [Stopping(), Heard()]) and last.made == []
    with pytest.raises(ConfigError, match=r"metrics\.heard was .*, now null"):
        RunFolder(out, {"metrics": {"stopping": Stopping().identity()}})
    with pytest.raises(ConfigError, match=r"metrics\.heard\.ear was 1, now 2"):
        RunFolder(out, {"metrics": {"stopping": Stopping().identity(), "heard": {"ear": 2}}})


def test_a_take_whose_audio_is_gone_is_made_again(tmp_path: Path) -> None:
    sets, out = read_sets([str(write_prompts(tmp_path))]), tmp_path / "run"
    first = go_on(out, sets, Maker(), [Signal()])
    (out / first[0]["audio"]).unlink()
    again = Maker()
    rows = go_on(out, sets, again, [Signal(), Heard()])
    assert again.made == ["said generated", "river recording"]
    assert all(set(row["scores"]) == {"signal", "heard"} for row in rows)
    assert (out / first[0]["audio"]).is_file()


def test_interrupted_while_metrics_are_added_it_begins_again(tmp_path: Path) -> None:
    sets, out = read_sets([str(write_prompts(tmp_path))]), tmp_path / "run"
    go_on(out, sets, Maker(), [Signal()])
    written = [(out / name).read_bytes() for name in ("run.json", "utterances.jsonl")]
    heard = Heard()
    heard.interrupted = True
    with pytest.raises(KeyboardInterrupt):
        go_on(out, sets, Maker(), [Signal(), heard])
    assert written == [(out / name).read_bytes() for name in ("run.json", "utterances.jsonl")]
    rows = go_on(out, sets, Maker(), [Signal(), Heard()])
    assert all("heard" in row["scores"] for row in rows)


def test_failed_takes_stay_failed_and_new_ones_have_every_metric(tmp_path: Path) -> None:
    sets, out = read_sets([str(write_prompts(tmp_path))]), tmp_path / "run"
    with open_run(out, {"metrics": {}}) as folder:
        folder.describe({})
        failed = {"set": "mine", "id": "said", "source": "generated", "seed": 0, "kind": "line"}
        folder.add({**failed, "error": "no word"})
    again = Maker()
    rows = go_on(out, sets, again, [Heard()])
    assert rows[0] == {**failed, "error": "no word"}
    assert again.made == ["river generated", "river recording"]


def test_a_run_of_the_program_takes_more_metrics(tmp_path: Path) -> None:
    """`eval.codec` does the same, in `test_codec_evaluation`."""
    prompts, out = write_prompts(tmp_path), tmp_path / "run"
    assert run("-p", prompts, "-o", out, "--metrics", "signal").exit_code == 0
    more = run("-p", prompts, "-o", out, "--metrics", "signal,stopping")
    assert more.exit_code == 0, more.output
    assert f"{out}: 1 takes are there, now scored by stopping, too\n" in more.stderr
    (row,) = read_rows(out / "utterances.jsonl").values()
    assert set(row["scores"]) == {"signal", "stopping"}
    assert "| stopping.leading | s |" in (out / "report.md").read_text()
    about = json.loads((out / "run.json").read_text())
    assert set(about["identity"]["metrics"]) == {"signal", "stopping"}
    fewer = run("-p", prompts, "-o", out, "--metrics", "stopping")
    assert fewer.exit_code == 2 and "metrics.signal was " in fewer.stderr
