"""Where compiled programs are kept between processes."""

from __future__ import annotations

import os
from pathlib import Path

import jax

#: Set to a folder to keep compiled programs there, or to "off".
CACHE_VARIABLE = "DIA2_JAX_CACHE"


def enable_compilation_cache() -> None:
    """Keep compiled programs on disk, so that a second process need not compile again.

    In ``~/.cache/dia2-jax/xla`` unless ``DIA2_JAX_CACHE`` names another folder or is ``off``. A
    cache that the caller configured in JAX is left alone. `dia2-jax warmup --help` says what the
    key of a program is made of.
    """
    choice = os.environ.get(CACHE_VARIABLE, "")
    if choice.lower() == "off" or jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(choice) if choice else home / "dia2-jax" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
