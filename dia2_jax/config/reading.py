"""Strict reading of a JSON document into frozen dataclasses, with errors that name the field."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from dia2_jax.errors import ConfigError, suggest

#: Unknown keys are errors, and nothing is converted: "3" is not 3.
STRICT = ConfigDict(extra="forbid", strict=True)

Config = TypeVar("Config")


def require(condition: bool, field: str, message: str) -> None:
    if not condition:
        raise ValueError(f"{field}: {message}")


def require_positive(instance: Any, *fields: str) -> None:
    for field in fields:
        value = getattr(instance, field)
        require(0 < value < math.inf, field, f"must be positive and finite, got {value}")


def read_json(source: str | Path | dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The document at a path (or in the folder's ``config.json``), and what to call it."""
    if isinstance(source, dict):
        return dict(source), "config"
    path = Path(source)
    if path.is_dir():
        path = path / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(raw).__name__}")
    return raw, str(path)


def validate(kind: type[Config], raw: dict[str, Any], where: str) -> Config:
    """``raw`` as a ``kind``; one error lists everything that is wrong with it."""
    try:
        # JSON mode keeps strictness while reading lists as tuples.
        return TypeAdapter(kind).validate_json(json.dumps(raw))
    except ValidationError as error:
        problems = [_explain(kind, item) for item in error.errors(include_url=False)]
    raise ConfigError(f"{where}: " + "; ".join(problems))


def _explain(kind: type[Any], item: Any) -> str:
    path = [str(part) for part in item["loc"]]
    name = ".".join(path)
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _fields_at(kind, path[:-1])
        hint = suggest(path[-1], known) or f"; known: {', '.join(known)}"
        return f"unknown key {name!r}{hint}"
    if item["type"] in ("missing", "missing_argument"):
        return f"missing field {name!r}"
    if item["type"] == "value_error":  # from _require, which names the field in front
        message = item["msg"].removeprefix("Value error, ")
        return f"{name}.{message}" if name else message
    return f"{name}: {item['msg']}, got {json.dumps(item['input'])[:80]}"


def _fields_at(kind: Any, path: list[str]) -> list[str]:
    """Field names of the dataclass that ``path`` leads to below ``kind``."""
    if path:
        hint = typing.get_type_hints(kind).get(path[0])
        candidates = [hint, *typing.get_args(hint)]
        section = next((c for c in candidates if dataclasses.is_dataclass(c)), None)
        return _fields_at(section, path[1:]) if section else []
    return [field.name for field in dataclasses.fields(kind) if field.name != "bookkeeping"]
