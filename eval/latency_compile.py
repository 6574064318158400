"""What JAX traces and compiles while something is measured."""

from __future__ import annotations

from collections import Counter
from typing import Any

import jax

_DURATIONS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace_s",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower_s",
    "/jax/core/compile/backend_compile_duration": "xla_s",
}
_COUNTS = {
    "/jax/compilation_cache/cache_hits": "cache_hits",
    "/jax/compilation_cache/cache_misses": "cache_misses",
}


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
