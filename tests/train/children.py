"""Programs that a test starts; none outlives it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]

#: ``start(arguments, environment)``: Python with these arguments, in the checkout.
StartPython = Callable[[list[str], Mapping[str, str]], "subprocess.Popen[str]"]


@contextmanager
def family() -> Iterator[StartPython]:
    """Starts children whose standard error is read; those that still run at the end are killed."""
    children: list[subprocess.Popen[str]] = []

    def start(arguments: list[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        children.append(child)
        return child

    try:
        yield start
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
            child.communicate()
