"""Weights in and out: bit for bit where the memory is wide enough, refused where it is not."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from dia2_jax import checkpoint
from dia2_jax.compilation_cache import CompileWatch
from dia2_jax.config import load_dia2_config, load_mimi_config
from dia2_jax.convert import dia2, load, mimi_hf, models
from dia2_jax.convert.rules import Rule, Table
from dia2_jax.convert.safetensors_io import TensorSpec, write_safetensors
from dia2_jax.errors import CheckpointError
from dia2_jax.nn.linear import fan_in_init

TOY = Table("toy", [Rule("t.{i}.w", "layers.{i}.weight")])


def table_and_tree(folder: Path, layout: str):
    if layout.startswith("mimi"):
        config = load_mimi_config(folder)
        return mimi_hf.make_table(config), models.abstract_mimi(config)[1]
    return dia2.TABLE, models.abstract_dia2(load_dia2_config(folder))[1]


def toy(tmp_path, dtype=np.float32, count=3):
    """A file of the toy layout and the abstract tree it fills."""
    rng = np.random.default_rng(0)
    tensors = {f"t.{i}.w": rng.standard_normal((2, 3)).astype(dtype) for i in range(count)}
    specs = {name: TensorSpec(array.shape, array.dtype) for name, array in tensors.items()}
    path = tmp_path / "toy.safetensors"
    write_safetensors(path, specs, tensors.__getitem__, {"made": "here"})
    tree = {"layers": [{"weight": jax.ShapeDtypeStruct((2, 3), jnp.float32)}] * count}
    return path, tree, tensors


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("layout", ["dia2-a", "dia2-b", "mimi-b"])
@pytest.mark.parametrize("through_orbax", [False, True])
def test_export_gives_the_same_file(tmp_path, checkpoint_folder, layout, dtype, through_orbax):
    """The whole file, header included, from float32 in memory."""
    folder = checkpoint_folder(layout, dtype)
    table, tree = table_and_tree(folder, layout)
    params, source = load.load_params(folder, table, tree)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    if through_orbax:
        load.save_orbax(tmp_path / "ck", params, source)
        params, source = load.load_orbax(tmp_path / "ck", tree)
    load.export_params(params, table, tmp_path / "out.safetensors", source)
    exported = (tmp_path / "out.safetensors").read_bytes()
    assert exported == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_every_half_precision_value_survives_float32(tmp_path, dtype):
    """All 65,536 bit patterns, subnormals, infinities and NaNs with their payloads."""
    kind = {"F16": np.float16, "BF16": ml_dtypes.bfloat16}[dtype]
    bits = np.arange(2**16, dtype=np.uint16)
    if dtype == "F16":  # the processor's conversion sets the quiet bit of a signalling NaN
        bits = bits[~(((bits & 0x7C00) == 0x7C00) & ((bits & 0x03FF) != 0) & ((bits & 0x200) == 0))]
    tensors = {"t.0.w": bits.view(kind)}
    path = tmp_path / "in.safetensors"
    safetensors.numpy.save_file(tensors, path)
    tree = {"layers": [{"weight": jax.ShapeDtypeStruct(bits.shape, jnp.float32)}]}
    params, source = load.load_params(path, TOY, tree)
    load.save_orbax(tmp_path / "ck", params, source)
    params, source = load.load_orbax(tmp_path / "ck", tree)
    load.export_params(params, TOY, tmp_path / "out.safetensors", source)
    assert (tmp_path / "out.safetensors").read_bytes() == path.read_bytes()


def test_narrower_memory_is_refused_unless_asked_for(tmp_path):
    path, tree, tensors = toy(tmp_path)
    params, source = load.load_params(path, TOY, tree, jnp.bfloat16)
    out = tmp_path / "out.safetensors"
    with pytest.raises(CheckpointError, match=r"3 of 3 tensors.*t.0.w: F32 as bfloat16.*wider"):
        load.export_params(params, TOY, out, source)
    assert not out.exists()
    rounded = {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()}
    load.export_params(params, TOY, out, source, allow_lossy=True)
    for name, array in safetensors.numpy.load_file(out).items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, rounded[name].astype(np.float32))
    load.export_params(params, TOY, out, source, dtype=jnp.bfloat16)
    for name, array in safetensors.numpy.load_file(out).items():
        assert array.tobytes() == rounded[name].tobytes()


@pytest.mark.parametrize(
    ("stored", "memory"), [(np.float16, jnp.bfloat16), (ml_dtypes.bfloat16, jnp.float16)]
)
def test_the_two_half_precisions_do_not_hold_each_other(tmp_path, stored, memory):
    path, tree, _ = toy(tmp_path, stored)
    params, source = load.load_params(path, TOY, tree, memory)
    with pytest.raises(CheckpointError, match="narrower dtype"):
        load.export_params(params, TOY, tmp_path / "out.safetensors", source)


def test_parameters_that_changed_are_not_rounded_in_silence(tmp_path):
    path, tree, _ = toy(tmp_path, ml_dtypes.bfloat16)
    params, source = load.load_params(path, TOY, tree)
    trained = jax.tree.map(lambda leaf: leaf + 1e-6, params)
    out = tmp_path / "out.safetensors"
    with pytest.raises(CheckpointError, match="t.0.w has values that the source's BF16 cannot"):
        load.export_params(trained, TOY, out, source)
    assert list(tmp_path.iterdir()) == [path]
    load.export_params(trained, TOY, out, source, dtype=jnp.float32)
    written = safetensors.numpy.load_file(out)["t.1.w"]
    np.testing.assert_array_equal(written, trained["layers"][1]["weight"])


def test_without_a_source_the_file_has_the_dtypes_in_memory(tmp_path):
    path, tree, tensors = toy(tmp_path)
    params, _ = load.load_params(path, TOY, tree)
    load.export_params(params, TOY, tmp_path / "out.safetensors")
    got = safetensors.numpy.load_file(tmp_path / "out.safetensors")
    assert {name: array.tobytes() for name, array in got.items()} == {
        name: array.tobytes() for name, array in tensors.items()
    }


def test_dtype_source_keeps_what_is_stored(tmp_path):
    path, tree, tensors = toy(tmp_path, np.float16)
    params, _ = load.load_params(path, TOY, tree, "source")
    assert params["layers"][0]["weight"].dtype == jnp.float16
    safetensors.numpy.save_file(
        {name: array.astype(np.float64) for name, array in tensors.items()}, path
    )
    with pytest.raises(CheckpointError, match="t.0.w is float64, which JAX would narrow"):
        load.load_params(path, TOY, tree, "source")


def test_integers_are_no_weights(tmp_path):
    path, tree, tensors = toy(tmp_path)
    tensors["t.1.w"] = np.ones((2, 3), np.int32)
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(CheckpointError, match="t.1.w is I32, wanted float32"):
        load.load_params(path, TOY, tree)


def test_weights_of_another_config_are_listed(checkpoint_folder):
    folder = checkpoint_folder("dia2-a")
    raw = json.loads((folder / "config.json").read_text())
    raw["model"]["decoder"]["n_layer"] = 4
    raw["model"]["depformer"]["n_hidden"] = 80
    raw["runtime"]["weights_schedule"] = [0, 1, 1, 1, 1, 1, 1]
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError) as caught:
        models.load_dia2(load_dia2_config(folder), folder)
    message = str(caught.value)
    assert "model.safetensors: the weights do not fit:" in message
    assert "5 tensors with no place in this dia2 model:\n    depformer.depformer_in.2" in message
    assert "10 wanted by this dia2 model and missing:\n    transformer.layers.3.attn" in message
    assert "depformer.layers.0.mlp.wi.weight is [192, 48], the model wants" in message
    assert "[160, 48]" in message and "Is config.json the one of these weights?" in message


def test_a_truncated_checkpoint_names_file_and_tensor(checkpoint_folder):
    folder = checkpoint_folder("dia2-a")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors: truncated.*transformer\."):
        models.load_dia2(load_dia2_config(folder), folder)


def test_a_loaded_model_has_the_values_of_its_file(checkpoint_folder):
    folder = checkpoint_folder("dia2-b")
    config = load_dia2_config(folder)
    model, source = models.load_dia2(config, folder, dtype=jnp.bfloat16, param_dtype=jnp.float32)
    stored = safetensors.numpy.load_file(folder / "model.safetensors")
    np.testing.assert_array_equal(
        model.depformer.layers[2].self_attention.in_proj["1"].weight[...],
        stored["depformer.layers.2.self_attention.in_proj.1.weight"],
    )
    assert source.dtypes.keys() == stored.keys()
    held = jax.tree.leaves(nnx.state(models.load_dia2(config, folder, dtype=jnp.bfloat16)[0]))
    assert {leaf.dtype for leaf in held} == {np.dtype(jnp.bfloat16)}


def test_shapes_cost_no_initial_values(monkeypatch):
    """No parameter is computed: a shape that no memory could hold is no problem."""

    class Vast(nnx.Module):
        def __init__(self, rngs):
            self.weight = nnx.Param(fan_in_init(rngs.params(), (2**20, 2**20), jnp.float32))
            self.other = nnx.Param(rngs.params.normal((2**20, 2**20), jnp.bfloat16))

    _, abstract = load.abstract_params(Vast)
    leaves, _ = checkpoint.flatten_tree(abstract)
    assert {name: str(leaf.dtype) for name, leaf in leaves.items()} == {
        "weight": "float32",
        "other": "bfloat16",
    }


@pytest.mark.parametrize("offset", [0, 8, 24, 56])
def test_memory_never_is_the_mapped_file(tmp_path, offset):
    """At any alignment: changing the file later changes nothing, and a donation works."""
    values = np.arange(64, dtype=np.float32)
    head = values[: offset // 4]
    tensors = {"t.1.w": head, "t.0.w": values}
    specs = {name: TensorSpec(array.shape, array.dtype) for name, array in tensors.items()}
    path = tmp_path / "a.safetensors"
    # Pads the header so that the first tensor starts at a multiple of 64.
    for padding in range(0, 64, 8):
        metadata = {"pad": "x" * padding}
        write_safetensors(path, specs, tensors.__getitem__, metadata)
        if (path.stat().st_size - sum(spec.nbytes for spec in specs.values())) % 64 == 0:
            break
    else:
        raise AssertionError("no padding aligns the file")
    tree = {
        "layers": [
            {"weight": jax.ShapeDtypeStruct((64,), jnp.float32)},
            {"weight": jax.ShapeDtypeStruct(head.shape, jnp.float32)},
        ]
    }
    with CompileWatch() as watch:
        params, _ = load.load_params(path, TOY, tree)
    assert watch.counts["programs"] == 0
    weight = params["layers"][0]["weight"]
    pointer = weight.unsafe_buffer_pointer()
    with open(path, "r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    np.testing.assert_array_equal(weight, values)
    # Only a buffer of JAX's own is given back to the result.
    result = jax.jit(lambda x: x + 1, donate_argnums=0)(weight)
    assert result.unsafe_buffer_pointer() == pointer
    np.testing.assert_array_equal(result, values + 1)


def test_sharding_of_the_target_is_honoured(tmp_path):
    path, tree, _ = toy(tmp_path)
    sharding = jax.sharding.NamedSharding(
        jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",)), jax.sharding.PartitionSpec()
    )
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )
    params, _ = load.load_params(path, TOY, placed)
    assert params["layers"][2]["weight"].sharding == sharding


def resident() -> int:
    """Anonymous resident memory of this process in bytes; file pages do not count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel reports no RssAnon")


