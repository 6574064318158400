"""Configs of published files: read strictly, and every refusal names the field."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from dia2_jax.config import config_to_dict, load_dia2_config, load_mimi_config
from dia2_jax.config.dia2 import DIA2_BOOKKEEPING
from dia2_jax.config.mimi import MIMI_BOOKKEEPING
from dia2_jax.errors import ConfigError

# Every key that a published Dia2 config.json can have, none of them at its default.
DIA2: dict[str, Any] = {
    "data": {
        "channels": 5,
        "text_vocab_size": 40,
        "audio_vocab_size": 26,
        "action_vocab_size": 3,
        "text_pad_token_id": 4,
        "text_new_word_token_id": 5,
        "text_zero_token_id": 6,
        "audio_pad_token_id": 23,
        "audio_bos_token_id": 22,
        "action_pad_token_id": 0,
        "action_new_word_token_id": 1,
        "delay_pattern": [1, 3, 0],
        "first_word_min_start": 3,
        "max_pad": 8,
        "second_stream_ahead": 2,
        "tokenizer_path": "there",
    },
    "model": {
        "decoder": {
            "n_layer": 1,
            "n_embd": 20,
            "n_hidden": 28,
            "gqa_query_heads": 6,
            "kv_heads": 3,
            "gqa_head_dim": 4,
            "low_rank_dim": 9,
        },
        "depformer": {
            "n_layer": 2,
            "n_embd": 16,
            "n_hidden": 24,
            "gqa_query_heads": 2,
            "kv_heads": 2,
            "gqa_head_dim": 8,
            "apply_rope": False,
            "text_embedding": False,
            "mlp_activations": ["gelu", "relu"],
        },
        "linear": {"mlp_activations": ["relu", "silu"]},
        "dropout": 0.25,
        "rope_min_timescale": 2.0,
        "rope_max_timescale": 300.0,
        "normalization_layer_epsilon": 0.125,
    },
    "runtime": {"weights_schedule": [3, 1], "max_context_steps": 64},
    "assets": {"tokenizer": "t", "mimi": "m"},
    "model_type": "dia2",
    "architectures": ["Dia2"],
    "transformers_version": "4.57.1",
}

# Of an older transformers ...
OLD_MIMI: dict[str, Any] = {
    "model_type": "mimi",
    "architectures": ["MimiModel"],
    "torch_dtype": "float32",
    "rope_theta": 20000.0,
    "frame_rate": 12.5,
    "normalize": False,
    "sliding_window": 100,
    "hidden_size": 32,
    "upsample_groups": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "intermediate_size": 48,
    "num_quantizers": 8,
    "codebook_size": 64,
    "codebook_dim": 16,
    "use_cache": False,
    "id2label": {"0": "LABEL_0"},
}
# ... and of a newer one.
NEW_MIMI: dict[str, Any] = {
    **{k: v for k, v in OLD_MIMI.items() if k not in ("torch_dtype", "rope_theta", "frame_rate")},
    "dtype": "float32",
    "rope_parameters": {"rope_theta": 20000.0, "rope_type": "default"},
    "_frame_rate": None,
    "use_streaming": False,
}


def changed(raw: dict[str, Any], path: str, *value: Any) -> dict[str, Any]:
    """A copy with one value put in place, or taken away if none is given."""
    result = copy.deepcopy(raw)
    *parents, last = path.split(".")
    target = result
    for name in parents:
        target = target[name]
    if value:
        target[last] = value[0]
    else:
        del target[last]
    return result


def leaves(raw: dict[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key, value in raw.items():
        nested = isinstance(value, dict)
        found += leaves(value, f"{prefix}{key}.") if nested else [f"{prefix}{key}"]
    return found


def test_every_published_key_is_read_and_written_back() -> None:
    config = load_dia2_config(DIA2)
    assert config_to_dict(config) == DIA2
    # No field of ours is missing in the list above, so a new one has to be added there.
    for section, raw in (
        (config.data, DIA2["data"]),
        (config.model, DIA2["model"]),
        (config.model.decoder, DIA2["model"]["decoder"]),
        (config.model.depformer, DIA2["model"]["depformer"]),
        (config.runtime, DIA2["runtime"]),
        (config.assets, DIA2["assets"]),
    ):
        assert section is not None
        fields = {field.name: field.default for field in dataclasses.fields(section)}
        assert set(fields) == set(raw)
        for name, default in fields.items():
            assert getattr(section, name) != default, f"{name} stayed at its default"


def test_upstream_s_defaults() -> None:
    raw = copy.deepcopy(DIA2)
    for path in (
        "data.text_zero_token_id", "data.audio_pad_token_id", "data.audio_bos_token_id",
        "data.first_word_min_start", "data.max_pad", "data.second_stream_ahead",
        "data.tokenizer_path", "model.decoder.low_rank_dim", "model.depformer.apply_rope",
        "model.depformer.text_embedding", "model.depformer.mlp_activations", "model.linear",
        "model.dropout", "model.rope_min_timescale", "model.rope_max_timescale",
        "model.normalization_layer_epsilon", "runtime.weights_schedule",
        "runtime.max_context_steps", "assets",
    ):  # fmt: skip
        raw = changed(raw, path)
    config = load_dia2_config(raw)
    data, model = config.data, config.model
    assert (data.text_zero_token_id, data.audio_pad, data.audio_bos) == (7, 25, 24)
    assert (data.second_stream_ahead, data.depth_vocab_size) == (0, 24)
    assert (model.depformer.apply_rope, model.depformer.text_embedding) == (True, True)
    assert model.depformer.mlp_activations == model.linear.mlp_activations == ("silu", "linear")
    assert (model.rope_min_timescale, model.rope_max_timescale) == (1, 10_000)
    assert (model.normalization_layer_epsilon, model.dropout) == (1e-5, 0)
    assert config.runtime.max_context_steps == 1500
    assert config.schedule == (0, 1)  # one weight set a stage
    # Upstream derives these ids where they are absent, and cannot read null.
    written = config_to_dict(config)
    assert not {"audio_pad_token_id", "audio_bos_token_id"} & set(written["data"])
    assert load_dia2_config(written) == config


def test_derived_values() -> None:
    data = load_dia2_config(DIA2).data
    assert (data.codebooks, data.max_delay, data.depth_vocab_size) == (3, 3, 22)


def test_one_codebook_needs_no_schedule() -> None:
    raw = changed(DIA2, "data.channels", 3)
    raw = changed(changed(raw, "data.delay_pattern", [2]), "runtime.weights_schedule", [])
    assert load_dia2_config(raw).schedule == ()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.decoder.n_layers", 1, "'model.decoder.n_layers' (did you mean 'n_layer'?)"),
        ("data.chanels", 1, "unknown key 'data.chanels' (did you mean 'channels'?)"),
        ("runtime.schedule", [], "unknown key 'runtime.schedule'"),
        ("assets.tokeniser", "t", "'assets.tokeniser' (did you mean 'tokenizer'?)"),
        ("modle", {}, "unknown key 'modle' (did you mean 'model'?)"),
        ("quantum", 1, "unknown key 'quantum'; known: data, model, runtime, assets"),
        ("data.channels", "5", "data.channels: Input should be a valid integer, got \"5\""),
        ("data.channels", 5.0, "data.channels: Input should be a valid integer, got 5.0"),
        ("data.delay_pattern", [1, None, 0], "data.delay_pattern.1: Input should be a valid"),
        ("data.delay_pattern", 3, "data.delay_pattern: "),
        ("model.depformer.apply_rope", 1, "model.depformer.apply_rope: Input should be a"),
        ("model.decoder", None, "model.decoder: Input should be an object"),
        ("data.channels", 2, "data.channels: must be two text streams and >= 1 codebook"),
        ("data.delay_pattern", [1, 2], "data.delay_pattern: has 2 delays for 3 codebooks"),
        ("data.delay_pattern", [1, 2, -1], "data.delay_pattern: delays cannot be negative"),
        ("data.text_vocab_size", 0, "data.text_vocab_size: must be positive"),
        ("data.action_vocab_size", 1, "data.action_vocab_size: must hold pad and new-word"),
        ("data.action_pad_token_id", 1, "data.action_pad_token_id: only 0 is supported"),
        ("data.action_new_word_token_id", 2, "data.action_new_word_token_id: only 1 is supported"),
        ("data.text_pad_token_id", 40, "data.text_pad_token_id: 40 is outside text_vocab_size"),
        ("data.text_new_word_token_id", -1, "data.text_new_word_token_id: -1 is outside"),
        ("data.text_zero_token_id", 41, "data.text_zero_token_id: 41 is outside text_vocab_size"),
        ("data.audio_pad_token_id", 26, "data.audio_pad_token_id: 26 is outside audio_vocab_size"),
        ("data.audio_bos_token_id", 0, "data.audio_bos_token_id: 0 is outside audio_vocab_size"),
        ("data.second_stream_ahead", -1, "data.second_stream_ahead: cannot be negative"),
        ("model.decoder.n_layer", 0, "model.decoder.n_layer: must be positive"),
        ("model.decoder.kv_heads", 4, "decoder.gqa_query_heads: 6 is not divisible by"),
        ("model.decoder.gqa_head_dim", 5, "model.decoder.gqa_head_dim: must be even"),
        ("model.decoder.low_rank_dim", 0, "model.decoder.low_rank_dim: must be positive"),
        ("model.depformer.kv_heads", 1, "model.depformer.kv_heads: must equal gqa_query_heads 2"),
        ("model.depformer.mlp_activations", ["silu"], "model.depformer.mlp_activations: needs two"),
        ("model.linear.mlp_activations", ["silu", "tanh"], "unknown activation 'tanh'; known: "),
        ("model.dropout", 1.0, "model.dropout: must be in [0, 1), got 1.0"),
        ("model.rope_max_timescale", float("inf"), "rope_max_timescale: must be positive and"),
        ("model.normalization_layer_epsilon", float("nan"), "normalization_layer_epsilon: must be"),
        ("runtime.weights_schedule", [0, 1, 2], "runtime.weights_schedule: has 3 entries for 2"),
        ("runtime.weights_schedule", [0, -1], "runtime.weights_schedule: has a negative id"),
        ("runtime.max_context_steps", 3, "must exceed the largest delay 3"),
        ("runtime.max_context_steps", 0, "runtime.max_context_steps: must be positive"),
    ],
)  # fmt: skip
def test_bad_values_are_refused_by_name(path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_dia2_config(changed(DIA2, path, value))
    assert str(caught.value).startswith("config: ")
    assert message in str(caught.value)
    assert path in str(caught.value) or path == "model.decoder.kv_heads"


def test_head_width_may_be_odd_only_without_rotary_positions() -> None:
    odd = changed(DIA2, "model.depformer.gqa_head_dim", 5)
    load_dia2_config(odd)
    with pytest.raises(ConfigError, match=r"model\.depformer\.gqa_head_dim: must be even"):
        load_dia2_config(changed(odd, "model.depformer.apply_rope", True))


@pytest.mark.parametrize("path", ["data.channels", "model.decoder.n_embd", "model.depformer"])
def test_missing_fields_are_named(path: str) -> None:
    with pytest.raises(ConfigError, match=f"missing field '{path}'"):
        load_dia2_config(changed(DIA2, path))


def test_all_problems_are_listed_at_once() -> None:
    raw = changed(changed(DIA2, "data.chanels", 1), "model.decoder.n_embd")
    with pytest.raises(ConfigError, match=r"data\.chanels.*; .*model\.decoder\.n_embd"):
        load_dia2_config(raw)


def test_bookkeeping_is_carried_verbatim() -> None:
    raw = copy.deepcopy(DIA2)
    raw.update({key: {"any": ["thing", None, 1.5]} for key in DIA2_BOOKKEEPING})
    assert config_to_dict(load_dia2_config(raw)) == raw
    mimi = copy.deepcopy(OLD_MIMI)
    mimi.update({key: [key, None] for key in MIMI_BOOKKEEPING - {"model_type"}})
    written = config_to_dict(load_mimi_config(mimi))
    assert {key: written[key] for key in mimi} == mimi


def test_configs_are_hashable_and_frozen() -> None:
    config, same = load_dia2_config(DIA2), load_dia2_config(copy.deepcopy(DIA2))
    assert hash(config) == hash(same) and config == same
    assert config != load_dia2_config(changed(DIA2, "data.max_pad", 9))
    assert hash(load_mimi_config(NEW_MIMI)) == hash(load_mimi_config(NEW_MIMI))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.data.channels = 6  # type: ignore[misc]


def test_the_given_dict_is_left_alone() -> None:
    for raw, load in ((DIA2, load_dia2_config), (NEW_MIMI, load_mimi_config)):
        before = copy.deepcopy(raw)
        load(raw)
        assert raw == before


def test_files_and_folders_are_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(DIA2))
    assert load_dia2_config(path) == load_dia2_config(str(tmp_path)) == load_dia2_config(DIA2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such config file"),
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object, got list"),
        (json.dumps(changed(DIA2, "data.channels")), "missing field 'data.channels'"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_dia2_config(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert message in str(caught.value)


# -------------------------------------------------------------------------------------------- Mimi


def test_old_and_new_mimi_files_say_the_same() -> None:
    old, new = load_mimi_config(OLD_MIMI), load_mimi_config(NEW_MIMI)
    assert (old.rope_theta, old.frame_rate) == (20_000, 12.5)
    assert (new.rope_theta, new.frame_rate) == (20_000, None)
    for name in (field.name for field in dataclasses.fields(old)):
        if name not in ("frame_rate", "bookkeeping"):
            assert getattr(old, name) == getattr(new, name), name
    assert load_mimi_config({**NEW_MIMI, "_frame_rate": 12.5}).frame_rate == 12.5


@pytest.mark.parametrize("raw", [OLD_MIMI, NEW_MIMI, {**NEW_MIMI, "_frame_rate": 12.5}])
def test_mimi_is_written_back_in_the_style_it_came_in(raw: dict[str, Any]) -> None:
    written = config_to_dict(load_mimi_config(raw))
    assert {key: written[key] for key in raw} == raw
    other_style = {"rope_theta", "frame_rate"} if "rope_parameters" in raw else {"rope_parameters"}
    assert not other_style & set(written)
    assert load_mimi_config(written) == load_mimi_config(raw)


def test_mimi_s_derived_values() -> None:
    config = load_mimi_config(OLD_MIMI)
    assert (config.samples_per_frame, config.frames_per_second) == (1920, 12.5)
    assert config.attention_head_dim == 10
    assert load_mimi_config(changed(OLD_MIMI, "head_dim", None)).attention_head_dim == 8


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_quantisers", 8, "unknown key 'num_quantisers' (did you mean 'num_quantizers'?)"),
        ("model_type", "encodec", "model_type is 'encodec', expected 'mimi'"),
        ("rope_parameters", {"rope_type": "yarn"}, "rope_parameters: only rope_type 'default'"),
        ("rope_parameters", [1], "rope_parameters: only rope_type 'default'"),
        ("rope_parameters", {"rope_theta": None}, "rope_parameters.rope_theta: must be a number"),
        ("rope_parameters", {"rope_theta": "x"}, 'rope_theta: must be a number, got "x"'),
        ("rope_parameters", {"rope_theta": True}, "rope_theta: must be a number, got true"),
        ("rope_parameters", {"rope_theta": -1}, "rope_theta: must be positive and finite"),
        ("head_dim", 0, "head_dim: must be positive and finite, got 0"),
        ("head_dim", -2, "head_dim: must be positive and finite, got -2"),
        ("frame_rate", 25.0, "frame_rate: 25.0 asks for a stride of 1"),
        ("normalize", True, "normalize: only false is supported"),
        ("hidden_act", "relu", "hidden_act: Input should be 'gelu', got \"relu\""),
        ("pad_mode", "reflect", "pad_mode: Input should be 'constant'"),
        ("use_causal_conv", False, "use_causal_conv: Input should be True"),
        ("num_key_value_heads", 3, "4 is not divisible by num_key_value_heads 3"),
        ("head_dim", 5, "head_dim: must be even"),
        ("upsample_groups", 5, "upsample_groups: does not divide hidden_size 32"),
        ("num_semantic_quantizers", 8, "num_semantic_quantizers: must lie between"),
        ("upsampling_ratios", [], "upsampling_ratios: is empty"),
        ("upsampling_ratios", [8, 1], "upsampling_ratios: must all exceed 1"),
        ("audio_channels", 2, "audio_channels: only mono"),
        ("trim_right_ratio", 0.5, "trim_right_ratio: only 1.0 streams"),
        ("sliding_window", 0, "sliding_window: must be positive"),
        ("sliding_window", "250", "sliding_window: Input should be a valid integer, got \"250\""),
    ],
)  # fmt: skip
def test_bad_mimi_values_are_refused_by_name(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_mimi_config({**OLD_MIMI, key: value})
    assert str(caught.value).startswith("config: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("raw", [DIA2, OLD_MIMI, NEW_MIMI])
def test_a_value_of_the_wrong_type_names_its_field(raw: dict[str, Any]) -> None:
    """Whatever the field: an object where something else belongs is refused, and named."""
    load = load_dia2_config if raw is DIA2 else load_mimi_config
    carried = DIA2_BOOKKEEPING | MIMI_BOOKKEEPING
    for path in leaves(raw):
        top = path.split(".")[0]
        if top in carried - {"model_type"} or top == "rope_parameters" or path == "model_type":
            continue
        name = path.removeprefix("_") if path.startswith("_") else path
        with pytest.raises(ConfigError, match=rf"config: {name}[.:]"):
            load(changed(raw, path, {"x": {}}))
