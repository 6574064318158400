"""Settings of codec training. A YAML file in ``configs/`` is one experiment."""

from __future__ import annotations

import math
from typing import Literal

from pydantic.dataclasses import dataclass

from dia2_jax.config.reading import STRICT, require, require_positive
from train.config import MeshConfig, RunConfig
from train.optimizer import OptimizerConfig

#: Losses of the output waveform: what the balancer weighs against each other.
WAVEFORM_LOSSES = ("mel", "stft", "waveform", "adversarial", "feature_matching")


@dataclass(frozen=True, config=STRICT)
class CodecModelConfig:
    """Which codec is trained.

    Attributes:
      shape: YAML or JSON file with a Mimi config; null takes that of `initial`.
      initial: a published codec (folder, file or repository) to start from; null starts at random.
      frozen: patterns of parameters that stay as they are, such as ``encoder*``.
      remat: compute activations again in the backward pass instead of keeping them: about a third
        more time, for memory that hardly grows with the window.
    """

    shape: str | None = None
    initial: str | None = None
    frozen: tuple[str, ...] = ()
    remat: bool = False

    def __post_init__(self) -> None:
        require(
            self.shape is not None or self.initial is not None,
            "shape",
            "name the file of a Mimi config, or a codec to start from in initial",
        )


@dataclass(frozen=True, config=STRICT)
class CodecDataConfig:
    """What the codec hears.

    Attributes:
      train: sources: folders of audio, JSONL manifests, data sets saved by ``datasets``.
      validation: sources; where there are none, `validation_share` of the training recordings.
      validation_share: share of the recordings that is kept for validation, chosen by name.
      recordings: how many of the training recordings are used, the first ones; null for all. With
        it a run can be resumed although its source has grown.
      cache: folder for the decoded audio (int16; 173 MB an hour at 24 kHz).
      rows: windows in a batch.
      frames: code frames in a window.
      gain_db: windows are made louder or quieter by a random gain between these.
    """

    train: tuple[str, ...]
    cache: str
    rows: int
    frames: int
    validation: tuple[str, ...] = ()
    validation_share: float = 0.05
    recordings: int | None = None
    gain_db: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        require(len(self.train) > 0, "train", "name at least one source of audio")
        require_positive(self, "rows", "frames")
        if self.recordings is not None:
            require_positive(self, "recordings")
        if not self.validation:
            share = self.validation_share
            require(0 < share < 1, "validation_share", f"must lie between 0 and 1, got {share}")
        low, high = self.gain_db
        require(-60 <= low <= high <= 60, "gain_db", "must be [lowest, highest] within +-60")


@dataclass(frozen=True, config=STRICT)
class CodebookConfig:
    """How codebooks learn.

    Attributes:
      decay: of the running sums and counts of what falls to each entry.
      dead_share: an entry with less than this share of the mean usage is replaced; 0 keeps all.
      revived_share: usage given to a replaced entry, as a share of the mean.
      dropout: share of rows heard through a random number of codebooks, from 1 to all.
      unquantized: share of rows that bypass the codebooks.
      kmeans_rows: windows whose features the codebooks start from.
      kmeans_iterations: of k-means.
      frozen: keep the codebooks as `model.initial` has them.
      predicted: share of rows whose decoder hears codes that a model predicted, which the sources
        bring in place of targets (see ``train.predict_codes``).
    """

    decay: float = 0.99
    dead_share: float = 0.1
    revived_share: float = 1.0
    dropout: float = 0.5
    unquantized: float = 0.5
    kmeans_rows: int = 128
    kmeans_iterations: int = 10
    frozen: bool = False
    predicted: float = 0.0

    def __post_init__(self) -> None:
        require(0 < self.decay < 1, "decay", "must lie between 0 and 1")
        require(
            not self.predicted or self.frozen,
            "predicted",
            "codes name entries of codebooks that stay as they are: set frozen",
        )
        for name in ("dead_share", "dropout", "unquantized", "predicted"):
            require(0 <= getattr(self, name) <= 1, name, "must lie in 0 ... 1")
        require_positive(self, "revived_share", "kmeans_rows", "kmeans_iterations")


@dataclass(frozen=True, config=STRICT)
class LossConfig:
    """Weights of the losses by name (0: off), and their windows in samples.

    With a balancer the weights of waveform losses are shares of the waveform's gradient; those of
    ``commitment`` and ``semantic`` are plain factors either way. A commitment of 0.1 from random
    weights made the features of ``codec_tiny`` shrink to a point before the decoder used them.
    """

    mel: float = 1.0
    stft: float = 0.0
    waveform: float = 0.0
    adversarial: float = 0.0
    feature_matching: float = 0.0
    commitment: float = 0.01
    semantic: float = 0.0
    mel_windows: tuple[int, ...] = (2048, 1024, 512, 256)
    mel_bands: tuple[int, ...] = (120, 80, 64, 32)
    stft_windows: tuple[int, ...] = (2048, 1024, 512, 256, 128)

    def __post_init__(self) -> None:
        for name in (*WAVEFORM_LOSSES, "commitment", "semantic"):
            require(0 <= getattr(self, name) < math.inf, name, "must be 0 (off) or a weight")
        require(
            any(getattr(self, name) > 0 for name in ("mel", "stft", "waveform")),
            "mel",
            "mel, stft and waveform are all 0: nothing would tie the output to the input",
        )
        same = len(self.mel_windows) == len(self.mel_bands)
        require(same, "mel_bands", "needs one number for each of mel_windows")
        for name in ("mel_windows", "stft_windows"):
            windows = getattr(self, name)
            good = len(windows) > 0 and all(size >= 8 and size % 4 == 0 for size in windows)
            require(good, name, "needs window lengths of at least 8 samples, multiples of 4")


