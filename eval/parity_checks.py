"""Outcomes of parity checks: what was compared, how far apart it was, and what was allowed.

A check never raises for what it finds. An item that cannot be read or computed is a miss with
its error, and a part that a folder does not hold is reported as absent, so that a table without
misses cannot be one that looked at nothing.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

#: Largest absolute difference of an fp32 network or codec value.
NETWORK_BAR = 1e-4
#: Largest total variation between the distributions of one draw.
DRAW_BAR = 1e-4
#: Least signal-to-noise ratio of a waveform, before the clamp.
WAVE_BAR_DB = 90.0
#: Entries this close are a tie: either order is right.
TIE = 1e-4

Status = Literal["pass", "tie", "absent", "unread", "MISS"]


@dataclass
class Item:
    """One row of the table.

    Attributes:
      name: the part of the folder, and what of it.
      status: ``tie`` passes, with differences that the tie rule explains; ``absent`` is a part
        that the folder does not hold; ``unread`` is one that nobody here knows.
      error: the worst one, in ``unit``; None where nothing could be compared.
      bar: what ``error`` may be at most (at least, for dB).
      unit: ``abs``, ``TV``, ``wrong`` (a count), ``s`` or ``dB``.
      detail: where the worst error is, or why the item is a miss.
      numbers: further figures.
    """

    name: str
    status: Status
    error: float | None = None
    bar: float | None = None
    unit: str = ""
    detail: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The item as JSON, in which infinite errors are strings."""
        return {key: _plain(value) for key, value in vars(self).items()}


@dataclass
class Checks:
    """Collects the items of one folder.

    Attributes:
      items: in the order of the checks.
      say: called with the name of what is being checked.
    """

    items: list[Item] = field(default_factory=list)
    say: Callable[[str], None] = lambda _: None

    @property
    def passed(self) -> bool:
        """Something was compared, and nothing missed."""
        seen = {item.status for item in self.items}
        return "MISS" not in seen and bool(seen & {"pass", "tie"})

    def at_most(
        self,
        name: str,
        error: float,
        bar: float,
        unit: str = "abs",
        *,
        detail: str = "",
        ties: int = 0,
        **numbers: Any,
    ) -> None:
        """An error against its bar. A NaN is beyond every bar."""
        status: Status = "MISS"
        if error <= bar:
            status = "tie" if ties else "pass"
        if ties:
            numbers["ties"] = ties
        self.items.append(Item(name, status, float(error), bar, unit, detail, numbers))

    def decibels(self, name: str, snr: float, detail: str = "") -> None:
        """A signal-to-noise ratio against its bar."""
        status: Status = "pass" if snr >= WAVE_BAR_DB else "MISS"
        self.items.append(Item(name, status, float(snr), WAVE_BAR_DB, "dB", detail))

    def close(self, name: str, ours: Any, golden: Any, bar: float = NETWORK_BAR) -> None:
        """Largest absolute difference of two arrays."""
        error, detail = difference(ours, golden)
        self.at_most(name, error, bar, detail="" if error <= bar else detail)

    def same(self, name: str, ours: Any, golden: Any) -> None:
        """Number of differing entries of two integer arrays."""
        wrong, detail = mismatches(ours, golden)
        self.at_most(name, wrong, 0, "wrong", detail=detail, of=int(np.size(golden)))

    def equal(self, name: str, pairs: Sequence[tuple[str, Any, Any]]) -> None:
        """Number of (what, ours, golden) triples that differ; none at all is absent."""
        if not pairs:
            self.absent(name, "holds no entry")
            return
        wrong = [pair for pair in pairs if pair[1] != pair[2]]
        detail = "; ".join(f"{what}: {_brief(a)}, golden {_brief(b)}" for what, a, b in wrong[:3])
        self.at_most(name, len(wrong), 0, "wrong", detail=detail, of=len(pairs))

    def absent(self, name: str, detail: str = "") -> None:
        """The folder does not hold this part."""
        self.items.append(Item(name, "absent", detail=detail))

    def unread(self, name: str, detail: str) -> None:
        """The folder holds something that this program does not know."""
        self.items.append(Item(name, "unread", detail=detail))

    def miss(self, name: str, detail: str) -> None:
        """A part that cannot be checked."""
        self.items.append(Item(name, "MISS", detail=detail))

    @contextlib.contextmanager
    def guard(self, name: str) -> Iterator[None]:
        """What fails inside is a miss of ``name``; the checks go on."""
        self.say(name)
        try:
            yield
        except Exception as error:
            lines = str(error).strip().splitlines()
            self.miss(name, f"{type(error).__name__}: {lines[0] if lines else 'no message'}")


def difference(ours: Any, golden: Any) -> tuple[float, str]:
    """Largest absolute difference and where it is; infinite where shapes or finiteness differ."""
    ours, golden = np.asarray(ours), np.asarray(golden)
    if ours.shape != golden.shape:
        return math.inf, f"shape {list(ours.shape)}, golden {list(golden.shape)}"
    if not golden.size:
        return math.inf, "the golden array is empty"
    with np.errstate(invalid="ignore"):
        gap = np.abs(ours.astype(np.float64) - golden.astype(np.float64))
    # Equal infinities are equal; NaN equals nothing.
    gap = np.where(ours == golden, 0.0, np.where(np.isnan(gap), np.inf, gap))
    where = np.unravel_index(int(np.argmax(gap)), gap.shape)
    return float(gap[where]), (
        f"at {[int(i) for i in where]}: {ours[where]:.7g}, golden {golden[where]:.7g}"
    )


def mismatches(ours: Any, golden: Any) -> tuple[float, str]:
    """Number of differing integers and where the first is; infinite where shapes differ."""
    ours, golden = np.asarray(ours), np.asarray(golden)
    if ours.shape != golden.shape:
        return math.inf, f"shape {list(ours.shape)}, golden {list(golden.shape)}"
    if not golden.size:
        return math.inf, "the golden array is empty"
    wrong = np.argwhere(ours != golden)
    if not len(wrong):
        return 0, ""
    where = tuple(wrong[0])
    return len(wrong), f"first at {[int(i) for i in where]}: {ours[where]}, golden {golden[where]}"


def snr(ours: np.ndarray, golden: np.ndarray) -> float:
    """Signal-to-noise ratio in dB; minus infinity where lengths differ."""
    if ours.shape != golden.shape or not golden.size:
        return -math.inf
    wide = golden.astype(np.float64)
    signal, noise = np.square(wide).sum(), np.square(ours - wide).sum()
    if noise == 0:
        return math.inf
    return float(10 * np.log10(signal / noise)) if signal > 0 else -math.inf


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
