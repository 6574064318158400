"""The model that training begins with: its files, its shape, its weights placed on a mesh."""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dia2_jax import checkpoint, hub
from dia2_jax.config import Dia2Config, config_to_dict, load_dia2_config
from dia2_jax.convert import dia2
from dia2_jax.convert.load import SourceInfo, export_params, load_weights
from dia2_jax.convert.models import abstract_dia2
from dia2_jax.convert.safetensors_io import dtype_name, open_safetensors
from dia2_jax.errors import HubError
from dia2_jax.text.tokenizer import Tokenizer
from dia2_jax.typing import Array
from train.dia2_config import ModelSource
from train.shapes import read_shape_file

#: Standard deviation of fresh embedding tables.
_EMBEDDING_SCALE = 0.02
#: Standard deviation of a normal distribution cut off at two of them.
_TRUNCATED = 0.87962566


@dataclass(frozen=True)
class StartingPoint:
    """Everything of a model but its weights.

    Attributes:
      config: the model's.
      tokenizer, tokenizer_file: of the model.
      weights: file or Orbax folder; None for random weights.
      mimi: the codec's files; None where it could not be found (no samples, export without it).
      config_file: the published ``config.json`` that is exported verbatim; None for YAML shapes.
    """

    config: Dia2Config
    tokenizer: Tokenizer
    tokenizer_file: Path
    weights: Path | None
    mimi: hub.MimiFiles | None
    config_file: Path | None


def find_start(source: ModelSource) -> StartingPoint:
    """The files that a training configuration names.

    Raises:
      ConfigError, HubError, CheckpointError: naming what is missing or malformed.
    """
    if source.start is not None:
        files = hub.resolve(source.start, mimi=source.codec)
        config = load_dia2_config(files.config)
        tokenizer_file = files.tokenizer
        if source.tokenizer is not None:
            tokenizer_file = _tokenizer_file(source.tokenizer)
        tokenizer = Tokenizer.from_file(tokenizer_file, config.data)
        return StartingPoint(
            config, tokenizer, tokenizer_file, files.weights, files.mimi, files.config
        )
    assert source.config is not None and source.tokenizer is not None
    config = read_shape_file(Path(source.config), load_dia2_config, "model.config")
    tokenizer_file = _tokenizer_file(source.tokenizer)
    tokenizer = Tokenizer.from_file(tokenizer_file, config.data)
    mimi = None
    if source.codec is not None:
        mimi = hub.resolve_mimi(source.codec)
    return StartingPoint(config, tokenizer, tokenizer_file, None, mimi, None)


def initial_params(
    start: StartingPoint, abstract: Mapping[str, jax.ShapeDtypeStruct], seed: int
) -> dict[str, Array]:
    """The weights, as a flat dict with the dtypes and shardings of ``abstract``.

    Random ones are a function of the seed and each parameter's own path: linear maps truncated
    normal of variance 1 / fan-in, tables normal, norms one.

    Raises:
      CheckpointError: weights that do not fit the config.
    """
    if start.weights is not None:
        # A flat dict is a tree, too: its dotted names are the parameters'.
        params, _ = load_weights(start.weights, dia2.TABLE, dict(abstract))
        return dict(params)

    # Drawn by numpy: random numbers of every shape take XLA seconds to minutes to compile.
    def place(path: str, leaf: jax.ShapeDtypeStruct) -> Array:
        values = fresh_param(path, leaf, seed)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda part: values[part])

    return {path: place(path, leaf) for path, leaf in abstract.items()}


def source_of(weights: Path | None) -> SourceInfo | None:
    """What the published file said beyond its values, without reading them."""
    if weights is None:
        return None
    if checkpoint.is_orbax(weights):
        document = checkpoint.read_metadata(weights)["source"]
        return SourceInfo.from_json(document)
    file = open_safetensors(weights)
    dtypes = {name: dtype_name(spec.dtype) for name, spec in file.specs.items()}
    return SourceInfo(dia2.LAYOUT, dtypes, file.metadata)


@contextmanager
def export_model(start: StartingPoint, params: Mapping[str, Any], folder: Path) -> Iterator[Path]:
    """Write a folder in the published layout, whole or not at all; an older one is replaced.

    The context is the folder before it gets its name, for what else belongs into it.

    ``params`` are float32; a checkpoint that began as bfloat16 is exported as float32, since its
    masters have moved on.
    """
    _, abstract = abstract_dia2(start.config)
    _, treedef = checkpoint.flatten_tree(abstract)
    tree = checkpoint.unflatten_tree(treedef, dict(params))
    info = source_of(start.weights)
    if start.config_file is not None:
        raw = json.loads(start.config_file.read_text(encoding="utf-8"))
    else:
        raw = config_to_dict(start.config)
    if isinstance(raw.get("assets"), dict):
        # They are in the folder now, wherever they came from.
        raw["assets"] |= {"tokenizer": None} | ({} if start.mimi is None else {"mimi": None})
    with checkpoint.staged_folder(folder) as staged:
        export_params(tree, dia2.TABLE, staged / hub.WEIGHTS, info, dtype=jnp.float32)
        if start.mimi is not None:
            _copy_codec(start.mimi, staged / "mimi")
        (staged / hub.CONFIG).write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
        for name in (hub.TOKENIZER, *hub.TOKENIZER_EXTRAS, "vocab.json", "merges.txt"):
            beside = start.tokenizer_file.parent / name
            if beside.is_file():
                shutil.copyfile(beside, staged / name)
        yield staged


def _copy_codec(mimi: hub.MimiFiles, target: Path) -> None:
    target.mkdir()
    if mimi.config is not None:
        shutil.copyfile(mimi.config, target / mimi.config.name)
    if mimi.weights.is_dir():
        shutil.copytree(mimi.weights, target / mimi.weights.name)
    else:
        shutil.copyfile(mimi.weights, target / mimi.weights.name)


def fresh_param(path: str, leaf: jax.ShapeDtypeStruct, seed: int) -> np.ndarray:
    """Random values of a parameter: a function of the seed and its path."""
    if len(leaf.shape) == 1:
        return np.ones(leaf.shape, leaf.dtype)
    stream = np.random.SeedSequence([seed, zlib.crc32(path.encode())])
    rng = np.random.default_rng(stream)
    values = rng.standard_normal(math.prod(leaf.shape), np.float32)
    if fnmatchcase(path, "*embed*.weight") and not path.endswith("_proj.weight"):
        values *= _EMBEDDING_SCALE
    else:
        while (outside := np.flatnonzero(np.abs(values) > 2)).size:
            values[outside] = rng.standard_normal(outside.size, np.float32)
        values *= 1 / (_TRUNCATED * math.sqrt(leaf.shape[1]))
    return values.reshape(leaf.shape).astype(leaf.dtype, copy=False)


def _tokenizer_file(name: str) -> Path:
    path = Path(name)
    path = path / hub.TOKENIZER if path.is_dir() else path
    if not path.is_file():
        raise HubError(f"no tokenizer at {path}: model.tokenizer names a folder that holds one")
    return path
