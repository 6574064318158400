"""A side of a measurement in a process of its own, which works only when it is asked to.

The two sides of a comparison could share one process. They do not, because thread pools, memory
allocators and library settings of one framework would then act on the other, and neither's
memory could be told apart. Of two processes, the one that is not asked waits in a blocking read
of its pipe and uses no processor time. It is also how a cold start is measured: in a new process.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from types import FrameType, TracebackType
from typing import Any, NoReturn, Protocol

from dia2_jax.errors import Dia2Error
from train.command import INTERRUPTED


class MeasurementError(Dia2Error):
    """Something cannot be measured; the message says what is missing and what to do."""


#: Exit status of a program that SIGTERM ended.
TERMINATED = 143


@contextlib.contextmanager
def ending_what_was_started() -> Iterator[None]:
    """SIGTERM leaves by way of every ``finally``, as Ctrl-C does, so that no process stays behind.

    By itself it ends a program on the spot, and what that started would speak on to nobody.
    """
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(TERMINATED)


class Side(Protocol):
    """What a measurement talks to."""

    def call(self, method: str, *arguments: Any) -> Any:
        """The result of a method of the other side."""
        ...

    def close(self) -> None:
        """End it."""
        ...


class Child:
    """An object in a new process; :meth:`call` runs one of its methods and waits for the result.

    Args:
      target: ``module:class``, imported in the new process only.
      arguments: keyword arguments of the class.
      environment: variables set before the import (None unsets one).

    Raises:
      MeasurementError: the class refused its arguments.
    """

    def __init__(
        self,
        target: str,
        arguments: Mapping[str, Any],
        environment: Mapping[str, str | None] | None = None,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._name = target.rpartition(":")[2]
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve,
            args=(theirs, target, dict(arguments), dict(environment or {})),
            daemon=True,
        )
        self._process.start()
        theirs.close()
        self._receive()

    def call(self, method: str, *arguments: Any) -> Any:
        """The result of a method.

        Raises:
          MeasurementError: the method failed, or the process is gone.
        """
        with contextlib.suppress(ConnectionError):  # it is gone, which is found out next
            self._connection.send((method, arguments))
        return self._receive()

    def close(self) -> None:
        """End the process."""
        if self._process.is_alive():
            with contextlib.suppress(OSError):  # it ended by itself
                self._connection.send(None)
            self._process.join(20)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
        self._connection.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _receive(self) -> Any:
        try:
            good, result = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise MeasurementError(
                f"{self._name}: its process ended with code {self._process.exitcode}; a negative "
                "code is a signal, -9 usually that memory ran out"
            ) from None
        if not good:
            raise MeasurementError(f"{self._name}: {result}")
        return result


def _serve(
    connection: Connection,
    target: str,
    arguments: dict[str, Any],
    environment: dict[str, str | None],
) -> None:
    # Ctrl-C reaches every process of a terminal; the parent is the one that speaks of it.
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    # What libraries print belongs to stderr: the parent's stdout may be carrying JSON.
    sys.stdout.flush()
    os.dup2(2, 1)
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    module, _, name = target.partition(":")

    def answer(run: Any) -> Any:
        try:
            result = run()
        except Dia2Error as error:
            connection.send((False, str(error)))
        except Exception as error:
            traceback.print_exc()
            connection.send((False, f"{type(error).__name__}: {error}"))
        else:
            return result
        return None

    side = answer(lambda: getattr(importlib.import_module(module), name)(**arguments))
    if side is None:
        return
    connection.send((True, None))
    while True:
        try:
            message = connection.recv()
        except EOFError:  # the parent is gone
            return
        if message is None:
            return
        method, values = message
        answer(lambda m=method, v=values: connection.send((True, getattr(side, m)(*v))))
