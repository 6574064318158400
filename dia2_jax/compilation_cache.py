"""Where compiled programs are kept between processes, and what JAX compiles meanwhile."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import jax

#: Set to a folder to keep compiled programs there, or to "off".
CACHE_VARIABLE = "DIA2_JAX_CACHE"

_DURATIONS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace_s",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower_s",
    "/jax/core/compile/backend_compile_duration": "xla_s",
}
_COUNTS = {
    "/jax/compilation_cache/cache_hits": "cache_hits",
    "/jax/compilation_cache/cache_misses": "cache_misses",
}


def cache_folder() -> Path | None:
    """``~/.cache/dia2-jax/xla``, or what ``DIA2_JAX_CACHE`` names; None if that is ``off``."""
    choice = os.environ.get(CACHE_VARIABLE, "")
    if choice.lower() == "off":
        return None
    if choice:
        return Path(choice)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "dia2-jax" / "xla"


def enable_compilation_cache() -> None:
    """Keep compiled programs on disk, so that a second process need not compile again.

    In :func:`cache_folder`; a cache that the caller configured in JAX is left alone.
    `dia2-jax warmup --help` says what the key of a program is made of.
    """
    folder = cache_folder()
    if folder is None or jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # About what reading a small program takes.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)


class CompileWatch:
    """Counts what JAX traces and compiles while inside the ``with``.

    ``seconds`` has trace_s, lower_s and xla_s (compiling, or reading a compiled program from the
    cache); ``counts`` has programs, cache_hits and cache_misses.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(_DURATIONS.values(), 0.0)
        self.counts: Counter[str] = Counter(programs=0, cache_hits=0, cache_misses=0)

    def _duration(self, event: str, duration_secs: float, **_: Any) -> None:
        if event in _DURATIONS:
            name = _DURATIONS[event]
            self.seconds[name] += duration_secs
            self.counts["programs"] += name == "xla_s"

    def _count(self, event: str, **_: Any) -> None:
        if event in _COUNTS:
            self.counts[_COUNTS[event]] += 1

    def __enter__(self) -> CompileWatch:
        jax.monitoring.register_event_duration_secs_listener(self._duration)
        jax.monitoring.register_event_listener(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._duration)
        jax.monitoring.unregister_event_listener(self._count)
