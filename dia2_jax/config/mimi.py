"""Mimi's ``config.json`` in the Hugging Face layout, of old and new `transformers`."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from dia2_jax.config.reading import STRICT, read_json, require, require_positive, validate
from dia2_jax.errors import ConfigError

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


@dataclass(frozen=True, config=STRICT)
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
    rope_theta: float = 10_000.0
    frame_rate: float | None = None
    bookkeeping: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        require_positive(
            self, "sampling_rate", "hidden_size", "num_filters", "num_residual_layers",
            "kernel_size", "last_kernel_size", "residual_kernel_size", "dilation_growth_rate",
            "compress", "codebook_size", "vector_quantization_hidden_dimension",
            "num_hidden_layers", "intermediate_size", "num_attention_heads",
            "num_key_value_heads", "sliding_window", "norm_eps", "rope_theta",
        )  # fmt: skip
        require(self.audio_channels == 1, "audio_channels", "only mono codecs are supported")
        require(len(self.upsampling_ratios) > 0, "upsampling_ratios", "is empty")
        require(min(self.upsampling_ratios) > 1, "upsampling_ratios", "must all exceed 1")
        require(self.trim_right_ratio == 1.0, "trim_right_ratio", "only 1.0 streams")
        require(
            0 < self.num_semantic_quantizers < self.num_quantizers,
            "num_semantic_quantizers",
            f"must lie between 0 and num_quantizers {self.num_quantizers}",
        )
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "num_attention_heads",
            f"{self.num_attention_heads} is not divisible by num_key_value_heads "
            f"{self.num_key_value_heads}",
        )
        require(
            self.head_dim is not None or self.hidden_size % self.num_attention_heads == 0,
            "hidden_size",
            f"{self.hidden_size} is not divisible by num_attention_heads",
        )
        if self.head_dim is not None:
            require_positive(self, "head_dim")
        require(self.attention_head_dim % 2 == 0, "head_dim", "must be even for rotary positions")
        require(
            self.hidden_size % self.upsample_groups == 0,
            "upsample_groups",
            f"does not divide hidden_size {self.hidden_size}",
        )
        if self.frame_rate is not None:
            stride = self.sampling_rate / math.prod(self.upsampling_ratios) / self.frame_rate
            require(
                stride == 2,
                "frame_rate",
                f"{self.frame_rate} asks for a stride of {stride:g} between the convolutions and "
                "the codes; Mimi's is 2",
            )

    @property
    def attention_head_dim(self) -> int:
        """Width H of one attention head."""
        if self.head_dim is None:
            return self.hidden_size // self.num_attention_heads
        return self.head_dim

    @property
    def samples_per_frame(self) -> int:
        """Waveform samples of one code frame (1,920 in the published codec)."""
        return math.prod(self.upsampling_ratios) * 2

    @property
    def frames_per_second(self) -> float:
        """Code frames per second (12.5 in the published codec)."""
        return self.sampling_rate / self.samples_per_frame


def load_mimi_config(source: str | Path | dict[str, Any]) -> MimiConfig:
    """Read a Mimi config (see :func:`load_dia2_config` for sources and errors)."""
    raw, where = read_json(source)
    bookkeeping = {key: raw.pop(key) for key in list(raw) if key in MIMI_BOOKKEEPING}
    model_type = bookkeeping.get("model_type", "mimi")
    if model_type != "mimi":
        raise ConfigError(f"{where}: model_type is {model_type!r}, expected 'mimi'")
    if "normalize" in raw:
        bookkeeping["normalize"] = raw.pop("normalize")
        if bookkeeping["normalize"] is not False:
            raise ConfigError(f"{where}: normalize: only false is supported")
    rope = raw.pop("rope_parameters", None)
    if rope is not None:
        bookkeeping["rope_parameters"] = rope
        if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
            raise ConfigError(f"{where}: rope_parameters: only rope_type 'default' is supported")
        theta = rope.get("rope_theta", 10_000.0)
        if isinstance(theta, bool) or not isinstance(theta, int | float):
            raise ConfigError(
                f"{where}: rope_parameters.rope_theta: must be a number, "
                f"got {json.dumps(theta)[:80]}"
            )
        raw["rope_theta"] = theta
    if "_frame_rate" in raw:
        bookkeeping["_frame_rate"] = raw["_frame_rate"]
        raw["frame_rate"] = raw.pop("_frame_rate")
    return validate(MimiConfig, {**raw, "bookkeeping": bookkeeping}, where)
