"""int8 at load and at rest: the same weights by every way, and no way back."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from dia2_jax import hub
from dia2_jax.checkpoint import flatten_tree
from dia2_jax.config import load_dia2_config
from dia2_jax.convert import dia2, models, rounding
from dia2_jax.convert.api import convert
from dia2_jax.errors import CheckpointError


@pytest.fixture
def folder(checkpoint_folder):
    """A model with a codec inside."""
    folder = checkpoint_folder("dia2-b")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    checkpoint_folder("mimi-b", name="source/mimi")
    return folder


def weights(folder: Path, **kinds) -> dict[str, jax.Array]:
    files = hub.resolve(folder)
    model, _ = models.load_dia2(load_dia2_config(files.config), files.weights, **kinds)
    return flatten_tree(nnx.state(model))[0]


def assert_same(one: dict[str, jax.Array], other: dict[str, jax.Array]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        np.testing.assert_array_equal(value, other[name], err_msg=name)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_weights_are_rounded_at_load(folder) -> None:
    whole, narrow = weights(folder), weights(folder, int8=True)
    assert narrow["transformer.cb0_head.weight"].dtype == jnp.int8
    for name, value in whole.items():
        if (scale := narrow.get(f"{name}_scale")) is None:
            np.testing.assert_array_equal(value, narrow[name])
        else:
            restored = np.asarray(narrow[name], np.float32) * np.asarray(scale)[:, None]
            assert (np.abs(restored - value) <= np.asarray(scale)[:, None] * 0.5001).all()


@pytest.mark.parametrize("form", ["published", "orbax"])
def test_saved_int8_weights_are_those_of_a_load(tmp_path, folder, form) -> None:
    done = convert(folder, tmp_path / "int8", form, jnp.int8)
    assert (done.kind, done.layout, done.form) == ("dia2", "dia2-int8", form)
    assert_same(weights(tmp_path / "int8", int8=True), weights(folder, int8=True))


def test_an_int8_file_there_and_back_is_the_same_bytes(tmp_path, folder) -> None:
    convert(folder, tmp_path / "int8", dtype=jnp.int8)
    convert(tmp_path / "int8", tmp_path / "orbax", "orbax")
    convert(tmp_path / "orbax", tmp_path / "back", dtype=jnp.int8)  # which it is
    assert contents(tmp_path / "back") == contents(tmp_path / "int8")
    stored = safetensors.numpy.load_file(tmp_path / "int8" / "model.safetensors")
    assert stored["transformer.cb0_head.weight"].dtype == np.int8
    assert stored["transformer.cb0_head.weight_scale"].dtype == np.float32


def test_an_orbax_folder_in_floating_point_is_rounded_in_groups(
    tmp_path, folder, monkeypatch
) -> None:
    monkeypatch.setattr(rounding, "_GROUP_BYTES", 1000)
    convert(folder, tmp_path / "orbax", "orbax")
    assert_same(weights(tmp_path / "orbax", int8=True), weights(folder, int8=True))


def test_bfloat16_weights_are_rounded_too(checkpoint_folder) -> None:
    folder = checkpoint_folder("dia2-b", "BF16")
    checkpoint_folder("mimi-b", name="source/mimi")
    (folder / "tokenizer.json").write_text("{}")
    held = weights(folder, int8=True)
    assert held["transformer.cb0_head.weight"].dtype == jnp.int8
    assert held["transformer.cb0_head.weight_scale"].dtype == jnp.float32
    assert held["transformer.norm.weight"].dtype == jnp.float32


@pytest.mark.parametrize("form", ["published", "orbax"])
def test_nothing_leads_back(tmp_path, folder, form) -> None:
    convert(folder, tmp_path / "int8", form, jnp.int8)
    with pytest.raises(CheckpointError, match="convert the checkpoint that they were made from"):
        convert(tmp_path / "int8", tmp_path / "back", dtype=jnp.float32)
    assert not (tmp_path / "back").exists()
    with pytest.raises(CheckpointError, match='with dtype="int8"'):
        weights(tmp_path / "int8")


def test_a_codec_stays_in_floating_point(tmp_path, folder) -> None:
    with pytest.raises(CheckpointError, match="int8 is for a Dia2 model"):
        convert(folder / "mimi", tmp_path / "mimi", dtype=jnp.int8)
    convert(folder, tmp_path / "int8", dtype=jnp.int8)
    codec = "mimi/model.safetensors"
    assert (tmp_path / "int8" / codec).read_bytes() == (folder / codec).read_bytes()


def test_a_damaged_int8_file_names_what_is_wrong(tmp_path, folder) -> None:
    convert(folder, tmp_path / "int8", dtype=jnp.int8)
    path = tmp_path / "int8" / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    del tensors["transformer.cb0_head.weight_scale"]
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(
        CheckpointError, match=r"1 wanted .*\n.*transformer\.cb0_head\.weight_scale"
    ):
        weights(tmp_path / "int8", int8=True)
    tensors["transformer.cb0_head.weight_scale"] = np.zeros(3, np.float32)
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(CheckpointError, match="of the wrong shape"):
        weights(tmp_path / "int8", int8=True)
    assert models.holds_int8(path) and dia2.INT8_TABLE.knows("transformer.cb0_head.weight_scale")
