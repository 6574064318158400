"""Conversion as a table: rows of name patterns with a transform and its inverse, and plans.

A :class:`Rule` relates published tensors to our parameters. Patterns are dotted names with
placeholders: ``{i}`` stands for an integer, ``{side:encoder|decoder}`` for one of the listed
words. All patterns of a rule carry the same placeholders, so that the names on one side
determine those on the other. A :class:`Table` is total: it plans a conversion only when every
published tensor has a place, every parameter is filled and every shape agrees, and otherwise
lists all that is wrong in one error.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dia2_jax.errors import CheckpointError

Shape = tuple[int, ...]

_PLACEHOLDER = re.compile(r"\{(\w+)(?::([\w|]+))?\}")


class Transform:
    """A bijection between the published arrays of a rule and ours; this one changes nothing.

    Subclasses override all four methods. Shapes are mapped without data, so that a plan is
    checked before a byte is read; an impossible shape raises ValueError with the reason.
    """

    def to_ours(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Our arrays from the published ones."""
        return list(arrays)

    def to_published(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The published arrays from ours; the exact inverse of :meth:`to_ours`."""
        return list(arrays)

    def shapes_to_ours(self, shapes: Sequence[Shape]) -> list[Shape]:
        """Shapes :meth:`to_ours` would give."""
        return list(shapes)

    def shapes_to_published(self, shapes: Sequence[Shape]) -> list[Shape]:
        """Shapes :meth:`to_published` would give."""
        return list(shapes)


IDENTITY = Transform()


@dataclass(frozen=True)
class Transpose(Transform):
    """One array whose axes are permuted: our axis `n` is the published axis ``axes[n]``."""

    axes: tuple[int, ...]

    def to_ours(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [array.transpose(self.axes) for array in arrays]

    def to_published(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [array.transpose(np.argsort(self.axes)) for array in arrays]

    def shapes_to_ours(self, shapes: Sequence[Shape]) -> list[Shape]:
        return [self._permute(shape, self.axes) for shape in shapes]

    def shapes_to_published(self, shapes: Sequence[Shape]) -> list[Shape]:
        return [self._permute(shape, tuple(np.argsort(self.axes))) for shape in shapes]

    def _permute(self, shape: Shape, axes: Sequence[int]) -> Shape:
        if len(shape) != len(axes):
            raise ValueError(f"has {len(shape)} axes, not {len(axes)}")
        return tuple(shape[axis] for axis in axes)


def _as_spellings(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


@dataclass(frozen=True)
class Rule:
    """One row of a table.

    ``published`` and ``ours`` are patterns (a string stands for a tuple of one). ``aliases`` are
    other spellings of ``published``, each of the same length: files that use them are read, and
    written back in the spelling they came in.
    """

    published: tuple[str, ...]
    ours: tuple[str, ...]
    transform: Transform = IDENTITY
    aliases: tuple[tuple[str, ...], ...] = ()

    def __init__(
        self,
        published: str | Sequence[str],
        ours: str | Sequence[str],
        transform: Transform = IDENTITY,
        aliases: Sequence[str | Sequence[str]] = (),
    ) -> None:
        object.__setattr__(self, "published", _as_spellings(published))
        object.__setattr__(self, "ours", _as_spellings(ours))
        object.__setattr__(self, "transform", transform)
        object.__setattr__(self, "aliases", tuple(_as_spellings(names) for names in aliases))
        holes = [_holes(pattern) for names in (*self.spellings, self.ours) for pattern in names]
        if not self.published or not self.ours:
            raise ValueError("a rule needs names on both sides")
        if any(found != holes[0] for found in holes):
            raise ValueError(f"patterns of one rule differ in their placeholders: {self}")
        if any(len(names) != len(self.published) for names in self.aliases):
            raise ValueError(f"an alias has another number of names: {self}")

    @property
    def spellings(self) -> tuple[tuple[str, ...], ...]:
        """The published names and their aliases."""
        return (self.published, *self.aliases)


def _holes(pattern: str) -> dict[str, str]:
    return {name: words for name, words in _PLACEHOLDER.findall(pattern)}


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """The regular expression of a pattern, with one named group a placeholder."""
    parts, last, seen = [], 0, set()
    for found in _PLACEHOLDER.finditer(pattern):
        parts.append(re.escape(pattern[last : found.start()]))
        name, words = found.groups()
        if name in seen:
            parts.append(f"(?P={name})")
        else:
            # Canonical integers only: "00" would not come back from the number it stands for.
            parts.append(f"(?P<{name}>{words or '0|[1-9][0-9]*'})")
        seen.add(name)
        last = found.end()
    parts.append(re.escape(pattern[last:]))
    return re.compile("".join(parts))


def fill_pattern(pattern: str, binding: Mapping[str, str]) -> str:
    """The name a pattern gives for the values of its placeholders."""
    return _PLACEHOLDER.sub(lambda found: binding[found[1]], pattern)


@dataclass(frozen=True)
class Step:
    """One instance of a rule: these published tensors are those parameters of ours."""

    published: tuple[str, ...]
    ours: tuple[str, ...]
    transform: Transform


@dataclass
class _Problems:
    """Everything wrong with a conversion, for one message."""

    unmapped: list[str] = field(default_factory=list)
    unfilled: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)

    def raise_if_any(self, where: str, sides: tuple[str, str], hint: str) -> None:
        kinds = [
            (self.unmapped, "no place", f"{sides[0]} with no place in {sides[1]}"),
            (self.unfilled, "missing", f"wanted by {sides[1]} and missing"),
            (self.misshapen, "wrong shape", "of the wrong shape"),
        ]
        if not any(names for names, _, _ in kinds):
            return
        lines = [f"{where}: the weights do not fit:"]
        for names, _, what in kinds:
            if names:
                lines.append(f"  {len(names)} {what}:")
                lines += [f"    {name}" for name in names]
        lines.append(f"  {hint}")
        raise CheckpointError("\n".join(lines))


class Table:
    """The rules between one published layout and our parameter tree.

    `layout` names it in messages and in saved metadata. Each published name must match one rule
    and each of our names one rule: an ambiguous table is a ValueError when a name shows it.
    """

    def __init__(self, layout: str, rules: Sequence[Rule]) -> None:
        self.layout = layout
        self.rules = tuple(rules)
        self._published = [
            (compile_pattern(pattern), rule, spelling)
            for rule in self.rules
            for spelling in rule.spellings
            for pattern in spelling
        ]
        self._ours = [
            (compile_pattern(pattern), rule) for rule in self.rules for pattern in rule.ours
        ]

    def knows(self, name: str) -> bool:
        """Whether a published tensor name has a row here."""
        return any(pattern.fullmatch(name) for pattern, _, _ in self._published)

    def plan_load(
        self,
        sources: Mapping[str, Shape],
        targets: Mapping[str, Shape],
        where: str = "weights",
    ) -> list[Step]:
        """The steps that fill every parameter of `targets` from the tensors of `sources`.

        Args:
          sources: published names and shapes, in file order (the order of the plan).
          targets: our dotted names and shapes.
          where: the file or folder, for the message.

        Raises:
          CheckpointError: lists every tensor without a place, every parameter without a source
            and every wrong shape.
        """
        problems, steps = _Problems(), []
        seen: set[tuple[str, ...]] = set()
        filled: set[str] = set()
        for name in sources:
            match = self._match_published(name)
            if match is None:
                problems.unmapped.append(name)
                continue
            rule, spelling, binding = match
            published = tuple(fill_pattern(pattern, binding) for pattern in spelling)
            if published in seen:
                continue
            seen.add(published)
            ours = tuple(fill_pattern(pattern, binding) for pattern in rule.ours)
            absent = [other for other in published if other not in sources]
            homeless = [path for path in ours if path not in targets]
            if absent:
                problems.unfilled.extend(f"{other} (belongs to {name})" for other in absent)
            if homeless:
                problems.unmapped.extend(other for other in published if other in sources)
            twice = [path for path in ours if path in filled]
            if twice:
                problems.unmapped.append(f"{name} (a second source of {', '.join(twice)})")
            filled.update(ours)
            if absent or homeless or twice:
                continue
            _check_shapes(rule.transform, published, ours, sources, targets, problems)
            steps.append(Step(published, ours, rule.transform))
        problems.unfilled += [path for path in targets if path not in filled]
        problems.raise_if_any(
            where, ("tensors", f"this {self.layout} model"), self._hint(sources, problems)
        )
        return steps

    def plan_export(
        self,
        sources: Mapping[str, Shape],
        spelled: Collection[str] = (),
        where: str = "export",
    ) -> tuple[list[Step], dict[str, Shape]]:
        """The steps that write every parameter of ours, and the published names and shapes.

        Args:
          sources: our dotted names and shapes.
          spelled: published names of the file the weights came from; where a rule has aliases,
            the spelling found there is used, and the first one otherwise.
          where: the destination, for the message.

        Raises:
          CheckpointError: a parameter this layout has no row for, or an impossible shape.
        """
        problems, steps = _Problems(), []
        shapes: dict[str, Shape] = {}
        seen: set[tuple[str, ...]] = set()
        for path in sources:
            match = self._match_ours(path)
            if match is None:
                problems.unmapped.append(path)
                continue
            rule, binding = match
            ours = tuple(fill_pattern(pattern, binding) for pattern in rule.ours)
            if ours in seen:
                continue
            seen.add(ours)
            absent = [other for other in ours if other not in sources]
            if absent:
                problems.unfilled.extend(f"{other} (belongs to {path})" for other in absent)
                continue
            candidates = [
                tuple(fill_pattern(pattern, binding) for pattern in spelling)
                for spelling in rule.spellings
            ]
            published = next(
                (names for names in candidates if all(name in spelled for name in names)),
                candidates[0],
            )
            try:
                result = rule.transform.shapes_to_published([sources[name] for name in ours])
            except ValueError as error:
                problems.misshapen.append(f"{path} {error}")
                continue
            shapes.update(zip(published, result, strict=True))
            steps.append(Step(published, ours, rule.transform))
        problems.raise_if_any(
            where,
            ("parameters", f"the {self.layout} layout"),
            f"Is this the parameter tree of a {self.layout} model?",
        )
        return steps, shapes

    def _match_published(self, name: str) -> tuple[Rule, tuple[str, ...], dict[str, str]] | None:
        found = [
            (rule, spelling, match.groupdict())
            for pattern, rule, spelling in self._published
            if (match := pattern.fullmatch(name))
        ]
        if len({id(rule) for rule, _, _ in found}) > 1:
            raise ValueError(f"the {self.layout} table is ambiguous about {name}")
        return found[0] if found else None

    def _match_ours(self, path: str) -> tuple[Rule, dict[str, str]] | None:
        found = [
            (rule, match.groupdict())
            for pattern, rule in self._ours
            if (match := pattern.fullmatch(path))
        ]
        if len(found) > 1:
            raise ValueError(f"the {self.layout} table is ambiguous about {path}")
        return found[0] if found else None

    def _hint(self, sources: Mapping[str, Any], problems: _Problems) -> str:
        known = sum(self.knows(name) for name in sources)
        if not known:
            return f"None of its names is of the {self.layout} layout: is this the right file?"
        if len(sources) - known > known:
            return f"Most of its names are not of the {self.layout} layout: is it another model?"
        if problems.misshapen or problems.unfilled:
            return "Is config.json the one of these weights?"
        return "Is config.json the one of these weights? It may describe a smaller model."


def _check_shapes(
    transform: Transform,
    published: Sequence[str],
    ours: Sequence[str],
    sources: Mapping[str, Shape],
    targets: Mapping[str, Shape],
    problems: _Problems,
) -> None:
    try:
        results = transform.shapes_to_ours([tuple(sources[name]) for name in published])
    except ValueError as error:
        problems.misshapen.append(f"{', '.join(published)} {error}")
        return
    for path, result in zip(ours, results, strict=True):
        if result != tuple(targets[path]):
            stored = " + ".join(str(list(sources[name])) for name in published)
            problems.misshapen.append(
                f"{', '.join(published)} is {stored}, the model wants "
                + (f"{path} " if (path,) != tuple(published) else "")
                + f"{list(targets[path])}"
                + ("" if len(published) == len(ours) == 1 else f", got {list(result)}")
            )
