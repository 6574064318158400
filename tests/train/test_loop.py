"""The loop in one process: exact resuming, stopping, what is refused, what is written."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import toy_task
import yaml
from click.testing import CliRunner
from toy_task import ToyConfig, ToyTask

from dia2_jax.audio import read_audio
from dia2_jax.checkpoint import flatten_tree
from dia2_jax.config.reading import validate
from dia2_jax.errors import ConfigError, NonFiniteError
from train.checkpoints import Checkpoints
from train.loop import Outcome, train
from train.peak import measure_peak

HOOKS = {"progress": False, "curve": False}


@pytest.fixture(autouse=True)
def quick_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that are about something else do not measure the machine, which takes 0.2 s."""
    monkeypatch.setattr("train.loop.measure_peak", lambda: 1e9)


def make(folder: Path, *, trouble: Any = None, model: Any = None, **run: Any) -> ToyConfig:
    settings = {"folder": str(folder), "steps": 4, "log_every": 1, "save_every": 2, "hooks": HOOKS}
    raw = {"run": settings | run, "trouble": trouble or {}, "model": model or {}}
    return validate(ToyConfig, raw, "toy")


def go(config: ToyConfig, **start: bool) -> Outcome:
    return train(ToyTask(config), config, **start)


def stored(folder: Path, step: int | None = None) -> dict[str, np.ndarray]:
    """Arrays of a checkpoint, the newest if not said otherwise."""
    config = validate(ToyConfig, yaml.safe_load((folder / "config.yaml").read_text()), "toy")
    with Checkpoints(folder / "checkpoints", keep=100) as checkpoints:
        restored = checkpoints.restore(ToyTask(config).abstract_state())
    assert restored is not None and (step is None or restored.step == step)
    return {name: np.asarray(leaf) for name, leaf in flatten_tree(restored.state)[0].items()}


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in log(folder) if "loss" in line}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and one[name].tobytes() == other[name].tobytes()
        for name in one
    )


# ----------------------------------------------------------------------------------------- resuming


def test_four_steps_are_two_and_two_bit_for_bit(tmp_path: Path) -> None:
    go(make(tmp_path / "straight"))
    assert go(make(tmp_path / "parts", steps=2)).step == 2
    config = make(tmp_path / "parts", steps=4)
    task = ToyTask(config)
    assert train(task, config, resume=True).step == 4
    assert task.started == [2], "the data goes on where it was"
    straight, parts = stored(tmp_path / "straight", 4), stored(tmp_path / "parts", 4)
    assert same(straight, parts)
    assert "optimizer.0.mu.layer.weight" in straight and straight["step"] == 4
    assert losses(tmp_path / "straight") == losses(tmp_path / "parts")
    hours = [line["audio_hours"] for line in log(tmp_path / "parts") if "audio_hours" in line]
    assert hours == [0.02, 0.04, 0.06, 0.08]


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    go(make(tmp_path / "a", steps=1))
    go(make(tmp_path / "b", steps=1, seed=1))
    assert not same(stored(tmp_path / "a"), stored(tmp_path / "b"))


