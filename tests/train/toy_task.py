"""A linear model that fulfils the Task protocol, and a program that trains it.

python tests/train/toy_task.py CONFIG [a.b=c …] [--resume]
"""

from __future__ import annotations

import functools
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from pydantic.dataclasses import dataclass

from dia2_jax.config.reading import STRICT
from train.command import Program, finish, run_options
from train.config import MeshConfig, RunConfig, read_config
from train.loop import train
from train.task import Sample

ROWS, INPUTS = 8, 16


@dataclass(frozen=True, config=STRICT)
class ToyModel:
    outputs: int = 2
    rate: float = 0.05
    dropout: float = 0.25


@dataclass(frozen=True, config=STRICT)
class ToyTrouble:
    """What goes wrong, and when (steps done); 0 is never."""

    nan_at: int = 0
    nan_weights_at: int = 0
    signal_at: int = 0
    signal: int = 15
    step_seconds: float = 0


@dataclass(frozen=True, config=STRICT)
class ToyConfig:
    run: RunConfig
    mesh: MeshConfig = MeshConfig()
    model: ToyModel = ToyModel()
    trouble: ToyTrouble = ToyTrouble()


@functools.cache
def compiled(model: ToyModel, mesh: Mesh) -> tuple[Any, Any, Any]:
    """The initial state's program, its abstract value and the step's; shared by all tests."""
    optimizer = optax.adamw(model.rate)

    def initial(seed: Any) -> dict[str, Any]:
        weight = jax.random.normal(jax.random.key(seed), (INPUTS, model.outputs))
        params = {"layer.weight": weight, "layer.bias": jnp.zeros(model.outputs)}
        return {
            "step": jnp.int32(0),
            "params": params,
            "ema": jax.tree.map(lambda x: x.astype(jnp.bfloat16), params),
            "optimizer": optimizer.init(params),
        }

    def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        rows = leaf.ndim > 0 and leaf.shape[0] == INPUTS
        sharding = NamedSharding(mesh, PartitionSpec("fsdp") if rows else PartitionSpec())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    abstract = jax.tree.map(place, jax.eval_shape(initial, np.uint32(0)))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    def loss_of(params: Any, batch: Any, key: Any) -> Any:
        kept = jax.random.bernoulli(key, 1 - model.dropout, batch["x"].shape)
        out = (batch["x"] * kept) @ params["layer.weight"] + params["layer.bias"]
        return jnp.mean((out - batch["y"]) ** 2)

    def step(state: Any, batch: Any, seed: Any, nan_at: Any, nan_weights_at: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(seed), state["step"])
        loss, gradients = jax.value_and_grad(loss_of)(state["params"], batch, key)
        updates, moments = optimizer.update(gradients, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        done = state["step"] + 1
        loss = jnp.where(done == nan_at, jnp.nan, loss)
        params["layer.bias"] += jnp.where(done == nan_weights_at, jnp.inf, 0.0)
        ema = jax.tree.map(
            lambda a, b: (0.9 * a + 0.1 * b).astype(jnp.bfloat16), state["ema"], params
        )
        new = {"step": done, "params": params, "ema": ema, "optimizer": moments}
        return new, {"loss": loss, "loss/square": loss, "accuracy": jnp.exp(-loss)}

    start = jax.jit(initial, out_shardings=shardings)
    return start, abstract, jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


class ToyTask:
    """Regression of a linear map from noise, with dropout keyed by (seed, step)."""

    name = "toy"

    def __init__(self, config: ToyConfig, *, data: str = "noise") -> None:
        self.config, self.data = config, data
        shape = (jax.device_count() // config.mesh.fsdp, config.mesh.fsdp)
        mesh = Mesh(np.array(jax.devices()).reshape(shape), ("data", "fsdp"))
        self.initial, self.abstract, self.step = compiled(config.model, mesh)
        self.validated: list[int] = []
        self.started: list[int] = []

    def initial_state(self) -> dict[str, Any]:
        return self.initial(np.uint32(self.config.run.seed))

    def abstract_state(self) -> dict[str, Any]:
        return self.abstract

    def _batch(self, step: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(np.random.SeedSequence([self.config.run.seed, step]))
        x = rng.standard_normal((ROWS, INPUTS), np.float32)
        return {"x": x, "y": x[:, : self.config.model.outputs] * 2 + 1}

    def batches(self, start: int) -> Iterator[dict[str, np.ndarray]]:
        self.started.append(start)
        step = start
        while True:
            yield self._batch(step)
            step += 1

    def train_step(self, state: Any, batch: Any) -> Any:
        trouble = self.config.trouble
        time.sleep(trouble.step_seconds)
        numbers = (self.config.run.seed, trouble.nan_at, trouble.nan_weights_at)
        out = self.step(state, batch, *(np.uint32(number) for number in numbers))
        if trouble.signal_at and int(out[0]["step"]) == trouble.signal_at:
            os.kill(os.getpid(), trouble.signal)
        return out

    def work(self, batch: Any) -> dict[str, float]:
        flops = 6.0 * ROWS * INPUTS * self.config.model.outputs
        return {"frames": ROWS, "audio_seconds": ROWS * 9.0, "flops": flops, "real_share": 0.5}

    def evaluate(self, state: Any) -> dict[str, float]:
        step = int(state["step"])
        self.validated.append(step)
        return {"validation/loss": abs(step - 3.5) + 1.0}

    def samples(self, state: Any, step: int) -> list[Sample]:
        wave = np.full(80, np.float32(state["params"]["layer.bias"][0]) * 0, np.float32)
        return [Sample("one/two", wave, 8000, "[S1] Hello.")]

    def export(self, state: Any, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "model.json").write_text(json.dumps({"step": int(state["step"])}))

    def metadata(self) -> dict[str, Any]:
        return {"outputs": self.config.model.outputs, "data": {"fingerprint": self.data}}


@click.command(cls=Program)
@run_options
def main(config_path: str, overrides: tuple[str, ...], plan: bool, **start: bool) -> None:
    """Train the toy."""
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # as train.distributed.join does
    config = read_config(ToyConfig, config_path, overrides)
    if plan:
        click.echo("small")
        return
    if "PROCESS" in os.environ:
        index, address = os.environ["PROCESS"].split("@")
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, 2, int(index))
    finish(train(ToyTask(config), config, **start))


if __name__ == "__main__":
    # A shell may have started the tests with Ctrl-C ignored, which children inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
