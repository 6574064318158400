"""Checkpoints of runs: kept, chosen, checked, and read by whatever reads the package's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dia2_jax.checkpoint
from dia2_jax.errors import CheckpointError, ConfigError, NonFiniteError
from train.checkpoints import Checkpoints, load_for_export, read_checkpoint


def state_of(step: int) -> dict[str, Any]:
    # Larger than a line of TensorStore's metadata, so that its data lie in files of their own.
    weight = jnp.arange(4096, dtype=jnp.float32).reshape(64, 64) + step
    return {
        "step": jnp.int32(step),
        "params": {"a.weight": weight, "a.bias": jnp.full(3, step, jnp.bfloat16)},
        "optimizer": ({"mu": {"a.weight": weight / 2}}, jnp.array([True, False])),
    }


ABSTRACT = jax.eval_shape(lambda: state_of(0))
METADATA = {"config": {"run": {"best": "validation/loss"}}, "task": {"width": 64}, "totals": {}}


def fill(
    folder: Path, losses: dict[int, float | None], *, keep: int = 9, best: str | None = None
) -> None:
    with Checkpoints(folder / "checkpoints", keep=keep, best=best) as checkpoints:
        checkpoints.restore(ABSTRACT)
        for step, loss in losses.items():
            values = {} if loss is None else {"validation/loss": loss}
            checkpoints.save(step, state_of(step), METADATA, values)


def kept(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


def newest(folder: Path) -> int | None:
    with Checkpoints(folder / "checkpoints", keep=9) as checkpoints:
        restored = checkpoints.restore(ABSTRACT)
    if restored is None:
        return None
    expected = state_of(restored.step)
    jax.tree.map(np.testing.assert_array_equal, restored.state, expected)
    assert restored.metadata["step"] == restored.step
    return restored.step


# ------------------------------------------------------------------------------------------ keeping


def test_newest_and_best_are_kept(tmp_path: Path) -> None:
    losses = {1: 5.0, 2: 3.0, 3: 4.0, 4: None, 5: 3.5}
    fill(tmp_path, losses, keep=2, best="validation/loss")
    assert kept(tmp_path) == [2, 4, 5]
    # Another process finds out again which one is best.
    with Checkpoints(tmp_path / "checkpoints", keep=1, best="validation/loss") as checkpoints:
        checkpoints.restore(ABSTRACT)
        assert not checkpoints.improves({"validation/loss": 3.0})
        assert not checkpoints.improves({})
        assert checkpoints.improves({"validation/loss": 2.9})
        with pytest.raises(ConfigError, match=r"run\.best: 'validation/loss' is no .*known: b"):
            checkpoints.improves({"b": 1.0})
        checkpoints.save(6, state_of(6), METADATA)
    assert kept(tmp_path) == [2, 6]
    fill(tmp_path, {7: 1.0}, keep=1, best="validation/loss")
    assert kept(tmp_path) == [7]


def test_without_a_metric_only_the_newest_are_kept(tmp_path: Path) -> None:
    fill(tmp_path, {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}, keep=2)
    assert kept(tmp_path) == [3, 4]


def test_first_run_has_no_checkpoint(tmp_path: Path) -> None:
    assert newest(tmp_path) is None


def test_background_save_is_of_the_state_and_totals_when_it_was_asked_for(tmp_path: Path) -> None:
    step = jax.jit(
        lambda state: jax.tree.map(lambda x: ~x if x.dtype == bool else x + 1, state),
        donate_argnums=0,
    )
    totals = {"frames": 1.0}
    with Checkpoints(tmp_path / "checkpoints", keep=9) as checkpoints:
        checkpoints.restore(ABSTRACT)
        state = state_of(1)
        checkpoints.save(1, state, METADATA | {"totals": totals})
        state = jax.block_until_ready(step(step(state)))
        totals["frames"] = 99.0
    with Checkpoints(tmp_path / "checkpoints", keep=9) as checkpoints:
        restored = checkpoints.restore(ABSTRACT)
    assert restored is not None and restored.metadata["totals"] == {"frames": 1.0}
    jax.tree.map(np.testing.assert_array_equal, restored.state, state_of(1))


# ------------------------------------------------------------------------------------------- damage


def data_file(checkpoint: Path) -> Path:
    """The largest file of a checkpoint: the arrays themselves."""
    return max(checkpoint.rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def garble(path: Path) -> None:
    """All of it: what nothing reads lies now before what is read, now in the middle, now behind."""
    path.write_bytes((b"garbage!" * (path.stat().st_size // 8 + 1))[: path.stat().st_size])


def flip_bits(path: Path) -> None:
    """One in every 64 bytes, for the same reason."""
    content = bytearray(path.read_bytes())
    for place in range(0, len(content), 64):
        content[place] ^= 1
    path.write_bytes(content)


def metadata_of(checkpoint: Path) -> Path:
    return checkpoint / "metadata" / "metadata"


def change_metadata(checkpoint: Path) -> None:
    path = metadata_of(checkpoint)
    path.write_text(path.read_text().replace('"width": 64', '"width": 65'))


DAMAGE = {
    "truncated file": lambda folder: truncate(data_file(folder)),
    "missing file": lambda folder: data_file(folder).unlink(),
    "garbage bytes": lambda folder: garble(data_file(folder)),
    "flipped bits": lambda folder: flip_bits(data_file(folder)),
    "missing manifest": lambda folder: (folder / "tree" / "manifest.ocdbt").unlink(),
    "missing metadata": lambda folder: metadata_of(folder).unlink(),
    "metadata of zeros": lambda folder: metadata_of(folder).write_bytes(bytes(500)),
    "changed metadata": change_metadata,
    "no file at all": lambda folder: [p.unlink() for p in folder.rglob("*") if p.is_file()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_newest_is_reported_and_the_one_before_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    fill(tmp_path, {1: None, 2: None})
    DAMAGE[damage](tmp_path / "checkpoints" / "2")
    assert newest(tmp_path) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("warning: checkpoint 2 cannot be used, trying the one before (")
    assert kept(tmp_path) == [1]
    assert (tmp_path / "damaged" / "2").is_dir(), "nothing is thrown away"
    # The run comes to that step again.
    fill(tmp_path, {2: None})
    assert newest(tmp_path) == 2


def test_no_good_checkpoint_is_an_error(tmp_path: Path) -> None:
    fill(tmp_path, {1: None, 2: None})
    for step in (1, 2):
        garble(data_file(tmp_path / "checkpoints" / str(step)))
    with pytest.raises(CheckpointError, match=r"none of its 2 checkpoints can be used.*2: .*dama"):
        newest(tmp_path)
    assert kept(tmp_path) == [1, 2], "they stay where they are"


@given(byte=st.integers(0, 10**6), bit=st.integers(0, 7))
@settings(max_examples=20)
def test_no_flipped_bit_goes_unseen(
    tmp_path_factory: pytest.TempPathFactory, byte: int, bit: int
) -> None:
    folder = tmp_path_factory.getbasetemp() / "flipped"
    if not folder.exists():
        fill(folder, {1: None})
    path = data_file(folder / "checkpoints" / "1")
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[byte % len(content)] ^= 1 << bit
    path.write_bytes(damaged)
    try:
        # What no array reads (padding, an unused node) may change; what is read may not.
        state, _ = read_checkpoint(folder / "checkpoints" / "1", ABSTRACT)
        jax.tree.map(np.testing.assert_array_equal, state, state_of(1))
    except CheckpointError:
        pass
    finally:
        path.write_bytes(content)


def test_leftovers_of_unfinished_saves_and_deletions_do_not_matter(tmp_path: Path) -> None:
    fill(tmp_path, {1: 1.0, 2: 2.0})
    folder = tmp_path / "checkpoints"
    unfinished = folder / "3.orbax-checkpoint-tmp-7"
    (unfinished / "tree").mkdir(parents=True)
    (unfinished / "tree" / "part").write_bytes(b"half")
    (folder / "1" / "_CHECKPOINT_METADATA").unlink()
    metadata_of(folder / "1").unlink()
    fill(tmp_path, {3: 3.0}, keep=2, best="validation/loss")
    assert kept(tmp_path) == [2, 3]


# ----------------------------------------------------------------------- what may be saved and read


def test_weights_must_be_numbers_and_moments_need_not(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        checkpoints.restore(ABSTRACT)
        state = state_of(1)
        state["params"]["a.bias"] = state["params"]["a.bias"].at[1].set(jnp.nan)
        with pytest.raises(NonFiniteError, match=r"step 1: 1 arrays .* such as params\.a\.bias"):
            checkpoints.save(1, state, METADATA)
        state = state_of(2)
        state["optimizer"][0]["mu"]["a.weight"] *= jnp.inf
        checkpoints.save(2, state, METADATA)
    assert kept(tmp_path) == [2]


def test_metadata_of_any_json_comes_back(tmp_path: Path) -> None:
    # Keys that are numbers sort differently from their names.
    awkward = METADATA | {"task": {"ranks": {9: 1, 10: (2, None)}, "word": "ö"}}
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        checkpoints.restore(ABSTRACT)
        checkpoints.save(1, state_of(1), awkward)
    _, metadata = read_checkpoint(tmp_path / "checkpoints" / "1", ABSTRACT)
    assert metadata["task"] == {"ranks": {"9": 1, "10": [2, None]}, "word": "ö"}


def test_what_cannot_be_written_is_an_error_that_says_where(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.restore(ABSTRACT)
    shutil.rmtree(folder)
    folder.write_text("a file where the folder was")
    with pytest.raises(CheckpointError, match="checkpoints: a checkpoint cannot be saved"):
        checkpoints.save(1, state_of(1), METADATA)
        checkpoints.close()


def test_another_structure_is_refused_by_name(tmp_path: Path) -> None:
    fill(tmp_path, {1: None})
    other = {**ABSTRACT, "ema": ABSTRACT["params"]}
    with (
        Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints,
        pytest.raises(CheckpointError, match=r"2 wanted and missing:\s+ema\.a\.bias"),
    ):
        checkpoints.restore(other)
    assert kept(tmp_path) == [1]


def test_layout_is_that_of_the_package(tmp_path: Path) -> None:
    fill(tmp_path, {3: None})
    path = tmp_path / "checkpoints" / "3"
    assert dia2_jax.checkpoint.is_orbax(path)
    tree, metadata = dia2_jax.checkpoint.restore(path)
    assert metadata["task"] == {"width": 64}
    assert tree["params"]["a"]["weight"].shape == (64, 64)
    assert dia2_jax.checkpoint.stored_leaves(path)["optimizer.0.mu.a.weight"].shape == (64, 64)


def test_weights_load_for_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path, {1: 1.0, 2: 0.5, 3: 2.0}, best="validation/loss")
    state, metadata = load_for_export(tmp_path)
    assert state.keys() == {"params"} and metadata["step"] == 3
    weight = state["params"]["a"]["weight"]
    assert isinstance(weight, np.ndarray) and weight[0, 1] == 4.0
    assert state["params"]["a"]["bias"].dtype == jnp.bfloat16
    assert load_for_export(tmp_path, "best")[1]["step"] == 2
    assert load_for_export(tmp_path, 1, parts=("optimizer",))[0].keys() == {"optimizer"}
    with pytest.raises(CheckpointError, match="has no checkpoint 7; it has 1, 2, 3"):
        load_for_export(tmp_path, 7)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_for_export(tmp_path / "nix")
    with pytest.raises(CheckpointError, match="holds none of lora"):
        load_for_export(tmp_path, parts=("lora",))
    garble(data_file(tmp_path / "checkpoints" / "3"))
    assert load_for_export(tmp_path)[1]["step"] == 2
    assert "checkpoint 3 cannot be used" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="damaged"):
        load_for_export(tmp_path, 3)


def test_checkpoint_metadata_is_json_for_people(tmp_path: Path) -> None:
    fill(tmp_path, {1: 0.25})
    document = json.loads(metadata_of(tmp_path / "checkpoints" / "1").read_text())
    assert document["metadata"]["metrics"] == {"validation/loss": 0.25}
    assert document["metadata"]["fingerprints"].keys() >= {"step", "params.a.weight"}
