"""Model configurations: the published ``config.json`` files of Dia2 and of Mimi.

Frozen dataclasses with the field names of the published files, read strictly: an
unknown key, a missing field or an impossible value is a :class:`ConfigError` that
names the field. Keys that nobody reads but that published files carry are kept
(``bookkeeping``), so that an exported file says what the original said.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from dia2_jax.errors import ConfigError

_STRICT = ConfigDict(extra="forbid", strict=True)

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

#: Keys of a Mimi config.json that carry no meaning for inference or training here.
#: The second group is what `PretrainedConfig` of older transformers wrote into every file.
MIMI_BOOKKEEPING = frozenset(
    {
        "_name_or_path", "architectures", "attention_dropout", "dtype", "initializer_range",
        "max_position_embeddings", "model_type", "tie_word_embeddings", "torch_dtype",
        "transformers_version", "use_cache", "use_streaming",
    }
) | frozenset(
    {
        "_attn_implementation_autoset", "add_cross_attention", "bad_words_ids",
        "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward",
        "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample",
        "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id",
        "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
        "forced_eos_token_id", "id2label", "is_decoder", "is_encoder_decoder", "label2id",
        "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups",
        "num_beams", "num_return_sequences", "output_attentions", "output_hidden_states",
        "output_scores", "pad_token_id", "prefix", "problem_type", "pruned_heads",
        "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate",
        "sep_token_id", "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss",
        "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p", "torchscript", "typical_p",
        "use_bfloat16",
    }
)  # fmt: skip


def _require(condition: bool, field: str, message: str) -> None:
    if not condition:
        raise ValueError(f"{field}: {message}")


def _require_positive(instance: Any, *fields: str) -> None:
    for field in fields:
        value = getattr(instance, field)
        _require(value > 0, field, f"must be positive, got {value}")


@dataclass(frozen=True, config=_STRICT)
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
        _require(self.channels >= 3, "channels", "must be two text streams and >= 1 codebook")
        _require_positive(self, "text_vocab_size", "audio_vocab_size")
        _require(
            self.action_vocab_size >= 2, "action_vocab_size", "must hold pad and new-word actions"
        )
        for name in ("text_pad_token_id", "text_new_word_token_id", "text_zero_token_id"):
            value = getattr(self, name)
            _require(0 <= value < self.text_vocab_size, name, f"{value} is outside text_vocab_size")
        for name, value in (("audio_pad", self.audio_pad), ("audio_bos", self.audio_bos)):
            _require(
                0 < value < self.audio_vocab_size,
                f"{name}_token_id",
                f"{value} is outside audio_vocab_size {self.audio_vocab_size}",
            )
        # The word machine reads actions 0 and 1 by value, as upstream does.
        _require(self.action_pad_token_id == 0, "action_pad_token_id", "only 0 is supported")
        _require(
            self.action_new_word_token_id == 1, "action_new_word_token_id", "only 1 is supported"
        )
        _require(
            len(self.delay_pattern) == self.codebooks,
            "delay_pattern",
            f"has {len(self.delay_pattern)} delays for {self.codebooks} codebooks",
        )
        _require(min(self.delay_pattern) >= 0, "delay_pattern", "delays cannot be negative")
        _require(self.second_stream_ahead >= 0, "second_stream_ahead", "cannot be negative")

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
    _require_positive(
        config, "n_layer", "n_embd", "n_hidden", "gqa_query_heads", "kv_heads", "gqa_head_dim"
    )
    _require(
        config.gqa_query_heads % config.kv_heads == 0,
        "gqa_query_heads",
        f"{config.gqa_query_heads} is not divisible by kv_heads {config.kv_heads}",
    )


def _check_activations(names: tuple[str, ...]) -> None:
    _require(len(names) == 2, "mlp_activations", f"needs two names, got {len(names)}")
    for name in names:
        _require(
            name.lower() in ACTIVATIONS,
            "mlp_activations",
            f"unknown activation {name!r}; known: {', '.join(sorted(ACTIVATIONS))}",
        )


@dataclass(frozen=True, config=_STRICT)
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
        _require(self.gqa_head_dim % 2 == 0, "gqa_head_dim", "must be even for rotary positions")
        if self.low_rank_dim is not None:
            _require_positive(self, "low_rank_dim")


@dataclass(frozen=True, config=_STRICT)
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
        _require(
            self.kv_heads == self.gqa_query_heads,
            "kv_heads",
            f"must equal gqa_query_heads {self.gqa_query_heads} in the depformer",
        )
        if self.apply_rope:
            _require(self.gqa_head_dim % 2 == 0, "gqa_head_dim", "must be even when apply_rope")


@dataclass(frozen=True, config=_STRICT)
class LinearConfig:
    """Activations of the decoder's gated MLP (`model.linear`)."""

    mlp_activations: tuple[str, ...] = ("silu", "linear")

    def __post_init__(self) -> None:
        _check_activations(self.mlp_activations)


