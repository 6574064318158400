"""Dia2 in JAX: streaming dialogue text-to-speech.

The public names load lazily, so ``import dia2_jax`` (and ``dia2-jax --help``)
does not pay for JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dia2_jax.engine import Dia2 as Dia2
    from dia2_jax.generation.settings import GenerationConfig as GenerationConfig
    from dia2_jax.generation.settings import SamplingConfig as SamplingConfig
    from dia2_jax.voice import Turn as Turn
    from dia2_jax.voice import Voice as Voice

__version__ = "0.1.0"

_EXPORTS = {
    "Dia2": "dia2_jax.engine",
    "GenerationConfig": "dia2_jax.generation.settings",
    "SamplingConfig": "dia2_jax.generation.settings",
    "Turn": "dia2_jax.voice",
    "Voice": "dia2_jax.voice",
}

__all__ = ["Dia2", "GenerationConfig", "SamplingConfig", "Turn", "Voice", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'dia2_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
