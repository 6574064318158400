"""Reports as a browser takes them: well formed, whole in themselves, every figure explained."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dia2_jax.audio import write_wav
from eval import latency_page
from eval.scoring.evaluation import conclude
from eval.scoring.page import page, worst_first
from eval.scoring.registry import METRICS
from eval.scoring.report import NEITHER, Section, report
from eval.scoring.run_folder import RunFolder
from eval.scoring.stopping import Stopping
from eval.scoring.summary import bootstrap, summarise

VOID = {"meta", "link", "br", "img", "hr", "input", "wbr"}


class Checked(HTMLParser):
    """Refuses tags that do not nest; gathers ids, references and the cells of table rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        named = dict(attrs)
        self.ids += [named["id"]] if "id" in named else []
        self.references += [v for k, v in named.items() if k in ("src", "href")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


@pytest.fixture
def summary() -> dict[str, Any]:
    """Every figure of every metric, of two groups and a source."""
    estimate = {"value": 1.234, "low": -0.001, "high": 12.34, "takes": 3}
    figures = {m.name: {figure.name: estimate for figure in m.figures} for m in METRICS}
    groups = ("all", "lines: list", "lines: word")
    return {
        "figures": {"generated": {group: figures for group in groups}},
        "counts": {"generated": {group: {"takes": 3, "failed": 0} for group in groups}},
        "failures": [
            {"set": "s", "id": "<a>", "source": "generated", "seed": 0, "what": ["a & b"]}
        ],
    }


def test_the_page_is_well_formed_and_needs_nothing_else(
    tmp_path: Path, summary: dict[str, Any]
) -> None:
    text = page("A <title>", {"name": "value"}, summary, [], METRICS, tmp_path)  # type: ignore[arg-type]
    found = Checked(text)
    assert len(found.ids) == len(set(found.ids))
    targets = [reference[1:] for reference in found.references if reference.startswith("#")]
    assert targets and set(targets) <= set(found.ids)
    others = [one for one in found.references if not one.startswith(("#", "data:"))]
    assert others == []
    assert not re.search(r"<script|@import|url\(", text)
    assert "A &lt;title&gt;" in text and "a &amp; b" in text


def test_every_figure_has_its_unit_direction_and_meaning(
    tmp_path: Path, summary: dict[str, Any]
) -> None:
    text = page("T", {}, summary, [], METRICS, tmp_path)  # type: ignore[arg-type]
    cells = [[" ".join(cell.split()) for cell in row] for row in Checked(text).rows]
    rows = [row for row in cells if len(row) == 6 and row[0] != "figure"]
    wanted = [figure for metric in METRICS for figure in metric.figures]
    assert len(rows) == 3 * len(wanted)
    for figure, (name, unit, better, value, takes, about) in zip(wanted, rows, strict=False):
        assert (name, unit, about) == (figure.name, figure.unit, figure.about)
        assert better.removeprefix(better[0] + " ") == figure.better or better == NEITHER
        assert (value, takes) == ("1.23 (0.00 – 12.3)", "3")
    markdown = report("T", {}, summary, [], METRICS)  # type: ignore[arg-type]
    for metric in METRICS:
        for figure in metric.figures:
            line = f"| {metric.name}.{figure.name} | {figure.unit} | {figure.better or NEITHER} |"
            assert line in markdown


def take(folder: Path, identifier: str, source: str = "generated", **scores: Any) -> dict[str, Any]:
    """A row whose audio is a second of noise."""
    wave = 0.1 * np.random.default_rng(0).standard_normal(16_000).astype(np.float32)
    place = folder / "audio" / source / f"{identifier}.wav"
    write_wav(place, wave, 16_000)
    return {
        "set": "s", "id": identifier, "source": source, "seed": 0, "kind": "line", "script": "x",
        "audio": str(place.relative_to(folder)), "seconds": 1.0, "words": [], "scores": scores,
    }  # fmt: skip


def test_every_figure_says_how_many_takes_it_rests_on(tmp_path: Path) -> None:
    """Six takes of six prompts, of which five have a tail, and no recording has."""
    tails = [None, 0.1, 0.2, 0.3, 0.4, 0.5]
    scores = dict.fromkeys(("truncated", "silent", "leading", "trailing", "length", "paced"))
    rows = [
        take(tmp_path, f"{n}", source, stopping={**scores, "stops": True, "leading": 0.1 * n,
             "long_tail": None, "tail": tail if source == "generated" else None})
        for source in ("generated", "recording")
        for n, tail in enumerate(tails)
    ]  # fmt: skip
    found = summarise(rows, [Stopping()])
    tail = found["figures"]["generated"]["all"]["stopping"]["tail"]
    assert (tail["takes"], tail["low"], tail["high"]) == (5, None, None)
    text = report("T", {}, found, rows, [Stopping()])
    assert "| figure | unit | better | generated | recording | n | |" in text
    assert "of fewer than 6 prompts there is none" in text
    assert "| stopping.tail | s | neither | 0.30 | – | 5 / – | sound after" in text
    assert "| 0.25 (0.12 – 0.38) | 0.25 (0.12 – 0.38) | 6 | silence before" in text
    whole = page("T", {}, found, rows, [Stopping()], tmp_path)
    assert "of fewer than 6 prompts there is none" in whole
    cells = [[" ".join(cell.split()) for cell in row] for row in Checked(whole).rows]
    assert [
        "tail",
        "s",
        "neither",
        "0.30",
        "–",
        "5 / –",
        "sound after the end of the text",
    ] in cells


def test_a_take_that_says_nothing_of_a_figure_is_none_of_its_takes() -> None:
    parts = [(n, (1.0, 2.0)) for n in range(4)] + [(n, (0.0, 0.0)) for n in range(4, 9)]
    found = bootstrap(parts, fewest=5)
    assert found == {"value": 0.5, "low": None, "high": None, "takes": 4}
    assert bootstrap([(0, (0.0, 0.0))]) is None


@pytest.mark.parametrize("package", ["librosa", "matplotlib"])
def test_without_what_draws_the_page_has_no_pictures_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    rows = [take(tmp_path, f"{n}", signal={"level": -20.0 - n}) for n in range(2)]
    found = summarise(rows, METRICS[:0])
    drawn = page("T", {}, found, rows, [], tmp_path)
    assert drawn.count("<img ") == 3 and "left out" not in drawn
    monkeypatch.setitem(sys.modules, package, None)
    text = page("T", {}, found, rows, [], tmp_path)
    Checked(text)
    assert text.count("Pictures are left out: they need librosa and matplotlib") == 1
    assert "pip install &#34;dia2-jax[eval]&#34;" in text
    assert text.count("<audio ") == 2 and "<img" not in text and "Too few" not in text


def test_without_jinja2_there_is_all_but_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path, {})
    rows = [take(tmp_path, "a")]

    def end() -> str:
        conclude(folder, rows, [], {}, "T", quiet=True)
        return capsys.readouterr().err

    assert "left out" not in end() and (tmp_path / "report.html").exists()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    first, second = end().splitlines()
    assert first.startswith("report.html is left out: needs jinja2 (")
    assert first.endswith('pip install "dia2-jax[eval]"') and "1 takes" in second
    assert (tmp_path / "report.md").exists() and (tmp_path / "summary.json").exists()
    assert not (tmp_path / "report.html").exists()  # what was there is of another time


