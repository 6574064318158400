"""``dia2_generation.json``: how a model wants to be sampled when its user does not say.

{"audio": {"temperature": 0.4}, "cfg_scale": 1.0, "max_padding": 12}

A file of this project, beside ``config.json``; keys are field names of ``GenerationConfig``, and
what it leaves out keeps that class's default.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from dia2_jax.errors import ConfigError, suggest
from dia2_jax.generation.settings import GenerationConfig, SamplingConfig

#: What belongs to a model. Prefixes, their plan and whether they are kept are its user's.
KEYS = ("text", "audio", "cfg_scale", "cfg_filter_k", "initial_padding", "max_padding")
_SAMPLING_KEYS = ("temperature", "top_k")


def read_defaults(path: Path | None) -> GenerationConfig:
    """The settings that a file asks for; ``GenerationConfig()`` where there is no file.

    Raises:
      ConfigError: unreadable, a key that nobody reads, or a value that is none; names all three.
    """
    settings = GenerationConfig()
    if path is None:
        return settings
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from None
    given = dict(_object(raw, KEYS, str(path)))
    try:
        for name in ("text", "audio"):
            if name in given:
                part = _object(given[name], _SAMPLING_KEYS, name)
                given[name] = _sampling(getattr(settings, name), part, name)
        return dataclasses.replace(settings, **given)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def write_defaults(path: Path, settings: GenerationConfig) -> None:
    """Write all that a model can ask for, such that :func:`read_defaults` gives it back.

    Raises:
      ConfigError: the settings ask for more.
    """
    for field in dataclasses.fields(settings):
        if field.name not in KEYS and getattr(settings, field.name) != field.default:
            raise ConfigError(f"{field.name}: its user sets it, a model cannot")
    document = {name: dataclasses.asdict(settings)[name] for name in KEYS}
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _sampling(settings: SamplingConfig, given: dict[str, Any], name: str) -> SamplingConfig:
    try:
        return dataclasses.replace(settings, **given)
    except ConfigError as error:
        raise ConfigError(f"{name}.{error}") from None


def _object(value: Any, known: Collection[str], where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: must be a JSON object, got {json.dumps(value)[:80]}")
    for key in value:
        if key not in known:
            hint = suggest(key, known)
            raise ConfigError(f"{where}: unknown key {key!r}{hint}; known: {', '.join(known)}")
    return value
