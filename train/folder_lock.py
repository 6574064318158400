"""One process at a time in a folder: of a training run, of an evaluation."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dia2_jax.errors import ConfigError


@contextmanager
def held(folder: Path, refusal: str) -> Iterator[None]:
    """Hold a folder, so that what was started twice does not write into its own work.

    The lock is one of the folder itself and ends with the process, however that ends: nothing is
    left behind. Some network file systems refuse it; processes are not kept apart there.

    Args:
      refusal: what is said, after the folder's name, where another process holds it.

    Raises:
      ConfigError: another process holds it.
      OSError: there is no such folder.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{folder}: {refusal}") from None
        except OSError:
            pass
        yield
    finally:
        os.close(handle)
