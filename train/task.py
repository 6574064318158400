"""What the training loop asks of a task: the protocol that decoder and codec training fulfil.

A task knows its model, data, losses and optimiser; the loop knows steps, hooks and checkpoints.
Step ``s`` (counted from 0) consumes batch ``s``; after it ``state["step"] == s + 1``. Files and
logs count finished steps, so the checkpoint named 40 continues with batch 40.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dia2_jax.typing import Array, Float

#: A nested dict pytree of arrays: ``{"step": int32 [], "params": {path: array}, "optimizer": …}``.
State = dict[str, Any]
#: One step's batch, of all processes together; what it holds is the task's own affair.
Batch = Any
#: Scalars by name, on the device until somebody reads them. All of them must be finite: a mean over
#: nothing is 0.
Metrics = Mapping[str, Array]


@dataclass(frozen=True)
class Sample:
    """Audio to listen to: mono, full scale at ±1.

    ``name`` becomes a file name; ``text`` is what was to be said (empty for a codec).
    """

    name: str
    waveform: Float[np.ndarray, " W"]
    sample_rate: int
    text: str = ""


class Task(Protocol):
    """A training problem. Everything is a function of (config, seed, step)."""

    #: "pretrain", "finetune", "codec".
    name: str

    def initial_state(self) -> State:
        """The state before step 0, its arrays placed on the mesh."""
        ...

    def abstract_state(self) -> State:
        """The same tree of ``jax.ShapeDtypeStruct`` with shardings: what a restore targets.

        The mesh may differ from the one that the checkpoint was saved on.
        """
        ...

    def batches(self, start: int) -> Iterator[Batch]:
        """The batches of steps ``start``, ``start + 1``, … without end, in O(1) to the first.

        An iterator with a ``close`` is closed at the end.
        """
        ...

    def train_step(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        """One update, dispatched without waiting for it; ``state`` is donated."""
        ...

    def work(self, batch: Batch) -> dict[str, float]:
        """What a batch is worth, as host numbers over all processes.

        ``frames``, ``audio_seconds``, ``flops`` (of the model, forward and backward) and
        ``real_share`` (frames that are not padding). The first three are summed over time.
        """
        ...

    def evaluate(self, state: State) -> dict[str, float]:
        """Validation metrics, finite, by their names in the log (``validation/loss``)."""
        ...

    def samples(self, state: State, step: int) -> list[Sample]:
        """Audio made with the weights as they are; called in every process."""
        ...

    def export(self, state: State, folder: Path) -> None:
        """Write the weights in the published layout, whole or not at all; replaces an older one."""
        ...

    def metadata(self) -> dict[str, Any]:
        """JSON kept with each checkpoint: model config, fingerprint of the data, LoRA settings, ….

        A run resumes only where it is the same, so it must not depend on what may change between
        parts of a run (number of steps, mesh, intervals).
        """
        ...
