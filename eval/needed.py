"""What is said where a package is missing that a program cannot do without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click

#: Whose modules are here with the program: one that is missing is a mistake in the code.
_OWN = ("dia2_jax", "eval", "train")


@contextmanager
def needed_from(extra: str) -> Iterator[None]:
    """Around the imports of a program: one that fails ends it with one line and status 2.

    Args:
      extra: of dia2-jax; brings what the program needs.
    """
    try:
        yield
    except ImportError as error:
        if (error.name or "").split(".")[0] in _OWN:
            raise
        # Nothing has been parsed yet, so no `Program` is there to say it.
        click.echo(f'error: needs a package ({error}): pip install "dia2-jax[{extra}]"', err=True)
        raise SystemExit(2) from None
