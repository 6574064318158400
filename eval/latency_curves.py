"""Plots of a latency report: text and audio over time, and what chunk sizes and rows cost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.latency_listener import AUDIBLE, Chunk, stalls


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Write a PNG with a panel for each cadence, for the chunk sizes and for the rows.

    A cadence's panel follows the first of its takes: text as it arrives, audio as it arrives, and
    what a listener has heard who starts with the first chunk; stalls are the shaded times.

    Args:
      report: with ``cadences``, ``chunks``, ``rows`` or some of them.
      path: of the picture.
    """
    # Without pyplot, which keeps figures in a global and looks for a screen.
    from matplotlib.figure import Figure

    panels: list[tuple[Any, str, Any]] = [
        (_cadence, name, one["curve"]) for name, one in report.get("cadences", {}).items()
    ]
    for name, plot in (("chunks", _chunks), ("rows", _rows)):
        if name in report:
            panels.append((plot, name, report[name]))
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(6.4 * columns, 3.8 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for axis, (plot, name, content) in zip(axes, panels, strict=False):
        plot(axis, name, content)
    for axis in list(figure.axes)[len(panels) :]:
        axis.set_axis_off()
    figure.suptitle(f"{report['config']} · {report['dtype']} · {report['machine']['cpu']}")
    figure.savefig(path, format="png", dpi=100)


def _cadence(axis: Any, name: str, curve: Mapping[str, Any]) -> None:
    chunks = [
        Chunk(at, seconds, level)
        for (at, seconds), level in zip(curve["chunks_s"], curve["levels_dbfs"], strict=True)
    ]
    arrived, heard, total = [(0.0, 0.0)], [], 0.0
    for chunk in chunks:
        total += chunk.seconds
        arrived.append((chunk.at, total))
    played, total = chunks[0].at if chunks else 0.0, 0.0
    for chunk in chunks:
        start = max(played, chunk.at)
        heard += [(start, total), (start + chunk.seconds, total + chunk.seconds)]
        played, total = start + chunk.seconds, total + chunk.seconds
    axis.step(*zip(*arrived, strict=True), where="post", label="audio that arrived")
    if heard:
        axis.plot(*zip(*heard, strict=True), label="audio that was heard")
    for start, end in stalls(chunks):
        axis.axvspan(start, end, color="tab:red", alpha=0.25, linewidth=0)
    for second in curve["fed_s"]:
        axis.axvline(second, ymax=0.04, color="black", linewidth=0.8)
    audible = next((chunk.at for chunk in chunks if chunk.level > AUDIBLE), None)
    marks = (
        ("look-ahead complete", curve["origin_s"], ":"),
        ("first audible chunk", audible, "--"),
        ("end of the text", curve["ended_s"], "-."),
    )
    for label, second, style in marks:
        if second is not None:
            axis.axvline(second, color="tab:gray", linestyle=style, label=label)
    axis.set(title=name, xlabel="seconds (ticks: text arrives)", ylabel="seconds of audio")
    axis.legend(fontsize=7)


def _chunks(axis: Any, name: str, sizes: Mapping[str, Any]) -> None:
    numbers = [int(size) for size in sizes]
    for figure, label in (("first_playable", "first chunk"), ("first_audible", "first audible")):
        values = [one[figure] and one[figure]["p50_ms"] for one in sizes.values()]
        if all(value is not None for value in values):
            axis.plot(numbers, values, marker="o", label=f"{label}, p50")
    axis.set(title=name, xlabel="frames in a chunk", ylabel="ms", ylim=(0, None))
    axis.set_xticks(numbers)
    axis.legend(fontsize=7)


def _rows(axis: Any, name: str, counts: Mapping[str, Any]) -> None:
    numbers = [int(count) for count in counts]
    for rank in ("p50", "p95", "p99"):
        values = [one["step"][f"{rank}_ms"] for one in counts.values()]
        axis.plot(numbers, values, marker="o", label=f"frame, {rank}")
    axis.set(title=name, xlabel="batch rows", ylabel="ms a frame of all rows", ylim=(0, None))
    axis.set_xticks(numbers)
    axis.legend(fontsize=7)
