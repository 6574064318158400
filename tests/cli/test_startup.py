"""``--verbose``: the time from the start of the process to the first audio, and its parts."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from dia2_jax.cli import startup
from dia2_jax.cli.startup import Startup, process_start
from dia2_jax.nn.kernels import kernels

BLOCK = re.compile(r"^start, counted from .*:$((?:\n  .* +\d+\.\d\d s.*)+)", re.MULTILINE)


def phases(stderr: str) -> dict[str, float]:
    """Seconds by phase of the block, which must be there once."""
    (block,) = BLOCK.findall(stderr)
    lines = [re.fullmatch(r"  (.*?) +(\d+\.\d\d) s.*", line) for line in block.splitlines()[1:]]
    assert all(lines), block
    return {line[1]: float(line[2]) for line in lines if line}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
def test_the_start_of_the_process_is_before_its_first_line() -> None:
    code = (
        "import time; time.sleep(0.3)\n"
        "from dia2_jax.cli.startup import process_start\n"
        "began, source = process_start(); print(time.perf_counter() - began, source)"
    )
    before = time.perf_counter()
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lasted = time.perf_counter() - before
    age, _, source = said.stdout.partition(" ")
    assert source == "the operating system's record of the process\n"
    assert 0.3 <= float(age) <= lasted + 0.02  # ticks are hundredths


def test_a_system_that_does_not_tell_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_bytes", lambda _: b"nothing of use")
    began, source = process_start()
    assert began == startup._IMPORTED and "does not tell" in source
    # An answer that is later than our own import is none.
    monkeypatch.setattr(Path, "read_bytes", lambda _: b"1 (a) S" + b" 0" * 18 + b" 99999999999")
    assert process_start() == (began, source)


def test_phases_add_up_and_end_with_the_first_audio(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(startup.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(startup, "process_start", lambda: (100.0, "a record"))
    with click.Context(click.Command("x")):
        found = Startup(True)

    def at(second: float, call: Callable[..., None], *arguments: Any) -> None:
        now[0] = 100 + second
        call(*arguments)

    at(0.25, found.passed, "imports")
    at(1.25, found.worked, "text")
    at(2.00, found.worked, "frame")
    for second in (2.25, 2.5):
        at(second, found.worked, "frame")
    at(2.75, found.worked, "chunk")
    at(3.00, found.heard)
    at(9.00, found.worked, "frame")  # no longer the start
    assert found.text().splitlines() == [
        "start, counted from a record:",
        "  imports                 0.25 s",
        "  text, prefill           1.00 s",
        "  first frame             0.75 s",
        "  2 further frames        0.50 s",
        "  codec                   0.25 s",
        "  writing                 0.25 s",
        "  first audio written     3.00 s",
    ]


def test_compiled_programs_are_told_by_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    with click.Context(click.Command("x")):
        found = Startup(True)
    found.watch_compiler()
    watch = found._watch
    assert watch is not None
    watch.seconds["xla_s"] += 1.5
    watch.counts.update(programs=3, cache_hits=2)
    found.passed("compiling")
    found.passed("session")
    found.end()
    lines = found.text().splitlines()
    assert lines[1].endswith(" s   1.50 s of it for 3 programs, 2 of them from disk")
    assert lines[2].endswith(" s") and lines[3].startswith("  no audio was written ")


def test_nothing_is_noted_unless_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    found = Startup(False)
    found.watch_compiler()
    found.passed("imports")
    found.heard()
    found.write()
    assert found._phases == {} and found._watch is None
    assert capsys.readouterr() == ("", "")


# --------------------------------------------------------------------------------------- commands


def test_quiet_and_verbose_exclude_each_other(command: Any) -> None:
    for name in (["stream"], ["generate", "Yes.", "-o", "out.wav"]):
        run = command(*name, "-m", "x", "--quiet", "--verbose")
        assert run.exit_code == 2 and "--verbose and --quiet exclude each other" in run.stderr


def test_stream_says_where_its_start_went(
    command: Any, tiny_model_folder: Path, stdin_pipe: Callable[[bytes], None]
) -> None:
    stdin_pipe(b"[S1] Yes.")
    stdin_pipe(b"")
    run = command("stream", "-m", tiny_model_folder, "--verbose")
    assert run.exit_code == 0, run.stderr
    found = phases(run.stderr)
    # Silence before the first word needs no text, so frames may come before it.
    assert {re.sub(r"\d+", "N", name) for name in found} == {
        "Python, options", "imports", "weights", "compiling, or reading what was compiled",
        "session", "text, prefill", "waiting for text", "first frame", "N further frames", "codec",
        "writing", "first audio written",
    }  # fmt: skip
    assert run.stderr.splitlines()[-1] == f"kernels in C: {kernels().reason}"
    total = found.pop("first audio written")
    assert total == pytest.approx(sum(found.values()), abs=0.005 * (len(found) + 1))


def test_generate_says_where_its_start_went(command: Any, tiny_model_folder: Path) -> None:
    run = command("generate", "[S1] Yes.", "-m", tiny_model_folder, "-o", "out.wav", "-v")
    assert run.exit_code == 0, run.stderr
    names = [re.sub(r"\d+", "N", name) for name in phases(run.stderr)]
    assert names == [
        "Python, options", "script", "imports", "weights", "prefill and first frame",
        "N further frames", "codec, all frames", "writing", "first audio written",
    ]  # fmt: skip
    assert command("generate", "Yes.", "-m", tiny_model_folder, "-o", "b.wav").stderr == ""
