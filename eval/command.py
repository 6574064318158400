"""What evaluation programs share on the command line: errors, numbers and places to write to that
are refused before anything is measured, and options that hold several."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from dia2_jax.errors import describe
from train.command import BadInput, Program

_Command = TypeVar("_Command", bound=Callable[..., Any])

#: Of programs that measure; `Program` keeps these promises.
EPILOG = """\b
Exit status:
  0    measured, whatever came out
  2    a model, file or option cannot be used: the message says why
  130  interrupted (Ctrl-C); 143 if terminated
"""


class Resumable(Program):
    """A program whose run goes on where it was."""

    interrupted = "interrupted; the same command goes on from here"


class OutputFile(click.ParamType):
    """A file to be written: tried before anything is measured, with nothing left behind.

    Folders above it need not be there; `write_json` makes them.

    Args:
      stdout: "-" is standard output.
    """

    name = "file"

    def __init__(self, *, stdout: bool = False) -> None:
        self._stdout = stdout

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if self._stdout and str(value) == "-":
            return "-"
        path = Path(value)
        with _refusing(param, value, "a file in a folder that you may write to"):
            if path.is_dir():
                raise IsADirectoryError(None, "Is a directory")
            if path.is_file():
                path.open("ab").close()
            elif not path.exists():  # pipes and devices are as they are
                _try_to_write_in(path.parent)
        return path


class OutputFolder(click.ParamType):
    """A folder to be filled: as `OutputFile`."""

    name = "folder"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(value)
        with _refusing(param, value, "a folder in one that you may write to"):
            if not str(value):
                raise FileNotFoundError(None, "No such file or directory")
            if path.exists() and not path.is_dir():
                raise NotADirectoryError(None, "is a file")
            _try_to_write_in(path)
        return path


@contextlib.contextmanager
def _refusing(param: click.Parameter | None, value: Any, remedy: str) -> Iterator[None]:
    option = param.opts[0] if param is not None and param.opts else "output"
    try:
        yield
    except OSError as error:
        raise BadInput(
            f"{option} {str(value)!r}: cannot be written ({describe(error)}); name {remedy}"
        ) from error


def _try_to_write_in(folder: Path) -> None:
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    finally:
        for place in made:
            with contextlib.suppress(OSError):  # it was not made
                place.rmdir()


class Finite(click.FloatRange):
    """A number in a range: ``nan`` passes every comparison, and nothing lasts ``inf`` seconds."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number.", param, ctx)
        return number


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


def size(text: str) -> int:
    """A whole number from 1 on, as an item of :func:`listed`."""
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


_INTEGERS = listed("whole numbers separated by commas, such as 0,1,2", int)


def integers(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> list[int] | None:
    """A click callback: ``0,1,2`` as numbers, each once."""
    found = _INTEGERS(context, parameter, value)
    return None if found is None else list(dict.fromkeys(found))


def write_json(path: Path | str, content: Any) -> None:
    """What ``--json PATH`` asks for; "-" is standard output.

    Raises:
      OSError: it cannot be written.
    """
    text = json.dumps(content, indent=2) + "\n"
    if path == "-":
        click.echo(text, nl=False)
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def names(_: click.Context, __: click.Parameter, value: Sequence[str]) -> list[str]:
    """A click callback: names separated by commas, of an option that may be given several times."""
    parts = [name.strip() for part in value for name in part.split(",")]
    found = list(dict.fromkeys(name for name in parts if name))
    if value and not found:
        raise click.BadParameter("names nothing; give a name, or leave the option out")
    return found


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
