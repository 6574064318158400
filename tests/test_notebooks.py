"""The notebooks as they are kept: executed in order, without a complaint, and small.

That they still execute is what `python -m notebooks.run --check` says, as CI does.
"""

from __future__ import annotations

import ast
import json
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).parent.parent
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
OURS = {"dia2_jax", "eval", "train", "notebooks"}

#: Bytes of one notebook, and of all.
LARGEST, LARGEST_SUM = 700_000, 2_000_000


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def test_there_are_five_and_they_are_small() -> None:
    assert [path.stem[:2] for path in PATHS] == ["01", "02", "03", "04", "05"]
    sizes = {path.name: path.stat().st_size for path in PATHS}
    assert {name: size for name, size in sizes.items() if size > LARGEST} == {}
    assert sum(sizes.values()) < LARGEST_SUM


def printed(path: Path) -> str:
    """All plain text among the outputs."""
    return "".join(
        "".join(output.get("text", "")) + "".join(output.get("data", {}).get("text/plain", ""))
        for cell in cells(path, "code")
        for output in cell["outputs"]
    )


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_outputs_are_of_one_run_in_order_without_errors(path: Path) -> None:
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert len(outputs) >= 5
    for output in outputs:
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr", output["text"]
    lines = [len("".join(output.get("text", "")).splitlines()) for output in outputs]
    assert max(lines) <= 30, "a wall of output"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_no_trace_of_the_run_is_kept(path: Path) -> None:
    notebook = json.loads(path.read_text())
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    assert notebook["metadata"]["language_info"] == {"name": "python"}
    assert all(cell["metadata"] == {} for cell in notebook["cells"])
    assert "/tmp/" not in printed(path)


def test_notebook_4_is_kept_with_what_whisper_heard() -> None:
    """Where Whisper is missing it says so and goes on; such a run is not the one to keep."""
    said = printed(next(path for path in PATHS if path.stem.startswith("04")))
    assert "one word is" in said and "points of WER" in said
    assert "left out" not in said


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_it_begins_with_a_title_and_links_lead_somewhere(path: Path) -> None:
    prose = [source(cell) for cell in cells(path, "markdown")]
    assert prose[0].startswith(f"# {int(path.stem[:2])}. ")
    for text in prose:
        for part in text.split("](")[1:]:
            target = part.split(")")[0]
            assert (path.parent / target).exists(), target


def test_they_import_what_the_extra_declares() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = " ".join(
        line
        for name in ("notebooks", "eval", "train")
        for line in project["optional-dependencies"][name]
    )
    declared += " ".join(project["dependencies"])
    for path in PATHS:
        for cell in cells(path, "code"):
            for node in ast.walk(ast.parse(source(cell))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                for name in (name.split(".")[0] for name in names):
                    if name not in OURS | sys.stdlib_module_names:
                        assert name in declared, f"{path.name}: {name}"


@pytest.mark.parametrize(("others", "slow"), [(0.0, True), (0.6, False)])
def test_a_notebook_that_takes_too_long_is_named(
    monkeypatch: pytest.MonkeyPatch, others: float, slow: bool
) -> None:
    """On a clock that a notebook moves by 200 s; of these, what other programs took is not its."""
    pytest.importorskip("nbclient", reason="runs with the extra notebooks")
    from notebooks import run

    clock = [0.0]

    def execute(path: Path) -> None:
        clock[0] += 200.0 if path.stem.startswith("04") else 20.0

    monkeypatch.setattr(run, "execute", execute)
    monkeypatch.setattr(run, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(run, "OtherWork", lambda: SimpleNamespace(share=lambda: others))
    found = CliRunner().invoke(run.main, ["--check"])
    assert found.exit_code == int(slow), found.output
    assert "05_codec.ipynb: 20 s" in found.output  # the rest is executed all the same
    said = "04_latency_and_naturalness.ipynb took 200 s"
    assert (said in found.output) == slow and "01_speak.ipynb took" not in found.output
    if slow:
        assert "180 s are allowed: have it do less" in " ".join(found.output.split())
        assert CliRunner().invoke(run.main, ["--check", "--limit", "201"]).exit_code == 0
