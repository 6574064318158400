"""What the processes of a run tell each other. With one process nothing here does anything."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def is_leader() -> bool:
    """Whether this process writes the logs."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until every process has come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def gather(value: float) -> list[float]:
    """The number that each process gives, in all of them."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    return [float(x) for x in multihost_utils.process_allgather(np.float32(value))]


class Agreement:
    """One number a step on which all processes agree: the largest, one step late.

    Several processes must leave the loop after the same step, though a signal reaches each at
    another moment. So every step adds a tiny reduction behind its work, and the result of the step
    before is read: nobody waits for the step that has just been dispatched.
    """

    def __init__(self) -> None:
        self._previous: jax.Array | None = None
        if jax.process_count() > 1:
            from jax.sharding import Mesh, NamedSharding, PartitionSpec

            mesh = Mesh(np.array(jax.devices()), ("all",))
            self._sharding = NamedSharding(mesh, PartitionSpec("all"))
            everywhere = NamedSharding(mesh, PartitionSpec())
            self._largest: Any = jax.jit(lambda x: x.max(), out_shardings=everywhere)

    def __call__(self, wish: int) -> int:
        """The largest wish of all processes, of this call (one process) or the one before."""
        if jax.process_count() == 1:
            return wish
        local = np.full(jax.local_device_count(), wish, np.int32)
        wishes = jax.make_array_from_process_local_data(self._sharding, local)
        previous, self._previous = self._previous, self._largest(wishes)
        return 0 if previous is None else int(previous)
