"""The program ``dia2-jax``: its commands, and what errors and signals become.

A command raises; here it is decided what the user reads and which status the shell gets.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import IO, Any, NoReturn

import click

from dia2_jax import __version__
from dia2_jax.allocator import use_one_arena
from dia2_jax.cli import codec, convert, generate, stream, voice, warmup
from dia2_jax.cli.terminal import DEBUG, PROGRAM
from dia2_jax.errors import Dia2Error, describe

INTERRUPTED, READER_LEFT, TERMINATED = 130, 141, 143

EPILOG = """\b
Exit status:
  0    done
  1    a model, script, recording or file cannot be used: the message says why
  2    wrong use of the command line
  3    done, but the speech was cut off at the end of the model's context
  130  interrupted (Ctrl-C); 143 if terminated
  141  whoever read the output stopped reading

Standard output carries nothing but data. Progress goes to standard error when that is a terminal.
Compiled programs are kept in ~/.cache/dia2-jax/xla; DIA2_JAX_CACHE names another folder, or off.
"""


class Failure(click.ClickException):
    """An error whose message is all that the user needs."""

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"{PROGRAM}: error: {self.format_message()}", err=True)


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does: files are closed, nothing is left behind."""


class Program(click.Group):
    """The group of commands, with errors and signals turned into messages and exit statuses."""

    def invoke(self, ctx: click.Context) -> Any:
        before = signal.signal(signal.SIGTERM, _terminate)
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # What is still buffered cannot be written; Python would complain about it at exit.
            _discard_stdout()
            ctx.exit(READER_LEFT)
        except (Dia2Error, OSError) as error:
            if ctx.meta.get(DEBUG):
                raise
            raise Failure(describe(error)) from error
        except KeyboardInterrupt as stop:
            terminated = isinstance(stop, Terminated)
            click.echo(f"{PROGRAM}: {'terminated' if terminated else 'interrupted'}", err=True)
            ctx.exit(TERMINATED if terminated else INTERRUPTED)
        finally:
            signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def _discard_stdout() -> None:
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        return  # standard output is no file of the system


@click.group(
    cls=Program,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, "--version", prog_name=PROGRAM)
def main() -> None:
    """Dia2 in JAX: dialogue text to speech, streamed while the text is being written.

    \b
      dia2-jax generate "[S1] Hello. [S2] Hi!" -o hello.wav
      llm "Tell me a story" | dia2-jax stream -m nari-labs/Dia2-1B | aplay
    """
    use_one_arena()


for _command in (
    generate.generate,
    stream.stream,
    voice.voice,
    codec.encode,
    codec.decode,
    convert.convert,
    warmup.warmup,
):
    main.add_command(_command)
