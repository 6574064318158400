"""Where the files of a checkpoint are: the package, local folders, repositories of the hub.

A model is a config, weights, a tokenizer and a codec (Mimi), which may be spread over folders
and repositories. :func:`resolve` finds all of them or says which file is missing, how to
download it and where to put it.

The name ``nano`` means the model that is installed with the package, and ``./nano`` a folder of
that name.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dia2_jax.errors import ConfigError, HubError, suggest
from dia2_jax.sources import (
    CONFIG,
    DEFAULT_MIMI,
    INDEX,
    KYUTAI_CONFIG,
    MIMI_FILES,
    MODEL_FILES,
    ORBAX,
    TOKENIZER,
    TOKENIZER_EXTRAS,
    WEIGHTS,
    Folder,
    Repository,
    find_home,
    find_weights,
    is_repository_id,
    read_json,
    shards,
)

__all__ = [
    "CONFIG", "DEFAULT_MIMI", "GENERATION", "INDEX", "KYUTAI_CONFIG", "MANIFEST", "MANIFEST_KEYS",
    "MIMI_FILES", "NANO", "NANO_FILES", "ORBAX", "TOKENIZER", "TOKENIZER_EXTRAS", "WEIGHTS",
    "MimiFiles", "ModelFiles", "find_weights", "holds_codec", "is_repository_id", "local_file",
    "local_place", "nano_folder", "read_manifest", "resolve", "resolve_mimi", "shards",
]  # fmt: skip

#: A model's own generation settings, beside its config
#: (:mod:`dia2_jax.generation.defaults` reads it).
GENERATION = "dia2_generation.json"
#: The model inside the package.
NANO = "nano"
#: What it cannot be without.
NANO_FILES = (
    CONFIG, WEIGHTS, TOKENIZER, GENERATION, "mimi/config.json", "mimi/model.safetensors",
)  # fmt: skip
MANIFEST = "dia2_assets.json"
MANIFEST_KEYS = ("config", "weights", "tokenizer", "mimi")


@dataclass(frozen=True)
class MimiFiles:
    """Files of a codec.

    Attributes:
      weights: a safetensors file, an index of shards, or an Orbax folder.
      config: ``config.json`` or ``mimi_config.json``; None where weights came alone, as Kyutai's.
    """

    weights: Path
    config: Path | None


@dataclass(frozen=True)
class ModelFiles:
    """Files of a model.

    Attributes:
      name: the folder or repository that was asked for.
      config: its ``config.json``.
      weights: a safetensors file, an index of shards (which lie beside it), or an Orbax folder.
      tokenizer: its ``tokenizer.json``; what else there is of the tokenizer lies beside it.
      mimi: the codec.
      generation: its ``dia2_generation.json``; None where it has none.
    """

    name: str
    config: Path
    weights: Path
    tokenizer: Path
    mimi: MimiFiles
    generation: Path | None = None


def resolve(
    path_or_repo: str | Path | None = None,
    *,
    mimi: str | Path | None = None,
    revision: str | None = None,
) -> ModelFiles:
    """Find, and download where needed, every file of a model.

    ``nano`` is the model inside the package. Of other names a local folder comes first; what is
    none and reads ``owner/name`` is a hub repository. ``dia2_generation.json`` is optional.
    ``dia2_assets.json`` may name other files (``config``, ``weights``) and other places
    (``tokenizer``, ``mimi``). The codec is the first of: the argument, the manifest,
    ``assets.mimi`` of the config, a ``mimi`` folder of the model, ``kyutai/mimi``.

    Args:
      path_or_repo: ``nano``, a folder or a repository id; None means ``nano``, too.
      mimi: folder, safetensors file or repository id of another codec, or ``nano``.
      revision: branch, tag or commit of the model's repository.

    Raises:
      HubError: names the missing file, how to download it, and where to put it; or the string
        ``nano`` was given where there is also a model in a folder ``./nano``.
      ConfigError: ``dia2_assets.json`` says something that nobody understands.
    """
    home: Folder | Repository
    if path_or_repo is None or _means_nano(path_or_repo):
        path_or_repo, home = NANO, _nano()
    else:
        home = find_home(path_or_repo, revision, "model")
    manifest = read_manifest(home.optional(MANIFEST))
    config = home.required(manifest.get("config") or CONFIG)
    content = read_json(config)
    assets = content.get("assets")
    assets = assets if isinstance(assets, Mapping) else {}
    weights = _weights(home, manifest.get("weights"))
    tokenizer = _tokenizer(home, manifest.get("tokenizer"), assets.get("tokenizer"))
    if mimi is not None:
        codec = resolve_mimi(mimi)
    elif manifest.get("mimi"):
        codec = _named_mimi(home, manifest["mimi"])
    elif assets.get("mimi"):
        codec = _named_mimi(home, assets["mimi"])
    elif (own := home.part("mimi")) is not None and _holds_codec(own):
        codec = _mimi_files(own)
    else:
        codec = _mimi_files(Repository(DEFAULT_MIMI, None, put=home.place_for("mimi")))
    generation = home.optional(GENERATION)
    return ModelFiles(str(path_or_repo), config, weights, tokenizer, codec, generation)


def resolve_mimi(path_or_repo: str | Path, *, revision: str | None = None) -> MimiFiles:
    """Find the files of a codec: a folder, a safetensors file, a hub repository, or ``nano``.

    Raises:
      HubError: as :func:`resolve`.
    """
    if _means_nano(path_or_repo):
        return _mimi_files(Folder(_nano().path / "mimi", MIMI_FILES))
    path = Path(path_or_repo)
    if path.is_file():
        return MimiFiles(path, _config_beside(path))
    return _mimi_files(find_home(path_or_repo, revision, "mimi"))


def nano_folder() -> Path:
    """Where the package keeps the model ``nano``."""
    return Path(str(importlib.resources.files("dia2_jax"))) / NANO


def _means_nano(name: str | Path) -> bool:
    """Whether a user means the package's model. A `Path` is always a place.

    Raises:
      HubError: it could be a folder as well: neither may win unnoticed.
    """
    if name != NANO:
        return False
    beside = Path(NANO)
    if (beside / CONFIG).is_file() and beside.resolve() != nano_folder().resolve():
        raise HubError(
            "'nano' is the model inside the package, and there is a model in the folder nano here "
            "as well: write ./nano for the folder; for the package's, name no model at all, or "
            "work in another folder"
        )
    return True


def _nano() -> Folder:
    folder = nano_folder()
    missing = [name for name in NANO_FILES if not (folder / name).is_file()]
    if missing:
        raise HubError(
            f"the model nano, which is installed with dia2-jax, is not whole: {folder} lacks "
            f"{', '.join(missing)}. Install dia2-jax again, or name another model: a folder in "
            "the published layout, or a repository such as nari-labs/Dia2-1B"
        )
    return Folder(folder, NANO_FILES)


def read_manifest(path: Path | None) -> dict[str, str]:
    """What a ``dia2_assets.json`` names, without its nulls; nothing where there is no file.

    Raises:
      HubError: it is not a JSON object.
      ConfigError: a key that nobody reads, or a value that is no string.
    """
    manifest = read_json(path)
    for key, value in manifest.items():
        if key not in MANIFEST_KEYS:
            hint = suggest(key, MANIFEST_KEYS)
            raise ConfigError(
                f"{path}: unknown key {key!r}{hint}; known: {', '.join(MANIFEST_KEYS)}"
            )
        if not isinstance(value, str | None) or value == "":
            raise ConfigError(f"{path}: {key}: must be a string, got {json.dumps(value)[:80]}")
    return {key: value for key, value in manifest.items() if value is not None}


def local_place(folder: Path, name: str, kind: str) -> Path | None:
    """The file or folder that a manifest or config in `folder` means by `name`.

    None where it means a repository; the hub is not asked.

    Raises:
      HubError: `name` is neither.
    """
    place = _named(Folder(folder, MODEL_FILES[:3]), name, kind, CONFIG)
    if isinstance(place, Repository):
        return None
    return place if isinstance(place, Path) else place.path


def local_file(folder: Path, name: str) -> Path:
    """The file `name` of a model's folder; an index only with all its shards.

    Raises:
      HubError: names the file that is missing.
    """
    return _weights(Folder(folder, MODEL_FILES[:3]), name)


def holds_codec(folder: Path) -> bool:
    """Whether :func:`resolve` would take `folder` for the codec of the model around it."""
    return folder.is_dir() and _holds_codec(Folder(folder, MIMI_FILES))


def _weights(home: Folder | Repository, named: str | None) -> Path:
    if named:
        file = home.required(named)
        if named.endswith(".index.json"):
            for shard in shards(file):
                home.required(str(Path(named).parent / shard) if "/" in named else shard)
        return file
    found = home.weights()
    return home.required(WEIGHTS) if found is None else found


def _tokenizer(home: Folder | Repository, named: str | None, fallback: Any) -> Path:
    if named:
        return _tokenizer_at(_named(home, named, "tokenizer", TOKENIZER))
    if home.optional(TOKENIZER) is None and isinstance(fallback, str) and fallback:
        return _tokenizer_at(_named(home, fallback, "tokenizer", TOKENIZER))
    return _tokenizer_at(home)


def _tokenizer_at(place: Folder | Repository | Path) -> Path:
    if isinstance(place, Path):
        return place
    for name in TOKENIZER_EXTRAS:
        place.optional(name)
    return place.required(TOKENIZER)


def _named_mimi(home: Folder | Repository, name: Any) -> MimiFiles:
    if not isinstance(name, str):
        raise ConfigError(f"{home}: assets.mimi must be a folder or a repository id")
    place = _named(home, name, "mimi", CONFIG)
    return resolve_mimi(place) if isinstance(place, Path) else _mimi_files(place)


def _named(
    home: Folder | Repository, name: str, kind: str, probe: str
) -> Folder | Repository | Path:
    """What a manifest or config means by `name`: part of the model, a local path, a repository.

    A file comes back as its path.
    """
    inside = name.removeprefix("./").rstrip("/")
    if isinstance(home, Folder) and (home.place_for(inside) or Path()).is_file():
        return home.required(inside)
    part = home.part(inside)
    if part is not None and (isinstance(part, Folder) or part.optional(probe) is not None):
        return part
    return find_home(name, None, kind)


def _config_beside(weights: Path) -> Path | None:
    """The codec's config next to a weights file. Kyutai publishes the file in repositories of
    language models, so a ``config.json`` there may well be of something else."""
    own, other = weights.parent / KYUTAI_CONFIG, weights.parent / CONFIG
    if own.is_file():
        return own
    return other if other.is_file() and read_json(other).get("model_type") == "mimi" else None


def _holds_codec(place: Folder | Repository) -> bool:
    if isinstance(place, Repository):
        return place.optional(CONFIG) is not None
    return any(place.optional(name) for name in (CONFIG, KYUTAI_CONFIG)) or bool(place.weights())


def _mimi_files(place: Folder | Repository) -> MimiFiles:
    weights = place.weights()
    config = place.optional(CONFIG) or place.optional(KYUTAI_CONFIG)
    if weights is None:
        weights = place.required(WEIGHTS)
    if config is None and isinstance(place, Repository):
        config = place.required(CONFIG)
    return MimiFiles(weights, config)
