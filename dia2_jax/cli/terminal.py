"""What commands say to a person, on standard error: notes, warnings, progress.

Notes and progress need a terminal to read them; warnings are always written.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

import click

PROGRAM = "dia2-jax"
#: Keys of ``ctx.meta``.
DEBUG, QUIET = "dia2_jax.debug", "dia2_jax.quiet"

_Command = TypeVar("_Command", bound=Callable[..., Any])


def _remember(key: str) -> Callable[[click.Context, click.Parameter, bool], None]:
    def callback(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        ctx.meta[key] = value

    return callback


def talk_options(command: _Command) -> _Command:
    """``--quiet`` and ``--debug``, which every command has."""
    for name, key, text in (
        (("--debug",), DEBUG, "Show the traceback of an error."),
        (("--quiet", "-q"), QUIET, "No progress and no notes; warnings and errors only."),
    ):
        option = click.option(
            *name, is_flag=True, expose_value=False, callback=_remember(key), help=text
        )
        command = option(command)
    return command


def is_quiet() -> bool:
    """Whether ``--quiet`` was given."""
    return bool(click.get_current_context().meta.get(QUIET))


def talks() -> bool:
    """Whether somebody reads notes and progress: a terminal, and no ``--quiet``."""
    return sys.stderr.isatty() and not is_quiet()


def note(text: str) -> None:
    """A line for whoever watches."""
    if talks():
        click.echo(text, err=True)


def warn(text: str) -> None:
    """A line that is written in any case."""
    click.echo(f"{PROGRAM}: warning: {text}", err=True)


class Meter:
    """Frames done and their speed, redrawn on one line of standard error.

    Call it with the number of frames so far. The speed counts from the end of the first call, so
    compiling is not part of it.

    Args:
      frame_rate: frames of a second of audio.
      total: frames in all, where that is known.
      shown: draw it; :func:`talks` by default.
    """

    def __init__(
        self, frame_rate: float, *, total: int | None = None, shown: bool | None = None
    ) -> None:
        from tqdm import tqdm

        self._frame_rate = frame_rate
        self._first: tuple[int, float] | None = None
        self.speed: float | None = None  # seconds of audio a second
        self._bar = tqdm(
            total=total,
            unit=" frames",
            disable=not (talks() if shown is None else shown),
            leave=False,
            bar_format=None if total else "{n_fmt} frames [{elapsed}{postfix}]",
        )

    def __call__(self, frames: int) -> None:
        now = time.perf_counter()
        if self._first is None:
            self._first = (frames, now)
        elif now > self._first[1]:
            self.speed = (frames - self._first[0]) / self._frame_rate / (now - self._first[1])
            self._bar.set_postfix_str(f"{self.speed:.2f} x real time", refresh=False)
        self._bar.update(frames - self._bar.n)

    def __enter__(self) -> Meter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def summary(self) -> str:
        """The speed in words; empty where it was too short to tell."""
        return "" if self.speed is None else f", {self.speed:.2f} x real time"
