"""Several processes, one run: joining them before JAX touches a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from dia2_jax.errors import ConfigError

_Command = TypeVar("_Command", bound=Callable[..., Any])

#: Seconds that a process waits for the others to come.
_PATIENCE = 300


def distributed_option(command: _Command) -> _Command:
    """``--distributed``, which the command gets as ``distributed`` for :func:`join`."""
    return click.option(
        "--distributed",
        metavar="auto|HOST:PORT,COUNT,INDEX",
        help="Join the other processes of this run: auto on a cluster that JAX knows (Cloud TPU, "
        "Slurm, Open MPI), else the address of the first process, how many there are, and which "
        "this one is (from 0). Start the same command in every process.",
    )(command)


def join(distributed: str | None) -> None:
    """Join the other processes, if there are any; call it before anything uses JAX.

    Raises:
      ConfigError: a malformed address, or processes that do not come.
    """
    import jax

    # A CPU runs programs that do not depend on one another at once, in whatever order, on a few
    # threads. Their collectives would wait for one another, and for those of other programs in
    # other devices and processes, for ever.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if distributed is None:
        return
    options: dict[str, Any] = {}
    if distributed != "auto":
        parts = distributed.split(",")
        numbers = [part.strip() for part in parts[1:]]
        if len(parts) != 3 or ":" not in parts[0] or not all(n.isdigit() for n in numbers):
            raise ConfigError(
                f"--distributed {distributed!r}: expected auto, or HOST:PORT,COUNT,INDEX such as "
                "10.0.0.1:1234,2,0"
            )
        count, index = (int(number) for number in numbers)
        if not index < count:
            raise ConfigError(f"--distributed {distributed!r}: INDEX counts from 0 to COUNT - 1")
        options = {"coordinator_address": parts[0], "num_processes": count, "process_id": index}
    try:
        jax.distributed.initialize(initialization_timeout=_PATIENCE, **options)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"--distributed {distributed!r}: cannot join the other processes "
            f"({str(error).splitlines()[0]})"
        ) from error
