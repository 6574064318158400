"""What is measured: models by name or folder, random weights where none are given, and their cost.

Random weights cost what trained ones cost: no time depends on their values as long as these are
of ordinary size, so they are drawn to keep activations near 1.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dia2_jax import hub
from dia2_jax.config import (
    Dia2Config,
    MimiConfig,
    config_to_dict,
    load_dia2_config,
    load_mimi_config,
)
from eval.latency_process import MeasurementError

CONFIGS = Path(__file__).parent.parent / "configs"


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
      name: as it was asked for.
      folder: the checkpoint, or None for random weights of the shape ``configs/NAME.yaml``.
    """

    name: str
    folder: Path | None

    @classmethod
    def of(cls, name_or_folder: str) -> Source:
        """
        Raises:
          MeasurementError: neither a folder nor a name in configs/ nor the package's model.
          HubError: the package's model is not whole.
        """
        if name_or_folder == hub.NANO:
            return cls(name_or_folder, hub.resolve(hub.NANO).config.parent)
        path = Path(name_or_folder)
        if _yaml(name_or_folder).is_file():
            return cls(name_or_folder, None)
        if name_or_folder and path.is_dir():
            return cls(name_or_folder, path)
        names = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.yaml")))
        raise MeasurementError(
            f"--config {name_or_folder}: neither a checkpoint folder nor a shape in configs/; "
            f"shapes are {names}"
        )

    def dia2_config(self) -> Dia2Config:
        """The model's config."""
        if self.folder is not None:
            return load_dia2_config(hub.resolve(self.folder).config)
        raw = _read(self.name)
        if "data" not in raw:
            raise MeasurementError(
                f"--config {self.name}: a codec's shape; add --codec, or name a Dia2 shape"
            )
        return load_dia2_config(raw)

    def mimi_config(self) -> MimiConfig:
        """The config of the codec itself, or of the codec that goes with a Dia2 shape.

        Of random weights only; a folder's codec comes with its config.
        """
        assert self.folder is None
        raw = _read(self.name)
        if "data" in raw:
            own = f"mimi_{self.name}"
            raw = _read(own if _yaml(own).is_file() else "mimi")
        return load_mimi_config(raw)

    def mimi_files(self) -> hub.MimiFiles:
        """Files of the codec of a folder, which is a codec's own or a model's."""
        assert self.folder is not None
        config = self.folder / hub.CONFIG
        if config.is_file() and "data" in json.loads(config.read_text(encoding="utf-8")):
            return hub.resolve(self.folder).mimi
        return hub.resolve_mimi(self.folder)


def write_config(config: Dia2Config | MimiConfig, path: Path) -> Path:
    """The config as a published ``config.json``."""
    path.write_text(json.dumps(config_to_dict(config), indent=2), encoding="utf-8")
    return path


def _yaml(name: str) -> Path:
    return CONFIGS / f"{name}.yaml"


def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(_yaml(name).read_text(encoding="utf-8"))
    return content


def random_params(abstract: Any, seed: int = 0) -> Any:
    """Weights for every leaf of an abstract parameter tree.

    Matrices ``[out, ...]``, and transposed convolutions ``[stride, out, ...]``, are uniform with
    variance 1 / fan-in, scales and counts are 1, biases 0. int8 weights are such matrices, rounded.
    """
    import jax.numpy as jnp
    import numpy as np

    from dia2_jax import checkpoint
    from dia2_jax.nn.quantized import SCALE_SUFFIX, quantize

    leaves, structure = checkpoint.flatten_tree(abstract)
    generator = np.random.default_rng(seed)
    made: dict[str, Any] = {}
    for name, leaf in leaves.items():
        if name in made:  # the scale of an int8 weight
            continue
        if len(leaf.shape) <= 1:
            value = np.full(leaf.shape, 0.0 if name.endswith("bias") else 1.0, np.float32)
        else:
            fan_in = np.prod(leaf.shape[2 if len(leaf.shape) == 4 else 1 :])
            value = generator.random(leaf.shape, np.float32)
            value -= 0.5
            value *= (12.0 / float(fan_in)) ** 0.5
        if leaf.dtype == jnp.int8:
            value, scale = quantize(value)
            made[name + SCALE_SUFFIX] = jnp.asarray(scale)
        made[name] = jnp.asarray(value, leaf.dtype)
    return checkpoint.unflatten_tree(structure, made)


def synthetic_tokenizer(config: Dia2Config) -> Any:
    """A tokenizer of one word, for models that come without one."""
    import tokenizers

    from dia2_jax.text.tokenizer import Tokenizer

    data = config.data
    special = {data.text_pad_token_id, data.text_new_word_token_id, data.text_zero_token_id, 1}
    word = next(i for i in range(data.text_vocab_size) if i not in special)
    model = tokenizers.models.WordLevel({"word": word}, unk_token="word")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return Tokenizer(backend, data)


def frame_weight_bytes(config: Dia2Config, params: Any) -> int:
    """Bytes of weights that one frame multiplies by; see :func:`frame_weights`."""
    return sum(frame_weights(config, params).values())


def frame_weights(config: Dia2Config, params: Any) -> dict[str, int]:
    """Bytes of weights that one frame multiplies by, each matrix once for every time it does.

    The decoder's matrices count once. In the depformer, MLPs count once a stage, attention once a
    stage of their weight set, and each stage has its own output head. What conditions the stages
    (``depformer_in``) counts once for each run of stages with one weight set. Embedding tables do
    not count: a frame reads a few rows of each.

    Args:
      config: the model's.
      params: arrays, or their abstract shapes.

    Returns:
      Bytes of ``decoder`` and ``depformer``.
    """
    from dia2_jax import checkpoint
    from dia2_jax.model.depformer import stage_runs

    stages = Counter(config.schedule)
    runs = Counter(run.weight_set for run in stage_runs(config.schedule))
    total = {"decoder": 0, "depformer": 0}
    for name, leaf in checkpoint.flatten_tree(params)[0].items():
        parts = name.split(".")
        if "audio_embeds" in parts or "embedding" in parts:
            times = 0
        elif name.startswith("depformer.depformer_in."):
            times = runs[int(parts[2])]
        elif {"in_proj", "out_proj"} & set(parts):
            times = stages[int(parts[-2])]
        elif name.startswith(("depformer.layers.", "depformer.norm.")):
            times = len(config.schedule)
        else:
            times = 1
        part = "depformer" if parts[0] == "depformer" else "decoder"
        total[part] += times * leaf.size * leaf.dtype.itemsize
    return total


def frame_cache_bytes(
    config: Dia2Config,
    position: int,
    itemsize: int = 4,
    *,
    int8: bool = False,
    blocks: bool = True,
) -> int:
    """Bytes of decoder cache that the frame at ``position`` reads, for both guidance rows.

    XLA reads whole blocks up to the one that holds the position, a kernel (not ``blocks``) as many
    slots as there are; of an int8 cache with its scales.
    """
    from dia2_jax.nn import attention, int8_cache

    shape = config.model.decoder
    block = (int8_cache.BLOCK if int8 else attention.BLOCK) if blocks else 1
    slots = -(-(position + 1) // block) * block
    a_slot = shape.gqa_head_dim + 4 if int8 else shape.gqa_head_dim * itemsize
    return 2 * 2 * shape.n_layer * slots * shape.kv_heads * a_slot