@dataclass(frozen=True, config=STRICT)
class BalancerConfig:
    """The balancer of gradients; ``decay`` is that of the running mean of their norms."""

    decay: float = 0.999

    def __post_init__(self) -> None:
        require(0 <= self.decay < 1, "decay", "must lie in 0 ... 1 (excluded)")


@dataclass(frozen=True, config=STRICT)
class DiscriminatorConfig:
    """The discriminator.

    Attributes:
      windows: window length of each scale, in samples.
      filters: channels of every layer.
      start: step from which it is trained and heard.
      period: it is updated every so many steps; the generator hears it in all.
      optimizer: its own.
    """

    windows: tuple[int, ...] = (2048, 1024, 512, 256, 128)
    filters: int = 32
    start: int = 0
    period: int = 1
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=3e-4, betas=(0.5, 0.9), weight_decay=0.05
    )

    def __post_init__(self) -> None:
        require_positive(self, "filters", "period")
        require(self.start >= 0, "start", "must not be negative")
        good = len(self.windows) > 0 and all(w >= 8 and w % 4 == 0 for w in self.windows)
        require(good, "windows", "needs window lengths of at least 8 samples, multiples of 4")
        require(self.optimizer.ema_decay == 0, "optimizer.ema_decay", "is not kept here: set 0")


@dataclass(frozen=True, config=STRICT)
class SemanticConfig:
    """What the semantic codebooks are taught, by a linear head that is not exported.

    Attributes:
      kind: ``cosine`` brings the head's output near a target vector a frame; ``histogram`` has it
        predict a distribution a frame (of phonemes, for example).
      targets: ``teacher`` computes the targets by `teacher` when the audio is cached;
        ``data`` takes them from the sources (see :mod:`train.codec_training.sources`).
      teacher: a speech encoder for ``transformers``, folder or repository.
      teacher_layer: which hidden layer; -1 is the last.
      width: of the targets, checked against the data; null takes what is there.
    """

    kind: Literal["cosine", "histogram"] = "cosine"
    targets: Literal["teacher", "data"] = "teacher"
    teacher: str = "microsoft/wavlm-large"
    teacher_layer: int = -1
    width: int | None = None

    def __post_init__(self) -> None:
        both = (self.kind, self.targets) != ("histogram", "teacher")
        require(both, "kind", "a teacher gives vectors, not distributions: use cosine")
        if self.width is not None:
            require_positive(self, "width")


@dataclass(frozen=True, config=STRICT)
class EvaluationConfig:
    """What is measured on the validation recordings.

    Attributes:
      windows: how many windows, spread evenly over the recordings.
      frames: code frames of each.
      rows: windows computed at a time.
      samples: how many of the windows are saved as audio, original and reconstruction.
    """

    windows: int = 64
    frames: int = 50
    rows: int = 8
    samples: int = 3

    def __post_init__(self) -> None:
        require_positive(self, "windows", "frames", "rows")
        require(0 <= self.samples <= self.windows, "samples", "must lie in 0 ... windows")


@dataclass(frozen=True, config=STRICT)
class CodecConfig:
    """A run of ``python -m train.codec``."""

    run: RunConfig
    model: CodecModelConfig
    data: CodecDataConfig
    mesh: MeshConfig = MeshConfig()
    codebooks: CodebookConfig = CodebookConfig()
    losses: LossConfig = LossConfig()
    balancer: BalancerConfig | None = None
    discriminator: DiscriminatorConfig | None = None
    semantic: SemanticConfig | None = None
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=8e-4, betas=(0.5, 0.9), weight_decay=0.05, ema_decay=0.99
    )
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self) -> None:
        heard = self.losses.adversarial > 0 or self.losses.feature_matching > 0
        require(
            heard == (self.discriminator is not None),
            "discriminator",
            "goes with losses.adversarial or losses.feature_matching: set both or neither",
        )
        require(
            (self.losses.semantic > 0) == (self.semantic is not None),
            "semantic",
            "goes with a weight losses.semantic: set both or neither",
        )
        require(
            not self.codebooks.frozen or self.model.initial is not None,
            "codebooks.frozen",
            "random codebooks are of no use: name a codec in model.initial",
        )
        require(
            not self.codebooks.predicted or self.semantic is None,
            "codebooks.predicted",
            "takes the place of the sources' targets: leave semantic out",
        )
        require(
            self.mesh.fsdp == 1 and self.mesh.tensor == 1,
            "mesh",
            "a codec is small and copied to every device: use the data axis alone",
        )
