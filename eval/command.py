"""What evaluation programs share on the command line: errors, and options that hold several."""

from __future__ import annotations

import json
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


def listed(
    what: str, take: Callable[[str], Any]
) -> Callable[[click.Context, click.Parameter, str | None], list[Any] | None]:
    """A click callback that splits at commas; no option at all is None.

    Args:
      what: what should have been given, for the message.
      take: makes an item of its text; KeyError or ValueError where it cannot.
    """

    def callback(_: click.Context, __: click.Parameter, value: str | None) -> list[Any] | None:
        if value is None:
            return None
        try:
            return [take(part.strip()) for part in value.split(",")]
        except (KeyError, ValueError):
            raise click.BadParameter(what) from None

    return callback


_INTEGERS = listed("whole numbers separated by commas, such as 0,1,2", int)


def integers(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> list[int] | None:
    """A click callback: ``0,1,2`` as numbers, each once."""
    found = _INTEGERS(context, parameter, value)
    return None if found is None else list(dict.fromkeys(found))


def write_json(path: Path, content: Any) -> None:
    """What ``--json PATH`` asks for.

    Raises:
      BadInput: it cannot be written.
    """
    try:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise BadInput(f"--json {path}: cannot be written ({error.strerror})") from error


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
