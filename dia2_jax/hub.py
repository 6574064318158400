"""Where the files of a checkpoint are: a local folder, or a repository of the Hugging Face hub.

A model is a config, weights, a tokenizer and a codec (Mimi), which may be spread over folders
and repositories. :func:`resolve` finds all of them or says which file is missing, how to
download it and where to put it. `huggingface_hub` is imported only when a repository is asked.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dia2_jax.errors import ConfigError, HubError

DEFAULT_MIMI = "kyutai/mimi"
MANIFEST = "dia2_assets.json"
MANIFEST_KEYS = ("config", "weights", "tokenizer", "mimi")
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
#: Folder of weights that `dia2-jax convert --to orbax` writes in place of WEIGHTS.
ORBAX = "model.orbax"
TOKENIZER = "tokenizer.json"
#: What lies beside tokenizer.json and says more about it.
TOKENIZER_EXTRAS = ("tokenizer_config.json", "special_tokens_map.json")
#: The config beside Mimi weights in Kyutai's own layout.
KYUTAI_CONFIG = "mimi_config.json"

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


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
    """

    name: str
    config: Path
    weights: Path
    tokenizer: Path
    mimi: MimiFiles


def resolve(
    path_or_repo: str | Path,
    *,
    mimi: str | Path | None = None,
    revision: str | None = None,
) -> ModelFiles:
    """Find, and download where needed, every file of a model.

    A local folder comes first; what is none and reads ``owner/name`` is a hub repository.
    ``dia2_assets.json`` may name other files (``config``, ``weights``) and other places
    (``tokenizer``, ``mimi``). The codec is the first of: the argument, the manifest,
    ``assets.mimi`` of the config, a ``mimi`` folder of the model, ``kyutai/mimi``.

    Args:
      path_or_repo: folder or repository id.
      mimi: folder, safetensors file or repository id of another codec.
      revision: branch, tag or commit of the model's repository.

    Raises:
      HubError: names the missing file, how to download it, and where to put it.
      ConfigError: ``dia2_assets.json`` says something that nobody understands.
    """
    home = _home(path_or_repo, revision, "model")
    manifest = read_manifest(home.optional(MANIFEST))
    config = home.required(manifest.get("config") or CONFIG)
    content = _read_json(config)
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
        codec = _mimi_files(_Repository(DEFAULT_MIMI, None, put=home.place_for("mimi")))
    return ModelFiles(str(path_or_repo), config, weights, tokenizer, codec)


def resolve_mimi(path_or_repo: str | Path, *, revision: str | None = None) -> MimiFiles:
    """Find the files of a codec: a folder, a safetensors file, or a hub repository.

    Raises:
      HubError: names the missing file, how to download it, and where to put it.
    """
    path = Path(path_or_repo)
    if path.is_file():
        return MimiFiles(path, _config_beside(path))
    return _mimi_files(_home(path_or_repo, revision, "mimi"))


