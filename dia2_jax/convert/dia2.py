"""The table of the published Dia2 layout (`nari-labs/Dia2-1B`, `-2B`).

Our modules carry the published names and orientations, so every row is names only. The rows
are spelled out all the same: they are the list of what such a file may hold.
"""

from __future__ import annotations

from dia2_jax.convert.rules import Rule, Table
from dia2_jax.nn.quantized import SCALE_SUFFIX

LAYOUT = "dia2"

# Weights of linear maps.
_LINEAR = (
    # The decoder.
    "transformer.text_embed.{stream:main|second}_proj.weight",
    "transformer.layers.{i}.attn.{part:q|k|v|o}_proj.weight",
    "transformer.layers.{i}.mlp.{part:wi|wo}.weight",
    "transformer.cb0_head.weight",
    # The depformer; {s} is a weight-set id of `weights_schedule`. Its text embedding is optional.
    "depformer.text_embed.{stream:main|second}_proj.weight",
    "depformer.depformer_in.{s}.weight",
    "depformer.layers.{i}.self_attention.{part:in|out}_proj.{s}.weight",
    "depformer.layers.{i}.mlp.{part:wi|wo}.weight",
    "depformer.logits.{i}.weight",
)

# The rest, which an int8 model keeps in floating point.
_FLOATING = (
    "transformer.audio_embeds.{i}.weight",
    "transformer.text_embed.embedding.weight",
    "transformer.layers.{i}.{norm:pre_norm|post_norm}.weight",
    "transformer.layers.{i}.attn.{part:q|k}_norm.weight",
    "transformer.norm.weight",
    "transformer.action_head.weight",
    "depformer.audio_embeds.{i}.weight",
    "depformer.text_embed.embedding.weight",
    "depformer.layers.{i}.{norm:pre_norm|post_norm}.weight",
    "depformer.layers.{i}.self_attention.{part:q|k}_norm.weight",
    "depformer.norm.weight",
)

TABLE = Table(LAYOUT, [Rule(name, name) for name in (*_LINEAR, *_FLOATING)])

#: Our own layout of an int8 model: the same names, every weight of a linear map int8 with a
#: ``weight_scale`` beside it. It has no row that leads back to :data:`TABLE`, since what rounding
#: took is gone.
INT8_LAYOUT = "dia2-int8"

INT8_TABLE = Table(
    INT8_LAYOUT,
    [*TABLE.rules, *(Rule(name, name) for name in (weight + SCALE_SUFFIX for weight in _LINEAR))],
)
