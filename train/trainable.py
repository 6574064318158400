"""Which parameters train: path patterns over the flat dict of parameters.

A set of parameters in training is a flat dict ``{dotted path: array}``. Patterns are shell globs
over whole paths, case-sensitive; ``*`` also crosses dots, so ``transformer.layers.*.attn.*`` names
the attention weights of every decoder layer and ``depformer.*`` the whole depformer.

Freezing is exact because it is structural: frozen tensors are not arguments of the gradient, so
they get neither a gradient nor optimiser state, and no update of size zero is ever added to them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from dia2_jax.errors import ConfigError

Leaf = TypeVar("Leaf")

#: Tables that are looked up by id, not multiplied with.
EMBEDDINGS = ("*embeds.*.weight", "*.embedding.weight", "*.embed_sum")


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Whether any of `patterns` matches the whole of `path`."""
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def select(paths: Collection[str], patterns: Sequence[str], field: str) -> list[str]:
    """The paths that some pattern matches, in the order of `paths`.

    Args:
      paths: dotted paths of the parameters.
      patterns: shell globs over whole paths.
      field: name of the setting that holds the patterns, for the message.

    Raises:
      ConfigError: patterns that match nothing; names each, with the nearest paths.
    """
    problems = []
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in paths):
            near = _near(pattern, paths)
            hint = f"; near it: {', '.join(near)}" if near else ""
            problems.append(f"{pattern!r} matches no parameter{hint}")
    if problems:
        raise ConfigError(f"{field}: " + "; ".join(problems))
    return [path for path in paths if matches(path, patterns)]


def partition(
    params: Mapping[str, Leaf],
    frozen: Sequence[str] = (),
    trainable: Sequence[str] = (),
) -> tuple[dict[str, Leaf], dict[str, Leaf]]:
    """Split parameters into those that train and those that stay as they are.

    Args:
      params: flat dict of parameters (arrays or ``jax.ShapeDtypeStruct``).
      frozen: patterns of what does not train; they win over `trainable`.
      trainable: patterns of what trains; empty means everything.

    Returns:
      The trainable and the frozen part, flat dicts in the order of `params`.

    Raises:
      ConfigError: a pattern that matches nothing, or nothing left to train.
    """
    chosen = set(select(params, trainable, "trainable") if trainable else params)
    chosen -= set(select(params, frozen, "frozen"))
    if not chosen:
        raise ConfigError(
            f"frozen {list(frozen)} and trainable {list(trainable)} leave nothing to train; "
            "drop a frozen pattern"
        )
    return (
        {path: leaf for path, leaf in params.items() if path in chosen},
        {path: leaf for path, leaf in params.items() if path not in chosen},
    )


def combine(trainable: Mapping[str, Leaf], frozen: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """The inverse of :func:`partition`, up to order (pytrees of dicts have none).

    Raises:
      ValueError: a path is in both.
    """
    both = sorted(trainable.keys() & frozen.keys())
    if both:
        raise ValueError(f"parameters are both trainable and frozen: {', '.join(both[:5])}")
    return {**trainable, **frozen}


def is_projection(path: str, shape: Sequence[int]) -> bool:
    """Whether a parameter is the ``[out, in]`` matrix of a Linear (not a table, not a conv)."""
    return path.endswith(".weight") and len(shape) == 2 and not matches(path, EMBEDDINGS)


def _near(pattern: str, paths: Collection[str]) -> list[str]:
    """Up to three paths that resemble a pattern; layers that differ by their number are one."""
    kinds = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path) for path in paths))
    return difflib.get_close_matches(pattern, kinds, n=3, cutoff=0.0)
