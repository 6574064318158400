"""``--verbose``: where the time from the start of the process to its first audio goes."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dia2_jax.cli.terminal import is_quiet

if TYPE_CHECKING:
    from dia2_jax.compilation_cache import CompileWatch

#: What time is counted from where the system does not tell when a process started.
_IMPORTED = time.perf_counter()

#: Name of the phase of all frames after the first.
FURTHER = "further frames"

verbose_option = click.option(
    "--verbose",
    "-v",
    is_flag=True,
    help="At the end, write to standard error where the time from the start of the process to the "
    "first audio went.",
)


def process_start() -> tuple[float, str]:
    """When this process started, on the clock of ``time.perf_counter``, and what says so.

    Linux keeps it, to a hundredth of a second (proc_pid_stat(5), field 22, in ticks after boot).
    Elsewhere it is when this module was imported: the interpreter's own start, some hundredths of a
    second, is then not in it.
    """
    now = time.perf_counter()
    if sys.platform == "linux":
        try:
            # The name of the program, in brackets, may hold anything, so what follows it counts.
            fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
            started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
            age = time.clock_gettime(time.CLOCK_BOOTTIME) - started
        except (OSError, ValueError, IndexError):
            pass
        else:
            if now - age <= _IMPORTED:  # a sandbox may answer with something else
                return now - age, "the operating system's record of the process"
    return _IMPORTED, "the import of this program's code; the system does not tell more"


@dataclass
class _Phase:
    seconds: float = 0.0
    times: int = 0
    programs: int = 0
    from_cache: int = 0
    compiling: float = 0.0


class Startup:
    """Phases of a start, one after another without a gap, so that they add up to all of it.

    Args:
      wanted: whether anybody asked; if not, nothing is noted and nothing written.

    Raises:
      click.UsageError: wanted, and ``--quiet`` was given.
    """

    def __init__(self, wanted: bool) -> None:
        if wanted and is_quiet():
            raise click.UsageError("--verbose and --quiet exclude each other")
        self._began, self._source = process_start() if wanted else (0.0, "")
        self._last = self._began
        self._phases: dict[str, _Phase] = {}
        self._going = self.wanted = wanted
        self._heard = self._watched = False
        self._watch: CompileWatch | None = None
        self._compiled = (0, 0, 0.0)

    def passed(self, name: str) -> None:
        """What happened since the last call was ``name``; a name that comes again adds to it."""
        if not self._going:
            return
        now = time.perf_counter()
        phase = self._phases.setdefault(name, _Phase())
        phase.seconds += now - self._last
        phase.times += 1
        self._last = now
        if self._watch is not None:
            seconds, counts = sum(self._watch.seconds.values()), self._watch.counts
            compiled = counts["programs"], counts["cache_hits"], seconds
            phase.programs += compiled[0] - self._compiled[0]
            phase.from_cache += compiled[1] - self._compiled[1]
            phase.compiling += compiled[2] - self._compiled[2]
            self._compiled = compiled

    def watch_compiler(self) -> None:
        """Count compiled programs from now on; JAX must be imported, and is not before."""
        if self._going and self._watch is None:
            from dia2_jax.compilation_cache import CompileWatch

            self._watch = CompileWatch()
            self._watch.__enter__()
            self._watched = True

    def worked(self, what: str) -> None:
        """A session computed something; see ``Session.on_work``."""
        if what == "frame" and "first frame" in self._phases:
            self.passed(FURTHER)
        else:
            self.passed({"frame": "first frame", "text": "text, prefill", "chunk": "codec"}[what])

    def heard(self) -> None:
        """The first audio was written: what follows is not part of the start."""
        self.passed("writing")
        self._heard = self._heard or self._going
        self.end()

    def end(self) -> None:
        """Stop counting, whether or not there was audio."""
        self._going = False
        if self._watch is not None:
            self._watch.__exit__(None, None, None)
            self._watch = None

    def write(self) -> None:
        """The block on standard error, if it was wanted."""
        if self.wanted:
            self.end()
            click.echo(self.text(), err=True)

    def text(self) -> str:
        """The phases as lines."""
        total = self._last - self._began
        rows = [
            (f"{phase.times} {name}" if name == FURTHER else name, phase.seconds, _said(phase))
            for name, phase in self._phases.items()
        ]
        end = "first audio written" if self._heard else "no audio was written"
        rows.append((end, total, ""))
        width = max(len(name) for name, _, _ in rows)
        lines = [
            f"  {name:<{width}} {seconds:8.2f} s{note}".rstrip() for name, seconds, note in rows
        ]
        if self._watched:
            from dia2_jax.nn.kernels import kernels_here

            lines.append(f"kernels in C: {kernels_here().reason}")
        return "\n".join([f"start, counted from {self._source}:", *lines])


def _said(phase: _Phase) -> str:
    if not phase.programs:
        return ""
    return (
        f"   {phase.compiling:.2f} s of it for {phase.programs} programs, {phase.from_cache} of "
        "them from disk"
    )
