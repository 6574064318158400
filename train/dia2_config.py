"""The configuration of decoder and depformer training (`train.pretrain`, `train.finetune`)."""

from __future__ import annotations

import math
from typing import Literal

from pydantic.dataclasses import dataclass

from dia2_jax.config.reading import STRICT, require, require_positive
from dia2_jax.data import Masking
from train.config import MeshConfig, RunConfig
from train.lora import LoraConfig
from train.losses import LossConfig
from train.optimizer import OptimizerConfig


@dataclass(frozen=True, config=STRICT)
class ModelSource:
    """Where the model comes from.

    Attributes:
      start: a checkpoint to go on from (folder in the published layout, what ``dia2-jax convert``
        wrote, or a hub repository); null starts from random weights.
      config: shape of a random model: ``config.json``, or YAML as in ``configs/``; null takes
        that of ``start``.
      tokenizer: folder of ``tokenizer.json``; null takes that of ``start``.
      codec: folder or repository of Mimi; null takes what ``start`` names, or ``kyutai/mimi``.
    """

    start: str | None = None
    config: str | None = None
    tokenizer: str | None = None
    codec: str | None = None

    def __post_init__(self) -> None:
        if self.start is None:
            for name in ("config", "tokenizer"):
                require(getattr(self, name) is not None, name, "must be given where start is null")
        else:
            require(self.config is None, "config", "belongs to start; leave it out")


@dataclass(frozen=True, config=STRICT)
class DataSettings:
    """What is read, and how rows are cut and masked.

    Attributes:
      train, validation: folders that `train.prepare` wrote; null for no validation.
      rows: rows of a batch, over all hosts and micro-batches.
      max_steps: steps of a row at most (80 ms each).
      buckets: shorter lengths to which batches may be padded; each is compiled once.
      depth_share: share of frames on which the depformer is trained.
      text_dropout: share of rows without text, for guidance.
      code_noise: share of input codes replaced by random ones.
      validation_batches: batches of one evaluation (the same ones each time).
      threads, prefetch: of the reader.
    """

    train: str
    validation: str | None = None
    rows: int = 8
    max_steps: int = 250
    buckets: tuple[int, ...] = ()
    depth_share: float = 1.0
    text_dropout: float = 0.0
    code_noise: float = 0.0
    validation_batches: int = 8
    threads: int = 1
    prefetch: int = 4

    def __post_init__(self) -> None:
        require_positive(
            self, "rows", "max_steps", "depth_share", "validation_batches", "threads", "prefetch"
        )
        for name in ("depth_share", "text_dropout", "code_noise"):
            require(0 <= getattr(self, name) <= 1, name, "is a share, from 0 to 1")
        require(all(bucket > 0 for bucket in self.buckets), "buckets", "must be positive")

    @property
    def masking(self) -> Masking:
        """What is random in a training row."""
        return Masking(self.depth_share, self.text_dropout, self.code_noise)


@dataclass(frozen=True, config=STRICT)
class SampleSettings:
    """Audio that is generated while training runs (``run.sample_every``).

    Attributes:
      scripts: what is said; empty takes the first scripts of the validation (or training) data.
      count: how many of those.
      cfg_scale, temperature: of generation; temperature 0 is greedy.
      seed: of the draws.
    """

    scripts: tuple[str, ...] = ()
    count: int = 2
    cfg_scale: float = 1.0
    temperature: float = 0.7
    seed: int = 0

    def __post_init__(self) -> None:
        # The engine says the same, but only once the run has come to its first samples.
        require_positive(self, "count", "cfg_scale")
        require(0 <= self.temperature < math.inf, "temperature", "must be finite and at least 0")
        require(all(text.strip() for text in self.scripts), "scripts", "one of them says nothing")


@dataclass(frozen=True, config=STRICT)
class Dia2TrainingConfig:
    """A whole training configuration.

    Attributes:
      model, data, loss, optimizer, samples, run, mesh: see their classes.
      lora: adapters that train instead of the weights; null trains the weights.
      trainable, frozen: patterns of parameters that train (empty: all) and that do not.
      compute: dtype of activations; masters are float32 in any case.
      remat: what the backward pass keeps of a layer (``none``, ``dots``, ``full``).
      microbatches: parts in which a batch is computed, to save memory.
    """

    model: ModelSource
    data: DataSettings
    run: RunConfig
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    samples: SampleSettings = SampleSettings()
    lora: LoraConfig | None = None
    trainable: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    compute: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "full"] = "none"
    microbatches: int = 1

    def __post_init__(self) -> None:
        require_positive(self, "microbatches")
        require(
            self.data.rows % self.microbatches == 0,
            "microbatches",
            f"{self.microbatches} do not divide data.rows {self.data.rows}",
        )
        require(
            self.lora is None or not (self.trainable or self.frozen),
            "lora",
            "trains its adapters alone; leave trainable and frozen out",
        )
