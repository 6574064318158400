"""The same data gives the same gradients and the same step in every arrangement of the work.

`mesh_cases.py` runs all of them in one process that has eight CPU devices.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mesh_cases import GROUPS
from small_data import ROOT

GRADIENT = 1e-4  # of each tensor's largest; measured: 5.1e-6
PARAMETER = 1e-6  # after an SGD step at rate 0.1; measured: 5.4e-7

COMPARED = [
    f"{group}: {name}" for group, cases in GROUPS.items() for name in cases if name != "straight"
]
RESUMED = [f"resume on {mesh}, step {step}" for mesh in ("8 fsdp", "2 x 2 x 2") for step in (0, 1)]


@pytest.fixture(scope="module")
def report(small_run: Path) -> dict[str, Any]:
    # Eight devices on few cores meet late; XLA gives up after 40 seconds otherwise. The programs
    # run one after another, as `train.distributed.join` has it, on threads to spare (XLA reads
    # NPROC): with one for each device, one that is late to come free leaves seven waiting for ever.
    patience = "--xla_cpu_collective_call_terminate_timeout_seconds=300"
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8 {patience}"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": flags,
        "JAX_CPU_ENABLE_ASYNC_DISPATCH": "false",
        "NPROC": "32",
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("mesh_cases.py")), str(small_run)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    errors = [line for line in done.stderr.splitlines() if "[SPMD]" not in line]
    assert done.returncode == 0, "\n".join(errors)[-3000:]
    print(*errors, sep="\n")
    return dict(json.loads(done.stdout))


def check(found: dict[str, Any]) -> None:
    print({name: value for name, value in found.items() if name != "parts"})
    assert found["gradients"] < GRADIENT
    assert found["params"] < PARAMETER
    assert found["ema"] < PARAMETER
    assert found["metrics"] < 1e-5


@pytest.mark.parametrize("name", COMPARED)
def test_gradients_and_the_step_are_those_of_one_device(name, report) -> None:
    check(report[name])


@pytest.mark.parametrize("group", list(GROUPS))
def test_the_comparison_would_notice_another_batch(group, report) -> None:
    reference = report[f"{group}: straight"]
    assert reference["another batch"] > 1000 * GRADIENT
    # Every parameter has a gradient, and the step moves far more than the tolerance.
    assert reference["smallest gradient"] > 1e-4
    assert reference["largest step"] > 1000 * PARAMETER


@pytest.mark.parametrize("name", RESUMED)
def test_a_checkpoint_of_one_device_goes_on_upon_another_mesh(name, report) -> None:
    check(report[name])
    assert report[name]["same batch"]
    assert report[name]["step"] == 3 + int(name[-1])


def test_the_parts_of_a_mesh_hold_parts(report) -> None:
    """From the arrays: weights, their gradients and the batch really are split."""
    data, fsdp, three = (
        report[f"everything: {name}"]["parts"] for name in ("8 data", "8 fsdp", "2 x 2 x 2")
    )
    matrix, table = "transformer.layers.0.mlp.wi.weight", "transformer.cb0_head.weight"
    for kind in ("params", "gradients"):
        assert set(data[kind].values()) == {1}
        assert {fsdp[kind][matrix], fsdp[kind][table]} == {8}
        assert {three[kind][matrix], three[kind][table]} == {4}
        whole = [path for path, count in three[kind].items() if count == 1]
        assert whole and all(path.endswith("norm.weight") for path in whole)
    assert set(data["batch"].values()) == set(fsdp["batch"].values()) == {8}
    assert set(three["batch"].values()) == {4}


def test_what_is_frozen_and_what_adapts_is_split_as_well(report) -> None:
    frozen = report["everything: 2 x 2 x 2, decoder frozen"]["parts"]
    assert frozen["frozen"]["transformer.layers.0.mlp.wi.weight"] == 4
    assert frozen["frozen"].keys().isdisjoint(frozen["gradients"])
    name = next(name for name in COMPARED if name.startswith("lora"))
    assert set(report[name]["parts"]["params"].values()) == {2}
