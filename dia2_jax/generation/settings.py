"""What a caller may choose about a generation, with upstream's names for settings."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from dia2_jax.errors import ConfigError

#: Upstream's ``max_padding``, which it hard-codes.
MAX_PADDING = 6

# Settings travel to the device as 32-bit numbers.
_LARGEST_COUNT, _LARGEST_NUMBER = 2**31 - 1, 3e38


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, float | int | np.floating | np.integer):
        return False
    return math.isfinite(value) and abs(float(value)) < _LARGEST_NUMBER


def _is_count(value: Any) -> bool:
    return (
        isinstance(value, int | np.integer)
        and not isinstance(value, bool)
        and bool(0 <= value <= _LARGEST_COUNT)
    )


@dataclass(frozen=True)
class SamplingConfig:
    """How one kind of token is drawn.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token.
      top_k: only this many of the most likely tokens can be drawn; 0 for all.
    """

    temperature: float = 0.8
    top_k: int = 50

    def __post_init__(self) -> None:
        if not (_is_number(self.temperature) and self.temperature >= 0):
            raise ConfigError(
                f"temperature: must be a finite number >= 0 (0 for the most likely token), got "
                f"{self.temperature!r}"
            )
        if not _is_count(self.top_k):
            raise ConfigError(f"top_k: must be a whole number >= 0 (0 for all), got {self.top_k!r}")


@dataclass(frozen=True)
class GenerationConfig:
    """Settings of a generation or a session.

    A model may have defaults of its own: ``Dia2.defaults``.

    Attributes:
      text: how actions (start a word / pad) are drawn.
      audio: how codes are drawn.
      cfg_scale: classifier-free guidance; 1.0 turns it off. Upstream's demo offers 1 to 8.
      cfg_filter_k: guidance keeps this many candidates, by guided logits; the survivors are drawn
        by their conditional logits. 0 keeps all, which turns guidance off in effect.
      initial_padding: frames before the first word may start.
      max_padding: frames without a word after which the next one starts on its own; as many are
        generated after the end of the text. A model wants the number that its training data were
        prepared with (``train.prepare --max-padding``); upstream knows 6 alone.
      include_prefix: keep the prefix's own audio at the start of the output.
      prefix_plan: ``"exact"`` takes every prefix word inside the prefix, once; ``"upstream"``
        reproduces upstream's warm-up, whose dropped starts leave the last words of a dense prefix
        to be spoken again.
    """

    text: SamplingConfig = field(default_factory=lambda: SamplingConfig(0.6, 50))
    audio: SamplingConfig = field(default_factory=lambda: SamplingConfig(0.8, 50))
    cfg_scale: float = 2.0
    cfg_filter_k: int = 50
    initial_padding: int = 2
    max_padding: int = MAX_PADDING
    include_prefix: bool = False
    prefix_plan: Literal["exact", "upstream"] = "exact"

    def __post_init__(self) -> None:
        for name in ("text", "audio"):
            if not isinstance(getattr(self, name), SamplingConfig):
                raise ConfigError(f"{name}: must be a SamplingConfig, got {getattr(self, name)!r}")
        if not (_is_number(self.cfg_scale) and self.cfg_scale > 0):
            raise ConfigError(
                f"cfg_scale: must be a finite number > 0 (1.0 for no guidance), got "
                f"{self.cfg_scale!r}"
            )
        for name in ("cfg_filter_k", "initial_padding"):
            value = getattr(self, name)
            if not _is_count(value):
                raise ConfigError(f"{name}: must be a whole number >= 0, got {value!r}")
        if not (_is_count(self.max_padding) and self.max_padding >= 1):
            raise ConfigError(f"max_padding: must be a whole number >= 1, got {self.max_padding!r}")
        if self.prefix_plan not in ("exact", "upstream"):
            raise ConfigError(
                f"prefix_plan: must be 'exact' or 'upstream', got {self.prefix_plan!r}"
            )