def test_log_is_cut_where_the_run_goes_on(tmp_path: Path) -> None:
    # Step 3 was logged, then the machine died; the newest checkpoint is that of step 2.
    go(make(tmp_path / "run", steps=2))
    with (tmp_path / "run" / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 99.0}\n{"step": 4, "lo')
    go(make(tmp_path / "run", steps=3), resume=True)
    assert list(losses(tmp_path / "run")) == [1, 2, 3]
    assert losses(tmp_path / "run")[3] != 99.0


def test_finished_run_resumes_to_its_export(tmp_path: Path) -> None:
    go(make(tmp_path / "run"))
    exported = tmp_path / "run" / "export" / "model.json"
    assert json.loads(exported.read_text()) == {"step": 4}
    exported.unlink()
    assert go(make(tmp_path / "run"), resume=True).step == 4
    assert json.loads(exported.read_text()) == {"step": 4}


# ----------------------------------------------------------------------------- when a run may start


def test_existing_run_needs_a_decision(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    go(make(folder, steps=2))
    before = stored(folder)
    with pytest.raises(ConfigError, match=r"holds a run; continue it with --resume.*--overwrite"):
        go(make(folder, steps=2))
    with pytest.raises(ConfigError, match="one of them"):
        go(make(folder, steps=2), resume=True, overwrite=True)
    assert same(stored(folder), before)
    (folder / "notes.txt").write_text("mine")
    go(make(folder, steps=1, seed=3), overwrite=True)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["1"]
    assert list(losses(folder)) == [1]
    assert (folder / "notes.txt").read_text() == "mine", "only what a run wrote is deleted"


def test_foreign_folder_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for start in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(ConfigError, match="exists and holds no run"):
            go(make(tmp_path), **start)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_two_runs_do_not_share_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make(tmp_path / "run", sample_every=4)
    refused: list[str] = []

    def start_again(self: ToyTask, state: Any, step: int) -> list[Any]:
        for start in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(ConfigError) as caught:
                go(config, **start)
            refused.append(str(caught.value))
        return []

    monkeypatch.setattr(ToyTask, "samples", start_again)
    go(config)
    assert len(refused) == 2 and all("another process is training in it" in x for x in refused)
    assert (
        set(losses(tmp_path / "run")) == {1, 2, 3, 4} and "warning" not in capsys.readouterr().err
    )
    monkeypatch.undo()
    go(make(tmp_path / "run", steps=5), resume=True)
    assert "warning: run.steps was 4, now 5: a learning rate" in capsys.readouterr().err


def test_resume_starts_what_was_killed_before_its_first_checkpoint(tmp_path: Path) -> None:
    assert go(make(tmp_path / "run", steps=1), resume=True).step == 1


def test_resume_refuses_a_changed_config_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    go(make(folder, steps=1))
    with pytest.raises(ConfigError) as caught:
        go(make(folder, steps=2, seed=7, model={"rate": 0.5}), resume=True)
    message = str(caught.value)
    assert "run.seed was 0, now 7" in message and "model.rate was 0.05, now 0.5" in message
    assert "run.steps" not in message
    changed = make(folder, steps=2, log_every=2, keep=3, save_every=1, model={"rate": 0.5})
    assert go(changed, resume=True, force_config=True).step == 2
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["rate"] == 0.5
    changed = make(folder, steps=3, log_every=3, keep=1, hooks={**HOOKS, "jsonl": False})
    with pytest.raises(ConfigError, match=r"model\.rate was 0\.5, now 0\.05"):
        go(changed, resume=True)


def test_resume_needs_to_know_the_old_config(tmp_path: Path) -> None:
    go(make(tmp_path / "run", steps=1))
    (tmp_path / "run" / "config.yaml").write_text("[")
    with pytest.raises(ConfigError, match=r"config\.yaml: cannot be read, .*--force-config"):
        go(make(tmp_path / "run", steps=2), resume=True)
    assert go(make(tmp_path / "run", steps=2), resume=True, force_config=True).step == 2


def test_resume_refuses_other_data(tmp_path: Path) -> None:
    config = make(tmp_path / "run", steps=1)
    go(config)
    longer = make(tmp_path / "run", steps=2)
    with pytest.raises(ConfigError, match=r'data\.fingerprint was "noise", now "speech"'):
        train(ToyTask(longer, data="speech"), longer, resume=True)
    other = ToyTask(longer, data="speech")
    assert train(other, longer, resume=True, force_config=True).step == 2


def test_resume_compares_only_what_the_checkpoint_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(make(tmp_path / "run", steps=1))
    before = ToyTask.metadata
    monkeypatch.setattr(ToyTask, "metadata", lambda self: {**before(self), "newer": 1})
    assert go(make(tmp_path / "run", steps=2), resume=True).step == 2
    monkeypatch.setattr(ToyTask, "metadata", before)
    with pytest.raises(ConfigError, match="newer was 1, now absent"):
        go(make(tmp_path / "run", steps=3), resume=True)


# ----------------------------------------------------------------------------------------- stopping


def test_nan_stops_the_run_and_is_not_saved(tmp_path: Path) -> None:
    # Nothing is read before step 8 is logged, and still the step of the NaN is named.
    config = make(tmp_path / "run", steps=9, log_every=8, save_every=3, trouble={"nan_at": 5})
    with pytest.raises(NonFiniteError, match=r"step 5: loss is NaN or infinite"):
        go(config)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["3"]
    assert same(stored(tmp_path / "run"), stored(tmp_path / "run", 3))


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path) -> None:
    # The loss of step 2 was computed before its update broke the weights.
    config = make(tmp_path / "run", trouble={"nan_weights_at": 2})
    with pytest.raises(NonFiniteError, match=r"step 2: .*params\.layer\.bias|ema\.layer\.bias"):
        go(config)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_signal_stops_after_the_step_with_its_checkpoint(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    outcome = go(make(tmp_path / "run", steps=9, save_every=0, trouble={"signal_at": 3}))
    assert (outcome.step, outcome.signal) == (3, signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (tmp_path / "run" / "export").exists()
    assert stored(tmp_path / "run", 3)["step"] == 3


def test_samples_that_fail_lose_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: ToyTask, state: Any, step: int) -> Any:
        raise ConfigError("no voice")

    monkeypatch.setattr(ToyTask, "samples", fail)
    with pytest.raises(ConfigError, match="no voice"):
        go(make(tmp_path / "run", sample_every=2))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]


def test_minutes_between_saves(tmp_path: Path) -> None:
    config = make(tmp_path / "run", save_every=0, save_minutes=1e-9, steps=3, keep=9)
    go(config)
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["1", "2", "3"]


def test_data_that_ends_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ToyTask, "batches", lambda self, start: iter([self._batch(0)]))
    with pytest.raises(ConfigError, match="ended after 1 batches"):
        go(make(tmp_path / "run"))


