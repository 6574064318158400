"""The plan of a run: exact where it counts, near XLA's own analysis where it models."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from small_data import small_shape

from train import plan
from train.config import read_config
from train.dia2_config import Dia2TrainingConfig
from train.dia2_task import Dia2Task

TOLERANCE = 0.25

DECODER = ("data.rows=8", "data.max_steps=128", "data.depth_share=0.05")
DEPFORMER = ("data.rows=8", "data.max_steps=64", "data.depth_share=1")


def make_task(config: Path, *overrides: str) -> Dia2Task:
    return Dia2Task(read_config(Dia2TrainingConfig, config, overrides))


@pytest.fixture(scope="module")
def shaped(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``shaped(decoder_layers, depformer_layers, *overrides)``: a task whose activations are
    many times its weights."""
    folder = tmp_path_factory.mktemp("shapes")

    def make(decoder: int, depformer: int, *overrides: str) -> Dia2Task:
        raw = small_shape()
        raw["model"]["decoder"] |= {"n_layer": decoder, "n_embd": 64, "n_hidden": 192}
        raw["model"]["depformer"] |= {"n_layer": depformer, "n_embd": 64, "n_hidden": 192}
        raw["model"]["depformer"] |= {"gqa_head_dim": 32}
        raw["model"]["decoder"] |= {"gqa_head_dim": 16}
        path = folder / f"{decoder}-{depformer}.yaml"
        path.write_text(yaml.safe_dump(raw))
        return make_task(small_run, f"model.config={path}", *overrides)

    return make


@pytest.mark.parametrize(
    ("layers", "overrides"),
    [
        ((3, 1), (*DECODER, "remat=none")),  # measured: 0.81 of XLA's
        ((3, 1), (*DECODER, "remat=full")),  # 0.85
        ((1, 3), (*DEPFORMER, "remat=none")),  # 1.02
        ((1, 3), (*DEPFORMER, "remat=dots")),  # 0.99
    ],
    ids=lambda value: value[-1] if isinstance(value[-1], str) else str(value),
)
def test_the_estimate_is_near_what_xla_allocates(layers, overrides, shaped) -> None:
    task = shaped(*layers, *overrides)
    found = plan.estimate(task)
    assert found.working["activations"] > 0.6 * found.total
    compiled = plan.compiled_bytes(task)
    assert compiled is not None
    ratio = found.total / compiled
    print(f"{layers} {overrides[-1]}: {ratio:.2f} of {compiled / 1e6:.1f} MB")
    assert abs(ratio - 1) < TOLERANCE


def test_what_can_be_counted_is_exact(small_run) -> None:
    task = make_task(small_run, "optimizer.ema_decay=0.9", "frozen=[depformer.*]")
    found = plan.estimate(task)
    state, batch = task.initial_state(), next(task.batches(0))
    size = sum(leaf.nbytes for leaf in state["params"].values())
    assert found.state["masters"] == found.state["ema"] == found.working["gradients"] == size
    assert found.state["optimizer"] == sum(x.nbytes for x in jax.tree.leaves(state["optimizer"]))
    assert found.state["optimizer"] > 2 * size
    assert found.trainable == size // 4
    assert found.frozen == sum(leaf.size for leaf in task.frozen.values()) > 0
    assert found.state["frozen weights"] == 4 * found.frozen
    assert found.flops == task.work(batch)["flops"]
    assert found.frames == 8 * 40
    assert found.seconds == 8 * 40 * 0.08


def test_the_abstract_batch_is_that_of_the_data(small_run) -> None:
    task = make_task(small_run)
    batch, abstract = next(task.batches(0)), plan.abstract_batch(task)
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in batch.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in abstract.items()
    }
    assert plan.estimate(task).state["batch"] == sum(leaf.nbytes for leaf in batch.values())


SIZES = {"width": 64, "queries": 64, "keys": 32, "heads": 4, "hidden": 192, "row": 128}


def test_policies_keep_less_and_less() -> None:
    none, dots, full = (
        plan.layer_bytes(remat, plan._DECODER, **SIZES, compute=4)
        for remat in ("none", "dots", "full")
    )
    # By hand: 4 (4 * 64 + 3 * 64 + 3 * 32 + 2 * 192) + 4 (3 * 192 + 2 * 4 * 128), and so on.
    assert none == 4 * (256 + 192 + 96 + 384) + 4 * (576 + 1024)
    assert dots == 4 * 64 + 4 * (64 + 64 + 64 + 384)
    assert full == 4 * 64


@pytest.mark.parametrize(("overrides", "parts"), [(("microbatches=4",), 4), ((), 1)])
def test_micro_batches_divide_activations_and_cost_a_sum(overrides, parts, small_run) -> None:
    whole = plan.estimate(make_task(small_run))
    found = plan.estimate(make_task(small_run, *overrides))
    share = whole.working["activations"] / found.working["activations"]
    np.testing.assert_allclose(share, parts, rtol=0.01)
    masters = found.state["masters"]
    assert found.working["accumulated gradients"] == (masters if parts > 1 else 0)


def test_half_precision_costs_a_copy_of_the_weights(small_run) -> None:
    plain = plan.estimate(make_task(small_run))
    half = plan.estimate(make_task(small_run, "compute=bfloat16"))
    assert half.working["weights in compute dtype"] == half.state["masters"] // 2
    assert half.working["activations"] < plain.working["activations"]


def test_a_plan_is_printed_at_once(small_run, capsys) -> None:
    task = make_task(small_run)
    begin = time.perf_counter()
    plan.print_plan(task)
    assert time.perf_counter() - begin < 3  # alone, half a second; a fifth of it measures the peak
    printed = capsys.readouterr().err
    total = plan.estimate(task).total
    for part in ("1 devices (data 1 x fsdp 1 x tensor 1)", "FLOPs", "320 frames", "masters"):
        assert part in printed
    assert f"{total / 1e6:.2f} MB (estimated)" in printed
    assert "XLA" not in printed


def test_step_time_and_xlas_analysis_are_printed(small_run, monkeypatch) -> None:
    task = make_task(small_run)
    found = plan.estimate(task)
    monkeypatch.setattr(plan, "measure_local_peak", lambda: 2e9)
    printed = "\n".join(plan.table(found, task, compiled=2 * found.total))
    assert "XLA's analysis; estimate 0.50 of it" in printed
    assert f"step time    {found.flops / 1e9:.3g} s (computed: 50% of the fp32" in printed


def test_accelerators_are_timed_by_their_published_peak(small_run) -> None:
    task = make_task(small_run)
    device = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
    task.mesh = SimpleNamespace(devices=np.array([device] * 4, object))
    found = plan.estimate(make_task(small_run))
    (line,) = plan.step_time(found, task)
    assert f"{found.flops / (4 * 989e12 * 0.4):.3g} s (computed: 40% of NVIDIA H100" in line
    device.device_kind = "an abacus"
    assert plan.step_time(found, task) == []


def test_the_program_plans_and_does_nothing(small_run, tmp_path, monkeypatch) -> None:
    from train import pretrain

    sizes = []
    monkeypatch.setattr(plan, "compiled_bytes", lambda task: sizes.append(task) or 10**9)
    folder = tmp_path / "run"
    arguments = [str(small_run), f"run.folder={folder}"]
    results = [
        CliRunner().invoke(pretrain.main, [*arguments, option])
        for option in ("--plan", "--plan-xla")
    ]
    assert [result.exit_code for result in results] == [0, 0]
    assert ["XLA's analysis" in result.output for result in results] == [False, True]
    assert len(sizes) == 1 and not folder.exists()