def read_manifest(path: Path | None) -> dict[str, str]:
    """What a ``dia2_assets.json`` names, without its nulls; nothing where there is no file.

    Raises:
      HubError: it is not a JSON object.
      ConfigError: a key that nobody reads, or a value that is no string.
    """
    manifest = _read_json(path)
    for key, value in manifest.items():
        if key not in MANIFEST_KEYS:
            close = difflib.get_close_matches(key, MANIFEST_KEYS, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
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
    place = _named(_Folder(folder, _MODEL_FILES[:3]), name, kind, CONFIG)
    if isinstance(place, _Repository):
        return None
    return place if isinstance(place, Path) else place.path


def local_file(folder: Path, name: str) -> Path:
    """The file `name` of a model's folder; an index only with all its shards.

    Raises:
      HubError: names the file that is missing.
    """
    return _weights(_Folder(folder, _MODEL_FILES[:3]), name)


def is_repository_id(name: str) -> bool:
    """Whether `name` reads ``owner/name``, and not like a path."""
    return name[:1] not in (".", "/", "~") and _REPOSITORY.fullmatch(name) is not None


def holds_codec(folder: Path) -> bool:
    """Whether :func:`resolve` would take `folder` for the codec of the model around it."""
    return folder.is_dir() and _holds_codec(_Folder(folder, _MIMI_FILES))


def shards(index: Path) -> list[str]:
    """Names of the files that an index of shards lists."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, Mapping):
        raise HubError(f"{index}: not an index of safetensors shards; download it again")
    return sorted(set(weight_map.values()))


def find_weights(folder: str | Path) -> Path | None:
    """The weights of a folder: ``model.safetensors``, else ``model.orbax``, else its only index
    of shards, else its only ``*.safetensors`` file; None where there is none, or a choice."""
    folder = Path(folder)
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    if (folder / ORBAX).is_dir():
        return folder / ORBAX
    found = sorted(folder.glob("*.safetensors.index.json")) or sorted(folder.glob("*.safetensors"))
    return found[0] if len(found) == 1 else None


class _Folder:
    """A local folder as a source of files."""

    def __init__(self, path: Path, wanted: Sequence[str]) -> None:
        self.path, self._wanted = path, wanted

    def __str__(self) -> str:
        return str(self.path)

    def optional(self, name: str) -> Path | None:
        file = self.path / name
        return file if file.is_file() or file.name == ORBAX and file.is_dir() else None

    def required(self, name: str) -> Path:
        found = self.optional(name)
        if found is None:
            raise HubError(
                f"{self.path}: {name} is missing. A model folder holds "
                f"{', '.join(self._wanted)}; copy the file there, or name another folder or a "
                "repository (owner/name)."
            )
        return found

    def weights(self) -> Path | None:
        return find_weights(self.path)

    def part(self, name: str) -> _Folder | _Repository | None:
        folder = self.path / name
        return _Folder(folder, _MIMI_FILES) if folder.is_dir() else None

    def place_for(self, name: str) -> Path | None:
        return self.path / name


class _Repository:
    """A hub repository (or a folder of one) as a source of files."""

    def __init__(
        self, repo: str, revision: str | None, folder: str = "", put: Path | None = None
    ) -> None:
        self._repo, self._revision, self._folder, self._put = repo, revision, folder, put
        # Why the hub was out of reach; then only the cache is asked: one half minute is enough.
        self._cut_off: BaseException | None = None

    def __str__(self) -> str:
        return "/".join(part for part in (self._repo, self._folder) if part)

    def optional(self, name: str) -> Path | None:
        """The downloaded file; None where the repository lacks it or, offline, the cache."""
        from huggingface_hub.errors import EntryNotFoundError

        try:
            return self._download(name)
        except EntryNotFoundError:
            return None

    def required(self, name: str) -> Path:
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            return self._download(name)
        except LocalEntryNotFoundError as error:
            raise HubError(self._unreachable(name, self._cut_off or error)) from error
        except EntryNotFoundError:
            raise HubError(
                f"the repository {self._repo} has no file {self._full(name)}"
                + (f" at revision {self._revision}" if self._revision else "")
                + ". Is it a repository of this kind of model?"
            ) from None

    def weights(self) -> Path | None:
        found = self.optional(WEIGHTS)
        if found is None and (found := self.optional(INDEX)) is not None:
            for shard in shards(found):
                self.required(shard)
        return found

    def part(self, name: str) -> _Folder | _Repository | None:
        found = _Repository(self._repo, self._revision, self._full(name), self._put)
        found._cut_off = self._cut_off
        return found

    def place_for(self, name: str) -> Path | None:
        return None

    def _full(self, name: str) -> str:
        return f"{self._folder}/{name}" if self._folder else name

    def _download(self, name: str) -> Path:
        import huggingface_hub
        from huggingface_hub import errors

        try:
            return Path(
                huggingface_hub.hf_hub_download(
                    self._repo,
                    self._full(name),
                    revision=self._revision,
                    local_files_only=self._cut_off is not None,
                )
            )
        except errors.LocalEntryNotFoundError as error:
            self._cut_off = self._cut_off or error
            raise
        except errors.EntryNotFoundError:
            raise
        except errors.GatedRepoError as error:
            raise HubError(
                f"{self._repo} asks for its conditions to be accepted: open its page on the hub, "
                "accept them, then run `hf auth login`"
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise HubError(
                f"there is no hub repository {self._repo} (nor a local folder of that name), or "
                "it is private. Check the spelling; for a private one run `hf auth login`."
            ) from error
        except errors.RevisionNotFoundError as error:
            raise HubError(f"{self._repo} has no revision {self._revision!r}") from error
        except errors.HFValidationError as error:
            raise HubError(f"{self._repo} is no repository id ({error})") from error
        except OSError as error:  # no network, a refused connection, a full disk
            self._cut_off = self._cut_off or error
            raise errors.LocalEntryNotFoundError(str(error)) from error

    def _unreachable(self, name: str, error: BaseException) -> str:
        from huggingface_hub import constants

        files = _MIMI_FILES if self._repo == DEFAULT_MIMI or self._folder else _MODEL_FILES
        if self._full(name) not in files:
            files = (*files, self._full(name))
        target = self._put or Path(self._repo.split("/")[1])
        revision = f" --revision {self._revision}" if self._revision else ""
        detail = "".join(f" ({line[:160]})" for line in str(error).splitlines()[:1])
        how = f"the hub could not be reached{detail}"
        if constants.HF_HUB_OFFLINE:
            how = "the hub is switched off by HF_HUB_OFFLINE"
        use = (
            "the files are then found there"
            if self._put
            else f"pass the folder (here {target}) instead of {self._repo}"
        )
        return (
            f"{self._full(name)} of {self._repo} is not in the local cache, and {how}.\n"
            f"Where there is a network, run\n"
            f"  hf download {self._repo} {' '.join(files)}{revision} --local-dir {target}\n"
            f"and copy the folder here: {use}."
        )


_MODEL_FILES = (CONFIG, WEIGHTS, TOKENIZER, *TOKENIZER_EXTRAS)
_MIMI_FILES = (CONFIG, WEIGHTS)


def _home(name: str | Path, revision: str | None, kind: str) -> _Folder | _Repository:
    path = Path(name).expanduser()
    if path.is_dir():
        wanted = _MODEL_FILES[:3] if kind == "model" else _MIMI_FILES
        return _Folder(path, wanted)
    text = str(name)
    if path.exists():
        raise HubError(f"{text} is a file; name the folder that holds the {kind}'s files")
    if isinstance(name, Path) or not is_repository_id(text):
        raise HubError(
            f"there is no folder {text}, and it is no hub repository either (owner/name, such as "
            "nari-labs/Dia2-1B)"
        )
    return _Repository(text, revision)


def _weights(home: _Folder | _Repository, named: str | None) -> Path:
    if named:
        file = home.required(named)
        if named.endswith(".index.json"):
            for shard in shards(file):
                home.required(str(Path(named).parent / shard) if "/" in named else shard)
        return file
    found = home.weights()
    return home.required(WEIGHTS) if found is None else found


def _tokenizer(home: _Folder | _Repository, named: str | None, fallback: Any) -> Path:
    if named:
        return _tokenizer_at(_named(home, named, "tokenizer", TOKENIZER))
    if home.optional(TOKENIZER) is None and isinstance(fallback, str) and fallback:
        return _tokenizer_at(_named(home, fallback, "tokenizer", TOKENIZER))
    return _tokenizer_at(home)


def _tokenizer_at(place: _Folder | _Repository | Path) -> Path:
    if isinstance(place, Path):
        return place
    for name in TOKENIZER_EXTRAS:
        place.optional(name)
    return place.required(TOKENIZER)


def _named_mimi(home: _Folder | _Repository, name: Any) -> MimiFiles:
    if not isinstance(name, str):
        raise ConfigError(f"{home}: assets.mimi must be a folder or a repository id")
    place = _named(home, name, "mimi", CONFIG)
    return resolve_mimi(place) if isinstance(place, Path) else _mimi_files(place)


def _named(
    home: _Folder | _Repository, name: str, kind: str, probe: str
) -> _Folder | _Repository | Path:
    """What a manifest or config means by `name`: part of the model, a local path, a repository.

    A file comes back as its path.
    """
    inside = name.removeprefix("./").rstrip("/")
    if isinstance(home, _Folder) and (home.place_for(inside) or Path()).is_file():
        return home.required(inside)
    part = home.part(inside)
    if part is not None and (isinstance(part, _Folder) or part.optional(probe) is not None):
        return part
    return _home(name, None, kind)


def _config_beside(weights: Path) -> Path | None:
    """The codec's config next to a weights file. Kyutai publishes the file in repositories of
    language models, so a ``config.json`` there may well be of something else."""
    own, other = weights.parent / KYUTAI_CONFIG, weights.parent / CONFIG
    if own.is_file():
        return own
    return other if other.is_file() and _read_json(other).get("model_type") == "mimi" else None


def _holds_codec(place: _Folder | _Repository) -> bool:
    if isinstance(place, _Repository):
        return place.optional(CONFIG) is not None
    return any(place.optional(name) for name in (CONFIG, KYUTAI_CONFIG)) or bool(place.weights())


def _mimi_files(place: _Folder | _Repository) -> MimiFiles:
    weights = place.weights()
    config = place.optional(CONFIG) or place.optional(KYUTAI_CONFIG)
    if weights is None:
        weights = place.required(WEIGHTS)
    if config is None and isinstance(place, _Repository):
        config = place.required(CONFIG)
    return MimiFiles(weights, config)


def _read_json(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HubError(f"{path}: not valid JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise HubError(f"{path}: not a JSON object; download it again")
    return content
