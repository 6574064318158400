"""The errors this package raises on bad input.

Every message says what is wrong, where, and what to do about it. All of them
derive from :class:`Dia2Error`, so a caller can catch one type; each also derives
from the builtin that a Python reader would expect.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Dia2Error(Exception):
    """Base of every error raised on purpose by dia2_jax."""


class ConfigError(Dia2Error, ValueError):
    """A configuration file or setting is malformed; the message names the field."""


class CheckpointError(Dia2Error, ValueError):
    """Weights are missing, misshapen, truncated or do not belong to the config."""


class HubError(Dia2Error, OSError):
    """A file could not be found locally or fetched from the Hugging Face hub."""


class ScriptError(Dia2Error, ValueError):
    """A script cannot be spoken: empty, or without a speakable word."""


class PrefixError(Dia2Error, ValueError):
    """A voice or conversation prefix cannot be used as given."""


class AlignmentError(Dia2Error, ValueError):
    """Words and times of a recording cannot be laid out over the frames of the model."""


class DataError(Dia2Error, ValueError):
    """A prepared data set is missing, damaged, or does not fit the model it is to train."""


class AudioError(Dia2Error, ValueError):
    """An audio file cannot be read or has an impossible shape or rate."""


class NonFiniteError(Dia2Error, FloatingPointError):
    """The model produced NaN or infinite logits."""


class SessionError(Dia2Error, RuntimeError):
    """A streaming session was used out of order (fed after close, after cancel)."""


def suggest(name: str, known: Iterable[str]) -> str:
    """What a message about an unknown name adds: " (did you mean …?)", or nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def describe(error: BaseException) -> str:
    """The message that a user of the command line reads; of a system's error, file and reason."""
    if isinstance(error, OSError) and error.strerror and not isinstance(error, Dia2Error):
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)
