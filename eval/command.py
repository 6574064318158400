"""What errors become on the command lines of evaluation programs."""

from __future__ import annotations

from typing import IO, Any

import click


class BadInput(click.ClickException):
    """An error whose message is all that the user needs."""

    exit_code = 2

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"error: {self.format_message()}", err=True)
