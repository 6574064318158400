"""A signal to ``eval.latency`` ends what it started, too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

#: ``eval.latency`` where all that is measured is a command of the stopwatch: one that is ready at
#: once, says its number, and then speaks to nobody and hears nothing, also not SIGTERM.
PROGRAM = """
import signal, sys
from eval import latency, latency_stopwatch
from eval.latency_cadences import Schedule

# Tests that run in the background inherit Ctrl-C ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
command = '''
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", file=sys.stderr, flush=True)
open(sys.argv[1], "w").write(str(os.getpid()))
time.sleep(600)
'''
latency_stopwatch.command_of = lambda model, **_: [sys.executable, "-c", command, sys.argv[1]]
latency.measure_model = lambda source, **_: latency_stopwatch.time_command(
    "model", Schedule(((0.0, "a"), (300.0, "b")), 600.0),
    chunk_frames=1, sample_rate=1000, samples_per_frame=50, rest_s=0.0,
)
latency.main(["--config", "dia2_1b"])
"""


def wait_for(path: Path, program: subprocess.Popen[str]) -> int:
    deadline = time.monotonic() + 300  # on a busy machine imports take minutes
    while time.monotonic() < deadline and program.poll() is None:
        if path.exists() and (text := path.read_text()):
            return int(text)
        time.sleep(0.02)
    program.kill()
    raise AssertionError(f"it started nothing: {program.communicate()}")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_program_ends_the_command_that_it_times(
    tmp_path: Path, number: int, status: int
) -> None:
    place = tmp_path / "process"
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(place)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A signal to it alone: a terminal would signal the command as well.
        start_new_session=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    try:
        started = wait_for(place, program)
        assert psutil.pid_exists(started)
        program.send_signal(number)
        _, said = program.communicate(timeout=60)
        assert program.returncode == status, said
        assert "Traceback" not in said
        assert not psutil.pid_exists(started)
    finally:
        program.kill()
        program.wait()
        if place.exists() and (text := place.read_text()) and psutil.pid_exists(int(text)):
            os.kill(int(text), signal.SIGKILL)
