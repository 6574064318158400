"""Codec training as a task of the loop: state, steps, evaluation, samples, export."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dia2_jax import sharding
from dia2_jax.config import config_to_dict
from dia2_jax.errors import ConfigError
from dia2_jax.typing import Array
from train.codec_training import evaluation
from train.codec_training.balancer import Balance
from train.codec_training.config import CodecConfig
from train.codec_training.corpora import Corpora, open_corpora
from train.codec_training.discriminator import random_weights
from train.codec_training.generator import (
    Generator,
    forward_flops,
    read_shape,
)
from train.codec_training.objective import Objective, Slope
from train.codec_training.quantizer import row_choices, update_codebooks
from train.codec_training.semantic import check_width, make_head
from train.codec_training.starting_weights import initial_weights
from train.codec_training.windows import WindowSource, fixed_windows
from train.optimizer import ema_update, make_optimizer
from train.recordings import read_batches
from train.task import Batch, Metrics, Sample, State
from train.trainable import partition

#: What a step's key is folded with, for each use of it.
_CHOICES, _CODEBOOKS, _KMEANS, _HEAD = range(4)

#: Windows read ahead; each is a copy of a few pages.
_THREADS, _PREFETCH = 2, 8


class CodecTask:
    """See `train.task.Task`. Weights and codebooks that stay as they are count as arguments.

    Attributes:
      mimi: the codec's config.
      generator: the codec.
      objective: what is minimised.
      corpora: training and validation audio.
    """

    name = "codec"

    def __init__(self, config: CodecConfig) -> None:
        """Reads shapes and opens (or makes) the cache of audio; no weight is loaded yet.

        Raises:
          ConfigError, DataError, HubError, CheckpointError: what cannot be used, and why.
        """
        self.config = config
        self.mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
        sharding.check_rows(config.data.rows, self.mesh)
        self.mimi = read_shape(config.model)
        self.generator = Generator(self.mimi, remat=config.model.remat)
        self.objective = Objective(config, self.generator)
        self.corpora: Corpora = open_corpora(config, self.mimi)
        self._whole = sharding.replicated(self.mesh)
        self._shape_state()
        mine = sharding.host_rows(self.mesh, config.data.rows)
        self.windows = self._source(config.data.frames, mine)
        held_out = config.evaluation
        self.held_out = fixed_windows(
            self.corpora.validation,
            count=held_out.windows,
            frames=held_out.frames,
            samples_per_frame=self.mimi.samples_per_frame,
        )
        self._flops: float | None = None
        self._fixed: dict[str, Array] | None = None
        self._steps = {
            heard: jax.jit(functools.partial(self._train_step, heard=heard), donate_argnums=0)
            for heard in (False, True)
        }
        self._judge = jax.jit(lambda p, c, w: evaluation.judge(self.generator.mimi(p, c), w))
        self._streamed = jax.jit(lambda p, c, x: evaluation.streamed(self.generator.mimi(p, c), x))

    # ------------------------------------------------------------------------------- set-up

    def _source(self, frames: int, mine: range | None) -> WindowSource:
        data = self.config.data
        return WindowSource(
            self.corpora.train,
            frames=frames,
            samples_per_frame=self.mimi.samples_per_frame,
            rows=data.rows,
            seed=self.config.run.seed,
            gain_db=data.gain_db,
            with_targets=self.config.semantic is not None or self.config.codebooks.predicted > 0,
            mine=mine,
        )

    def _shape_state(self) -> None:
        config = self.config
        every = dict(self.generator.params)
        if config.semantic is not None:
            targets = self.corpora.train.targets
            assert targets is not None  # else the source of windows refuses
            check_width(config.semantic, targets.shape[1])
            inner = self.mimi.vector_quantization_hidden_dimension
            head = jax.eval_shape(lambda: make_head(jax.random.key(0), inner, targets.shape[1]))
            every |= head
        self.trainable, self.frozen = partition(every, config.model.frozen)
        if self.frozen and config.model.initial is None:
            raise ConfigError(
                "model.frozen: random weights would stay random; name a codec in model.initial"
            )
        self.optimizer, self.schedule = make_optimizer(
            config.optimizer, config.run.steps, self.trainable
        )
        self.judge_optimizer: Any = None
        if config.discriminator is not None:
            settings = config.discriminator
            updates = max(1, -(-(config.run.steps - settings.start) // settings.period))
            self.judge_optimizer, _ = make_optimizer(
                settings.optimizer, updates, self.objective.judge
            )
        self._balance: Balance | None = None
        if config.balancer is not None:
            self._balance = Balance.start(tuple(self.objective.weights))

    # -------------------------------------------------------------------------------- state

    def initial_state(self) -> State:
        """See `Task`: weights, k-means codebooks, and how far the untrained codec is off."""
        every = self._initial_weights()
        params = {path: every[path] for path in self.trainable}
        state: State = {
            "step": jnp.int32(0),
            "params": params,
            "optimizer": jax.jit(self.optimizer.init)(params),
        }
        codebooks = {path: every[path] for path in self.generator.codebooks}
        if not self.config.codebooks.frozen:
            state["codebooks"] = codebooks
        if self.config.optimizer.ema_decay:
            state["ema"] = {path: jnp.copy(value) for path, value in params.items()}
        if self._balance is not None:
            state["balance"] = self._balance
        if self.judge_optimizer is not None:
            judge = self._put(random_weights(self.objective.judge, self.config.run.seed))
            state["discriminator"] = judge
            state["discriminator_optimizer"] = jax.jit(self.judge_optimizer.init)(judge)
        state["untrained_distance"] = jnp.float32(self._distances(every, codebooks)[0].mean())
        # Scalars and moments were made on one device.
        return jax.device_put(state, jax.tree.map(lambda leaf: self._whole, state))

    def _initial_weights(self) -> dict[str, Array]:
        """All weights: loaded or random, codebooks by k-means unless they were loaded."""
        data = self.config.data
        targets = self.corpora.train.targets
        every = initial_weights(
            self.config,
            self.generator,
            source=self._source(data.frames, None),
            target_width=0 if targets is None else targets.shape[1],
            keys=(self._key(0, _KMEANS), self._key(0, _HEAD)),
            put=self._put,
        )
        self._keep(every)
        return every

    def _put(self, tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.device_put(leaf, self._whole), tree)

    def _keep(self, every: dict[str, Array]) -> None:
        paths = list(self.frozen)
        if self.config.codebooks.frozen:
            paths += list(self.generator.codebooks)
        self._fixed = {path: every[path] for path in paths}

    def _constant(self) -> dict[str, Array]:
        """Weights and codebooks that no step changes; loaded again after a restore."""
        if self._fixed is None:
            if self.frozen or self.config.codebooks.frozen:
                self._initial_weights()
            else:
                self._fixed = {}
        assert self._fixed is not None
        return self._fixed

    def abstract_state(self) -> State:
        """See `Task`; everything is on every device."""
        state: State = {
            "step": jax.ShapeDtypeStruct((), jnp.int32),
            "params": dict(self.trainable),
            "optimizer": jax.eval_shape(self.optimizer.init, self.trainable),
            "untrained_distance": jax.ShapeDtypeStruct((), jnp.float32),
        }
        if not self.config.codebooks.frozen:
            state["codebooks"] = dict(self.generator.codebooks)
        if self.config.optimizer.ema_decay:
            state["ema"] = dict(self.trainable)
        if self._balance is not None:
            state["balance"] = self._balance
        if self.judge_optimizer is not None:
            state["discriminator"] = dict(self.objective.judge)
            state["discriminator_optimizer"] = jax.eval_shape(
                self.judge_optimizer.init, self.objective.judge
            )
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._whole), state
        )

    # --------------------------------------------------------------------------------- steps

    def batches(self, start: int) -> Iterator[Batch]:
        """See `Task`."""
        yield from read_batches(self.windows, start, threads=_THREADS, prefetch=_PREFETCH)

    def train_step(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        """See `Task`. The batch says on the host which step it is."""
        settings = self.config.discriminator
        heard = settings is not None and batch["step"] >= settings.start
        arrays = {name: leaf for name, leaf in batch.items() if name != "step"}
        placed = sharding.place_rows(arrays, self.mesh, self.config.data.rows)
        return self._steps[heard](state, self._constant(), placed)

    def _key(self, step: Any, use: int) -> Array:
        key = jax.random.fold_in(jax.random.key(self.config.run.seed), step)
        return jax.random.fold_in(key, use)

    def _train_step(
        self, state: State, fixed: dict[str, Array], batch: Batch, *, heard: bool
    ) -> tuple[State, Metrics]:
        step, settings = state["step"], self.config.codebooks
        count = self.mimi.num_quantizers
        choices = row_choices(self._key(step, _CHOICES), batch["wave"].shape[0], count, settings)
        codebooks = self._codebooks(state, fixed)
        slope: Slope = self.objective.gradients(
            state["params"],
            {path: fixed[path] for path in self.frozen},
            codebooks,
            batch,
            choices,
            state.get("balance"),
            state["discriminator"] if heard else None,
        )
        updates, optimizer = self.optimizer.update(
            slope.gradients, state["optimizer"], state["params"]
        )
        params = optax.apply_updates(state["params"], updates)
        new: State = {**state, "step": step + 1, "params": params, "optimizer": optimizer}
        metrics = {f"loss/{name}": value for name, value in slope.values.items()}
        if "ema" in state:
            decay = self.config.optimizer.ema_decay
            new["ema"] = ema_update(state["ema"], params, decay, step)
        if "balance" in state:
            new["balance"] = slope.balance
        if "codebooks" in state:
            new["codebooks"], replaced = update_codebooks(
                codebooks, slope.heard.assignments, self._key(step, _CODEBOOKS), settings
            )
            metrics["replaced_entries"] = replaced.sum()
        if heard:
            part, loss = self._discriminate(state, slope.heard.wave, batch["wave"])
            new |= part
            metrics["loss/discriminator"] = loss
        metrics["gradient_norm"] = optax.tree.norm(slope.gradients)
        metrics["learning_rate"] = jnp.asarray(self.schedule(step))
        whole = jax.tree.map(lambda leaf: self._whole, new)
        return jax.lax.with_sharding_constraint(new, whole), metrics

    def _discriminate(self, state: State, wave: Array, target: Array) -> tuple[State, Array]:
        """The discriminator's update; the wave comes as a constant."""
        assert self.config.discriminator is not None
        judge, moments = state["discriminator"], state["discriminator_optimizer"]

        def update(judge: Any, moments: Any) -> tuple[Any, Any, Array]:
            slope = jax.value_and_grad(self.objective.judge_loss)
            loss, gradients = slope(judge, jax.lax.stop_gradient(wave), target)
            updates, moments = self.judge_optimizer.update(gradients, moments, judge)
            return optax.apply_updates(judge, updates), moments, loss

        def skip(judge: Any, moments: Any) -> tuple[Any, Any, Array]:
            return judge, moments, self.objective.judge_loss(judge, wave, target)

        period = self.config.discriminator.period
        if period == 1:
            judge, moments, loss = update(judge, moments)
        else:
            due = (state["step"] - self.config.discriminator.start) % period == 0
            judge, moments, loss = jax.lax.cond(due, update, skip, judge, moments)
        return {"discriminator": judge, "discriminator_optimizer": moments}, loss

    def _codebooks(self, state: State, fixed: dict[str, Array]) -> dict[str, Array]:
        if "codebooks" in state:
            return dict(state["codebooks"])
        return {path: fixed[path] for path in self.generator.codebooks}

    def work(self, batch: Batch) -> dict[str, float]:
        """See `Task`; the codec's own products, backward counted twice the forward pass."""
        rows, samples = self.config.data.rows, batch["wave"].shape[1]
        if self._flops is None:
            self._flops = 3 * forward_flops(self.generator, samples)
        frames = rows * samples / self.mimi.samples_per_frame
        return {
            "frames": frames,
            "audio_seconds": rows * samples / self.mimi.sampling_rate,
            "flops": rows * self._flops,
            "real_share": 1.0,
        }

    # ---------------------------------------------------------------- evaluation, samples, export

    def weights(self, state: State) -> tuple[dict[str, Array], dict[str, Array]]:
        """The codec's parameters (their moving average, where it is kept) and codebooks."""
        fixed = self._constant()
        averaged = state["ema"] if "ema" in state else state["params"]
        every = {**averaged, **fixed}
        params = {path: every[path] for path in self.generator.params}
        return params, self._codebooks(state, fixed)

    def evaluate(self, state: State) -> dict[str, float]:
        """Distances and codebook figures on the same windows each time.

        ``mel_share`` is the mel distance over that of the untrained codec, ``streaming_difference``
        that of decoding frame by frame, relative to the largest sample.
        """
        params, codebooks = self.weights(state)
        mel, sdr, codes, wave = self._distances(params, codebooks)
        first = slice(0, self.config.evaluation.rows)
        pieces = np.asarray(self._streamed(params, codebooks, codes[first]))
        result = {
            "mel_distance": float(mel.mean()),
            "mel_share": float(mel.mean() / state["untrained_distance"]),
            "si_sdr": float(sdr.mean()),
            "streaming_difference": evaluation.streaming_difference(wave[first], pieces),
            **evaluation.codebook_figures(codes, self.mimi.codebook_size),
        }
        return {f"validation/{name}": value for name, value in result.items()}

    def _distances(self, params: Any, codebooks: Any) -> evaluation.Judged:
        """All evaluation windows, judged; on the host."""
        rows, windows = self.config.evaluation.rows, self.held_out
        parts = []
        for start in range(0, len(windows), rows):
            batch = windows[start : start + rows]
            filled = np.resize(batch, (rows, batch.shape[1]))
            judged = self._judge(params, codebooks, jax.device_put(filled, self._whole))
            parts.append([np.asarray(leaf)[: len(batch)] for leaf in judged])
        return evaluation.Judged(*(np.concatenate(leaves) for leaves in zip(*parts, strict=True)))

    def samples(self, state: State, step: int) -> list[Sample]:
        """See `Task`: originals and their reconstructions."""
        count, rate = self.config.evaluation.samples, self.mimi.sampling_rate
        if count == 0:
            return []
        heard = self._distances(*self.weights(state)).wave
        # Spread over the windows, not neighbours of one recording.
        chosen = [index * len(heard) // count for index in range(count)]
        pairs = [
            (Sample(f"{index}_original", self.held_out[index], rate),
             Sample(f"{index}_codec", np.asarray(heard[index]), rate))
            for index in chosen
        ]  # fmt: skip
        return [sample for pair in pairs for sample in pair]

    def export(self, state: State, folder: Path) -> None:
        """See `Task`: the published Hugging Face layout."""
        params, codebooks = self.weights(state)
        if jax.process_index() == 0:
            self.generator.export(params, codebooks, folder)

    def metadata(self) -> dict[str, Any]:
        """See `Task`."""
        return {
            "codec": config_to_dict(self.mimi),
            "data": self.corpora.train.fingerprint,
            "validation": self.corpora.validation.fingerprint,
        }