@pytest.mark.parametrize("memory", ["float32", "bfloat16"])
def test_loading_holds_the_weights_once(tmp_path, memory):
    """Peak anonymous memory below 1.3 times the weights, here of 64 MB in 32 tensors."""
    count, shape = 32, (512, 1024)
    values = np.random.default_rng(0).standard_normal(shape, np.float32)
    specs = {f"t.{i}.w": TensorSpec(shape, values.dtype) for i in range(count)}
    write_safetensors(tmp_path / "big.safetensors", specs, lambda name: values)
    tree = {"layers": [{"weight": jax.ShapeDtypeStruct(shape, jnp.dtype(memory))}] * count}
    load.load_params(*[toy(tmp_path)[0], TOY, toy(tmp_path)[1]])  # what a first load imports
    peak, done = [0], threading.Event()

    def sample():
        while not done.is_set():
            peak[0] = max(peak[0], resident())
            time.sleep(0.0005)

    before = resident()
    thread = threading.Thread(target=sample)
    thread.start()
    params, _ = load.load_params(tmp_path / "big.safetensors", TOY, tree)
    done.set()
    thread.join()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert size == count * values.size * jnp.dtype(memory).itemsize
    assert peak[0] - before < 1.3 * size


def test_source_info_survives_json_and_says_when_damaged():
    info = load.SourceInfo("toy", {"b": "F32", "a": "BF16"}, {"format": "pt"})
    again = load.SourceInfo.from_json(json.loads(json.dumps(info.to_json())))
    assert again == info and list(again.dtypes) == ["b", "a"]
    bare = dataclasses.replace(info, metadata=None)
    assert load.SourceInfo.from_json(bare.to_json()).metadata is None
    with pytest.raises(CheckpointError, match="record of the source weights is damaged"):
        load.SourceInfo.from_json({"layout": "toy"})


def test_an_orbax_folder_without_that_record_is_refused(tmp_path):
    _, tree, _ = toy(tmp_path)
    checkpoint.save(tmp_path / "ck", {"layers": [{"weight": jnp.ones((2, 3))}] * 3}, {})
    with pytest.raises(CheckpointError, match="holds no record of the published weights"):
        load.load_weights(tmp_path / "ck", TOY, tree)


def test_orbax_restores_in_a_chosen_dtype(tmp_path):
    path, tree, tensors = toy(tmp_path, np.float16)
    params, source = load.load_params(path, TOY, tree, "source")
    load.save_orbax(tmp_path / "ck", params, source)
    for dtype, expected in ((None, jnp.float32), ("source", jnp.float16), (jnp.bfloat16,) * 2):
        got, _ = load.load_weights(tmp_path / "ck", TOY, tree, dtype)
        weight = got["layers"][1]["weight"]
        assert weight.dtype == expected
        np.testing.assert_array_equal(weight, tensors["t.1.w"].astype(expected))
