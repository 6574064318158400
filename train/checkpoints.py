"""Checkpoints of a run: saved in the background, whole or not at all, checked when they are read.

    RUN/checkpoints/<steps done>/tree/      the training state, arrays by dotted name
                                 metadata/  JSON: step, totals, config, task, metrics, fingerprints

Each is a checkpoint of :mod:`dia2_jax.checkpoint`, so that whatever reads those reads these. Arrays
lie on disk without a checksum of their own; a fingerprint of each goes into the metadata, and a
checkpoint whose arrays have others is damaged (:mod:`train.fingerprints`).
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import jax
import numpy as np

from dia2_jax.checkpoint import (
    flatten_tree,
    read_metadata,
    restore,
    stored_leaves,
)
from dia2_jax.errors import CheckpointError, ConfigError, NonFiniteError
from train.command import warn
from train.fingerprints import fingerprints_of
from train.processes import barrier, gather, is_leader
from train.task import State

#: Where damaged checkpoints go, beside the folder of the good ones.
DAMAGED = "damaged"
#: The format of dia2_jax.checkpoint, which a test of the layout holds this to.
_FORMAT = 1
#: Bytes that Orbax holds in flight while writing; it refuses leaves above it.
_IN_FLIGHT = 256_000_000
#: Seconds in which reads that are under way end, after one has failed.
_GRACE = 0.3


@dataclass(frozen=True)
class Restored:
    """A training state, the number of steps it has seen, and the JSON kept with it."""

    step: int
    state: State
    metadata: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run; call :meth:`restore` first, in every process.

    Args:
      folder: where they lie; a folder per step.
      keep: how many of the newest to keep.
      best: the validation metric (lower is better) whose best checkpoint is kept as well.
    """

    def __init__(self, folder: Path, *, keep: int, best: str | None = None) -> None:
        self._folder = folder.absolute()
        self._keep, self._metric = keep, best
        self._best_step: int | None = None
        self._best_value = math.inf
        self._manager: Any = None

    def restore(self, abstract_state: State) -> Restored | None:
        """The newest good checkpoint, or None where none was ever saved.

        Damaged ones are reported and moved to ``damaged`` beside the folder; what an unfinished
        save left is deleted.

        Raises:
          CheckpointError: there are checkpoints, and none of them is good.
        """
        steps = _steps(self._folder)
        damaged: list[int] = []
        restored: Restored | None = None
        newest: Exception | None = None
        for step in reversed(steps):
            try:
                found = read_checkpoint(self._folder / str(step), abstract_state)
                problem = None
            except Exception as error:  # Damage shows as errors of many types.
                problem = error
            # Each process reads its own part, and all must take the same checkpoint.
            if max(gather(float(problem is not None))) == 0:
                restored = Restored(step, found[0], found[1])
                break
            problem = problem or CheckpointError("another process cannot read it")
            newest = newest or problem
            if len(steps) == len(damaged) + 1:
                raise CheckpointError(
                    f"{self._folder}: none of its {len(steps)} checkpoints can be used; the "
                    f"newest: {newest}"
                ) from newest
            if is_leader():
                reason = str(problem) or type(problem).__name__
                warn(f"checkpoint {step} cannot be used, trying the one before ({reason})")
            damaged.append(step)
        barrier("checkpoints read")
        if is_leader():
            for step in damaged:
                _set_aside(self._folder / str(step))
        barrier("damaged checkpoints moved")
        self._find_best()
        self._manager = self._make_manager(abstract_state)
        return restored

    def improves(self, values: Mapping[str, float]) -> bool:
        """Whether these validation metrics (none: no) are better than those of all checkpoints.

        Raises:
          ConfigError: the metric of ``run.best`` is not among them.
        """
        if self._metric is None or not values:
            return False
        if self._metric not in values:
            raise ConfigError(
                f"run.best: {self._metric!r} is no validation metric; known: {', '.join(values)}"
            )
        return values[self._metric] < self._best_value

    def save(
        self,
        step: int,
        state: State,
        metadata: Mapping[str, Any],
        values: Mapping[str, float] | None = None,
    ) -> None:
        """Save in the background; returns when ``state`` may be donated.

        Args:
          step: steps done.
          state: the training state.
          metadata: JSON to keep with it.
          values: validation metrics of this very state, if it was evaluated.

        Raises:
          NonFiniteError: the weights hold NaN or infinity; nothing is saved.
          CheckpointError: this or the save before could not be written.
        """
        import orbax.checkpoint as ocp

        named, _ = flatten_tree(state)
        fingerprints = fingerprints_of(named)
        broken = [
            name
            for name, (_, finite) in fingerprints.items()
            if not finite and not name.startswith("optimizer.")
        ]
        if broken:
            raise NonFiniteError(
                f"step {step}: {len(broken)} arrays of the state hold NaN or infinity, "
                f"such as {broken[0]}; they are not saved. Resume from the last checkpoint with a "
                "lower learning rate"
            )
        # Copied: the JSON is written in the background, when the run has counted further.
        document: dict[str, Any] = _as_json(
            {
                **metadata,
                "step": step,
                "metrics": dict(values or {}),
                "fingerprints": {name: value for name, (value, _) in fingerprints.items()},
            }
        )
        document["checksum"] = _checksum(document)
        if self._metric is not None and self.improves(values or {}):
            self._best_step, self._best_value = step, document["metrics"][self._metric]
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    tree=ocp.args.PyTreeSave(_nest(named)),
                    metadata=ocp.args.JsonSave(
                        {"format": _FORMAT, "random_keys": {}, "metadata": document}
                    ),
                ),
                force=True,
            )
        except Exception as error:  # Full disks show as errors of many types.
            raise self._unsaved(error) from error

    def close(self) -> None:
        """Wait for the save under way.

        Raises:
          CheckpointError: it could not be written.
        """
        manager, self._manager = self._manager, None
        if manager is not None:
            try:
                manager.close()
            except Exception as error:
                raise self._unsaved(error) from error

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax asks before it deletes: the newest and the best stay."""
        steps = [info.step for info in checkpoints]
        return [
            step in steps[-self._keep :] or (self._metric is not None and step == self._best_step)
            for step in steps
        ]

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _unsaved(self, error: Exception) -> CheckpointError:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return CheckpointError(
            f"{self._folder}: a checkpoint cannot be saved ({reason}); make room there and resume"
        )

    def _find_best(self) -> None:
        for step in _steps(self._folder):
            try:
                metrics = read_metadata(self._folder / str(step)).get("metrics", {})
            except CheckpointError:
                continue  # It is an old one, and matters only once it is asked for.
            value = metrics.get(self._metric)
            if value is not None and value < self._best_value:
                self._best_step, self._best_value = step, value

    def _make_manager(self, abstract_state: State) -> Any:
        import orbax.checkpoint as ocp

        leaves = jax.tree.leaves(abstract_state)
        largest = max(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in leaves)
        handler = ocp.PyTreeCheckpointHandler(
            use_ocdbt=True,
            use_zarr3=True,
            use_compression=False,
            save_concurrent_gb=max(_IN_FLIGHT, largest * 5 // 4) / 1e9,
        )
        return ocp.CheckpointManager(
            self._folder,
            item_handlers={"tree": handler, "metadata": ocp.JsonCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(
                create=True,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
                # In the background, a folder that cannot be made leaves threads that wait for it
                # for ten minutes, and the program with them.
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
                preservation_policy=self,
            ),
        )


def read_checkpoint(path: Path, abstract_state: State) -> tuple[State, dict[str, Any]]:
    """A state and its metadata, checked against their fingerprints.

    Raises:
      CheckpointError: damaged, or of another structure.
    """
    metadata = _read_metadata(path)
    state = _restore(path, abstract_state)
    _check(path, flatten_tree(state)[0], metadata)
    return state, metadata


def load_for_export(
    run_folder: str | Path,
    step: int | Literal["best"] | None = None,
    *,
    parts: Sequence[str] = ("params", "ema"),
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights of a run as numpy arrays, without building its task.

    Args:
      run_folder: the folder of a run.
      step: of a checkpoint; None is the newest good one, "best" the one of the best validation
        metric (``run.best`` of that run).
      parts: which entries of the training state to read; those that are not there are left out.

    Returns:
      The state, a nested dict (one level for each dot in the name of a parameter), and the JSON
      kept with the checkpoint.

    Raises:
      CheckpointError: no such checkpoint, or a damaged one.
    """
    folder = Path(run_folder).absolute() / "checkpoints"
    steps = _steps(folder)
    if not steps:
        raise CheckpointError(f"{folder}: holds no checkpoint")
    if step is None:
        for newest in reversed(steps[1:]):
            try:
                return _load(folder / str(newest), parts)
            except CheckpointError as error:
                warn(f"checkpoint {newest} cannot be used, trying the one before ({error})")
        return _load(folder / str(steps[0]), parts)
    if step == "best":
        return _load(folder / str(_best(folder, steps)), parts)
    if step not in steps:
        raise CheckpointError(
            f"{folder}: has no checkpoint {step}; it has {', '.join(map(str, steps))}"
        )
    return _load(folder / str(step), parts)


