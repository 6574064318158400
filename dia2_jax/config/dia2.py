"""Dia2's ``config.json`` in the published form."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from dia2_jax.config.reading import STRICT, read_json, require, require_positive, validate

#: Spellings of activations that published configs use, by what they compute.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "swiglu": "silu",
    "gelu": "gelu",
    "geglu": "gelu",
    "relu": "relu",
    "linear": "linear",
}

#: Top-level keys of a Dia2 config.json that carry no meaning for the model.
DIA2_BOOKKEEPING = frozenset(
    {"_name_or_path", "architectures", "model_type", "torch_dtype", "dtype", "transformers_version"}
)


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """Streams, vocabularies and special ids (`data` in config.json).

    ``channels`` counts the two text streams and the audio codebooks. ``delay_pattern`` is the
    delay of each codebook in frames. ``first_word_min_start`` and ``max_pad`` are read by nobody,
    here or upstream; they are carried for export.
    """

    channels: int
    text_vocab_size: int
    audio_vocab_size: int
    action_vocab_size: int
    text_pad_token_id: int
    text_new_word_token_id: int
    action_pad_token_id: int
    action_new_word_token_id: int
    text_zero_token_id: int = 7
    audio_pad_token_id: int | None = None
    audio_bos_token_id: int | None = None
    delay_pattern: tuple[int, ...] = ()
    first_word_min_start: int = 0
    max_pad: int = 0
    second_stream_ahead: int = 0
    tokenizer_path: str | None = None

    def __post_init__(self) -> None:
        require(self.channels >= 3, "channels", "must be two text streams and >= 1 codebook")
        require_positive(self, "text_vocab_size", "audio_vocab_size")
        require(
            self.action_vocab_size >= 2, "action_vocab_size", "must hold pad and new-word actions"
        )
        for name in ("text_pad_token_id", "text_new_word_token_id", "text_zero_token_id"):
            value = getattr(self, name)
            require(0 <= value < self.text_vocab_size, name, f"{value} is outside text_vocab_size")
        for name, value in (("audio_pad", self.audio_pad), ("audio_bos", self.audio_bos)):
            require(
                0 < value < self.audio_vocab_size,
                f"{name}_token_id",
                f"{value} is outside audio_vocab_size {self.audio_vocab_size}",
            )
        # The word machine reads actions 0 and 1 by value, as upstream does.
        require(self.action_pad_token_id == 0, "action_pad_token_id", "only 0 is supported")
        require(
            self.action_new_word_token_id == 1, "action_new_word_token_id", "only 1 is supported"
        )
        require(
            len(self.delay_pattern) == self.codebooks,
            "delay_pattern",
            f"has {len(self.delay_pattern)} delays for {self.codebooks} codebooks",
        )
        require(min(self.delay_pattern) >= 0, "delay_pattern", "delays cannot be negative")
        require(self.second_stream_ahead >= 0, "second_stream_ahead", "cannot be negative")

    @property
    def codebooks(self) -> int:
        """Number of audio codebooks C."""
        return self.channels - 2

    @property
    def max_delay(self) -> int:
        """Largest codebook delay, in frames."""
        return max(self.delay_pattern)

    @property
    def audio_pad(self) -> int:
        """Audio padding id; upstream's default is the last entry of the vocabulary."""
        pad = self.audio_pad_token_id
        return self.audio_vocab_size - 1 if pad is None else pad

    @property
    def audio_bos(self) -> int:
        """Audio beginning-of-stream id; upstream's default is the last but one entry."""
        bos = self.audio_bos_token_id
        return self.audio_vocab_size - 2 if bos is None else bos

    @property
    def depth_vocab_size(self) -> int:
        """Entries the depformer predicts: everything below both special ids."""
        return min(self.audio_pad, self.audio_bos)


def _check_transformer(config: DecoderConfig | DepformerConfig) -> None:
    require_positive(
        config, "n_layer", "n_embd", "n_hidden", "gqa_query_heads", "kv_heads", "gqa_head_dim"
    )
    require(
        config.gqa_query_heads % config.kv_heads == 0,
        "gqa_query_heads",
        f"{config.gqa_query_heads} is not divisible by kv_heads {config.kv_heads}",
    )


def _check_activations(names: tuple[str, ...]) -> None:
    require(len(names) == 2, "mlp_activations", f"needs two names, got {len(names)}")
    for name in names:
        require(
            name.lower() in ACTIVATIONS,
            "mlp_activations",
            f"unknown activation {name!r}; known: {', '.join(sorted(ACTIVATIONS))}",
        )


