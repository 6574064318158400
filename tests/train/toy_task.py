"""A linear model that fulfils the Task protocol, and a program that trains it.

    python tests/train/toy_task.py CONFIG [a.b=c …] [--resume]
"""

from __future__ import annotations

import json
import os
import sys
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


class ToyTask:
    """Regression of a random linear map from noise, with dropout keyed by (seed, step)."""

    name = "toy"

    def __init__(self, config: ToyConfig, *, data: str = "noise") -> None:
        self.config, self.data = config, data
        shape = (jax.device_count() // config.mesh.fsdp, config.mesh.fsdp)
        self.mesh = Mesh(np.array(jax.devices()).reshape(shape), ("data", "fsdp"))
        self.optimizer = optax.adamw(config.model.rate)
        self.validated: list[int] = []
        self.started: list[int] = []
        self.step = jax.jit(self._step, donate_argnums=0)

    def initial_state(self) -> dict[str, Any]:
        abstract = self.abstract_state()
        return jax.jit(self._initial, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))()

    def _initial(self) -> dict[str, Any]:
        key = jax.random.key(self.config.run.seed)
        weight = jax.random.normal(key, (INPUTS, self.config.model.outputs))
        params = {"layer.weight": weight, "layer.bias": jnp.zeros(self.config.model.outputs)}
        return {
            "step": jnp.int32(0),
            "params": params,
            "ema": jax.tree.map(lambda x: x.astype(jnp.bfloat16), params),
            "optimizer": self.optimizer.init(params),
        }

    def abstract_state(self) -> dict[str, Any]:
        def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            rows = leaf.ndim > 0 and leaf.shape[0] == INPUTS
            sharding = NamedSharding(self.mesh, PartitionSpec("fsdp") if rows else PartitionSpec())
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree.map(place, jax.eval_shape(self._initial))

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

    def _loss(self, params: Any, batch: Any, step: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(self.config.run.seed), step)
        kept = jax.random.bernoulli(key, 1 - self.config.model.dropout, batch["x"].shape)
        out = (batch["x"] * kept) @ params["layer.weight"] + params["layer.bias"]
        return jnp.mean((out - batch["y"]) ** 2)

    def _step(self, state: Any, batch: Any) -> Any:
        loss, gradients = jax.value_and_grad(self._loss)(state["params"], batch, state["step"])
        updates, optimizer = self.optimizer.update(gradients, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        done = state["step"] + 1
        trouble = self.config.trouble
        loss = jnp.where(done == trouble.nan_at, jnp.nan, loss)
        params["layer.bias"] += jnp.where(done == trouble.nan_weights_at, jnp.inf, 0.0)
        ema = jax.tree.map(
            lambda a, b: (0.9 * a + 0.1 * b).astype(jnp.bfloat16), state["ema"], params
        )
        new = {"step": done, "params": params, "ema": ema, "optimizer": optimizer}
        return new, {"loss": loss, "loss/square": loss, "accuracy": jnp.exp(-loss)}

    def train_step(self, state: Any, batch: Any) -> Any:
        trouble = self.config.trouble
        time.sleep(trouble.step_seconds)
        out = self.step(state, batch)
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
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main()
