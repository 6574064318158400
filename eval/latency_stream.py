"""A session driven in real time: text fed as a schedule says, audio noted as it comes.

The loop is that of ``dia2-jax stream``: everything that can be computed is computed, and only then
the next piece of text is taken, at once if it has arrived meanwhile. A piece counts as arrived
when its schedule says so, whether or not the session was busy at that moment. Frames that need no
text (the padding before the first word) are computed before the clock starts, as the command
computes them before its text arrives; and as there, the text can find a session that has waited for
it, whose threads and processors sleep: waking them is part of what a listener waits for. A chunk is
there when it was delivered; to a :class:`Client`, that is when another process can read it.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from subprocess import PIPE
from typing import Any, Protocol

import numpy as np

from dia2_jax.audio import to_pcm16
from dia2_jax.typing import Float
from eval.latency_cadences import Schedule
from eval.latency_listener import Chunk, Span, Take, level_dbfs


class Client:
    """Somebody at the other end of a pipe, who takes samples as they come and does nothing else.

    What reaches a listener has been made 16-bit PCM, written, and read by another process, which
    wakes for every chunk and takes its time of the processors. On a model that needs milliseconds
    for a frame that is a part of them; `eval.latency_stopwatch` measures from such an end.
    """

    _PROGRAM = "import os\nwhile os.read(0, 65536): pass"

    def __init__(self) -> None:
        # In a session of its own Ctrl-C does not reach it; it ends with the pipe.
        command = [sys.executable, "-S", "-c", self._PROGRAM]
        self._process = subprocess.Popen(command, stdin=PIPE, start_new_session=True)

    def take(self, pcm: Float[np.ndarray, " W"]) -> None:
        """Samples within +-1, written when this returns."""
        assert self._process.stdin is not None
        self._process.stdin.write(to_pcm16(pcm))
        self._process.stdin.flush()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class Speaker(Protocol):
    """What is used of a ``Session``."""

    @property
    def finished(self) -> bool: ...
    @property
    def waiting(self) -> bool: ...
    @property
    def sample_rate(self) -> int: ...
    def feed(self, text: str) -> None: ...
    def close(self) -> None: ...
    def __iter__(self) -> Any: ...


def speak(
    session: Speaker,
    schedule: Schedule,
    *,
    rest: float = 0.0,
    deliver: Callable[[Float[np.ndarray, " W"]], object] = lambda pcm: None,
    now: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
    until: Callable[[Chunk], bool] = lambda chunk: False,
) -> Take:
    """Feed a session by a schedule until everything was said.

    Args:
      session: one that was fed nothing.
      schedule: of the text; its zero is when the session needs text for the first time.
      deliver: takes the samples of a chunk; what it takes is part of the time.
      rest: seconds that the session waits for its text before the schedule's zero.
      now, sleep: a clock and a way to pass time, in seconds.
      until: stops after the first chunk for which it holds, of those that needed text.

    Returns:
      The take, in seconds of the schedule. ``fed`` holds the pieces that were asked for. Audio
      that needs no text at all (of a model whose codes are delayed by less than the padding) is
      there at zero.

    Raises:
      ScriptError: nothing of the text can be spoken.
    """
    coming: deque[tuple[float, str | None]] = deque([*schedule.pieces, (schedule.end, None)])
    fed: list[float] = []
    rate = session.sample_rate
    chunks = [_chunk(0.0, each.pcm, rate) for each in session]
    if rest:
        sleep(rest)
    start = now()
    waits: list[Span] = []
    began: int | None = None
    ended: float | None = None

    def drain(ready: Iterable[Any]) -> bool:
        for each in ready:
            deliver(each.pcm)
            chunks.append(_chunk(now() - start, each.pcm, rate))
            if until(chunks[-1]):
                return False
        return not session.finished

    while drain(session) and coming:
        due, text = coming.popleft()
        asked = now() - start
        if asked < due:
            sleep(due - asked)
            waits.append((asked, now() - start))
        if text is None:
            ended = due
            session.close()
        else:
            fed.append(due)
            session.feed(text)
        if began is None and not session.waiting:
            began = len(fed) - (text is not None)
    return Take(tuple(fed), ended, began, tuple(chunks), tuple(waits))


def _chunk(at: float, pcm: Float[np.ndarray, " W"], sample_rate: int) -> Chunk:
    return Chunk(at, pcm.size / sample_rate, level_dbfs(pcm))
