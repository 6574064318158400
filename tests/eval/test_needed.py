"""Programs whose packages are missing say so, in one line, before anything is done."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dia2_jax.errors import ConfigError
from eval.needed import needed_from

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("program", "package", "extra"),
    [
        ("naturalness", "psutil", "eval"),
        ("codec", "psutil", "eval"),
        ("compare", "scipy", "eval"),
        ("latency", "psutil", "eval"),
        ("latency_compare", "psutil", "eval"),
        ("read_aloud", "yaml", "corpus,train"),
    ],
)
def test_a_missing_package_is_one_line_with_the_remedy(
    tmp_path: Path, program: str, package: str, extra: str
) -> None:
    (tmp_path / f"{package}.py").write_text(f"raise ImportError('No module named {package}')\n")
    found = subprocess.run(
        [sys.executable, "-m", f"eval.{program}", "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert found.returncode == 2 and found.stdout == ""
    remedy = f'pip install "dia2-jax[{extra}]"'
    assert found.stderr == f"error: needs a package (No module named {package}): {remedy}\n"


def test_what_draws_a_page_is_looked_for_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "jinja2.py").write_text("raise ImportError('No module named jinja2')\n")
    found = subprocess.run(
        [sys.executable, "-m", "eval.latency", "--config", "tiny", "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert found.returncode == 2 and not (tmp_path / "out").exists()
    assert found.stderr.endswith(
        'error: needs a package (No module named jinja2): pip install "dia2-jax[eval]"\n'
    )
    assert "cold start" not in found.stderr


def test_what_is_wrong_in_the_code_itself_is_no_missing_package() -> None:
    with pytest.raises(ImportError, match=r"eval\.nothing"), needed_from("eval"):
        raise ImportError("no module eval.nothing", name="eval.nothing")
    with pytest.raises(ConfigError), needed_from("eval"):
        raise ConfigError("other")
