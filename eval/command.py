"""What evaluation programs share on the command line: errors, and options that hold several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO, Any

import click

#: Exit status of a program that was interrupted.
INTERRUPTED = 130


class BadInput(click.ClickException):
    """An error whose message is all that the user needs."""

    exit_code = 2

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"error: {self.format_message()}", err=True)


def integers(_: click.Context, __: click.Parameter, value: str | None) -> list[int] | None:
    """A click callback: ``0,1,2`` as numbers, each once."""
    if value is None:
        return None
    try:
        return list(dict.fromkeys(int(part) for part in value.split(",")))
    except ValueError:
        raise click.BadParameter("whole numbers separated by commas, such as 0,1,2") from None


def names(_: click.Context, __: click.Parameter, value: Sequence[str]) -> list[str]:
    """A click callback: names separated by commas, of an option that may be given several times."""
    return list(dict.fromkeys(name for part in value for name in part.split(",") if name))