@dataclass(frozen=True, config=_STRICT)
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
        _require(0 <= self.dropout < 1, "dropout", f"must be in [0, 1), got {self.dropout}")
        _require_positive(
            self, "rope_min_timescale", "rope_max_timescale", "normalization_layer_epsilon"
        )


@dataclass(frozen=True, config=_STRICT)
class RuntimeConfig:
    """Depformer weight schedule and context length (`runtime` in config.json)."""

    weights_schedule: tuple[int, ...] | None = None
    max_context_steps: int = 1500

    def __post_init__(self) -> None:
        _require_positive(self, "max_context_steps")


@dataclass(frozen=True, config=_STRICT)
class AssetsConfig:
    """Where the tokenizer and the codec of a checkpoint live (`assets` in config.json)."""

    tokenizer: str | None = None
    mimi: str | None = None


@dataclass(frozen=True, config=_STRICT)
class Dia2Config:
    """A whole Dia2 ``config.json``."""

    data: DataConfig
    model: ModelConfig
    runtime: RuntimeConfig
    assets: AssetsConfig | None = None
    bookkeeping: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        schedule, stages = self.schedule, self.data.codebooks - 1
        _require(
            len(schedule) == stages,
            "runtime.weights_schedule",
            f"has {len(schedule)} entries for {stages} depformer stages",
        )
        _require(
            all(index >= 0 for index in schedule), "runtime.weights_schedule", "has a negative id"
        )
        _require(
            self.runtime.max_context_steps > self.data.max_delay,
            "runtime.max_context_steps",
            f"must exceed the largest delay {self.data.max_delay}",
        )

    @property
    def schedule(self) -> tuple[int, ...]:
        """Weight-set id of every depformer stage; upstream's default is one set a stage."""
        schedule = self.runtime.weights_schedule
        return tuple(range(self.data.codebooks - 1)) if schedule is None else schedule


