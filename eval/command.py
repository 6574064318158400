"""What evaluation programs share on the command line: errors, and options that hold several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from dia2_jax.errors import Dia2Error, describe
from train.command import INTERRUPTED, BadInput

_Command = TypeVar("_Command", bound=Callable[..., Any])


@contextmanager
def resumable(debug: bool) -> Iterator[None]:
    """What a run that goes on where it was makes of errors and of Ctrl-C.

    Args:
      debug: let errors through, with their traceback.
    """
    try:
        yield
    except (Dia2Error, OSError) as error:
        if debug:
            raise
        raise BadInput(describe(error)) from error
    except KeyboardInterrupt:
        click.echo("interrupted; the same command goes on from here", err=True)
        click.get_current_context().exit(INTERRUPTED)


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


def metric_options(command: _Command) -> _Command:
    """``--asr``, ``--speaker-model``, ``--utmos`` and ``--metrics``.

    The command gets ``asr``, ``speaker_model`` and ``utmos`` as `eval.scoring.metric.Options` takes
    them, and ``metrics``, a list of names.
    """
    options = [
        click.option(
            "--asr", default="base", show_default=True, metavar="NAME|FOLDER", help="Whisper model."
        ),
        click.option(
            "--speaker-model",
            default="resemblyzer",
            show_default=True,
            metavar="NAME|FOLDER",
            help="What hears whose voice it is; else a WavLM for speaker verification, such as "
            "microsoft/wavlm-base-plus-sv.",
        ),
        click.option(
            "--utmos",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Weights of UTMOS (utmos_state_dict.pt of Blinorot/UTMOS-PyTorch); downloaded by "
            "default.",
        ),
        click.option(
            "--metrics",
            multiple=True,
            callback=names,
            metavar="NAME[,…]",
            help="Only these metrics.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command