def test_a_table_of_a_program_is_in_both_reports_and_its_source_is_heard(tmp_path: Path) -> None:
    """As eval.codec has one of codebooks, and lets one hear all of them."""
    heard = {"words": 2, "script_normalised": "x", "transcript_normalised": "y"}
    rows = [
        take(tmp_path, f"{n}", source, intelligibility={**heard, "errors": n})
        for source in ("recording", "codebooks-1", "codebooks-8")
        for n in (1, 2)
    ]
    found = summarise(rows, [])
    section = Section("Books", ("book", "used, %"), [("0", "12.5"), ("<1>", "3.0")], "All & more.")
    text = report("T", {}, found, rows, [], [section], "codebooks-8")
    table = "| book | used, % |\n| --- | --- |\n| 0 | 12.5 |\n| <1> | 3.0 |\n"
    assert text.endswith(f"## Books\n\n{table}\nAll & more.\n")
    assert "## Worst transcripts (codebooks-8)" in text
    whole = page("T", {}, found, rows, [], tmp_path, [section], "codebooks-8")
    checked = Checked(whole)
    assert ["0", "12.5"] in checked.rows and ["<1>", "3.0"] in checked.rows
    assert "All &amp; more." in whole and "#more-1" in checked.references
    assert "the worst of codebooks-8 by" in whole and "s/2 (codebooks-8, seed 0)" in whole
    assert "s/2 (codebooks-1" not in whole
    # By itself, the first that is no recording.
    assert "the worst of codebooks-1 by" in page("T", {}, found, rows, [], tmp_path)
    assert "## Worst transcripts (codebooks-1)" in report("T", {}, found, rows, [])


