"""``report.html`` of a latency measurement: tables with units and directions, and the curves.

The numbers are those of the JSON; what a name means is said in `eval.latency`.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.latency_stopwatch import verdict
from eval.page import render

#: Share of the processors that other programs may take before a report warns.
BUSY = 0.05

#: A value of one column of a table; None where it has none.
Get = Callable[[Mapping[str, Any]], Any]

#: A line: name, unit, which way is better ("" for neither), and how its value is found.
Line = tuple[str, str, str, Get]


def _p50(name: str) -> Get:
    return lambda one: one[name] and one[name]["p50_ms"]


def _of(name: str, part: str) -> Get:
    return lambda one: one[name] and one[name][part]


def _plain(name: str) -> Get:
    return lambda one: one.get(name)


_START: tuple[Line, ...] = tuple(
    (label, "s", "lower", _plain(name))
    for label, name in (
        ("importing and starting the backend", "import_s"),
        ("loading", "load_s"),
        ("ready after the weights", "ready_s"),
        ("of it: session", "session_s"),
        ("of it: first frame", "first_frame_s"),
        ("of it: first chunk", "first_chunk_s"),
        ("compiling, or reading what was compiled", "xla_s"),
    )
)

_HEARD: tuple[Line, ...] = (
    ("first byte, p50", "ms", "lower", _p50("first_byte")),
    ("first playable sample, p50", "ms", "lower", _p50("first_playable")),
    ("first audible sample, p50", "ms", "lower", _p50("first_audible")),
    ("leading silence, p50", "ms", "lower", _p50("leading_silence")),
    ("first text to first chunk, p50", "ms", "lower", _p50("first_text_to_audio")),
    ("speed, median", "× real time", "higher", _plain("x_realtime")),
    ("between chunks, p50", "ms", "lower", _of("interval", "p50_ms")),
    ("between chunks, p95", "ms", "lower", _of("interval", "p95_ms")),
    ("between chunks, p99", "ms", "lower", _of("interval", "p99_ms")),
    ("jitter, p50", "ms", "lower", _p50("jitter")),
    ("underruns, all takes", "times", "lower", _plain("underruns")),
    ("stall, p50", "ms", "lower", _p50("stall")),
    ("of it for lack of text, p50", "ms", "", _p50("stall_for_text")),
    ("end of the text to the last chunk, p50", "ms", "lower", _p50("final_text")),
    ("end of the text until it was heard, p50", "ms", "lower", _p50("final_heard")),
    ("start before the text ends", "takes", "higher", _plain("starts_before_text_ends")),
    ("of so many", "takes", "", _plain("takes")),
)

_ROWS: tuple[Line, ...] = (
    ("frame of all rows, p50", "ms", "lower", _of("step", "p50_ms")),
    ("frame of all rows, p95", "ms", "lower", _of("step", "p95_ms")),
    ("frame of all rows, p99", "ms", "lower", _of("step", "p99_ms")),
    ("chunk of all rows decoded, p50", "ms", "lower", _of("decode", "p50_ms")),
    ("first chunk", "ms", "lower", _plain("first_playable_ms")),
    ("jitter", "ms", "lower", _plain("jitter_ms")),
    ("underruns", "times", "lower", _plain("underruns")),
    ("stall", "ms", "lower", _plain("stall_ms")),
    ("speed of a row", "× real time", "higher", _plain("x_realtime")),
    ("speed of all together", "× real time", "higher", _plain("x_realtime_all")),
    ("compiling", "s", "lower", _plain("compile_s")),
    ("anonymous memory, peak", "GB", "lower", _plain("anonymous_peak_gb")),
)

_STEP: tuple[Line, ...] = (
    *((f"frame, {rank}", "ms", "lower", _plain(f"{rank}_ms")) for rank in ("p50", "p95", "p99")),
    ("speed without the codec", "× real time", "higher", _plain("x_realtime")),
    ("weights and cache read", "GB/s", "higher", _plain("achieved_gb_per_s")),
)

_OUTSIDE: tuple[Line, ...] = (
    ("first chunk", "ms", "lower", _plain("first_playable_ms")),
    ("first audible sample", "ms", "lower", _plain("first_audible_ms")),
    ("last chunk", "ms", "lower", _plain("last_chunk_ms")),
    ("speed", "× real time", "higher", _plain("x_realtime")),
)

_MEMORY: tuple[Line, ...] = tuple(
    (label, "GB", "lower", _plain(name))
    for label, name in (
        ("resident", "rss_gb"),
        ("resident, peak", "rss_peak_gb"),
        ("anonymous", "anonymous_gb"),
        ("anonymous, peak", "anonymous_peak_gb"),
    )
)


def page(report: Mapping[str, Any], text: str, picture: bytes | None) -> str:
    """The report as HTML.

    Args:
      report: of a model, as ``--json`` writes it, or of a codec, of which only `text` is shown.
      text: what people read on the terminal; ends the page.
      picture: the curves, a PNG.
    """
    shown = None if picture is None else base64.b64encode(picture).decode()
    return render(
        Path(__file__).with_suffix(".html"),
        title=f"Latency of {report['config']}",
        about=_about(report),
        tables=[table for table in _tables(report) if table["lines"]],
        picture=shown and f"data:image/png;base64,{shown}",
        text=text,
    )


def _about(report: Mapping[str, Any]) -> dict[str, str]:
    machine = report["machine"]
    others = machine["others_cpu_share"]
    busy = " – NOT AN IDLE MACHINE: times and ratios mean little, measure again"
    return {
        "command": report["command"],
        "weights": f"{report['weights']}, {report['dtype']}",
        "machine": f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']:.0f} GB",
        "other programs": f"{others:.0%} of all cores{busy if others > BUSY else ''}",
        "versions": ", ".join(f"{k} {v}" for k, v in report.get("versions", {}).items()),
        "definitions": "python -c 'import eval.latency; help(eval.latency)'",
    }


def _tables(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    if "take" in report:
        return []
    outside = report.get("outside", {})
    sides = {
        side: {k: v[part] for k, v in outside.items() if isinstance(v, Mapping)}
        for side, part in (
            ("inside", "inside"), ("outside", "outside"), ("difference, of 1", "difference"),
            ("from", "low"), ("to (95 %)", "high"),
        )
    }  # fmt: skip
    stopwatch = f"Outside stopwatch: {verdict(outside)}" if outside else "Outside stopwatch"
    return [
        _table("How text arrives", report.get("cadences", {}), _HEARD),
        _table("Frames in a chunk", report.get("chunks", {}), _HEARD),
        _table("Batch rows", report.get("rows", {}), _ROWS),
        _table("Frames at a position", report["step"], _STEP),
        _table("Start", {k: report[k] for k in ("cold", "warm")}, _START),
        _table(stopwatch, sides, _OUTSIDE),
        _table("Memory", {"of the process": report["memory"]}, _MEMORY),
    ]


def _table(
    title: str, columns: Mapping[str, Mapping[str, Any]], lines: Sequence[Line]
) -> dict[str, Any]:
    """Lines that some column has a value of; None in the cells of the others."""
    found = []
    for name, unit, better, get in lines:
        cells = [get(one) for one in columns.values()]
        if any(cell is not None for cell in cells):
            shown = [None if cell is None else _number(cell) for cell in cells]
            found.append({"name": name, "unit": unit, "better": better, "cells": shown})
    return {"title": title, "columns": list(columns), "lines": found}


def _number(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
