"""What the C library does with memory that a process gives back."""

from __future__ import annotations

import contextlib
import ctypes

_M_ARENA_MAX = -8  # of glibc's mallopt


def use_one_arena() -> None:
    """Let all threads allocate from one arena, where the C library is glibc; call it at the start.

    By default every thread has one of its own. What XLA's threads free after a program is loaded
    is then of no use to the others. Programs call this; a library does not choose for the process
    it is loaded into (``MALLOC_ARENA_MAX=1`` does the same from outside).
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