def _load(path: Path, parts: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    metadata = _read_metadata(path)
    wanted = {
        # A numpy array asks for numpy; this one takes no memory.
        name: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
        for name, leaf in stored_leaves(path).items()
        if name.split(".")[0] in parts
    }
    if not wanted:
        raise CheckpointError(f"{path}: holds none of {', '.join(parts)}")
    state = _restore(path, _nest(wanted), some=True)
    named, _ = flatten_tree(state)
    _check(path, named, metadata)
    return state, metadata


def _best(folder: Path, steps: Sequence[int]) -> int:
    values: dict[int, float] = {}
    for step in steps:
        try:
            metadata = _read_metadata(folder / str(step))
        except CheckpointError as error:
            warn(f"checkpoint {step} cannot be used ({error})")
            continue
        metric = metadata["config"]["run"]["best"]
        if metric in metadata["metrics"]:
            values[step] = metadata["metrics"][metric]
    if not values:
        raise CheckpointError(f"{folder}: no checkpoint has the metric of run.best; name a step")
    return min(values, key=lambda step: values[step])


def _read_metadata(path: Path) -> dict[str, Any]:
    metadata = read_metadata(path)
    if metadata.get("checksum") != _checksum(metadata):
        raise CheckpointError(f"{path}: its metadata is damaged (the checksum differs)")
    return metadata


def _restore(path: Path, wanted: Any, *, some: bool = False) -> Any:
    """Read a tree, where a damaged checkpoint gives one error and nothing else is heard.

    Orbax gives up at the first read that fails. The others of TensorStore that are under way, and
    the coroutines that wait for them, then complain where nobody can catch it: to the hook for
    errors that cannot be raised. Those are dropped, if the read failed.
    """
    before = sys.unraisablehook
    others: list[Any] = []
    sys.unraisablehook = others.append
    problem = ""
    try:
        try:
            return restore(path, wanted, partial=some)[0]
        except Exception as error:  # Damage shows as errors of many types.
            problem = str(error) or type(error).__name__
        # The error held on to its coroutines; without it they end here.
        time.sleep(_GRACE)
        gc.collect()
        others.clear()
        raise CheckpointError(problem)
    finally:
        sys.unraisablehook = before
        for other in others:
            before(other)


def _as_json(document: Mapping[str, Any]) -> dict[str, Any]:
    """A document as it will be read back: lists for tuples, names for numbers as keys."""
    return dict(json.loads(json.dumps(document)))


def _checksum(metadata: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in metadata.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _check(path: Path, named: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    expected = metadata["fingerprints"]
    found = fingerprints_of(named)
    wrong = [name for name, (value, _) in found.items() if expected.get(name) != value]
    if wrong:
        raise CheckpointError(
            f"{path}: the checkpoint is damaged ({len(wrong)} of {len(found)} arrays differ from "
            f"what was saved, such as {wrong[0]})"
        )


def _nest(named: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in named.items():
        *parents, last = name.split(".")
        branch = tree
        for part in parents:
            branch = branch.setdefault(part, {})
        branch[last] = leaf
    return tree


def _steps(folder: Path) -> list[int]:
    """Steps of the checkpoints there, oldest first; unfinished ones have other names."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def _set_aside(path: Path) -> None:
    place = path.parent.parent / DAMAGED
    place.mkdir(exist_ok=True)
    target, count = place / path.name, 1
    while target.exists():
        target, count = place / f"{path.name}-{count}", count + 1
    path.rename(target)
