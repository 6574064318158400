"""Signals during a run: the first one asks it to stop after the current step, a second one ends it.

SIGTERM comes from schedulers that take the machine away, SIGINT from Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType

from train.processes import Agreement, is_leader

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
#: Seconds in which a second signal is the first one's echo: `timeout`, launchers and terminals
#: signal a process and its group.
_ECHO = 0.1
_TEXT = b"\nstopping after this step, with a checkpoint; a second signal stops at once\n"


class Interrupt:
    """Whether to save or stop after a step, agreed on by all processes.

        with Interrupt(save_minutes=10) as interrupt:
            for step in …:
                …
                wish = interrupt.poll()
                if wish.save: …
                if wish.signal: break

    Args:
      save_minutes: a save is also due when the last one is this old, by the clock of the first
        process; 0 means never.
    """

    def __init__(self, save_minutes: float = 0) -> None:
        self.signal: int = 0
        self.save: bool = False
        self._seconds = save_minutes * 60
        self._saved = time.monotonic()
        self._agree = Agreement()
        self._before: dict[int, object] = {}
        self._received = 0
        self._first = 0.0

    def poll(self) -> None:
        """Once a step: sets :attr:`signal` (its number or 0) and :attr:`save`."""
        due = self._seconds > 0 and time.monotonic() - self._saved >= self._seconds
        agreed = self._agree(2 * self._received + int(due and is_leader()))
        self.signal, self.save = agreed // 2, bool(agreed % 2)

    def saved(self) -> None:
        """Start the clock of ``save_minutes`` anew."""
        self._saved = time.monotonic()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received and time.monotonic() - self._first < _ECHO:
            return
        if self._received:
            # Nothing is cleaned up, which a run survives: what is unfinished has another name.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._received, self._first = number, time.monotonic()
        os.write(2, _TEXT)

    def __enter__(self) -> Interrupt:
        for number in _SIGNALS:
            # A shell starts background jobs with Ctrl-C ignored, and so it stays.
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            # None: jax.distributed had put a handler of its own there, from C++.
            signal.signal(number, handler or signal.SIG_DFL)  # type: ignore[arg-type]
