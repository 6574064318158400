"""The machine's fp32 matmul peak, to hold a run's arithmetic against."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp

from train.processes import gather

_SECONDS = 0.2


def measure_peak() -> float:
    """Floating-point operations a second of large fp32 matrix products, over all devices.

    The best of several products (2·n³ operations each) on one device of each process. The CPU's
    devices share its cores, so one of them has them all; other devices are counted. All processes
    must call it together.
    """
    return sum(gather(measure_local_peak()))


def measure_local_peak() -> float:
    """The same over the devices of this process alone."""
    on_cpu = jax.default_backend() == "cpu"
    size = 1024 if on_cpu else 8192
    product = jax.jit(lambda x: jnp.matmul(x, x, precision=jax.lax.Precision.HIGHEST))
    matrix = jnp.full((size, size), 1 / size, jnp.float32, device=jax.local_devices()[0])
    product(matrix).block_until_ready()
    best, end = float("inf"), time.perf_counter() + _SECONDS
    while (start := time.perf_counter()) < end:
        product(matrix).block_until_ready()
        best = min(best, time.perf_counter() - start)
    devices = 1 if on_cpu else jax.local_device_count()
    return devices * 2 * size**3 / best