# ---------------------------------------------------------------------------------- what is written


def test_run_folder_holds_everything(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = make(folder, evaluate_every=2, sample_every=4, log_every=2, hooks={"progress": True})
    task = ToyTask(config)
    train(task, config)
    assert task.validated == [2, 4]
    lines = log(folder)
    assert [line["step"] for line in lines] == [1, 2, 2, 4, 4]
    assert "first_step_seconds" in lines[0]
    step = lines[3]
    assert {"loss", "accuracy", "step_seconds", "data_share", "frames_per_second"} <= step.keys()
    assert step["real_share"] == 0.5 and 0 <= step["data_share"] <= 1
    work = 6 * 8 * 16 * 2 / (8 / step["frames_per_second"]) / 1e9
    assert step["peak_share"] == pytest.approx(work)
    assert lines[4]["validation/loss"] == 1.5
    assert read_audio(folder / "samples" / "4" / "one_two.wav", 8000).shape == (80,)
    assert (folder / "samples" / "4" / "one_two.txt").read_text() == "[S1] Hello.\n"
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    versions = json.loads((folder / "versions.json").read_text())["parts"]
    assert versions[0]["packages"]["jax"] == jax.__version__
    assert versions[0]["matmul_peak_flops"] == 1e9 and versions[0]["from_step"] == 0
    assert validate(ToyConfig, yaml.safe_load((folder / "config.yaml").read_text()), "") == config
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_metrics_are_read_only_when_they_are_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: (read.append(1), get(tree))[1])
    go(make(tmp_path / "run", steps=9, log_every=4, save_every=0))
    # Logged after 4, 8 and the last; one more for the fingerprints of the only checkpoint.
    assert len(read) == 4


def test_peak_is_a_plausible_speed() -> None:
    assert 1e8 < measure_peak() < 1e15


def test_command_says_one_line_and_exits_with_2(tmp_path: Path) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump({"run": {"folder": str(tmp_path / "run"), "steps": 1}}))
    result = CliRunner().invoke(toy_task.main, [str(path), "run.stepz=3"])
    assert result.exit_code == 2 and result.output.count("\n") == 1
    assert result.output.startswith("error: ") and "did you mean 'steps'" in result.output
    result = CliRunner().invoke(toy_task.main, [str(path), "--plan"])
    assert (result.exit_code, result.output) == (0, "small\n")
    result = CliRunner().invoke(toy_task.main, [str(path), "trouble.nan_at=1"])
    assert result.exit_code == 1 and "error: step 1: loss" in result.output
    result = CliRunner().invoke(toy_task.main, [str(path), "trouble.signal_at=1", "--overwrite"])
    assert result.exit_code == 0
    again = [str(path), "trouble.signal=2", "trouble.signal_at=1", "--overwrite", "run.steps=2"]
    result = CliRunner().invoke(toy_task.main, again)
    assert result.exit_code == 130