@dataclass(frozen=True, config=STRICT)
class DecoderConfig:
    """The temporal transformer (`model.decoder`)."""

    n_layer: int
    n_embd: int
    n_hidden: int
    gqa_query_heads: int
    kv_heads: int
    gqa_head_dim: int
    low_rank_dim: int | None = None

    def __post_init__(self) -> None:
        _check_transformer(self)
        require(self.gqa_head_dim % 2 == 0, "gqa_head_dim", "must be even for rotary positions")
        if self.low_rank_dim is not None:
            require_positive(self, "low_rank_dim")


@dataclass(frozen=True, config=STRICT)
class DepformerConfig:
    """The depth transformer over the codebooks of one frame (`model.depformer`)."""

    n_layer: int
    n_embd: int
    n_hidden: int
    gqa_query_heads: int
    kv_heads: int
    gqa_head_dim: int
    apply_rope: bool = True
    text_embedding: bool = True
    mlp_activations: tuple[str, ...] = ("silu", "linear")

    def __post_init__(self) -> None:
        _check_transformer(self)
        _check_activations(self.mlp_activations)
        # The fused projection of the published layout is [q; k; v] of equal widths.
        require(
            self.kv_heads == self.gqa_query_heads,
            "kv_heads",
            f"must equal gqa_query_heads {self.gqa_query_heads} in the depformer",
        )
        if self.apply_rope:
            require(self.gqa_head_dim % 2 == 0, "gqa_head_dim", "must be even when apply_rope")


@dataclass(frozen=True, config=STRICT)
class LinearConfig:
    """Activations of the decoder's gated MLP (`model.linear`)."""

    mlp_activations: tuple[str, ...] = ("silu", "linear")

    def __post_init__(self) -> None:
        _check_activations(self.mlp_activations)


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """Network shapes (`model` in config.json); defaults are those of the upstream reader."""

    decoder: DecoderConfig
    depformer: DepformerConfig
    linear: LinearConfig = dataclasses.field(default_factory=LinearConfig)
    dropout: float = 0.0
    rope_min_timescale: float = 1
    rope_max_timescale: float = 10000
    normalization_layer_epsilon: float = 1e-5

    def __post_init__(self) -> None:
        require(0 <= self.dropout < 1, "dropout", f"must be in [0, 1), got {self.dropout}")
        require_positive(
            self, "rope_min_timescale", "rope_max_timescale", "normalization_layer_epsilon"
        )


@dataclass(frozen=True, config=STRICT)
class RuntimeConfig:
    """Depformer weight schedule and context length (`runtime` in config.json)."""

    weights_schedule: tuple[int, ...] | None = None
    max_context_steps: int = 1500

    def __post_init__(self) -> None:
        require_positive(self, "max_context_steps")


@dataclass(frozen=True, config=STRICT)
class AssetsConfig:
    """Where the tokenizer and the codec of a checkpoint live (`assets` in config.json)."""

    tokenizer: str | None = None
    mimi: str | None = None


@dataclass(frozen=True, config=STRICT)
class Dia2Config:
    """A whole Dia2 ``config.json``."""

    data: DataConfig
    model: ModelConfig
    runtime: RuntimeConfig
    assets: AssetsConfig | None = None
    bookkeeping: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        schedule, stages = self.schedule, self.data.codebooks - 1
        require(
            len(schedule) == stages,
            "runtime.weights_schedule",
            f"has {len(schedule)} entries for {stages} depformer stages",
        )
        require(
            all(index >= 0 for index in schedule), "runtime.weights_schedule", "has a negative id"
        )
        require(
            self.runtime.max_context_steps > self.data.max_delay,
            "runtime.max_context_steps",
            f"must exceed the largest delay {self.data.max_delay}",
        )

    @property
    def schedule(self) -> tuple[int, ...]:
        """Weight-set id of every depformer stage; upstream's default is one set a stage."""
        schedule = self.runtime.weights_schedule
        return tuple(range(self.data.codebooks - 1)) if schedule is None else schedule


def load_dia2_config(source: str | Path | dict[str, Any]) -> Dia2Config:
    """Read a Dia2 config from a ``config.json`` path, its folder, or a parsed dict.

    Raises:
      ConfigError: naming the file, the field, and what is wrong with it.
    """
    raw, where = read_json(source)
    bookkeeping = {key: raw.pop(key) for key in list(raw) if key in DIA2_BOOKKEEPING}
    return validate(Dia2Config, {**raw, "bookkeeping": bookkeeping}, where)
