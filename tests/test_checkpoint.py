"""Orbax checkpoints: every kind of leaf comes back, and what does not fit is listed."""

from __future__ import annotations

import json
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dia2_jax import checkpoint
from dia2_jax.errors import CheckpointError


class Moments(NamedTuple):
    mu: jax.Array
    count: int


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (3, 4)))


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([Block(rngs) for _ in range(12)])
        self.sets = nnx.Dict({"0": Block(rngs), "7": Block(rngs)})


def make_tree():
    return {
        "params": {
            "f32": jnp.linspace(0, 1, 6).reshape(2, 3),
            "f16": jnp.arange(4, dtype=jnp.float16),
            "bf16": jnp.arange(5, dtype=jnp.bfloat16),
        },
        "opt": [Moments(jnp.ones((2, 3)), 7), Moments(jnp.zeros(3), 9)],
        "numpy": np.array([2**40, -1], np.int64),
        "key": jax.random.key(5),
        "rate": 0.25,
    }


def fail_with_full_disk(*paths):
    raise OSError("disk full")


def assert_same(got, want):
    got_leaves, got_def = jax.tree_util.tree_flatten(got)
    leaves, treedef = jax.tree_util.tree_flatten(want)
    assert got_def == treedef
    for a, b in zip(got_leaves, leaves, strict=True):
        if hasattr(b, "dtype") and jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert type(a) is type(b)
        if hasattr(b, "dtype"):
            assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_restores_every_kind_of_leaf_into_the_same_classes(tmp_path):
    tree, metadata = make_tree(), {"config": {"a": [1, None]}, "step": 3}
    checkpoint.save(tmp_path / "ck", tree, metadata)
    assert checkpoint.is_orbax(tmp_path / "ck")
    got, document = checkpoint.restore(tmp_path / "ck", tree)
    assert document == metadata == checkpoint.read_metadata(tmp_path / "ck")
    assert_same(got, tree)


def test_restores_without_classes_as_nested_dicts(tmp_path):
    tree = make_tree()
    checkpoint.save(tmp_path / "ck", tree, {})
    got, _ = checkpoint.restore(tmp_path / "ck")
    assert got["params"]["bf16"].dtype == jnp.bfloat16
    assert got["numpy"].dtype == np.int64
    assert got["numpy"].tolist() == [2**40, -1]
    assert int(got["opt"]["1"]["count"]) == 9
    assert jax.random.key_data(got["key"]).tolist() == jax.random.key_data(tree["key"]).tolist()


def test_restores_an_nnx_state_from_its_abstract_form(tmp_path):
    _, state = nnx.split(Net(nnx.Rngs(0)))
    checkpoint.save(tmp_path / "ck", state, {})
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Net(nnx.Rngs(1))))
    got, _ = checkpoint.restore(tmp_path / "ck", abstract)
    model = nnx.merge(graphdef, got)
    # Layer 10 sorts before layer 2 as a string: the order must not decide.
    for index in (2, 10):
        np.testing.assert_array_equal(
            model.layers[index].weight[...], state["layers"][index]["weight"][...]
        )


def test_casts_while_restoring(tmp_path):
    checkpoint.save(tmp_path / "ck", {"w": jnp.linspace(0, 1, 9)}, {})
    wanted = {"w": jax.ShapeDtypeStruct((9,), jnp.bfloat16)}
    got, _ = checkpoint.restore(tmp_path / "ck", wanted)
    assert got["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(got["w"], jnp.linspace(0, 1, 9).astype(jnp.bfloat16))


def test_partial_restores_a_part(tmp_path):
    checkpoint.save(tmp_path / "ck", make_tree(), {})
    wanted = {"params": make_tree()["params"]}
    got, _ = checkpoint.restore(tmp_path / "ck", wanted, partial=True)
    assert_same(got, wanted)


def test_lists_all_that_does_not_fit(tmp_path):
    checkpoint.save(tmp_path / "ck", {"a": jnp.ones(2), "b": jnp.ones((2, 3)), "c": 1.0}, {})
    with pytest.raises(CheckpointError) as caught:
        checkpoint.restore(tmp_path / "ck", {"a": jnp.ones(2), "b": jnp.ones((3, 2)), "d": 1.0})
    message = str(caught.value)
    assert "b is [2, 3], wanted [3, 2]" in message
    assert "1 wanted and missing:\n    d" in message
    assert "1 in the checkpoint and not wanted:\n    c" in message


def test_refuses_to_overwrite_unless_told_and_then_replaces(tmp_path):
    checkpoint.save(tmp_path / "ck", {"a": jnp.ones(2)}, {})
    with pytest.raises(CheckpointError, match="exists"):
        checkpoint.save(tmp_path / "ck", {"a": jnp.zeros(2)}, {})
    checkpoint.save(tmp_path / "ck", {"a": jnp.zeros(3)}, {"n": 2}, overwrite=True)
    got, metadata = checkpoint.restore(tmp_path / "ck")
    assert got["a"].tolist() == [0, 0, 0] and metadata == {"n": 2}
    assert [entry.name for entry in tmp_path.iterdir()] == ["ck"]


def test_a_failed_save_leaves_nothing_and_keeps_the_old(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "ck", {"a": jnp.ones(2)}, {})
    with pytest.raises(CheckpointError, match="not JSON"):
        checkpoint.save(tmp_path / "ck", {"a": jnp.zeros(2)}, {"x": object()}, overwrite=True)
    with pytest.raises(CheckpointError, match="a is a object; only arrays"):
        checkpoint.save(tmp_path / "ck", {"a": object()}, {}, overwrite=True)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(checkpoint, "replace_folder", fail_with_full_disk)
        checkpoint.save(tmp_path / "ck", {"a": jnp.zeros(2)}, {}, overwrite=True)
    assert checkpoint.restore(tmp_path / "ck")[0]["a"].tolist() == [1, 1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["ck"]


def test_damaged_and_foreign_folders_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        checkpoint.restore(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="not a checkpoint of this project"):
        checkpoint.restore(tmp_path / "empty")
    path = tmp_path / "ck"
    checkpoint.save(path, {"a": jnp.arange(50_000.0)}, {})
    document = path / "metadata" / "metadata"
    text = document.read_text()
    document.write_text(text[:5])
    with pytest.raises(CheckpointError, match="metadata is damaged"):
        checkpoint.read_metadata(path)
    document.write_text(json.dumps({**json.loads(text), "format": 99}))
    with pytest.raises(CheckpointError, match="format 99.*update"):
        checkpoint.restore(path)
    document.write_text(text)
    for data in path.glob("tree/**/d/*"):
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.restore(path)
    shutil.rmtree(path)


def test_one_name_for_two_leaves_is_refused():
    with pytest.raises(ValueError, match="share one dotted name"):
        checkpoint.flatten_tree({"a": {"b": 1}, "a.b": 2})
