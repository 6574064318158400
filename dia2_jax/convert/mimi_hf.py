"""The table of Mimi's Hugging Face layout (`kyutai/mimi`, ``transformers`` ``MimiModel``)."""

from __future__ import annotations

from dia2_jax.config import MimiConfig
from dia2_jax.convert.mimi_layout import KERNEL, seanet_layers
from dia2_jax.convert.rules import Rule, Table

LAYOUT = "mimi-hf"

_SIDE = "{side:encoder|decoder}_transformer.layers.{i}"


def make_table(config: MimiConfig) -> Table:
    """The rules of a Mimi of this shape (SEANet's layer numbers depend on it)."""
    rules = [
        rule
        for layer in seanet_layers(config)
        for rule in layer.rules(f"{layer.side}.layers.{layer.index}{layer.inner}.conv")
    ]
    rules += [
        Rule(f"{_SIDE}.{published}", f"{_SIDE}.{ours}")
        for published, ours in (
            ("self_attn.{part:q|k|v|o}_proj.weight", "attention.{part:q|k|v|o}_proj.weight"),
            ("mlp.{part:fc1|fc2}.weight", "{part:fc1|fc2}.weight"),
            ("input_layernorm.{kind:weight|bias}", "attention_norm.{kind:weight|bias}"),
            ("post_attention_layernorm.{kind:weight|bias}", "mlp_norm.{kind:weight|bias}"),
            ("self_attn_layer_scale.scale", "attention_scale.scale"),
            ("mlp_layer_scale.scale", "mlp_scale.scale"),
        )
    ]
    quantizer = "quantizer.{split:semantic|acoustic}_residual_vector_quantizer"
    ours = "quantizer.{split:semantic|acoustic}"
    part = "{part:embed_sum|cluster_usage|initialized}"
    rules += [
        Rule("downsample.conv.weight", "downsample.conv.weight", KERNEL),
        Rule("upsample.conv.weight", "upsample.weight"),
        Rule(f"{quantizer}.{{end:input|output}}_proj.weight",
             f"{ours}.{{end:input|output}}_proj.weight", KERNEL),
        Rule(f"{quantizer}.layers.{{i}}.codebook.{part}", f"{ours}.codebooks.{{i}}.{part}"),
    ]  # fmt: skip
    return Table(LAYOUT, rules)