def test_the_worst_takes_are_those_that_are_worst_in_each_direction() -> None:
    """Word errors count upwards, opinions downwards; what is not measured is not the worst."""

    def row(name: str, **scores: Any) -> dict[str, Any]:
        return {"set": "s", "id": name, "source": "generated", "seed": 0, "scores": scores}

    def heard(errors: int, words: int) -> dict[str, int]:
        return {"errors": errors, "words": words}

    def order(*rows: dict[str, Any], failed: str = "") -> tuple[list[str], str]:
        failures = [{"set": "s", "id": failed, "source": "generated", "seed": 0, "what": ["x"]}]
        found, by = worst_first(rows, METRICS, failures if failed else [])  # type: ignore[arg-type]
        return [one["id"] for one in found], by

    rows = (
        row("right, clean", intelligibility=heard(0, 4), quality={"overall": 4.0}),
        row("right, noisy", intelligibility=heard(0, 4), quality={"overall": 2.0}),
        row("wrong", intelligibility=heard(2, 4), quality={"overall": 4.0}),
        row("heard of nothing", intelligibility=heard(2, 0), quality={"overall": 4.0}),
        row("unheard"),
    )
    assert order(*rows) == (
        ["heard of nothing", "wrong", "right, noisy", "right, clean", "unheard"],
        "word errors, then by failures",
    )
    assert order(*rows, failed="right, clean")[0][2:4] == ["right, clean", "right, noisy"]
    # Without a transcript, by the lowest opinion; of a codec without one, by the largest distance.
    opinions = (row(str(mos), quality={"overall": mos}) for mos in (3.5, 1.5, 2.5))
    assert order(*opinions) == (["1.5", "2.5", "3.5"], "DNSMOS, then by failures")
    distances = (row(str(d), fidelity={"mel_distance": d}) for d in (0.1, 0.3, 0.2))
    assert order(*distances) == (["0.3", "0.2", "0.1"], "mel distance, then by failures")
    assert order(row("a"), row("b"), failed="b") == (["b", "a"], "failures")


def test_the_page_of_latency_has_curves_units_and_directions() -> None:
    spread = {f"p{rank}_ms": float(rank) for rank in (50, 95, 99)}
    heard = dict.fromkeys(
        ("first_byte", "first_playable", "leading_silence", "first_text_to_audio", "interval",
         "jitter", "stall", "stall_for_text", "final_text", "final_heard"), spread,
    )  # fmt: skip
    heard |= {"first_audible": None, "x_realtime": 2.5, "underruns": 0, "takes": 3}
    heard |= {"starts_before_text_ends": 3}
    machine = {"cpu": "<cpu>", "cores": 2, "memory_gb": 8, "others_cpu_share": 0.01}
    report = {
        "config": "tiny", "command": "python -m …", "weights": "random", "dtype": "float32",
        "machine": machine, "cadences": {"at_once": heard, "slow": heard},
        "rows": {"2": {"step": spread, "decode": spread, "first_playable_ms": 123.4}},
        "step": {"100": {**spread, "x_realtime": 1.5}}, "cold": {"load_s": 1.0}, "warm": {},
        "memory": {"rss_gb": None},
        "outside": {
            "agrees": False, "doubtful": False, "runs": 3,
            "x_realtime": {
                "inside": 2.0, "outside": 1.5, "difference": -0.25, "low": -0.3, "high": -0.2,
            },
        },
    }  # fmt: skip
    text = latency_page.page(report, "as <told>", b"png")
    found = Checked(text)
    assert [one for one in found.references if not one.startswith("data:")] == []
    assert "data:image/png;base64,cG5n" in text and "as &lt;told&gt;" in text
    rows = {row[0]: [cell.strip() for cell in row[1:]] for row in found.rows}
    assert rows["first playable sample, p50"] == ["ms", "lower", "50", "50"]
    assert rows["underruns, all takes"] == ["times", "lower", "0", "0"]
    assert "first audible sample, p50" not in rows  # nobody heard any
    assert rows["first chunk"] == ["ms", "lower", "123"]
    assert rows["loading"] == ["s", "lower", "1", "–"]
    assert rows["speed"] == ["× real time", "higher", "2", "1.5", "-0.25", "-0.3", "-0.2"]
    assert "DOES NOT AGREE" in text and "NOT AN IDLE" not in text
    # Of a codec there is what the terminal shows.
    machine["others_cpu_share"] = 0.5
    codec = latency_page.page({**report, "take": {}}, "words", None)
    assert "<table>" not in codec and "<img" not in codec and "words" in codec
    assert "50% of all cores – NOT AN IDLE MACHINE" in codec
