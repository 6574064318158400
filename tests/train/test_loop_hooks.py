"""What watches a run: each hook by itself, Weights & Biases at its boundary."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_task import ToyConfig

from dia2_jax.config.reading import validate
from dia2_jax.errors import ConfigError
from train.curves import draw_curves
from train.finite import FiniteWatch
from train.hooks import Hooks, Progress, describe, read_log
from train.interrupt import Interrupt
from train.meter import Meter
from train.run_folder import RunFolder
from train.task import Sample

QUIET = {"progress": False, "jsonl": False, "curve": False}
SAMPLE = Sample("../a b", np.zeros(10, np.float32), 8000, "[S1] Hi.")


def make(folder: Path, **hooks: Any) -> ToyConfig:
    run = {"folder": str(folder), "steps": 4, "hooks": QUIET | hooks}
    return validate(ToyConfig, {"run": run}, "toy")


class FakeWandb(types.ModuleType):
    """Stands in for the package: records what it is told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.options: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.exit_code: int | None = None

    def init(self, **options: Any) -> FakeWandb:
        self.options = options
        return self

    def log(self, values: dict[str, Any], *, step: int) -> None:
        self.logged.append((step, values))

    def finish(self, *, exit_code: int) -> None:
        self.exit_code = exit_code

    @staticmethod
    def Audio(wave: np.ndarray, *, sample_rate: int, caption: str) -> tuple[int, int, str]:
        return len(wave), sample_rate, caption


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return fake


# -------------------------------------------------------------------------------------------- wandb


def test_wandb_gets_config_metrics_and_audio(tmp_path: Path, wandb: FakeWandb) -> None:
    folder = RunFolder(tmp_path)
    config = make(tmp_path, wandb={"mode": "offline", "name": "first"})
    with Hooks(config, folder, start=0, task="toy") as hooks:
        hooks.metrics(3, {"loss": 0.5})
        hooks.samples(3, [SAMPLE])
    assert wandb.options["mode"] == "offline" and wandb.options["name"] == "first"
    assert wandb.options["project"] == "dia2-jax" and wandb.options["dir"] == str(tmp_path)
    assert wandb.options["config"]["run"]["steps"] == 4
    assert wandb.logged == [(3, {"loss": 0.5}), (3, {"samples/../a b": (10, 8000, "[S1] Hi.")})]
    assert wandb.exit_code == 0
    identity = wandb.options["id"]
    with pytest.raises(ZeroDivisionError), Hooks(config, folder, start=3, task="toy"):
        raise ZeroDivisionError
    assert wandb.options["id"] == identity, "a resumed run goes on under its id"
    assert wandb.exit_code == 1


