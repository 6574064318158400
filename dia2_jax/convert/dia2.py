"""The table of the published Dia2 layout (`nari-labs/Dia2-1B`, `-2B`).

Our modules carry the published names and orientations, so every row is names only. The rows
are spelled out all the same: they are the list of what such a file may hold.
"""

from __future__ import annotations

from dia2_jax.convert.rules import Rule, Table

LAYOUT = "dia2"

_NAMES = (
    # The decoder.
    "transformer.audio_embeds.{i}.weight",
    "transformer.text_embed.embedding.weight",
    "transformer.text_embed.{stream:main|second}_proj.weight",
    "transformer.layers.{i}.{norm:pre_norm|post_norm}.weight",
    "transformer.layers.{i}.attn.{part:q|k|v|o}_proj.weight",
    "transformer.layers.{i}.attn.{part:q|k}_norm.weight",
    "transformer.layers.{i}.mlp.{part:wi|wo}.weight",
    "transformer.norm.weight",
    "transformer.{head:action|cb0}_head.weight",
    # The depformer; {s} is a weight-set id of `weights_schedule`. Its text embedding is optional.
    "depformer.audio_embeds.{i}.weight",
    "depformer.text_embed.embedding.weight",
    "depformer.text_embed.{stream:main|second}_proj.weight",
    "depformer.depformer_in.{s}.weight",
    "depformer.layers.{i}.{norm:pre_norm|post_norm}.weight",
    "depformer.layers.{i}.self_attention.{part:in|out}_proj.{s}.weight",
    "depformer.layers.{i}.self_attention.{part:q|k}_norm.weight",
    "depformer.layers.{i}.mlp.{part:wi|wo}.weight",
    "depformer.norm.weight",
    "depformer.logits.{i}.weight",
)

TABLE = Table(LAYOUT, [Rule(name, name) for name in _NAMES])
