"""The latency report as text for people, and as a folder; the numbers are those of the JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.latency_curves import draw
from eval.latency_page import BUSY, page
from eval.latency_stopwatch import verdict


def table(report: Mapping[str, Any]) -> str:
    """A report of ``eval.latency`` as aligned lines."""
    machine = report["machine"]
    others = machine["others_cpu_share"]
    lines = [
        f"{report['config']} · {report['weights']} weights · {report['dtype']}"
        + (f" · kernels in C: {report['kernels']}" if "kernels" in report else ""),
        f"{machine['cpu']} · {machine['cores']} cores · {machine['memory_gb']:.0f} GB · load "
        f"{machine['load_average_1min']:.2f} before, other programs {others:.0%} during",
    ]
    if others > BUSY:
        lines.append("NOT AN IDLE MACHINE: times and ratios below mean little, measure again")
    lines.append("")
    lines += _codec(report) if "take" in report else _model(report)
    return "\n".join(lines)


def write_folder(report: Mapping[str, Any], folder: Path) -> None:
    """``report.json``, ``report.txt``, ``report.html`` and, if anything was listened to,
    ``latency.png``, which the page holds as well."""
    folder.mkdir(parents=True, exist_ok=True)
    text, picture = table(report), folder / "latency.png"
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / "report.txt").write_text(text + "\n", encoding="utf-8")
    listened = any(name in report for name in ("cadences", "chunks", "rows"))
    if listened:
        draw(report, picture)
    curves = picture.read_bytes() if listened else None
    (folder / "report.html").write_text(page(report, text, curves), encoding="utf-8")


def _model(report: Mapping[str, Any]) -> list[str]:
    rows = []
    for kind in ("cold", "warm"):
        start = report[kind]
        rows.append(
            [
                f"{kind} start",
                f"ready {start['ready_s']:.1f} s after the weights",
                f"session {start['session_s']:.1f}, first frame {start['first_frame_s']:.1f}, "
                f"first chunk {start['first_chunk_s']:.1f} s",
                f"trace {start['trace_s']:.1f}, lower {start['lower_s']:.1f}, XLA "
                f"{start['xla_s']:.1f} s, {start['programs']} programs "
                f"({start['cache_hits']} from the cache)",
            ]
        )
    warm = report["warm"]
    rows.append(
        [
            "loading",
            f"{warm['load_s']:.1f} s for {warm['weights_gb']:.3f} GB",
            f"anonymous memory + {_number(warm['anonymous_added_gb'])} GB "
            f"({_number(warm['anonymous_over_weights'])} × the weights)",
        ]
    )
    stream = report["stream"]
    rows.append(
        [
            "streaming",
            f"first audio {stream['first_audio_ms']:.0f} ms",
            f"after {stream['first_audio_frames']} frames, chunks of {stream['chunk_frames']}",
            f"{stream['x_realtime']:.3f} × real time",
            f"memory grew by {_number(stream['growth_mb'])} MB",
        ]
    )
    audible = report.get("audible", {}).get("first_audible")
    if audible:
        silence = report["audible"]["leading_silence"]
        rows.append(
            [
                "first audible",
                f"p50 {audible['p50_ms']:.0f} ms",
                f"{audible['p25_ms']:.0f} to {audible['p75_ms']:.0f} ms, {audible['count']} of "
                f"{audible['count'] + report['audible']['silent']} sentences",
                f"behind {silence['p50_ms']:.0f} ms of silence",
            ]
        )
    rows += _listening(report)
    for position, step in report["step"].items():
        rows.append(
            [
                f"frame at {position}",
                f"p50 {step['p50_ms']:.2f} ms",
                f"p95 {step['p95_ms']:.2f}, p99 {step['p99_ms']:.2f} ms, {step['count']} frames",
                f"{step['x_realtime']:.3f} × real time; weights {step['weights_gb']:.3f} GB, "
                f"{step['weights_gb_per_s']:.1f} GB/s",
            ]
        )
        rows.append(
            [
                "",
                f"{step['achieved_gb_per_s']:.1f} GB/s with the cache",
                f"{step['share_of_bandwidth']:.0%} of what the machine reads "
                f"({report['machine']['best_gb_per_s']:.1f} GB/s)",
            ]
        )
    decode = report["decode"]
    rows.append(
        [
            "codec",
            f"p50 {decode['p50_ms']:.2f} ms a frame",
            f"p95 {decode['p95_ms']:.2f}, p99 {decode['p99_ms']:.2f} ms",
        ]
    )
    rows.append(["memory", *_memory(report["memory"])])
    if "upstream" in report:
        for position, both in report["upstream"]["step"].items():
            rows.append(
                [
                    f"in turns at {position}",
                    f"ours {_spread(both['ours'])}",
                    f"upstream {_spread(both['theirs'])}",
                    f"ratio {both['ratio']:.2f}",
                ]
            )
        rows.append(["upstream memory", *_memory(report["upstream"]["memory"])])
        rows.append(
            ["ratio", f"{report['ratio']:.2f} × upstream's frames a second (geometric mean)"]
        )
    return _align(rows)


def _listening(report: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for kind in ("cadences", "chunks"):
        for name, one in report.get(kind, {}).items():
            rows += _heard(name if kind == "cadences" else f"chunks of {name}", one)
    for count, one in report.get("rows", {}).items():
        step = one["step"]
        rows.append(
            [
                f"rows {count}",
                f"p50 {step['p50_ms']:.2f}, p95 {step['p95_ms']:.2f}, p99 {step['p99_ms']:.2f} ms "
                "a frame of all",
                f"first chunk {one['first_playable_ms']:.0f} ms",
                f"{one['x_realtime']:.2f} × real time each, {one['x_realtime_all']:.2f} together",
                f"underruns {one['underruns']}, stall {one['stall_ms']:.0f} ms",
                f"anonymous peak {_number(one['anonymous_peak_gb'])} GB",
                f"leave {one['leave']['p50_ms']:.2f} ms, join {one['join']['p50_ms']:.2f} ms",
            ]
        )
    if "outside" in report:
        rows += _stopwatch(report["outside"])
    return rows


def _heard(label: str, one: Mapping[str, Any]) -> list[list[str]]:
    """Three lines about the takes of a cadence or a chunk size."""

    def p50(name: str) -> str:
        return "none" if one[name] is None else f"{one[name]['p50_ms']:.0f} ms"

    between = one["interval"]
    return [
        [
            label,
            f"first byte {p50('first_byte')}, playable {p50('first_playable')}, audible "
            f"{p50('first_audible')} behind {p50('leading_silence')} of silence",
            f"{p50('first_text_to_audio')} from the first text",
            f"{one['starts_before_text_ends']} of {one['takes']} start before the text ends",
        ],
        [
            "",
            "no speed" if one["x_realtime"] is None else f"{one['x_realtime']:.2f} × real time",
            "one chunk"
            if between is None
            else f"chunks every {between['p50_ms']:.1f} ms, p95 {between['p95_ms']:.1f}, p99 "
            f"{between['p99_ms']:.1f}, jitter {p50('jitter')}",
        ],
        [
            "",
            f"underruns {one['underruns']}, stall {p50('stall')}, {p50('stall_for_text')} of it "
            "for text",
            f"final text {p50('final_text')}, heard after {p50('final_heard')}",
        ],
    ]


def _stopwatch(outside: Mapping[str, Any]) -> list[list[str]]:
    labels = {
        "first_playable_ms": "first chunk ms",
        "first_audible_ms": "first audible ms",
        "last_chunk_ms": "last chunk ms",
        "x_realtime": "× real time",
    }
    found = [
        f"{label} {one['outside']:.4g} ({one['difference']:+.1%}, {one['low']:+.1%} to "
        f"{one['high']:+.1%})"
        for name, label in labels.items()
        if (one := outside[name]) is not None
    ]
    return [
        ["outside stopwatch", *found, f"{outside['runs']} runs", verdict(outside)],
        [
            "process to ready",
            f"cold {outside['cold_start_s']:.1f} s, warm {outside['warm_start_s']:.1f} s",
        ],
    ]


def _codec(report: Mapping[str, Any]) -> list[str]:
    take, first = report["take"], report["compile"]
    rows = [
        [
            "take",
            f"{take['audio_s']:.1f} s, {take['frames']} frames, {take['codebooks']} codebooks",
        ],
        [
            "first runs",
            f"encode {first['first_encode_s']:.1f}, decode {first['first_decode_s']:.1f} s",
            f"streams {first['first_stream_1_s']:.1f} and {first['first_stream_8_s']:.1f} s",
        ],
    ]
    for name in ("encode", "decode"):
        row = [
            f"whole {name}",
            _spread(report[name]),
            f"{report[name]['x_realtime']:.2f} × real time",
        ]
        if "transformers" in report:
            row += [
                f"transformers {_spread(report['transformers'][name])}",
                f"ratio {report[f'ratio_{name}']:.2f}",
            ]
        rows.append(row)
    for name, label in (("stream_1", "streamed by 1"), ("stream_8", "streamed by 8")):
        stream = report[name]
        rows.append(
            [
                label,
                f"{stream['p50_ms_per_frame']:.2f} ms a frame",
                f"{stream['x_realtime']:.2f} × real time",
            ]
        )
    rows[-1].append(f"{report['stream_8_over_whole']:.2f} × the whole decode's speed")
    memory = report["memory"]
    rows.append(
        [
            "long stream",
            f"{memory['stream_audio_s']:.0f} s at {memory['stream_x_realtime']:.2f} × real time",
            f"memory grew by {_number(memory['stream_growth_mb'])} MB",
        ]
    )
    rows.append(["memory", *_memory(memory)])
    if "agreement" in report:
        agreement = report["agreement"]
        rows.append(
            [
                "agreement",
                f"decode {agreement['decode_snr_db']:.0f} dB",
                f"{agreement['encode_equal_share']:.2%} of the codes equal",
            ]
        )
    return _align(rows)


def _spread(times: Mapping[str, float]) -> str:
    return f"{times['p50_ms']:.2f} ms ({times['p25_ms']:.2f} to {times['p75_ms']:.2f})"


def _memory(memory: Mapping[str, float | None]) -> list[str]:
    cells = [
        f"resident {_number(memory['rss_gb'])}, peak {_number(memory['rss_peak_gb'])} GB",
        f"anonymous {_number(memory['anonymous_gb'])} GB",
    ]
    if memory.get("anonymous_peak_gb") is not None:
        cells[-1] += f", peak {_number(memory['anonymous_peak_gb'])} GB"
    if memory.get("rest_gb") is not None:
        cells.append(
            f"of that weights {_number(memory['weights_gb'])}, caches "
            f"{_number(memory['caches_gb'])}, rest {_number(memory['rest_gb'])} GB"
        )
    return cells


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    label = max(len(row[0]) for row in rows)
    return [f"{row[0]:<{label}}  {' · '.join(row[1:])}" for row in rows]