def test_wandb_without_a_key_is_offline_and_says_so(
    tmp_path: Path,
    wandb: FakeWandb,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = make(tmp_path, wandb={"mode": "online"})
    with Hooks(config, RunFolder(tmp_path), start=0, task="toy"):
        assert wandb.options["mode"] == "offline" and wandb.options["resume"] is None
    assert "warning: wandb: no API key" in capsys.readouterr().err
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    with Hooks(config, RunFolder(tmp_path), start=0, task="toy"):
        assert wandb.options["mode"] == "online" and wandb.options["resume"] == "allow"
    (tmp_path / "netrc").write_text("machine elsewhere.example login user password x\n")
    monkeypatch.setenv("WANDB_API_KEY", "x")
    with Hooks(config, RunFolder(tmp_path), start=0, task="toy"):
        assert wandb.options["mode"] == "online"
    assert capsys.readouterr().err == ""


def test_wandb_that_refuses_the_run_is_one_line(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**options: Any) -> None:
        raise RuntimeError("permission denied\nfor project x")

    monkeypatch.setattr(wandb, "init", refuse)
    config = make(tmp_path, wandb={"mode": "offline"})
    with pytest.raises(ConfigError, match=r"\(permission denied\); set mode: offline$"):
        Hooks(config, RunFolder(tmp_path), start=0, task="toy")


def test_wandb_disabled_is_not_even_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would fail
    with Hooks(make(tmp_path), RunFolder(tmp_path), start=0, task="toy") as hooks:
        hooks.metrics(1, {"loss": 1.0})
    offline = make(tmp_path, wandb={"mode": "offline"})
    with pytest.raises(ConfigError, match="wandb is not installed"):
        Hooks(offline, RunFolder(tmp_path), start=0, task="toy")


# ------------------------------------------------------------------------------- files and progress


def test_samples_stay_in_their_folder(tmp_path: Path) -> None:
    with Hooks(make(tmp_path), RunFolder(tmp_path), start=0, task="toy") as hooks:
        hooks.samples(7, [SAMPLE])
    found = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert found == [Path("samples/7/_a_b.txt"), Path("samples/7/_a_b.wav")]


def test_lines_are_complete_json_as_they_come(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with Hooks(make(tmp_path, jsonl=True), folder, start=0, task="toy") as hooks:
        hooks.metrics(1, {"loss": 1.5})
        (line,) = folder.log.read_text().splitlines()
        assert json.loads(line)["loss"] == 1.5
        hooks.metrics(2, {"loss": 1.25})
    with folder.log.open("a") as file:
        file.write('[1]\nnoise\n{"loss": 1}\n{"step": 3, "los')
    assert [line["step"] for line in read_log(folder.log, 1)] == [1]
    assert [line["step"] for line in read_log(folder.log, 9)] == [1, 2]
    assert read_log(tmp_path / "nix", 9) == []


def test_curves_go_on_from_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "train.hooks.draw_curves", lambda history, path, title: drawn.append(dict(history))
    )
    folder = RunFolder(tmp_path)
    folder.log.write_text('{"step": 1, "time": 5, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n')
    with Hooks(make(tmp_path, curve=True), folder, start=1, task="toy") as hooks:
        hooks.metrics(2, {"loss": 2.5, "validation/loss": 4.0})
    assert drawn == [{"loss": [(1, 3.0), (2, 2.5)], "validation/loss": [(2, 4.0)]}]


def test_picture_shows_losses_and_accuracies(tmp_path: Path) -> None:
    history = {"loss": [(1, 300.0), (2, 2.0)], "validation/loss": [(2, 3.0)], "speed": [(1, 9.0)]}
    draw_curves(history, tmp_path / "one.png", title="toy")
    draw_curves(history | {"accuracy": [(1, 0.5)]}, tmp_path / "two.png")
    widths = [
        int.from_bytes((tmp_path / name).read_bytes()[16:20], "big")
        for name in ("one.png", "two.png")
    ]
    assert widths == [700, 1400]
    draw_curves({"speed": [(1, 9.0)]}, tmp_path / "none.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "two.png"]


def test_progress_is_a_line_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(0, 10, "toy")
    values = {"loss": 1.23456, "frames_per_second": 99.6, "audio_hours": 1.5, "peak_share": 0.456}
    progress.metrics(5, values)
    progress.close(failed=False)
    text = capsys.readouterr().err
    assert text == "step 5/10: loss 1.235, 100 frames/s, 1.50 h, 46% of peak\n"
    assert describe({"first_step_seconds": 2.0}) == "first_step_seconds 2"


def test_progress_is_a_bar_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = Progress(2, 10, "toy")
    progress.metrics(5, {"validation/loss": 2.0})
    progress.metrics(10, {"loss": 1.0, "audio_hours": 1.0})
    progress.close(failed=False)
    text = capsys.readouterr().err
    assert "step 5: validation/loss 2\n" in text
    assert "10/10" in text and "loss 1, 1.00 h" in text


# --------------------------------------------------------------------------- time, signals, numbers


def test_meter_separates_steps_from_waiting_and_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("train.meter.time.perf_counter", lambda: now[0])
    meter = Meter(peak=100.0, totals={"audio_seconds": 1800.0})
    work = {"frames": 10.0, "audio_seconds": 900.0, "flops": 30.0, "real_share": 0.5}
    for _ in range(2):
        with meter.data():
            now[0] += 0.25
        meter.count(work)
        now[0] += 0.75
    with meter.aside(()):
        now[0] += 100.0
    assert meter.read() == {
        "audio_hours": 1.0,
        "step_seconds": 0.75,
        "data_share": 0.25,
        "frames_per_second": 10.0,
        "peak_share": 0.3,
        "real_share": 0.5,
    }
    assert meter.read() == {"audio_hours": 1.0}, "each reading is of its own interval"
    assert meter.totals == {"frames": 20.0, "audio_seconds": 3600.0}
    now[0] += 5.0
    meter.count(work)
    assert meter.skip_compilation(()) == 5.0
    assert meter.read() == {"audio_hours": 1.25}


def test_first_bad_step_is_remembered_and_a_loss_is_named_first() -> None:
    watch = FiniteWatch()
    watch.add(1, {"accuracy": np.float32(1), "loss": np.float32(1)})
    watch.check()
    watch.add(2, {"accuracy": np.float32("nan"), "loss": np.float32("inf")})
    watch.add(3, {"accuracy": np.float32("nan"), "loss": np.float32(1)})
    with pytest.raises(FloatingPointError, match=r"^step 2: loss is NaN or infinite"):
        watch.check()


def test_an_echo_of_the_first_signal_is_no_second_one() -> None:
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with Interrupt() as interrupt:
            for _ in range(2):  # as `timeout` sends it, to the process and to its group
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.001)  # the first one is handled
            interrupt.poll()
            assert interrupt.signal == signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGINT)
            interrupt.poll()
            assert not interrupt.signal
    finally:
        signal.signal(signal.SIGINT, before)
