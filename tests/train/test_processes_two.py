"""`python -m train.pretrain` as it is run: in two processes, stopped, killed and resumed."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from children import family
from test_mesh import GRADIENT, PARAMETER

from dia2_jax.checkpoint import flatten_tree
from train.checkpoints import load_for_export
from train.dia2_task import Dia2Task

SECONDS = 120
#: So many that a run only ends when a signal ends it.
ENDLESS = 100_000
RATE = 0.1
SGD = ("optimizer.name=sgd", f"optimizer.learning_rate={RATE}", "optimizer.weight_decay=0")

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def start(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """``start(folder, *arguments)``: the program at work; the module's runs share compilations."""
    cache = tmp_path_factory.mktemp("xla")
    environment = {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "DIA2_JAX_CACHE": str(cache),
    }
    with family() as start_python:

        def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
            command = ["-m", "train.pretrain", str(small_run), f"run.folder={folder}"]
            return start_python([*command, "run.save_every=1", *arguments], environment)

        yield start


def finish(child: subprocess.Popen[str]) -> None:
    _, errors = child.communicate(timeout=SECONDS)
    assert child.returncode == 0, errors[-3000:]


def saved(folder: Path) -> list[int]:
    """Steps of the checkpoints that are whole."""
    names = (path.name for path in (folder / "checkpoints").glob("*"))
    return sorted(int(name) for name in names if name.isdecimal())


def wait_for(folder: Path, step: int, *children: subprocess.Popen[str]) -> None:
    end = time.monotonic() + SECONDS
    while max(saved(folder), default=0) < step:
        for child in children:
            assert child.poll() is None, child.communicate()[1][-3000:]
        assert time.monotonic() < end, f"no checkpoint {step} of {folder}"
        time.sleep(0.02)


def lines(folder: Path) -> dict[int, dict[str, float]]:
    """What is logged of the training itself, by step."""
    found: dict[int, dict[str, float]] = {}
    for text in (folder / "log.jsonl").read_text().splitlines():
        line = json.loads(text)
        if "loss" in line:
            names = [name for name in line if name.startswith(("loss", "accuracy", "gradient"))]
            found[line["step"]] = {name: line[name] for name in names}
    return found


def state_of(folder: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, which is checked against its fingerprints on the way."""
    state, _ = load_for_export(folder, step, parts=("step", "params", "optimizer"))
    return dict(flatten_tree(state)[0])


def in_two(start: Start, folder: Path, *arguments: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [
        start(folder, *arguments, "--distributed", f"{address},2,{index}") for index in range(2)
    ]


def test_two_processes_train_as_one_and_stop_together(start, tmp_path) -> None:
    """Weights and rows are split between the processes; one of them is told to stop."""
    both, one = tmp_path / "both", tmp_path / "one"
    children = in_two(start, both, *SGD, f"run.steps={ENDLESS}", "mesh.data=1", "mesh.fsdp=2")
    wait_for(both, 2, *children)
    children[1].send_signal(signal.SIGTERM)
    for child in children:
        finish(child)
    *_, before, end = saved(both)
    assert before == end - 1 < ENDLESS
    finish(start(one, *SGD, f"run.steps={end}"))

    mine, theirs = lines(both), lines(one)
    assert list(mine) == list(theirs) == list(range(1, end + 1))
    for step, line in mine.items():
        assert line == pytest.approx(theirs[step], rel=GRADIENT, abs=1e-6), step
    last, wanted = state_of(both, end), state_of(one, end)
    assert last.keys() == wanted.keys()
    assert last["step"] == end
    params = {name: leaf for name, leaf in last.items() if name.startswith("params.")}
    off = max(float(np.abs(leaf - wanted[name]).max()) for name, leaf in params.items())
    # SGD: the last step is the last gradient, up to the rounding of the weights.
    earlier, wanted_earlier = state_of(both, before), state_of(one, before)
    slopes = {name: (earlier[name] - leaf) / RATE for name, leaf in params.items()}
    errors = []
    for name, slope in slopes.items():
        other = (wanted_earlier[name] - wanted[name]) / RATE
        rounding = 2 * np.spacing(np.abs(wanted[name]).max()) / RATE
        errors.append((np.abs(slope - other).max() - rounding) / np.abs(other).max())
    print(f"{end} steps: weights differ by {off:.1e}, gradients by {max(errors):.1e} + rounding")
    assert off < PARAMETER
    assert max(errors) < GRADIENT


def test_a_killed_run_goes_on_as_if_nothing_had_been(start, tmp_path) -> None:
    """Parameters, AdamW's state and every logged loss, bit for bit."""
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    child = start(killed, f"run.steps={ENDLESS}")
    wait_for(killed, 2, child)
    child.kill()
    assert child.wait(SECONDS) == -signal.SIGKILL
    end = saved(killed)[-1] + 2
    finish(start(killed, f"run.steps={end}", "--resume"))
    finish(start(straight, f"run.steps={end}"))

    assert saved(killed)[-1] == saved(straight)[-1] == end
    mine, wanted = state_of(killed, end), state_of(straight, end)
    assert mine.keys() == wanted.keys()
    assert any(name.startswith("optimizer.") and leaf.ndim for name, leaf in mine.items())
    for name, leaf in mine.items():
        assert leaf.dtype == wanted[name].dtype
        assert leaf.tobytes() == wanted[name].tobytes(), name
    # Steps that the first part had done and not saved are logged once more, with the same values.
    assert lines(killed) == lines(straight)


def test_the_batches_after_a_resume_are_those_of_the_straight_run(small_config) -> None:
    task = Dia2Task(small_config)
    straight = task.batches(0)
    for _ in range(3):
        next(straight)
    resumed = Dia2Task(small_config).batches(3)
    for _ in range(2):
        mine, wanted = next(resumed), next(straight)
        assert mine.keys() == wanted.keys()
        for name, leaf in wanted.items():
            assert leaf.tobytes() == mine[name].tobytes(), name
