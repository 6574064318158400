"""Decoder and depformer training as a task of the loop: state, steps, evaluation, export."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from dia2_jax import checkpoint, sharding
from dia2_jax.config import config_to_dict
from dia2_jax.convert.models import abstract_dia2
from dia2_jax.data import Masking, real_share
from dia2_jax.errors import ConfigError
from dia2_jax.typing import Array, ArrayLike
from train import lora
from train.dia2_config import Dia2TrainingConfig
from train.fingerprints import fingerprints_of
from train.flops import projection_shapes, training_flops
from train.losses import dia2_loss, metrics, token_counts
from train.optimizer import accumulate, ema_update, make_optimizer, map_state, split_batch
from train.recordings import BatchSource, Recordings, RowBuilder, plan_for, read_batches
from train.samples import generate_samples
from train.starting_point import StartingPoint, export_model, find_start, initial_params
from train.task import Batch, Metrics, Sample, State
from train.trainable import combine, partition


class Dia2Task:
    """See `train.task.Task`. Weights that do not train are arguments of the step, not state.

    Attributes:
      mesh: of its devices.
      start: the model's files and shape.
      trainable, frozen: abstract parameters by path (adapters count as trainable).
      flops: ``flops(rows=, steps=, depth_frames=)``, operations of a step on such a batch.
    """

    def __init__(
        self,
        config: Dia2TrainingConfig,
        name: str = "pretrain",
        devices: Sequence[Any] | None = None,
        *,
        data: bool = True,
    ) -> None:
        """Reads files and shapes; no weight is loaded or made yet.

        Args:
          config: of the run.
          name: see `train.task.Task`.
          devices: of the mesh, all by default.
          data: without it nothing is read of the data sets: such a task cannot train, evaluate or
            speak, but it exports what others trained.

        Raises:
          ConfigError, DataError, HubError, CheckpointError: what cannot be used, and why.
        """
        self.name, self.config = name, config
        mesh = config.mesh
        self.mesh = sharding.make_mesh(mesh.data, mesh.fsdp, mesh.tensor, devices)
        self.start: StartingPoint = find_start(config.model)
        self._shape_model()
        self.optimizer, self.schedule = make_optimizer(
            config.optimizer, config.run.steps, self.trainable
        )
        if data:
            self._open_data()
        # The same few lengths come again and again.
        self.flops = functools.cache(
            functools.partial(
                training_flops,
                self.start.config,
                trained=self.trainable,
                shapes=projection_shapes(self.start.config),
                lora_rank=None if config.lora is None else config.lora.rank,
            )
        )
        self._loaded: dict[str, Array] | None = None  # what does not train, placed
        self._step = jax.jit(self._train_step, donate_argnums=0)
        self._evaluate = jax.jit(self._evaluation)

    # ------------------------------------------------------------------------------- set-up

    def _shape_model(self) -> None:
        config = self.config
        self.graph, abstract = abstract_dia2(
            self.start.config, dtype=jnp.dtype(config.compute), remat=config.remat
        )
        base = checkpoint.flatten_tree(abstract)[0]
        self.base = self._placed(base)
        if config.lora is not None:
            self.graph, abstract = lora.attach(self.graph, abstract, config.lora)
            every = self._placed(checkpoint.flatten_tree(abstract)[0])
            self.frozen = dict(self.base)
            self.trainable = {p: leaf for p, leaf in every.items() if p not in self.base}
        else:
            self.trainable, self.frozen = partition(self.base, config.frozen, config.trainable)
        self.treedef = checkpoint.flatten_tree(abstract)[1]

    def _placed(self, params: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
        table = (*lora.AXES, *sharding.DIA2_AXES)
        shardings = sharding.parameter_shardings(params, self.mesh, table)
        return {
            path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=shardings[path])
            for path, leaf in params.items()
        }

    def _open_data(self) -> None:
        data, config = self.config.data, self.start.config
        rows, longest = data.rows, config.runtime.max_context_steps
        if data.max_steps > longest:
            raise ConfigError(
                f"data.max_steps: {data.max_steps} steps do not fit the model's context of "
                f"{longest} (runtime.max_context_steps of its config), which would cut rows off"
            )
        sharding.check_rows(rows // self.config.microbatches, self.mesh)
        self.recordings = Recordings(data.train)
        self.builder = RowBuilder(self.recordings, self.start.tokenizer, config)
        plan = functools.partial(
            plan_for,
            config=config,
            rows=rows,
            max_steps=data.max_steps,
            buckets=data.buckets,
        )
        self.plan = plan(self.recordings, seed=self.config.run.seed)
        self.validation: BatchSource | None = None
        if data.validation is not None:
            held_out = Recordings(data.validation)
            builder = RowBuilder(held_out, self.start.tokenizer, config)
            self.validation = self._source_of(
                builder, plan(held_out, seed=0), Masking(depth_share=data.depth_share)
            )

    def _source_of(self, builder: RowBuilder, plan: Any, masking: Masking) -> BatchSource:
        mine = sharding.host_rows(self.mesh, self.config.data.rows)
        return BatchSource(
            builder, plan, masking, steps=2**31, first=mine.start, rows=mine.stop - mine.start
        )

    # -------------------------------------------------------------------------------- state

    def initial_state(self) -> State:
        """Parameters, optimiser state and EMA before step 0, placed on the mesh."""
        everything = self._load()
        if self.config.lora is not None:
            key = jax.random.key(self.config.run.seed)
            make = functools.partial(lora.init_adapters, self.base, self.config.lora)
            params = jax.jit(make, out_shardings=self._shardings(self.trainable))(key)
        else:
            params = {path: everything[path] for path in self.trainable}
        abstract = self.abstract_state()
        optimizer = jax.jit(
            self.optimizer.init, out_shardings=self._shardings(abstract["optimizer"])
        )(params)
        state: State = {
            "step": jax.device_put(jnp.int32(0), sharding.replicated(self.mesh)),
            "params": params,
            "optimizer": optimizer,
        }
        if self.config.optimizer.ema_decay:
            copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
            state["ema"] = copy(params)
        return state

    def abstract_state(self) -> State:
        """See `Task`."""
        whole = sharding.replicated(self.mesh)

        def place(path: str | None, leaf: Any) -> jax.ShapeDtypeStruct:
            where = whole if path is None else self.trainable[path].sharding
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

        optimizer = jax.eval_shape(self.optimizer.init, self.trainable)
        state: State = {
            "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
            "params": dict(self.trainable),
            "optimizer": map_state(place, optimizer, self.trainable),
        }
        if self.config.optimizer.ema_decay:
            state["ema"] = dict(self.trainable)
        return state

    def _load(self) -> dict[str, Array]:
        """All base parameters; those that do not train are kept for the steps."""
        params = initial_params(self.start, self.base, self.config.run.seed)
        self._loaded = {path: params[path] for path in self.frozen}
        return params

    def _frozen(self) -> dict[str, Array]:
        if self._loaded is None:  # after a restore, which brings what trains alone
            if self.frozen:
                self._load()
            else:
                self._loaded = {}
        assert self._loaded is not None
        return self._loaded

    def _shardings(self, tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.sharding, tree)

    # --------------------------------------------------------------------------------- steps

    def batches(self, start: int) -> Iterator[Batch]:
        """See `Task`."""
        data = self.config.data
        source = self._source_of(self.builder, self.plan, data.masking)
        yield from read_batches(source, start, threads=data.threads, prefetch=data.prefetch)

    def train_step(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        """See `Task`."""
        return self._step(state, self._frozen(), self._place(batch))

    def _place(self, batch: dict[str, np.ndarray]) -> dict[str, Array]:
        """This host's rows as their part of the global arrays."""
        return sharding.place_rows(batch, self.mesh, self.config.data.rows)

    def _model(self, params: dict[str, Array], frozen: dict[str, Array]) -> Any:
        everything = combine(params, frozen)
        kind = jnp.dtype(self.config.compute)
        cast = {path: leaf.astype(kind) for path, leaf in everything.items()}
        return nnx.merge(self.graph, checkpoint.unflatten_tree(self.treedef, cast))

    def _loss(
        self, params: dict[str, Array], frozen: dict[str, Array], counts: Any, batch: Any
    ) -> tuple[Array, Any]:
        return dia2_loss(self._model(params, frozen), batch, counts, self.config.loss)

    def gradients(
        self, params: dict[str, Array], frozen: dict[str, Array], batch: Batch
    ) -> tuple[Metrics, dict[str, Array]]:
        """Metrics and gradients of a batch, computed in micro-batches (traceable)."""
        with sharding.bound(self.mesh):
            counts = token_counts(batch, self.config.loss)
            slope = jax.value_and_grad(self._loss, has_aux=True)

            def part(params: Any, microbatch: Any) -> tuple[Any, Any]:
                (_, sums), gradients = slope(params, frozen, counts, microbatch)
                return sums, gradients

            sums, gradients = accumulate(part, params, split_batch(batch, self.config.microbatches))
            return metrics(sums, counts, self.config.loss), gradients

    def _train_step(
        self, state: State, frozen: dict[str, Array], batch: Batch
    ) -> tuple[State, Metrics]:
        result, gradients = self.gradients(state["params"], frozen, batch)
        updates, optimizer = self.optimizer.update(gradients, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        new: State = {"step": state["step"] + 1, "params": params, "optimizer": optimizer}
        if "ema" in state:
            decay = self.config.optimizer.ema_decay
            new["ema"] = ema_update(state["ema"], params, decay, state["step"])
        # A layout that XLA chose for itself would not fit the next call, or a restored state.
        new = jax.lax.with_sharding_constraint(new, self._shardings(self.abstract_state()))
        norms = {
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": jnp.asarray(self.schedule(state["step"])),
        }
        return new, {**result, **norms}

    def work(self, batch: Batch) -> dict[str, float]:
        """See `Task`; every row counts as padded to the batch's length in ``flops``."""
        rows, steps = self.config.data.rows, batch["tokens"].shape[-1]
        real = real_share(batch)  # of this host's rows
        frames = real * rows * steps
        return {
            "frames": frames,
            "audio_seconds": frames / self.recordings.pace.frame_rate,
            "flops": self.flops(rows=rows, steps=steps, depth_frames=batch["depth_index"].shape[1]),
            "real_share": real,
        }

    # ---------------------------------------------------------------- evaluation, samples, export

    def _evaluation(self, params: Any, frozen: Any, batch: Any) -> tuple[Any, Any]:
        with sharding.bound(self.mesh):
            counts = token_counts(batch, self.config.loss)

            def part(params: Any, microbatch: Any) -> tuple[Any, Any]:
                return self._loss(params, frozen, counts, microbatch)[1], {}

            sums, _ = accumulate(part, params, split_batch(batch, self.config.microbatches))
            return sums, counts

    def evaluate(self, state: State) -> dict[str, float]:
        """Teacher-forced losses over the same validation batches each time."""
        if self.validation is None:
            return {}
        total: Any = None
        count = min(self.config.data.validation_batches, self.validation.plan.steps_per_epoch)
        for step in range(count):
            batch = self._place(self.validation[step])
            part = self._evaluate(self._spoken(state), self._frozen(), batch)
            total = part if total is None else jax.tree.map(jnp.add, total, part)
        sums, counts = total
        result = metrics(sums, counts, self.config.loss)
        return {f"validation/{name}": float(value) for name, value in result.items()}

    def samples(self, state: State, step: int) -> list[Sample]:
        """See `Task`; nothing where there is no codec."""
        if self.start.mimi is None:
            return []
        settings = self.config.samples
        recordings = (
            self.recordings if self.validation is None else self.validation.builder.recordings
        )
        scripts = settings.scripts or tuple(recordings.scripts(settings.count))
        pause = recordings.pace.max_padding
        return generate_samples(
            self.start, self.merged(state), scripts, settings, max_padding=pause
        )

    def export(self, state: State, folder: Path) -> None:
        """See `Task`; of a LoRA run the merged model, and ``adapters.safetensors`` beside it."""
        params = self.merged(state)
        trained = {path: _fetched(leaf) for path, leaf in self._spoken(state).items()}
        if jax.process_index() == 0:
            with export_model(self.start, params, folder) as staged:
                if self.config.lora is not None:
                    lora.save_adapters(
                        staged / "adapters.safetensors",
                        trained,
                        self.config.lora,
                        {"start": self.config.model.start, "step": int(state["step"])},
                    )

    def merged(self, state: State) -> dict[str, np.ndarray]:
        """All parameters of the model as it would be exported, float32, on the host."""
        params, settings = self._spoken(state), self.config.lora
        if settings is None:
            return {p: _fetched(leaf) for p, leaf in combine(params, self._frozen()).items()}
        lora.check_adapters(params, self._frozen(), settings, "the run")
        # One at a time: merged targets of 2B parameters would take 6 GB of a device beside the run.
        everything = {}
        for path, leaf in self._frozen().items():
            stem = path.removesuffix(".weight")
            own = {p: params[p] for p in (f"{stem}.lora_a", f"{stem}.lora_b") if p in params}
            everything[path] = _fetched(lora.merge({path: leaf}, own, settings)[path])
        return everything

    def _spoken(self, state: State) -> dict[str, Array]:
        """The parameters that are evaluated and exported: the EMA where there is one."""
        params: dict[str, Array] = state["ema"] if "ema" in state else state["params"]
        return params

    def metadata(self) -> dict[str, Any]:
        """See `Task`; with what does not train, since a checkpoint of the run does not hold it."""
        tokenizer = self.start.tokenizer_file.read_bytes()
        found: dict[str, Any] = {
            "model": config_to_dict(self.start.config),
            "tokenizer": hashlib.sha256(tokenizer).hexdigest()[:16],
            "data": self.recordings.fingerprint,
            "parameters": sum(leaf.size for leaf in self.trainable.values()),
        }
        if self.frozen:
            found["frozen_weights"] = self._frozen_fingerprint
        return found

    @functools.cached_property
    def _frozen_fingerprint(self) -> str:
        values = {name: value for name, (value, _) in fingerprints_of(self._frozen()).items()}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _fetched(leaf: ArrayLike) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        from jax.experimental import multihost_utils

        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)
