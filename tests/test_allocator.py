"""One arena: what one thread freed another can use, so that memory does not grow with threads."""

from __future__ import annotations

import subprocess
import sys

import pytest

#: Threads that each allocate many small pieces and free them; how many arenas there are then.
PROGRAM = """
import ctypes, sys, threading
if sys.argv[1] == "one":
    from dia2_jax.allocator import use_one_arena
    use_one_arena()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
def work():
    held = [libc.malloc(1000) for _ in range(1000)]
    ready.wait()
    for each in held:
        libc.free(each)
ready = threading.Barrier(4)
threads = [threading.Thread(target=work) for _ in range(4)]
for each in threads: each.start()
for each in threads: each.join()
libc.malloc_stats()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's statistics")
def test_threads_share_one_arena() -> None:
    def arenas(kind: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, kind], capture_output=True, text=True, check=True
        )
        return done.stderr.count("Arena ")

    assert arenas("one") == 1 < arenas("many")
