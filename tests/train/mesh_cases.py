"""One step of training in every arrangement, on eight CPU devices: prints JSON of the differences.

python tests/train/mesh_cases.py CONFIG, with XLA_FLAGS=--xla_force_host_platform_device_count=8

The reference is one device, one micro-batch, everything kept. Gradients come out of the real
training step: they are kept in the optimiser's state, as an optax trace that forgets at once.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from train.checkpoints import Checkpoints
from train.config import read_config
from train.dia2_config import Dia2TrainingConfig
from train.dia2_task import Dia2Task
from train.task import State

SGD = ["optimizer.name=sgd", "optimizer.learning_rate=0.1", "optimizer.weight_decay=0"]
SGD += ["optimizer.clip=null", "optimizer.ema_decay=0.5"]
ONE = ["mesh.data=1"]
EIGHT = ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]

#: Names of the arrangements, each compared with the first of its group.
GROUPS: dict[str, dict[str, list[str]]] = {
    "everything": {
        "straight": ONE,
        "accumulate 2": [*ONE, "microbatches=2"],
        "accumulate 4": [*ONE, "microbatches=4"],
        "remat dots": [*ONE, "remat=dots"],
        "remat full": [*ONE, "remat=full"],
        "8 data": ["mesh.data=8"],
        "8 fsdp": ["mesh.data=1", "mesh.fsdp=8"],
        "2 x 2 x 2": EIGHT,
        # The depformer's gradients do not know whether the decoder trains.
        "2 x 2 x 2, decoder frozen": [*EIGHT, "frozen=[transformer.*]"],
    },
    "lora": {
        "straight": [*ONE, "lora.rank=4"],
        "2 x 2 x 2, accumulate 2, remat dots": [
            *EIGHT,
            "lora.rank=4",
            "microbatches=2",
            "remat=dots",
        ],
    },
}


def make_task(path: str, overrides: list[str]) -> Dia2Task:
    config = read_config(Dia2TrainingConfig, path, [*SGD, *overrides])
    alone = config.mesh.data == config.mesh.fsdp == 1
    task = Dia2Task(config, devices=jax.devices()[: 1 if alone else 8])
    task.optimizer = optax.chain(optax.trace(decay=0.0), task.optimizer)
    return task


def first_state(task: Dia2Task) -> State:
    """The state before step 0, with adapters that do something from the start."""
    state = task.initial_state()
    for path, leaf in state["params"].items():
        if path.endswith("lora_b"):
            noise = np.random.default_rng(len(path)).standard_normal(leaf.shape, np.float32)
            state["params"][path] = jax.device_put(0.05 * noise, leaf.sharding)
    return state


def fetched(tree: dict[str, Any]) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in tree.items()}


def step(task: Dia2Task, state: State, batch: Any) -> tuple[State, dict[str, Any]]:
    """The state after a step, and what is compared of it."""
    state, metrics = task.train_step(state, batch)
    result = {
        "gradients": fetched(state["optimizer"][0].trace),
        "params": fetched(state["params"]),
        "ema": fetched(state["ema"]),
        "metrics": {name: np.asarray(value) for name, value in metrics.items()},
    }
    return state, result


def relative(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """Largest difference, in units of each tensor's largest value."""
    return max(
        float(np.abs(leaf - wanted[path]).max() / np.abs(wanted[path]).max())
        for path, leaf in found.items()
    )


def absolute(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    return max(float(np.abs(leaf - wanted[path]).max()) for path, leaf in found.items())


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, float]:
    return {
        "gradients": relative(found["gradients"], wanted["gradients"]),
        "params": absolute(found["params"], wanted["params"]),
        "ema": absolute(found["ema"], wanted["ema"]),
        "metrics": absolute(found["metrics"], wanted["metrics"]),
    }


def parts(task: Dia2Task, state: State, batch: Any) -> dict[str, Any]:
    """In how many pieces each thing lies, from the arrays themselves."""

    def pieces(leaf: Any) -> int:
        return len({str(shard.index) for shard in leaf.addressable_shards})

    placed = task._place(batch)
    return {
        "params": {path: pieces(leaf) for path, leaf in state["params"].items()},
        "frozen": {path: pieces(leaf) for path, leaf in task._frozen().items()},
        "gradients": {path: pieces(leaf) for path, leaf in state["optimizer"][0].trace.items()},
        "batch": {name: pieces(leaf) for name, leaf in placed.items()},
    }


def compare(path: str) -> tuple[dict[str, Any], dict[str, Dia2Task]]:
    report: dict[str, Any] = {}
    tasks: dict[str, Dia2Task] = {}
    for group, cases in GROUPS.items():
        reference: dict[str, Any] = {}
        for name, overrides in cases.items():
            begin = time.perf_counter()
            task = make_task(path, overrides)
            batches, state = task.batches(0), first_state(task)
            before, batch = fetched(state["params"]), next(batches)
            state, result = step(task, state, batch)
            if not reference:
                reference = result
                _, other = step(task, state, next(batches))
                sizes = [float(np.abs(leaf).max()) for leaf in result["gradients"].values()]
                report[f"{group}: {name}"] = {
                    "another batch": relative(other["gradients"], result["gradients"]),
                    "smallest gradient": min(sizes),
                    "largest step": absolute(result["params"], before),
                    "gradients": len(sizes),
                }
            else:
                if task.config.frozen:
                    del result["metrics"]["gradient_norm"]  # of fewer gradients
                report[f"{group}: {name}"] = differences(result, reference) | {
                    "parts": parts(task, state, batch)
                }
            tasks[f"{group}: {name}"] = task
            print(f"{group}: {name}: {time.perf_counter() - begin:.1f} s", file=sys.stderr)
    return report, tasks


def resume(tasks: dict[str, Dia2Task], folder: Path) -> dict[str, Any]:
    """Two steps on one device, a checkpoint, two more there and on each mesh that resumes it."""
    task = tasks["everything: straight"]
    batches, state = task.batches(0), first_state(task)
    for _ in range(2):
        state, _ = step(task, state, next(batches))
    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.restore(task.abstract_state())
        checkpoints.save(2, state, {})
    wanted = []
    for _ in range(2):
        batch = next(batches)
        state, result = step(task, state, batch)
        wanted.append((batch, result))

    report = {}
    for name in ("8 fsdp", "2 x 2 x 2"):
        begin = time.perf_counter()
        task = tasks[f"everything: {name}"]
        with Checkpoints(folder, keep=1) as checkpoints:
            restored = checkpoints.restore(task.abstract_state())
        assert restored is not None
        state, batches = restored.state, task.batches(restored.step)
        for index, (batch, result) in enumerate(wanted):
            found = next(batches)
            same = all(np.array_equal(found[key], batch[key]) for key in batch)
            state, mine = step(task, state, found)
            report[f"resume on {name}, step {index}"] = differences(mine, result) | {
                "same batch": same and found.keys() == batch.keys(),
                "step": int(state["step"]),
            }
        print(f"resume {name}: {time.perf_counter() - begin:.1f} s", file=sys.stderr)
    return report


def main() -> None:
    report, tasks = compare(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        report |= resume(tasks, Path(folder))
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