@dataclass(frozen=True, config=_STRICT)
class MimiConfig:
    """Mimi's ``config.json`` in the Hugging Face layout, of old and new `transformers`.

    New files say ``rope_parameters`` and ``_frame_rate`` where old ones said ``rope_theta`` and
    ``frame_rate``; both are read, and written back as they came.
    """

    sampling_rate: int = 24_000
    audio_channels: int = 1
    hidden_size: int = 512
    num_filters: int = 64
    num_residual_layers: int = 1
    upsampling_ratios: tuple[int, ...] = (8, 6, 5, 4)
    kernel_size: int = 7
    last_kernel_size: int = 3
    residual_kernel_size: int = 3
    dilation_growth_rate: int = 2
    use_causal_conv: Literal[True] = True
    pad_mode: Literal["constant"] = "constant"
    compress: int = 2
    trim_right_ratio: float = 1.0
    codebook_size: int = 2048
    codebook_dim: int | None = 256
    num_quantizers: int = 32
    use_conv_shortcut: bool = False
    vector_quantization_hidden_dimension: int = 256
    num_semantic_quantizers: int = 1
    upsample_groups: int = 512
    num_hidden_layers: int = 8
    intermediate_size: int = 2048
    num_attention_heads: int = 8
    num_key_value_heads: int = 8
    head_dim: int | None = None
    hidden_act: Literal["gelu"] = "gelu"
    norm_eps: float = 1e-5
    sliding_window: int = 250
    layer_scale_initial_scale: float = 0.01
    attention_bias: Literal[False] = False
    normalize: Literal[False] = False
    rope_theta: float = 10_000.0
    frame_rate: float | None = None
    bookkeeping: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _require_positive(
            self, "sampling_rate", "hidden_size", "num_filters", "num_residual_layers",
            "kernel_size", "last_kernel_size", "residual_kernel_size", "dilation_growth_rate",
            "compress", "codebook_size", "vector_quantization_hidden_dimension",
            "num_hidden_layers", "intermediate_size", "num_attention_heads",
            "num_key_value_heads", "sliding_window", "norm_eps", "rope_theta",
        )  # fmt: skip
        _require(self.audio_channels == 1, "audio_channels", "only mono codecs are supported")
        _require(len(self.upsampling_ratios) > 0, "upsampling_ratios", "is empty")
        _require(min(self.upsampling_ratios) > 1, "upsampling_ratios", "must all exceed 1")
        _require(self.trim_right_ratio == 1.0, "trim_right_ratio", "only 1.0 streams")
        _require(
            0 < self.num_semantic_quantizers < self.num_quantizers,
            "num_semantic_quantizers",
            f"must lie between 0 and num_quantizers {self.num_quantizers}",
        )
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "num_attention_heads",
            f"{self.num_attention_heads} is not divisible by num_key_value_heads "
            f"{self.num_key_value_heads}",
        )
        _require(
            self.head_dim is not None or self.hidden_size % self.num_attention_heads == 0,
            "hidden_size",
            f"{self.hidden_size} is not divisible by num_attention_heads",
        )
        _require(self.attention_head_dim % 2 == 0, "head_dim", "must be even for rotary positions")
        _require(
            self.hidden_size % self.upsample_groups == 0,
            "upsample_groups",
            f"does not divide hidden_size {self.hidden_size}",
        )
        if self.frame_rate is not None:
            stride = self.sampling_rate / math.prod(self.upsampling_ratios) / self.frame_rate
            _require(
                stride == 2,
                "frame_rate",
                f"{self.frame_rate} asks for a stride of {stride:g} between the convolutions and "
                "the codes; Mimi's is 2",
            )

    @property
    def attention_head_dim(self) -> int:
        """Width H of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def samples_per_frame(self) -> int:
        """Waveform samples of one code frame (1,920 in the published codec)."""
        return math.prod(self.upsampling_ratios) * 2

    @property
    def frames_per_second(self) -> float:
        """Code frames per second (12.5 in the published codec)."""
        return self.sampling_rate / self.samples_per_frame


_Config = TypeVar("_Config", Dia2Config, MimiConfig)


def load_dia2_config(source: str | Path | dict[str, Any]) -> Dia2Config:
    """Read a Dia2 config from a ``config.json`` path, its folder, or a parsed dict.

    Raises:
      ConfigError: naming the file, the field, and what is wrong with it.
    """
    raw, where = _read(source)
    bookkeeping = {key: raw.pop(key) for key in list(raw) if key in DIA2_BOOKKEEPING}
    return _validate(Dia2Config, {**raw, "bookkeeping": bookkeeping}, where)


def load_mimi_config(source: str | Path | dict[str, Any]) -> MimiConfig:
    """Read a Mimi config (see :func:`load_dia2_config` for sources and errors)."""
    raw, where = _read(source)
    bookkeeping = {key: raw.pop(key) for key in list(raw) if key in MIMI_BOOKKEEPING}
    model_type = bookkeeping.get("model_type", "mimi")
    if model_type != "mimi":
        raise ConfigError(f"{where}: model_type is {model_type!r}, expected 'mimi'")
    rope = raw.pop("rope_parameters", None)
    if rope is not None:
        bookkeeping["rope_parameters"] = rope
        if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
            raise ConfigError(f"{where}: rope_parameters: only rope_type 'default' is supported")
        raw["rope_theta"] = float(rope.get("rope_theta", 10_000.0))
    if "_frame_rate" in raw:
        bookkeeping["_frame_rate"] = raw["_frame_rate"]
        raw["frame_rate"] = raw.pop("_frame_rate")
    return _validate(MimiConfig, {**raw, "bookkeeping": bookkeeping}, where)


def config_to_dict(config: Dia2Config | MimiConfig) -> dict[str, Any]:
    """The published form of a config: every field, carried keys included, JSON-ready."""
    raw = dataclasses.asdict(config)
    bookkeeping = raw.pop("bookkeeping")
    if isinstance(config, MimiConfig):
        if "rope_parameters" in bookkeeping:
            raw.pop("rope_theta")
        if "_frame_rate" in bookkeeping:
            raw.pop("frame_rate")
    elif raw["assets"] is None:
        raw.pop("assets")
    merged: dict[str, Any] = json.loads(json.dumps({**raw, **bookkeeping}))
    return merged


def _read(source: str | Path | dict[str, Any]) -> tuple[dict[str, Any], str]:
    if isinstance(source, dict):
        return dict(source), "config"
    path = Path(source)
    if path.is_dir():
        path = path / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(raw).__name__}")
    return raw, str(path)


def _validate(kind: type[_Config], raw: dict[str, Any], where: str) -> _Config:
    try:
        # JSON mode keeps strictness (no "3" for 3) while reading lists as tuples.
        return TypeAdapter(kind).validate_json(json.dumps(raw))
    except ValidationError as error:
        problems = [_explain(kind, item) for item in error.errors(include_url=False)]
    raise ConfigError(f"{where}: " + "; ".join(problems))


def _explain(kind: type[Any], item: Any) -> str:
    path = [str(part) for part in item["loc"]]
    name = ".".join(path)
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _fields_at(kind, path[:-1])
        close = difflib.get_close_matches(path[-1], known, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else f"; known: {', '.join(known)}"
        return f"unknown key {name!r}{hint}"
    if item["type"] in ("missing", "missing_argument"):
        return f"missing field {name!r}"
    message = item["msg"].removeprefix("Value error, ")
    return f"{name}: {message}" if name else message


def _fields_at(kind: Any, path: list[str]) -> list[str]:
    """Field names of the dataclass that `path` leads to below `kind`."""
    fields = {field.name: field.type for field in dataclasses.fields(kind)}
    if path:
        named = {cls.__name__: cls for cls in _SECTIONS}
        section = next(
            (cls for name, cls in named.items() if name in str(fields.get(path[0], ""))), None
        )
        return _fields_at(section, path[1:]) if section else []
    return [name for name in fields if name != "bookkeeping"]


_SECTIONS = (
    DataConfig, ModelConfig, RuntimeConfig, AssetsConfig, DecoderConfig, DepformerConfig,
    LinearConfig,
)  # fmt: skip
