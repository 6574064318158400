"""The program: help at once, statuses that mean something, one clean line for an error."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

import click
import pytest
from click.testing import CliRunner

import dia2_jax
from dia2_jax.cli import main
from dia2_jax.cli.program import EPILOG, Program
from dia2_jax.cli.terminal import Meter, talk_options
from dia2_jax.errors import ScriptError

COMMANDS = ["convert", "decode", "encode", "generate", "stream", "voice", "warmup"]


def program_that(action: Any) -> click.Group:
    @click.group(cls=Program)
    def group() -> None:
        pass

    @group.command()
    @talk_options
    def act() -> None:
        action()

    return group


def failing(error: BaseException) -> click.Group:
    def action() -> None:
        raise error

    return program_that(action)


def test_help_lists_commands_and_statuses_without_loading_jax() -> None:
    program = (
        "import sys\n"
        "from dia2_jax.cli import main\n"
        f"for name in {COMMANDS}: main([name, '--help'], standalone_mode=False)\n"
        "main(['--help'], standalone_mode=False)\n"
        "found = {'jax', 'flax', 'soundfile', 'tokenizers', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(f'imported: {found}' if found else 0)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    top = run.stdout[run.stdout.index("Dia2 in JAX") :]
    assert sorted(main.commands) == COMMANDS
    assert all(f"  {name} " in top for name in COMMANDS)
    for status in ("0", "1", "2", "3", "130", "141"):
        assert f"\n    {status:<3}  " in top


def test_every_option_has_a_help() -> None:
    for name, command in main.commands.items():
        assert command.help and command.short_help, name
        for option in command.params:
            if isinstance(option, click.Option):
                assert option.help, f"{name} {option.opts}"


def test_module_and_version() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "dia2_jax", "--version"], capture_output=True, text=True
    )
    assert run.stdout == f"dia2-jax, version {dia2_jax.__version__}\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ScriptError("the script is empty"), "the script is empty"),
        (OSError(28, "No space left on device", "out.wav"), "out.wav: No space left on device"),
        (PermissionError(13, "Permission denied"), "Permission denied"),
    ],
)
def test_an_error_is_one_line_and_status_1(error: Exception, line: str) -> None:
    run = CliRunner().invoke(failing(error), ["act"])
    assert (run.exit_code, run.stdout, run.stderr) == (1, "", f"dia2-jax: error: {line}\n")


def test_debug_shows_where_an_error_came_from() -> None:
    run = CliRunner().invoke(failing(ScriptError("empty")), ["act", "--debug"])
    assert isinstance(run.exception, ScriptError) and run.exit_code == 1


def test_a_mistake_of_ours_is_not_dressed_up() -> None:
    run = CliRunner().invoke(failing(ZeroDivisionError()), ["act"])
    assert isinstance(run.exception, ZeroDivisionError)


def test_wrong_use_is_status_2() -> None:
    run = CliRunner().invoke(main, ["generate", "Hello", "--seed", "x"])
    assert run.exit_code == 2 and "Invalid value for '--seed'" in run.stderr
    run = CliRunner().invoke(main, ["genrate"])
    assert run.exit_code == 2 and "No such command 'genrate'" in run.stderr


def test_signals_end_with_the_status_shells_expect() -> None:
    run = CliRunner().invoke(failing(KeyboardInterrupt()), ["act"])
    assert (run.exit_code, run.stderr) == (130, "dia2-jax: interrupted\n")
    before = signal.getsignal(signal.SIGTERM)
    terminating = program_that(lambda: os.kill(os.getpid(), signal.SIGTERM))
    run = CliRunner().invoke(terminating, ["act"])
    assert (run.exit_code, run.stderr) == (143, "dia2-jax: terminated\n")
    assert signal.getsignal(signal.SIGTERM) is before
    run = CliRunner().invoke(failing(BrokenPipeError(32, "Broken pipe")), ["act"])
    assert (run.exit_code, run.stderr) == (141, "")
    assert all(str(status) in EPILOG for status in (130, 143, 141))


def test_the_meter_counts_frames_and_their_speed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("dia2_jax.cli.terminal.time.perf_counter", lambda: now[0])
    with Meter(12.5, shown=True) as meter:
        assert meter.summary() == ""
        meter(1)  # compiling
        now[0] += 0.5
        meter(26)  # 25 frames, 2 s of audio, in half a second
        meter._bar.refresh()
        assert meter.summary() == ", 4.00 x real time"
    shown = capsys.readouterr().err
    assert "26 frames" in shown and "4.00 x real time" in shown
    with Meter(12.5, shown=False) as meter:
        meter(5)
    assert capsys.readouterr().err == ""
