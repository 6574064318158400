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
from dia2_jax.nn.quantized import SCALE_SUFFIX


def load_dia2(
    config: Dia2Config,
    weights: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = None,
    int8: bool = False,
) -> tuple[Dia2Model, SourceInfo]:
    """The Dia2 network of `config` with the weights of a published file or Orbax folder.

    Args:
      config: of these weights.
      weights: a safetensors file, an index of shards, a folder with one, or an Orbax folder.
      dtype: compute dtype.
      param_dtype: dtype of the weights in memory; `dtype` by default.
      int8: hold linear maps as int8, rounded tensor by tensor while they are read unless they
        are stored so.

    Raises:
      CheckpointError: unreadable weights, or weights that are not of this config; int8 weights
        without `int8`.
    """
    held = dtype if param_dtype is None else param_dtype
    graphdef, abstract = abstract_dia2(config, dtype=dtype, param_dtype=held, int8=int8)
    params, source = load_weights(weights, dia2_table(weights, int8=int8), abstract)
    return nnx.merge(graphdef, params), source


def holds_int8(weights: str | Path) -> bool:
    """Whether Dia2 weights are stored as int8 (``dia2-jax convert --dtype int8``).

    Raises:
      CheckpointError: unreadable.
    """
    if checkpoint.is_orbax(weights):
        names: Collection[str] = checkpoint.stored_leaves(weights)
    else:
        names = open_safetensors(weights).specs
    return layout_of(names) == dia2.INT8_LAYOUT


def dia2_table(weights: str | Path, *, int8: bool) -> Table:
    """The table that Dia2 weights are to be read through.

    Raises:
      CheckpointError: unreadable; or they are int8 and wanted in floating point.
    """
    if not holds_int8(weights):
        return dia2.TABLE
    if not int8:
        raise CheckpointError(
            f"{weights}: holds int8 weights, and what rounding took of them is gone; load them "
            'with dtype="int8", or take the checkpoint that they were made from'
        )
    return dia2.INT8_TABLE


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
    int8: bool = False,
    remat: str = "none",
) -> tuple[nnx.GraphDef[Any], Any]:
    """Structure and abstract parameters of the Dia2 network."""
    return abstract_params(
        lambda rngs: Dia2Model(
            config, dtype=dtype, param_dtype=param_dtype, int8=int8, remat=remat, rngs=rngs
        )
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
        what = (
            "a Dia2 model"
            if layout in (dia2.LAYOUT, dia2.INT8_LAYOUT)
            else "neither layout of Mimi"
        )
        raise CheckpointError(
            f"{weights}: holds {what}; name the weights of kyutai/mimi, or a file in Kyutai's own "
            "layout"
        )
    return layout


def layout_of(names: Collection[str]) -> str | None:
    """The layout that tensor names belong to, by what only one of them uses."""
    if any(name.startswith(("transformer.", "depformer.")) for name in names):
        scaled = any(name.endswith("weight" + SCALE_SUFFIX) for name in names)
        return dia2.INT8_LAYOUT if scaled else dia2.LAYOUT
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
