"""Shapes of models from files: ``config.json`` as published, or YAML as in ``configs/``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dia2_jax.errors import ConfigError

Shape = TypeVar("Shape")


def read_shape_file(path: Path, load: Callable[[Any], Shape], setting: str) -> Shape:
    """What `load` makes of a file.

    Args:
      path: the file.
      load: ``load_dia2_config`` or ``load_mimi_config``; reads a JSON file itself.
      setting: what named the file, for the message.

    Raises:
      ConfigError: naming the setting or the file, and what is wrong.
    """
    if path.suffix.lower() not in (".yaml", ".yml"):
        return load(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{setting}: {path}: {error.strerror}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected the names and values of a model's config")
    try:
        return load(raw)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
