"""Where the time of a run goes: steps, waiting for data, and everything else."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax

#: Work that is summed over the whole run, and kept in checkpoints.
TOTALS = ("frames", "audio_seconds")


class Meter:
    """Speeds of the steps since the last reading.

    Steps are dispatched without waiting for them, so times are only true over an interval whose
    ends wait: :meth:`read` belongs behind reading the metrics of the last step.

    Args:
      peak: floating-point operations a second that the machine can do.
      totals: frames and seconds of audio seen before this part of the run.
    """

    def __init__(self, peak: float, totals: Mapping[str, float] | None = None) -> None:
        self._peak = peak
        self.totals = {name: float((totals or {}).get(name, 0)) for name in TOTALS}
        self._restart()

    def _restart(self) -> None:
        self._start = time.perf_counter()
        self._waited = self._aside = 0.0
        self._steps = 0
        self._work: Counter[str] = Counter()

    @contextmanager
    def data(self) -> Iterator[None]:
        """Around waiting for a batch."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - start

    @contextmanager
    def aside(self, pending: Any) -> Iterator[None]:
        """Around validation, samples, saving and logging, which are no step's time.

        First waits for ``pending``, the arrays of the last step: its time is that step's.
        """
        jax.block_until_ready(pending)
        start = time.perf_counter()
        try:
            yield
        finally:
            self._aside += time.perf_counter() - start

    def count(self, work: Mapping[str, float]) -> None:
        """A step was dispatched, with ``Task.work`` of its batch."""
        self._steps += 1
        self._work.update(work)
        for name in TOTALS:
            self.totals[name] += work.get(name, 0.0)

    def skip_compilation(self, pending: Any) -> float:
        """Leave the first step out of the speeds; returns the seconds that it took."""
        jax.block_until_ready(pending)
        seconds = time.perf_counter() - self._start
        self._restart()
        return seconds

    def read(self) -> dict[str, float]:
        """Means over the steps since the last reading, and the hours of audio seen in all.

        ``step_seconds`` without waiting for data, ``data_share`` of the time of steps and waiting,
        ``frames_per_second``, ``peak_share`` (operations of the model a second over the machine's
        peak) and ``real_share`` of the frames.
        """
        values = {"audio_hours": self.totals["audio_seconds"] / 3600}
        seconds = time.perf_counter() - self._start - self._aside
        if self._steps and seconds > 0:
            values["step_seconds"] = max(0.0, seconds - self._waited) / self._steps
            values["data_share"] = min(1.0, self._waited / seconds)
            values["frames_per_second"] = self._work["frames"] / seconds
            values["peak_share"] = self._work["flops"] / seconds / self._peak
            values["real_share"] = self._work["real_share"] / self._steps
        self._restart()
        return values
