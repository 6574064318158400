"""The command line that training programs share: their options, and what errors become.

@click.command(cls=Program)
@run_options
def main(config_path, overrides, plan, **start):
    config = read_config(PretrainConfig, config_path, overrides)
    …
    finish(train(task, config, **start))
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from dia2_jax.errors import Dia2Error, NonFiniteError, describe

if TYPE_CHECKING:
    from train.loop import Outcome

_Command = TypeVar("_Command", bound=Callable[..., Any])

INTERRUPTED = 130

EPILOG = """\b
Exit status:
  0    done; also after SIGTERM, which saves a checkpoint and stops
  1    the run failed: the loss is no longer a number
  2    a configuration, file or option cannot be used: the message says why
  130  interrupted (Ctrl-C, which saves a checkpoint first; twice does not)
"""

#: Of programs that write a checkpoint and have no run.
EXPORT_EPILOG = """\b
Exit status:
  0    done
  2    a checkpoint, file or option cannot be used: the message says why
  130  interrupted (Ctrl-C)
"""


class BadInput(click.ClickException):
    """An error whose message is all that the user needs."""

    exit_code = 2

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"error: {self.format_message()}", err=True)


class FailedRun(BadInput):
    """An error that only came up on the way."""

    exit_code = 1


class Program(click.Command):
    """A command that turns errors into one message and an exit status; ``--debug`` shows more.

    Attributes:
      interrupted: what is said of Ctrl-C.
    """

    interrupted = "interrupted"

    def __init__(self, *args: Any, **options: Any) -> None:
        options.setdefault("epilog", EPILOG)
        options.setdefault("no_args_is_help", True)
        settings = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
        options["context_settings"] = settings | (options.get("context_settings") or {})
        super().__init__(*args, **options)
        debug = click.option("--debug", is_flag=True, help="Show the traceback of an error.")
        self.params += getattr(debug(lambda: None), "__click_params__", [])

    def invoke(self, ctx: click.Context) -> Any:
        debug = ctx.params.pop("debug")
        try:
            return super().invoke(ctx)
        except (Dia2Error, OSError) as error:
            if debug:
                raise
            kind = FailedRun if isinstance(error, NonFiniteError) else BadInput
            raise kind(describe(error)) from error
        except KeyboardInterrupt:
            click.echo(self.interrupted, err=True)
            ctx.exit(INTERRUPTED)


def run_options(command: _Command) -> _Command:
    """``CONFIG [a.b=c …]`` and how a run starts.

    The command gets ``config_path``, ``overrides``, ``plan``, and ``resume``, ``overwrite`` and
    ``force_config`` as :func:`train.loop.train` takes them.
    """
    options = [
        click.argument("config_path", metavar="CONFIG", type=click.Path()),
        click.argument("overrides", metavar="[NAME=VALUE ...]", nargs=-1),
        click.option("--resume", is_flag=True, help="Continue from the newest checkpoint, if any."),
        click.option("--overwrite", is_flag=True, help="Delete the run of that folder first."),
        click.option(
            "--force-config",
            is_flag=True,
            help="Resume although the configuration or the data changed.",
        ),
        click.option(
            "--plan", is_flag=True, help="Print the memory and time to expect, and do nothing."
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def finish(outcome: Outcome) -> NoReturn:
    """Leave the program with the status that the outcome of a run asks for."""
    raise click.exceptions.Exit(INTERRUPTED if outcome.signal == signal.SIGINT else 0)


def note(text: str) -> None:
    """A line on standard error."""
    click.echo(text, err=True)


def warn(text: str) -> None:
    """A warning, which is one line."""
    click.echo(f"warning: {' '.join(text.split())}", err=True)
