"""The picture of a run's losses and accuracies over its steps."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

#: Metrics of the validation carry this in front of the name of the training's.
VALIDATION = "validation/"

#: A spread of losses above which a logarithmic axis shows more.
_LOGARITHMIC = 20.0

History = Mapping[str, Sequence[tuple[int, float]]]


def draw_curves(history: History, path: Path, *, title: str = "") -> None:
    """Draw losses, and accuracies where there are any, as a PNG.

    Training is a line, validation a dashed one with points in the colour of its training metric.

    Args:
      history: (step, value) of each metric by name; only names with "loss" or "accuracy" count.
      path: the PNG, written whole or not at all.
      title: above the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [word for word in ("loss", "accuracy") if any(word in name for name in history)]
    if not panels:
        return
    figure = Figure(figsize=(7 * len(panels), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for place, word in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), place + 1)
        names = sorted(name for name in history if word in name)
        bases = list(dict.fromkeys(name.removeprefix(VALIDATION) for name in names))
        for name in names:
            held_out = name.startswith(VALIDATION)
            axes.plot(
                *zip(*history[name], strict=True),
                color=f"C{bases.index(name.removeprefix(VALIDATION)) % 10}",
                linestyle="--" if held_out else "-",
                marker="o" if held_out else None,
                markersize=3,
                linewidth=1,
                label=name,
            )
        axes.set_xlabel("steps")
        axes.set_ylabel(word)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        values = [value for name in names for _, value in history[name] if math.isfinite(value)]
        low, high = min(values, default=0.0), max(values, default=0.0)
        if word == "loss" and low > 0 and high / low > _LOGARITHMIC:
            axes.set_yscale("log")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    figure.savefig(temporary, format="png", dpi=100)
    temporary.replace(path)
