"""What the numbers were measured on: versions, processor, memory of a process, memory bandwidth."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import psutil

_GB = 1e9


def cores() -> int:
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe() -> dict[str, Any]:
    """Processor, cores, memory, and how busy the machine is before anything is measured."""
    return {
        "cpu": _cpu_model(),
        "cores": cores(),
        "memory_gb": psutil.virtual_memory().total / _GB,
        "system": platform.platform(),
        "load_average_1min": os.getloadavg()[0],
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


class OtherWork:
    """How much of the machine other programs used since this was made.

    Two sides that wait for each other's threads suffer unevenly from a third program, so times and
    ratios of a busy machine mean nothing.
    """

    def __init__(self) -> None:
        self._start = self._sample()

    def share(self) -> float:
        """Processor time of all programs but this one and its children, 0 to 1 of all cores."""
        wall, busy, own = (b - a for a, b in zip(self._start, self._sample(), strict=True))
        return min(max((busy - own) / max(wall, 1e-9), 0.0), 1.0)

    @staticmethod
    def _sample() -> tuple[float, float, float]:
        system = psutil.cpu_times()
        wall = sum(system)
        idle = system.idle + getattr(system, "iowait", 0.0)
        # Linux counts guests in user time, too.
        guests = getattr(system, "guest", 0.0) + getattr(system, "guest_nice", 0.0)
        me = psutil.Process()
        mine = me.cpu_times()
        # Children that ended are counted in their parent; those still running are not.
        own = mine.user + mine.system + mine.children_user + mine.children_system
        for child in me.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                times = child.cpu_times()
                own += times.user + times.system + times.children_user + times.children_system
        return wall - guests, wall - guests - idle, own


def versions(*names: str) -> dict[str, str | None]:
    """Installed versions of Python and some distributions; None where one is not installed."""
    return {"python": platform.python_version(), **package_versions(*names)}


def package_versions(*names: str) -> dict[str, str | None]:
    """Installed versions of some distributions; None where one is not installed."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def return_freed_memory() -> None:
    """Hand what was freed back to the system, where the C library can (glibc's ``malloc_trim``)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def memory() -> dict[str, float | None]:
    """Memory of this process now, and the peak of all of it.

    ``anonymous`` leaves out pages of files, such as a mapped checkpoint, which the system takes
    back when it needs them. It is None where the system does not tell (anywhere but on Linux).
    """
    status = _status()
    peak = status.get("VmHWM")
    return {
        "rss_gb": psutil.Process().memory_info().rss / _GB,
        "rss_peak_gb": None if peak is None else peak / _GB,
        "anonymous_gb": None if "RssAnon" not in status else status["RssAnon"] / _GB,
    }


def anonymous_bytes() -> int | None:
    """Anonymous memory of this process in bytes, None where the system does not tell."""
    return _status().get("RssAnon")


def _status() -> dict[str, int]:
    """The sizes in /proc/self/status, in bytes."""
    path = Path("/proc/self/status")
    if not path.is_file():
        return {}
    fields = (line.split() for line in path.read_text().splitlines())
    return {f[0].rstrip(":"): int(f[1]) * 1024 for f in fields if len(f) == 3 and f[2] == "kB"}


class AnonymousPeak:
    """Highest anonymous memory while inside the ``with``, looked up every few milliseconds.

    Attributes:
      before, peak: bytes; None where the system does not tell.
    """

    def __init__(self, interval_s: float = 0.005) -> None:
        self.before = self.peak = anonymous_bytes()
        self._interval = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> AnonymousPeak:
        self.before = self.peak = anonymous_bytes()
        if self.before is not None:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self.before is not None:
            self._thread.join()
            self._look()

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            self._look()

    def _look(self) -> None:
        now = anonymous_bytes()
        if now is not None and self.peak is not None:
            self.peak = max(self.peak, now)


def read_bandwidth(gigabytes: float, repeats: int = 5) -> dict[str, float]:
    """GB/s at which this machine reads memory, by reductions over a large array.

    Every core reduces its own part, in several ways; each way is repeated and its best counts,
    because a bandwidth is what can be reached. The matrix-vector product is what a step mostly
    does, so it is among the ways, and so is the kernel's where there is one.
    """
    import jax
    import jax.numpy as jnp

    from dia2_jax.nn.kernels import product_float32, use_float32

    columns = 4096
    rows = max(int(gigabytes * _GB / 4 / columns), 1)
    host = np.ones((rows, columns), np.float32)
    parts = np.array_split(host, cores())
    vector = jnp.ones((columns,), jnp.float32)
    # Taken as it is where its address allows, else copied.
    device = jnp.asarray(host)
    product = jax.jit(lambda matrix: matrix @ vector)
    with ThreadPoolExecutor(cores()) as pool:
        ways = {
            "numpy_max_gb_per_s": lambda: list(pool.map(np.max, parts)),
            "numpy_sum_gb_per_s": lambda: list(pool.map(_sum_of_words, parts)),
            "jax_matvec_gb_per_s": lambda: product(device).block_until_ready(),
        }
        if use_float32():
            kernel = jax.jit(lambda matrix: product_float32(vector[None], matrix))
            ways["kernel_product_gb_per_s"] = lambda: kernel(device).block_until_ready()
        rates = {}
        for name, run in ways.items():
            run()
            best = min(_seconds(run) for _ in range(repeats))
            rates[name] = host.nbytes / best / _GB
    return {**rates, "best_gb_per_s": max(rates.values())}


def _sum_of_words(part: np.ndarray) -> Any:
    return np.add.reduce(part.reshape(-1).view(np.int64))


def _seconds(run: Any) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
