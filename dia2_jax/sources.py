"""Where files come from: a local folder, or a repository of the Hugging Face hub.

Both answer the same questions, and say what is missing, how to download it and where to put it.
`huggingface_hub` is imported only when a repository is asked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dia2_jax.errors import HubError

DEFAULT_MIMI = "kyutai/mimi"
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

MODEL_FILES = (CONFIG, WEIGHTS, TOKENIZER, *TOKENIZER_EXTRAS)
MIMI_FILES = (CONFIG, WEIGHTS)

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


class Folder:
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

    def part(self, name: str) -> Folder | Repository | None:
        folder = self.path / name
        return Folder(folder, MIMI_FILES) if folder.is_dir() else None

    def place_for(self, name: str) -> Path | None:
        return self.path / name


class Repository:
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

    def part(self, name: str) -> Folder | Repository | None:
        found = Repository(self._repo, self._revision, self._full(name), self._put)
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

        files = MIMI_FILES if self._repo == DEFAULT_MIMI or self._folder else MODEL_FILES
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


def find_home(name: str | Path, revision: str | None, kind: str) -> Folder | Repository:
    path = Path(name).expanduser()
    if path.is_dir():
        wanted = MODEL_FILES[:3] if kind == "model" else MIMI_FILES
        return Folder(path, wanted)
    text = str(name)
    if path.exists():
        raise HubError(f"{text} is a file; name the folder that holds the {kind}'s files")
    if isinstance(name, Path) or not is_repository_id(text):
        raise HubError(
            f"there is no folder {text}, and it is no hub repository either (owner/name, such as "
            "nari-labs/Dia2-1B)"
        )
    return Repository(text, revision)


def is_repository_id(name: str) -> bool:
    """Whether `name` reads ``owner/name``, and not like a path."""
    return name[:1] not in (".", "/", "~") and _REPOSITORY.fullmatch(name) is not None


def shards(index: Path) -> list[str]:
    """Names of the files that an index of shards lists."""
    weight_map = read_json(index).get("weight_map")
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


def read_json(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HubError(f"{path}: not valid JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise HubError(f"{path}: not a JSON object; download it again")
    return content
