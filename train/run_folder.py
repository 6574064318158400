"""The folder of a run: what lies where, and when it may be used.

    RUN/config.yaml  versions.json  log.jsonl  curve.png  samples/<step>/NAME.wav
        checkpoints/<step>/  damaged/  wandb/  export/

A folder that holds a run is touched only with ``--resume`` or ``--overwrite``, and a run is resumed
with the configuration that it was started with, but for what does not change its result.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import yaml

import dia2_jax
from dia2_jax.errors import ConfigError
from train.command import warn
from train.config import TrainingConfig, config_to_dict, flat
from train.folder_lock import held
from train.processes import barrier, is_leader

#: Said where another process holds the folder.
_BUSY = (
    "another process is training in it; wait for it or stop it (SIGTERM saves a checkpoint), or "
    "choose another run.folder"
)
#: What a run writes, in the order in which it is deleted: config.yaml marks the folder as a run's.
_OWN = (
    "checkpoints", "damaged", "samples", "export", "wandb", "log.jsonl", "curve.png",
    "versions.json", "config.yaml",
)  # fmt: skip
#: What may change when a run is resumed.
_CHANGEABLE = {"folder", "steps", "save_minutes", "keep", "best"}
_CHANGEABLE |= {f"{what}_every" for what in ("log", "evaluate", "sample", "save")}
_PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain", "datasets",
)  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def versions(self) -> Path:
        return self.path / "versions.json"

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def curve(self) -> Path:
        return self.path / "curve.png"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        return self.path / "export"


@contextmanager
def open_run_folder(
    config: TrainingConfig, *, resume: bool, overwrite: bool, force_config: bool
) -> Iterator[RunFolder]:
    """The folder of ``config.run``, made or checked, with ``config.yaml`` written.

    While the context lasts, no other run on this machine can take the folder.

    To resume what does not exist yet starts it, so that a job that may be killed at any time can
    always be started by one command.

    Raises:
      ConfigError: the folder holds a run and neither way was chosen, or both; it holds something
        else; another run is using it; or the configuration changed in what must not change.
    """
    folder = RunFolder(Path(config.run.folder))
    if resume and overwrite:
        raise ConfigError("--resume continues a run, --overwrite deletes it: give one of them")
    exists = folder.config.is_file()
    if not exists and folder.path.exists():
        if not folder.path.is_dir():
            raise ConfigError(f"{folder.path}: is a file; choose another run.folder")
        # Hidden files are an unfinished config.yaml, or the file system's own.
        if any(not path.name.startswith(".") for path in folder.path.iterdir()):
            raise ConfigError(
                f"{folder.path}: exists and holds no run (no config.yaml); choose another "
                "run.folder"
            )
    if exists and not (resume or overwrite):
        raise ConfigError(
            f"{folder.path}: holds a run; continue it with --resume, delete it with --overwrite, "
            "or choose another run.folder"
        )
    if exists and resume and not force_config:
        _refuse_changes(folder, config)
    # Every process has looked before the first one changes anything.
    barrier("run folder read")
    with ExitStack() as stack:
        if is_leader():
            folder.path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(folder.path, _BUSY))
            if exists and overwrite:
                for name in _OWN:
                    _delete(folder.path / name)
            text = yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True)
            write_text(folder.config, text)
        barrier("run folder made")
        yield folder


def refuse_other_task(saved: Mapping[str, Any], now: Mapping[str, Any], folder: RunFolder) -> None:
    """Stop where the data or the model are not those of the checkpoint.

    What an older version did not keep is not compared.

    Raises:
      ConfigError: names what differs.
    """
    old = flat(dict(saved))
    new = {name: value for name, value in flat(_as_json(now)).items() if name in old}
    changes = _changes(old, new)
    if changes:
        raise ConfigError(
            f"{folder.path}: its checkpoint belongs to another model or other data: "
            f"{'; '.join(changes)}. Restore what it was, or pass --force-config"
        )


def write_versions(folder: RunFolder, *, step: int, peak: float) -> None:
    """Add to ``versions.json`` what this part of the run runs on, and the command line."""
    parts: list[dict[str, Any]] = []
    try:
        parts = json.loads(folder.versions.read_text(encoding="utf-8"))["parts"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        parts = []  # The first part, or a file that nobody can read any more.
    devices = jax.devices()
    parts.append(
        {
            "from_step": step,
            "command": sys.argv,
            "commit": _commit(),
            "python": platform.python_version(),
            "packages": {"dia2-jax": dia2_jax.__version__} | _installed(),
            "processes": jax.process_count(),
            "devices": {"count": len(devices), "kind": devices[0].device_kind},
            "cores": os.cpu_count(),
            "matmul_peak_flops": peak,
        }
    )
    write_text(folder.versions, json.dumps({"parts": parts}, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _refuse_changes(folder: RunFolder, config: TrainingConfig) -> None:
    try:
        old = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        old = None
    if not isinstance(old, dict):
        raise ConfigError(
            f"{folder.config}: cannot be read, so nobody knows whether the configuration changed; "
            "--force-config takes the one given"
        )
    changes = _changes(_fixed(old), _fixed(config_to_dict(config)))
    before = flat(old).get("run.steps")
    if before != config.run.steps and is_leader() and not changes:
        warn(
            f"run.steps was {before}, now {config.run.steps}: a learning rate that falls towards "
            "the end of the run (cosine, wsd) goes on as that of the new length"
        )
    if changes:
        raise ConfigError(
            f"{folder.config}: the run was started with another configuration: "
            f"{'; '.join(changes)}. Resume with what it was, choose another run.folder, or pass "
            "--force-config"
        )


def _fixed(raw: dict[str, Any]) -> dict[str, Any]:
    """What must not change, by dotted name."""
    changeable = {f"run.{name}" for name in _CHANGEABLE}
    return {
        name: value
        for name, value in flat(raw).items()
        if name not in changeable and not name.startswith(("run.hooks.", "mesh."))
    }


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    absent = object()
    return [
        f"{name} was {_shown(old, name)}, now {_shown(new, name)}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name, absent) != new.get(name, absent)
    ]


def _shown(values: Mapping[str, Any], name: str) -> str:
    return json.dumps(values[name])[:80] if name in values else "absent"


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _installed() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """The checkout's commit, with a plus if files differ from it; None outside of git."""
    here = Path(__file__).parent
    try:
        commit, changed = (
            subprocess.run(
                ["git", *command], cwd=here, capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
            for command in (
                ["rev-parse", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no"],
            )
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "")
