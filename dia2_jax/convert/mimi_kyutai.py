"""The table of Mimi's layout in Kyutai's own packages (`moshi`), and its config.

What differs from the Hugging Face layout beyond names: queries, keys and values are one fused
matrix, and rotary positions turn neighbouring pairs of a head (r0, i0, r1, i1, …) where ours
turn the first half against the second. The attention ``context`` counts steps like
``sliding_window``: step t sees t - context + 1 … t.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dia2_jax.config import MimiConfig, load_mimi_config
from dia2_jax.convert.mimi_layout import KERNEL, seanet_layers
from dia2_jax.convert.rules import Rule, Shape, Table, Transform
from dia2_jax.errors import ConfigError

LAYOUT = "mimi-kyutai"

#: Name under which a Kyutai config lies beside its weights.
CONFIG_NAME = "mimi_config.json"

_NAMES = {"embed_sum": "embedding_sum", "cluster_usage": "cluster_usage",
          "initialized": "_initialized"}  # fmt: skip
# What older files call them; `moshi` reads these too.
_OLD_NAMES = {"embed_sum": ("embed_sum", "embed_avg"), "cluster_usage": ("cluster_size",),
              "initialized": ("inited",)}  # fmt: skip


@dataclass(frozen=True)
class FusedAttention(Transform):
    """One ``[(N + 2K) * H, D]`` matrix [q; k; v] with interleaved rotary pairs, as three.

    N query and K key-value heads of width H. Rows of a head of q and k go from interleaved to
    half-split order; v has no positions.
    """

    heads: int
    kv_heads: int
    head_dim: int

    def to_ours(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        query, key, value = np.split(arrays[0], self._ends()[:2])
        return [self._deinterleave(query), self._deinterleave(key), value]

    def to_published(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        query, key, value = arrays
        return [np.concatenate([self._interleave(query), self._interleave(key), value])]

    def shapes_to_ours(self, shapes: Sequence[Shape]) -> list[Shape]:
        ends = self._ends()
        (shape,) = shapes
        if len(shape) != 2 or shape[0] != ends[2]:
            raise ValueError(
                f"is {list(shape)}; {self.heads} query and {self.kv_heads} key-value heads of "
                f"width {self.head_dim} take {ends[2]} rows"
            )
        rows = (ends[0], ends[1] - ends[0], ends[2] - ends[1])
        return [(count, shape[1]) for count in rows]

    def shapes_to_published(self, shapes: Sequence[Shape]) -> list[Shape]:
        return [(sum(shape[0] for shape in shapes), shapes[0][1])]

    def _ends(self) -> tuple[int, int, int]:
        wide, narrow = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return wide, wide + narrow, wide + 2 * narrow

    def _deinterleave(self, rows: np.ndarray) -> np.ndarray:
        pairs = rows.reshape(-1, self.head_dim // 2, 2, rows.shape[1])
        return pairs.swapaxes(1, 2).reshape(rows.shape)

    def _interleave(self, rows: np.ndarray) -> np.ndarray:
        halves = rows.reshape(-1, 2, self.head_dim // 2, rows.shape[1])
        return halves.swapaxes(1, 2).reshape(rows.shape)


def make_table(config: MimiConfig) -> Table:
    """The rules of a Mimi of this shape.

    Spellings are those of the published file; the state dicts of newer `moshi` releases
    (``in_projs.0.weight``) and older codebook names are read too.
    """
    rules: list[Rule] = []
    for layer in seanet_layers(config):
        inner = "conv.conv" if layer.stride is None else "convtr.convtr"
        rules += layer.rules(f"{layer.side}.model.{layer.index}{layer.inner}.{inner}")
    side, ours = (
        "{side:encoder|decoder}_transformer.transformer.layers.{i}",
        "{side:encoder|decoder}_transformer.layers.{i}",
    )
    fused = FusedAttention(
        config.num_attention_heads, config.num_key_value_heads, config.attention_head_dim
    )
    rules.append(
        Rule(
            f"{side}.self_attn.in_proj_weight",
            [f"{ours}.attention.{part}_proj.weight" for part in "qkv"],
            fused,
            aliases=[f"{side}.self_attn.{name}.weight" for name in ("in_proj", "in_projs.0")],
        )
    )
    rules.append(
        Rule(
            f"{side}.self_attn.out_proj.weight",
            f"{ours}.attention.o_proj.weight",
            aliases=[f"{side}.self_attn.out_projs.0.weight"],
        )
    )
    rules += [
        Rule(f"{side}.{published}", f"{ours}.{name}")
        for published, name in (
            ("linear1.weight", "fc1.weight"),
            ("linear2.weight", "fc2.weight"),
            ("norm1.{kind:weight|bias}", "attention_norm.{kind:weight|bias}"),
            ("norm2.{kind:weight|bias}", "mlp_norm.{kind:weight|bias}"),
            ("layer_scale_1.scale", "attention_scale.scale"),
            ("layer_scale_2.scale", "mlp_scale.scale"),
        )
    ]
    rules += [
        Rule("downsample.conv.conv.conv.weight", "downsample.conv.weight", KERNEL),
        Rule("upsample.convtr.convtr.convtr.weight", "upsample.weight"),
    ]
    for published, split in (("rvq_first", "semantic"), ("rvq_rest", "acoustic")):
        rules.append(
            Rule(
                f"quantizer.{published}.{{end:input|output}}_proj.weight",
                f"quantizer.{split}.{{end:input|output}}_proj.weight",
                KERNEL,
            )
        )
        codebook = f"quantizer.{published}.vq.layers.{{i}}._codebook"
        rules += [
            Rule(
                f"{codebook}.{name}",
                f"quantizer.{split}.codebooks.{{i}}.{part}",
                aliases=[f"{codebook}.{old}" for old in _OLD_NAMES[part]],
            )
            for part, name in _NAMES.items()
        ]
    return Table(LAYOUT, rules)


#: Settings of a Kyutai config that have one supported value, by section.
_FIXED: dict[str, dict[str, Any]] = {
    "": {"channels": 1},
    "seanet": {
        "channels": 1, "causal": True, "activation": "ELU", "norm": "none",
        "disable_norm_outer_blocks": 0, "pad_mode": "constant",
    },
    "quantizer": {},
    "transformer": {
        "causal": True, "conv_layout": True, "gating": "none", "norm": "layer_norm",
        "positional_embedding": "rope",
    },
}  # fmt: skip

#: Kyutai's name of each field of :class:`MimiConfig`, by section.
_FIELDS: dict[str, dict[str, str]] = {
    "": {"sample_rate": "sampling_rate", "frame_rate": "frame_rate"},
    "seanet": {
        "dimension": "hidden_size", "n_filters": "num_filters",
        "n_residual_layers": "num_residual_layers", "compress": "compress",
        "dilation_base": "dilation_growth_rate", "kernel_size": "kernel_size",
        "residual_kernel_size": "residual_kernel_size", "last_kernel_size": "last_kernel_size",
        "ratios": "upsampling_ratios",
    },
    "quantizer": {
        "dimension": "vector_quantization_hidden_dimension", "n_q": "num_quantizers",
        "n_q_semantic": "num_semantic_quantizers", "bins": "codebook_size",
    },
    "transformer": {
        "num_heads": "num_attention_heads", "num_layers": "num_hidden_layers",
        "layer_scale": "layer_scale_initial_scale", "context": "sliding_window",
        "max_period": "rope_theta", "dim_feedforward": "intermediate_size",
    },
}  # fmt: skip


#: Keys that follow from others, or that have a default.
_DERIVED = frozenset(
    {
        "seanet.true_skip", "quantizer.input_dimension", "quantizer.output_dimension",
        "transformer.d_model", "transformer.input_dimension", "transformer.output_dimensions",
        "transformer.kv_repeat",
    }
)  # fmt: skip


def config_from_kyutai(raw: Mapping[str, Any], where: str = CONFIG_NAME) -> MimiConfig:
    """Our config from a Kyutai one (the dict that ``moshi``'s loader takes).

    Raises:
      ConfigError: a key that is unknown, or a setting this codec does not have.
    """
    values: dict[str, Any] = {}
    for section in _FIELDS:
        part = raw if not section else raw.get(section)
        if not isinstance(part, Mapping):
            raise ConfigError(f"{where}: missing section {section!r}")
        # Nothing has a default here: `moshi`'s own differ from those of the published codec.
        missing = [key for key in (*_FIELDS[section], *_FIXED[section]) if key not in part]
        if missing and missing != ["n_q_semantic"]:
            raise ConfigError(
                f"{where}: missing field {'.'.join(filter(None, (section, missing[0])))!r}"
            )
        for key, value in part.items():
            name = f"{section}.{key}" if section else key
            if key in _FIELDS[section]:
                values[_FIELDS[section][key]] = float(value) if key == "max_period" else value
            elif key in _FIXED[section]:
                if value != _FIXED[section][key]:
                    raise ConfigError(
                        f"{where}: {name}: only {_FIXED[section][key]!r} is supported, "
                        f"got {value!r}"
                    )
            elif name not in _DERIVED and not (section == "" and key in _FIELDS):
                raise ConfigError(f"{where}: unknown key {name!r}")
    width = values["hidden_size"]
    heads = values["num_attention_heads"]
    transformer, quantizer = raw["transformer"], raw["quantizer"]
    same_width = {
        "transformer.d_model": transformer.get("d_model", width),
        "transformer.input_dimension": transformer.get("input_dimension", width),
        "transformer.output_dimensions": transformer.get("output_dimensions", [width]),
        "quantizer.input_dimension": quantizer.get("input_dimension", width),
        "quantizer.output_dimension": quantizer.get("output_dimension", width),
    }
    for name, value in same_width.items():
        if value not in (width, [width], (width,)):
            raise ConfigError(f"{where}: {name}: must equal seanet.dimension {width}, got {value}")
    values["use_conv_shortcut"] = not raw["seanet"].get("true_skip", True)
    values["codebook_dim"] = values["vector_quantization_hidden_dimension"]
    values["num_key_value_heads"] = heads // transformer.get("kv_repeat", 1)
    values["upsample_groups"] = width  # `moshi` always upsamples channel by channel
    values["model_type"], values["architectures"] = "mimi", ["MimiModel"]
    return load_mimi_config(values)


def config_to_kyutai(config: MimiConfig) -> dict[str, Any]:
    """The Kyutai form of a config, complete enough for ``moshi``'s loader.

    Raises:
      ConfigError: a setting that layout cannot express.
    """
    width = config.hidden_size
    for field, value, only in (
        ("norm_eps", config.norm_eps, 1e-5),
        ("upsample_groups", config.upsample_groups, width),
        ("head_dim", config.attention_head_dim, width // config.num_attention_heads),
    ):
        if value != only:
            raise ConfigError(f"{field}: Kyutai's layout knows only {only}, got {value}")
    raw: dict[str, Any] = {**_FIXED[""]}
    for section, names in _FIELDS.items():
        part = raw if not section else raw.setdefault(section, {**_FIXED[section]})
        for key, field in names.items():
            value = getattr(config, field)
            part[key] = list(value) if isinstance(value, tuple) else value
    raw["frame_rate"] = config.frames_per_second
    raw["seanet"]["true_skip"] = not config.use_conv_shortcut
    raw["quantizer"] |= {"input_dimension": width, "output_dimension": width}
    raw["transformer"] |= {
        "d_model": width, "input_dimension": width, "output_dimensions": [width],
        "kv_repeat": config.num_attention_heads // config.num_key_value_heads,
    }  # fmt: skip
    return raw
