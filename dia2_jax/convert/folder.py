"""What a local Dia2 folder itself holds, and so what a conversion must rewrite or carry along.

The same precedence as :func:`dia2_jax.hub.resolve`, without the hub: a part that is named by
repository id stays a name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dia2_jax import hub
from dia2_jax.config import Dia2Config, load_dia2_config
from dia2_jax.errors import CheckpointError


@dataclass(frozen=True)
class Dia2Folder:
    """Parts of a model, each a place below the folder.

    Attributes:
      manifest: what ``dia2_assets.json`` names.
      config: the config.
      weights: a safetensors file, an index of shards, or an Orbax folder.
      tokenizer: ``tokenizer.json``; None where a repository holds it, or nothing does.
      mimi: folder or weights file of the codec; None where a repository holds it.
    """

    manifest: Mapping[str, str]
    config: Path
    weights: Path
    tokenizer: Path | None
    mimi: Path | None


def read_dia2_folder(source: Path) -> tuple[Dia2Folder, Dia2Config]:
    """Find the parts of the model in `source`, and read its config.

    Raises:
      CheckpointError: no weights, or a part that lies elsewhere on this machine: a copy of the
        folder could not hold it at the same place.
      ConfigError: a manifest or config that cannot be read.
      HubError: a named part that is missing.
    """
    manifest = hub.read_manifest(_file(source, hub.MANIFEST))
    for key in ("config", "weights"):
        if key in manifest:
            _check_inside(source, hub.MANIFEST, key, manifest[key])
    config = hub.local_file(source, manifest.get("config", hub.CONFIG))
    content = load_dia2_config(config)
    weights = hub.find_weights(source)
    if "weights" in manifest:
        weights = hub.local_file(source, manifest["weights"])
    if weights is None:
        raise CheckpointError(f"{source}: holds no {hub.WEIGHTS}; {config.name} alone is no model")
    assets = content.assets
    tokenizer = _file(source, hub.TOKENIZER)
    if "tokenizer" in manifest:
        tokenizer = _named(source, hub.MANIFEST, "tokenizer", manifest["tokenizer"])
    elif tokenizer is None and assets is not None and assets.tokenizer:
        tokenizer = _named(source, config.name, "tokenizer", assets.tokenizer)
    if tokenizer is not None and tokenizer.is_dir():
        tokenizer = hub.local_file(tokenizer, hub.TOKENIZER)
    # A codec that a named repository outranks is kept all the same: nothing is lost on the way.
    mimi = source / "mimi" if hub.holds_codec(source / "mimi") else None
    if "mimi" in manifest:
        mimi = _named(source, hub.MANIFEST, "mimi", manifest["mimi"]) or mimi
    elif assets is not None and assets.mimi:
        mimi = _named(source, config.name, "mimi", assets.mimi) or mimi
    return Dia2Folder(manifest, config, weights, tokenizer, mimi), content


def _named(source: Path, where: str, key: str, name: str) -> Path | None:
    """What the file `where` means by `name`: part of `source`; None for a repository id."""
    if not (source / name).exists() and hub.is_repository_id(name):
        return None
    _check_inside(source, where, key, name)
    found = hub.local_place(source, name, key)
    if found != source / name:  # such as a folder of the working directory
        raise _outside(source, where, key, name, found or source / name)
    return found


def _check_inside(source: Path, where: str, key: str, name: str) -> None:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise _outside(source, where, key, name, source / name)


def _outside(source: Path, where: str, key: str, name: str, found: Path) -> CheckpointError:
    place = key if found.is_dir() else f"{key}/{found.name}"
    return CheckpointError(
        f"{source / where}: {key} {name!r} lies outside the folder, and the converted folder "
        f'would not be whole; copy it to {source / place} and say "{key}": "{place}" in '
        f"{hub.MANIFEST}"
    )


def _file(source: Path, name: str) -> Path | None:
    return source / name if (source / name).is_file() else None
