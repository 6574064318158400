"""What the recorded training step was computed from: shapes, settings, weights and a batch.

All of it follows from formulas of integers, so the recording in PyTorch and the test build the
same numbers without a file between them.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np

#: All optional branches, unequal widths and head counts, a weight set that is used twice.
CONFIG: dict[str, Any] = {
    "data": {
        "channels": 6,
        "text_vocab_size": 20,
        "audio_vocab_size": 18,
        "action_vocab_size": 2,
        "text_pad_token_id": 3,
        "text_new_word_token_id": 2,
        "text_zero_token_id": 7,
        "audio_pad_token_id": 17,
        "audio_bos_token_id": 16,
        "action_pad_token_id": 0,
        "action_new_word_token_id": 1,
        "delay_pattern": [1, 2, 3, 2],
        "second_stream_ahead": 2,
    },
    "model": {
        "decoder": {
            "n_layer": 2,
            "n_embd": 16,
            "n_hidden": 24,
            "gqa_query_heads": 4,
            "kv_heads": 2,
            "gqa_head_dim": 4,
            "low_rank_dim": 8,
        },
        "depformer": {
            "n_layer": 2,
            "n_embd": 12,
            "n_hidden": 16,
            "gqa_query_heads": 2,
            "kv_heads": 2,
            "gqa_head_dim": 4,
            "apply_rope": True,
            "text_embedding": True,
            "mlp_activations": ["gelu", "linear"],
        },
        "linear": {"mlp_activations": ["silu", "linear"]},
        "dropout": 0.0,
        "rope_min_timescale": 1,
        "rope_max_timescale": 10000,
        "normalization_layer_epsilon": 1e-6,
    },
    "runtime": {"weights_schedule": [0, 1, 0], "max_context_steps": 32},
}

#: Two settings of the loss that share no number (fields of ``train.losses.LossConfig``).
LOSSES: dict[str, dict[str, Any]] = {
    "pooled": {
        "action_weight": 1.0,
        "action_padding_weight": 0.5,
        "overruled_action_weight": 0.0,
        "first_codebook_multiplier": 100.0,
        "depth": "pooled",
        "label_smoothing": 0.0,
        "z_loss": 0.0,
    },
    "per_codebook": {
        "action_weight": 0.7,
        "action_padding_weight": 0.3,
        "overruled_action_weight": 0.2,
        "first_codebook_multiplier": 2.0,
        "depth": "per_codebook",
        "label_smoothing": 0.1,
        "z_loss": 0.01,
    },
}

ROWS, STEPS, FRAMES = 3, 14, 5  # FRAMES of each row have a depth loss


def uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers in [0, 1) that depend on name and index alone: an integer hash, exact anywhere."""
    x = np.arange(math.prod(shape), dtype=np.uint32) * np.uint32(2654435761)
    x ^= np.uint32(zlib.crc32(name.encode()))
    for multiplier in (0x7FEB352D, 0x846CA68B):
        x ^= x >> np.uint32(16)
        x *= np.uint32(multiplier)
    x ^= x >> np.uint32(16)
    return (x.astype(np.float64) / 2**32).reshape(shape)


