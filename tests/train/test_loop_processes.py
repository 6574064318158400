"""The loop as a program: killed at any instant, stopped by signals, on other meshes, in two."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from children import family
from toy_task import ToyConfig, ToyTask

from dia2_jax.checkpoint import flatten_tree
from train.checkpoints import Checkpoints
from train.config import read_config
from train.loop import train

SECONDS = 90
HOOKS = {"progress": False, "curve": False}


@pytest.fixture(autouse=True)
def quick_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that are about something else do not measure the machine, which takes 0.2 s."""
    monkeypatch.setattr("train.loop.measure_peak", lambda: 1e9)


def write_config(folder: Path, **sections: Any) -> Path:
    run = {"folder": str(folder), "steps": 6, "log_every": 1, "save_every": 1, "hooks": HOOKS}
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**sections, "run": run | sections.get("run", {})}))
    return path


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts the toy program with a config and arguments; what still runs at the end is killed."""
    with family() as start_python:

        def start(path: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
            return start_python(["tests/train/toy_task.py", str(path), *arguments], environment)

        yield start


def finish(child: subprocess.Popen[str]) -> tuple[int, str]:
    """Status and standard error of a child that ends by itself."""
    _, errors = child.communicate(timeout=SECONDS)
    return child.returncode, errors


def logged(folder: Path) -> int:
    """The last step in the log."""
    try:
        lines = (folder / "log.jsonl").read_text().splitlines()
        return int(json.loads(lines[-1])["step"])
    except (FileNotFoundError, IndexError, ValueError):
        return 0


def wait_for_step(child: subprocess.Popen[str], folder: Path, step: int) -> None:
    deadline = time.monotonic() + SECONDS
    while logged(folder) < step:
        assert child.poll() is None, finish(child)
        assert time.monotonic() < deadline
        time.sleep(0.002)


def checkpoints_of(folder: Path) -> list[int]:
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdecimal())


def stored(path: Path, folder: Path) -> dict[str, np.ndarray]:
    task = ToyTask(read_config(ToyConfig, path))
    with Checkpoints(folder / "checkpoints", keep=100) as checkpoints:
        restored = checkpoints.restore(task.abstract_state())
    assert restored is not None
    return {name: np.asarray(leaf) for name, leaf in flatten_tree(restored.state)[0].items()}


def straight(path: Path, folder: Path) -> dict[str, np.ndarray]:
    """The same run without interruption, in this process."""
    here = [f"run.folder={folder}", "run.save_every=0", "trouble.step_seconds=0"]
    config = read_config(ToyConfig, path, here)
    train(ToyTask(config), config)
    return stored(path, folder)


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_killed_at_random_and_resumed_is_a_straight_run(tmp_path: Path, start: Start) -> None:
    folder = tmp_path / "run"
    path = write_config(folder, run={"steps": 14}, trouble={"step_seconds": 0.01})
    moments = random.Random(3)
    for step in (3, 8):
        child = start(path, "--resume")
        wait_for_step(child, folder, step)
        time.sleep(moments.uniform(0, 0.06))
        child.send_signal(signal.SIGKILL)
        assert finish(child)[0] == -signal.SIGKILL
        # What a kill loses: the step under way, and the save of the one before.
        assert checkpoints_of(folder)[-1] >= logged(folder) - 2
    config = read_config(ToyConfig, path)
    assert train(ToyTask(config), config, resume=True).step == 14
    # Whole checkpoints only, also where a save or a deletion was cut off.
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"13", "14"}
    one, other = stored(path, folder), straight(path, tmp_path / "straight")
    assert {name: leaf.tobytes() for name, leaf in one.items()} == {
        name: leaf.tobytes() for name, leaf in other.items()
    }
    assert losses(folder) == losses(tmp_path / "straight")


def test_sigterm_saves_the_last_step_and_exits_with_0(tmp_path: Path, start: Start) -> None:
    folder = tmp_path / "run"
    path = write_config(folder, run={"steps": 10_000, "save_every": 0})
    child = start(path, "trouble.step_seconds=0.02")
    wait_for_step(child, folder, 2)
    child.send_signal(signal.SIGTERM)
    status, errors = finish(child)
    assert status == 0, errors
    assert "stopping after this step, with a checkpoint" in errors
    assert checkpoints_of(folder) == [logged(folder)]


def test_second_signal_stops_at_once(tmp_path: Path, start: Start) -> None:
    folder = tmp_path / "run"
    path = write_config(folder, run={"save_every": 1})
    child = start(path, "trouble.step_seconds=30")
    deadline = time.monotonic() + SECONDS
    while not (folder / "log.jsonl").exists():
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.2)
    child.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert child.poll() is None, "the first one waits for the step"
    child.send_signal(signal.SIGTERM)
    assert finish(child)[0] == -signal.SIGTERM


def test_resumes_on_another_mesh(tmp_path: Path, start: Start) -> None:
    folder = tmp_path / "run"
    path = write_config(folder)
    before = straight(path, tmp_path / "straight")
    config = read_config(ToyConfig, path, ["run.steps=3"])
    train(ToyTask(config), config)
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    status, errors = finish(start(path, "mesh.fsdp=4", "--resume", XLA_FLAGS=flags, NPROC="32"))
    assert status == 0, errors
    for name, leaf in stored(path, folder).items():
        np.testing.assert_allclose(leaf, before[name], rtol=1e-6, atol=1e-6, err_msg=name)
    versions = json.loads((folder / "versions.json").read_text())["parts"]
    assert [part["devices"]["count"] for part in versions] == [jax.device_count(), 8]


def test_two_processes_stop_after_the_same_step_and_resume_as_one(
    tmp_path: Path, start: Start
) -> None:
    folder = tmp_path / "run"
    path = write_config(folder, run={"steps": 10_000, "save_every": 0})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    children = [
        start(path, "mesh.fsdp=2", "trouble.step_seconds=0.02", PROCESS=f"{index}@{address}")
        for index in (0, 1)
    ]
    wait_for_step(children[0], folder, 3)
    # The second one alone is told, and both save the step that they agree on.
    children[1].send_signal(signal.SIGTERM)
    results = [finish(child) for child in children]
    assert [status for status, _ in results] == [0, 0], results
    (step,) = checkpoints_of(folder)
    assert step == logged(folder)
    assert len(losses(folder)) == step, "one process writes the log"
    expected = write_config(tmp_path / "one", run={"steps": step, "save_every": 0})
    one = straight(expected, tmp_path / "straight")
    for name, leaf in stored(path, folder).items():
        np.testing.assert_allclose(leaf, one[name], rtol=1e-5, atol=1e-6, err_msg=name)
