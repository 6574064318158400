"""The parts of a frame: what is subtracted from what, and all of them on a small shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from eval.frame_profile import main, measure, table


class Fixed:
    """Parts that take as long as they are told to."""

    times = {"frame": 100.0, "decoder": 31.0, "depformer": 51.0, "dispatch": 1.0, "codec": 20.0}

    def sides(self, position: int) -> dict[str, Any]:
        return {name: lambda n, ms=ms: [ms] * n for name, ms in self.times.items()}

    def gigabytes(self, position: int) -> dict[str, float]:
        return {"frame": 2.0, "decoder": 0.6, "depformer": 1.4}


def test_a_dispatch_is_counted_once_and_the_rest_is_what_no_part_explains() -> None:
    found = measure(Fixed(), 7, 5)  # type: ignore[arg-type]
    assert found["ms"] == {
        "frame": 100, "decoder": 30, "depformer": 50, "dispatch": 1, "codec": 20, "rest": 19,
    }  # fmt: skip
    assert found["times"]["decoder"]["count"] == 5
    lines = table(found)
    assert lines[0].startswith("| step 7 |")
    assert lines[2] == "| frame | 100.00 | 100% | 2.000 | 20.0 |"
    assert "| decoder | 30.00 | 30% | 0.600 | 20.0 |" in lines
    assert "| codec | 20.00 | beside it | | |" in lines
    assert lines[-1] == "| rest | 19.00 | 19% | | |"


def test_every_part_of_a_small_shape(tmp_path: Path) -> None:
    target = tmp_path / "profile.json"
    run = CliRunner().invoke(main, f"--config tiny --at 3,90 --repeats 2 --json {target}".split())
    assert run.exit_code == 0, run.output
    assert "| step 3 |" in run.output and "| step 90 |" in run.output
    report = json.loads(target.read_text())
    assert report["machine"]["best_gb_per_s"] > 0 and report["dtype"] == "float32"
    names = {"frame", "decoder", "depformer", "guidance and draws", "dispatch", "codec"}
    for part in report["parts"]:
        assert part["times"].keys() == names and part["ms"].keys() == names | {"rest"}
        assert all(times["min_ms"] > 0 for times in part["times"].values())
    early, late = (part["gb"] for part in report["parts"])
    assert late["decoder"] > early["decoder"] and late["depformer"] == early["depformer"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--config tiny --at 256", "--at 256: outside this model's context of 256"),
        ("--config nothing", "neither a checkpoint folder nor a shape"),
        ("--config tiny --at early", "steps separated by commas"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: str, said: str) -> None:
    run = CliRunner().invoke(main, arguments.split())
    assert run.exit_code == 2 and said in run.output