def integers(name: str, shape: tuple[int, ...], high: int) -> np.ndarray:
    """Integers in [0, high)."""
    return np.floor(uniform(name, shape) * high).astype(np.int32)


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 weight of one parameter; activations stay near 1."""
    spread = (2 * uniform(name, shape) - 1) * math.sqrt(3)
    if len(shape) == 1:
        spread = 1 + 0.3 * spread
    elif "embed" not in name or "proj" in name:
        spread = spread * 1.5 / math.sqrt(shape[1])
    return spread.astype(np.float32)


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The published parameter names and shapes of a config, written out."""
    data, model = config["data"], config["model"]
    deep, depth = model["decoder"], model["depformer"]
    codebooks, audio = data["channels"] - 2, data["audio_vocab_size"]
    named: dict[str, tuple[int, ...]] = {}

    def text(name: str, width: int, rank: int) -> None:
        named[f"{name}.embedding.weight"] = (data["text_vocab_size"], rank)
        named[f"{name}.main_proj.weight"] = named[f"{name}.second_proj.weight"] = (width, rank)

    def block(name: str, shape: dict[str, Any], attention: str) -> None:
        width, hidden, head = shape["n_embd"], shape["n_hidden"], shape["gqa_head_dim"]
        named[f"{name}.pre_norm.weight"] = named[f"{name}.post_norm.weight"] = (width,)
        named[f"{name}.{attention}.q_norm.weight"] = (head,)
        named[f"{name}.{attention}.k_norm.weight"] = (head,)
        named[f"{name}.mlp.wi.weight"] = (2 * hidden, width)
        named[f"{name}.mlp.wo.weight"] = (width, hidden)

    width, inner = deep["n_embd"], depth["n_embd"]
    for book in range(codebooks):
        named[f"transformer.audio_embeds.{book}.weight"] = (audio, width)
    text("transformer.text_embed", width, deep["low_rank_dim"] or width)
    queries = deep["gqa_query_heads"] * deep["gqa_head_dim"]
    keys = deep["kv_heads"] * deep["gqa_head_dim"]
    for layer in range(deep["n_layer"]):
        name = f"transformer.layers.{layer}"
        block(name, deep, "attn")
        named[f"{name}.attn.q_proj.weight"] = (queries, width)
        named[f"{name}.attn.k_proj.weight"] = named[f"{name}.attn.v_proj.weight"] = (keys, width)
        named[f"{name}.attn.o_proj.weight"] = (width, queries)
    named["transformer.norm.weight"] = (width,)
    named["transformer.action_head.weight"] = (data["action_vocab_size"], width)
    named["transformer.cb0_head.weight"] = (audio, width)

    sets = sorted(set(config["runtime"]["weights_schedule"]))
    for book in range(codebooks - 1):
        named[f"depformer.audio_embeds.{book}.weight"] = (audio, inner)
        named[f"depformer.logits.{book}.weight"] = (audio, inner)
    if depth["text_embedding"]:
        text("depformer.text_embed", inner, inner)
    heads = depth["gqa_query_heads"] * depth["gqa_head_dim"]
    for index in sets:
        named[f"depformer.depformer_in.{index}.weight"] = (inner, width)
    for layer in range(depth["n_layer"]):
        name = f"depformer.layers.{layer}"
        block(name, depth, "self_attention")
        for index in sets:
            named[f"{name}.self_attention.in_proj.{index}.weight"] = (3 * heads, inner)
            named[f"{name}.self_attention.out_proj.{index}.weight"] = (inner, heads)
    named["depformer.norm.weight"] = (inner,)
    return dict(sorted(named.items()))


def batch() -> dict[str, np.ndarray]:
    """A batch as ``dia2_jax.data.batch.collate`` makes one, with padding and holes everywhere."""
    data = CONFIG["data"]
    books, codes = data["channels"] - 2, data["audio_bos_token_id"]
    text = integers("text", (ROWS, 2, STEPS), data["text_vocab_size"])
    text[:, 1][uniform("quiet", (ROWS, STEPS)) < 0.4] = data["text_pad_token_id"]
    audio = integers("audio", (ROWS, books, STEPS), codes)
    for book, late in enumerate(data["delay_pattern"]):
        audio[:, book, :late] = data["audio_bos_token_id"]
    length = np.array([STEPS, STEPS - 3, STEPS - 6])
    real = np.arange(STEPS) < length[:, None]
    tokens = np.concatenate([text, audio], axis=1)
    tokens[:, :2][np.repeat(~real[:, None], 2, axis=1)] = data["text_pad_token_id"]
    tokens[:, 2:][np.repeat(~real[:, None], books, axis=1)] = data["audio_pad_token_id"]
    return {
        "tokens": tokens,
        "action": integers("action", (ROWS, STEPS), 2) * real,
        "action_known": real,
        "action_free": real & (uniform("free", (ROWS, STEPS)) < 0.6),
        "code": integers("code", (ROWS, STEPS), codes) * real,
        "code_known": real & (uniform("code known", (ROWS, STEPS)) < 0.8),
        "depth_index": np.sort(integers("index", (ROWS, FRAMES), STEPS - 6), axis=1),
        "depth_codes": integers("depth", (ROWS, FRAMES, books), codes),
        # Codebooks differ in how many targets they have: one mean for all is another number.
        "depth_known": uniform("depth known", (ROWS, FRAMES, books - 1)) < [0.9, 0.6, 0.4],
        "depth_text": integers("spoken", (ROWS, FRAMES, 2), data["text_vocab_size"]),
    }
