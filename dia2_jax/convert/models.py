"""Models with their weights in: the config, the right table, and a module that was never
initialised at random.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from dia2_jax import checkpoint
from dia2_jax.config import Dia2Config, MimiConfig, load_mimi_config
from dia2_jax.convert import dia2, mimi_hf, mimi_kyutai
from dia2_jax.convert.load import SourceInfo, abstract_params, load_weights
from dia2_jax.convert.rules import Table
from dia2_jax.convert.safetensors_io import open_safetensors
from dia2_jax.errors import CheckpointError, ConfigError
from dia2_jax.hub import MimiFiles
from dia2_jax.mimi.codec import Mimi
from dia2_jax.model.dia2 import Dia2Model


def load_dia2(
    config: Dia2Config,
    weights: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = None,
) -> tuple[Dia2Model, SourceInfo]:
    """The Dia2 network of `config` with the weights of a published file or Orbax folder.

    Args:
      config: of these weights.
      weights: a safetensors file, an index of shards, a folder with one, or an Orbax folder.
      dtype: compute dtype.
      param_dtype: dtype of the weights in memory; `dtype` by default.

    Raises:
      CheckpointError: unreadable weights, or weights that are not of this config.
    """
    held = dtype if param_dtype is None else param_dtype
    graphdef, abstract = abstract_dia2(config, dtype=dtype, param_dtype=held)
    params, source = load_weights(weights, dia2.TABLE, abstract)
    return nnx.merge(graphdef, params), source


def load_mimi(
    files: MimiFiles, *, param_dtype: DTypeLike = jnp.float32
) -> tuple[Mimi, MimiConfig, SourceInfo]:
    """The codec of `files`, in either published layout or from an Orbax folder.

    Raises:
      CheckpointError: unreadable weights, or weights that are not of this config.
      ConfigError: an unreadable config.
    """
    layout = mimi_layout(files.weights)
    config = read_mimi_config(files.config)
    graphdef, abstract = abstract_mimi(config, param_dtype=param_dtype)
    params, source = load_weights(files.weights, mimi_table(layout, config), abstract)
    return nnx.merge(graphdef, params), config, source


def abstract_dia2(
    config: Dia2Config,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    remat: str = "none",
) -> tuple[nnx.GraphDef[Any], Any]:
    """Structure and abstract parameters of the Dia2 network."""
    return abstract_params(
        lambda rngs: Dia2Model(config, dtype=dtype, param_dtype=param_dtype, remat=remat, rngs=rngs)
    )


def abstract_mimi(
    config: MimiConfig, *, param_dtype: DTypeLike = jnp.float32
) -> tuple[nnx.GraphDef[Any], Any]:
    """Structure and abstract parameters of the codec."""
    return abstract_params(lambda rngs: Mimi(config, param_dtype=param_dtype, rngs=rngs))


def mimi_table(layout: str, config: MimiConfig) -> Table:
    """The table of one of the two Mimi layouts, by its name."""
    makers = {mimi_hf.LAYOUT: mimi_hf.make_table, mimi_kyutai.LAYOUT: mimi_kyutai.make_table}
    return makers[layout](config)


def mimi_layout(weights: str | Path) -> str:
    """Which layout Mimi weights have, from their tensor names (or from Orbax's record).

    Raises:
      CheckpointError: unreadable, or neither layout.
    """
    if checkpoint.is_orbax(weights):
        source = checkpoint.read_metadata(weights).get("source")
        layout = source.get("layout") if isinstance(source, dict) else None
    else:
        layout = layout_of(open_safetensors(weights).specs)
    if layout not in (mimi_hf.LAYOUT, mimi_kyutai.LAYOUT):
        what = "a Dia2 model" if layout == dia2.LAYOUT else "neither layout of Mimi"
        raise CheckpointError(
            f"{weights}: holds {what}; name the weights of kyutai/mimi, or a file in Kyutai's own "
            "layout"
        )
    return layout


def layout_of(names: Collection[str]) -> str | None:
    """The layout that tensor names belong to, by what only one of them uses."""
    if any(name.startswith(("transformer.", "depformer.")) for name in names):
        return dia2.LAYOUT
    if any(name.startswith(("encoder.model.", "quantizer.rvq_first.")) for name in names):
        return mimi_kyutai.LAYOUT
    if any(name.startswith(("encoder.layers.", "quantizer.semantic_")) for name in names):
        return mimi_hf.LAYOUT
    return None


def read_mimi_config(path: Path | None) -> MimiConfig:
    """A codec's config in either form; the published shape where there is no file.

    Raises:
      ConfigError: naming the file and the field.
    """
    if path is None:
        return MimiConfig()
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from None
    if isinstance(raw, dict) and "seanet" in raw:
        return mimi_kyutai.config_from_kyutai(raw, str(path))
    return load_mimi_config(path)
