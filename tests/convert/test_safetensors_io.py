"""Safetensors files: agreement with the reference library, and errors that name the tensor."""

from __future__ import annotations

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dia2_jax.convert import safetensors_io as io
from dia2_jax.errors import CheckpointError
from dia2_jax.hub import find_weights

RNG = np.random.default_rng(0)
TENSORS = {
    "wide": RNG.standard_normal((3, 5)).astype(np.float32),
    "half": RNG.standard_normal((2, 3, 4)).astype(np.float16),
    "ids": np.arange(7, dtype=np.int64),
    "flags": np.array([True, False, True]),
    "scalar": np.array(2.5, np.float32),
    "empty": np.empty((0, 4), np.float32),
}
BRAIN = RNG.standard_normal((4, 3)).astype(ml_dtypes.bfloat16)


def write(path, tensors, metadata=None):
    specs = {name: io.TensorSpec(array.shape, array.dtype) for name, array in tensors.items()}
    io.write_safetensors(path, specs, tensors.__getitem__, metadata)


def read_all(path):
    file = io.open_safetensors(path)
    return {name: file.read(name) for name in file.specs}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].dtype == array.dtype and got[name].shape == array.shape
        assert got[name].tobytes() == array.tobytes()


def rewrite(path, change):
    """Change the header of a file (a dict, in place) and keep the data."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def test_reads_what_the_library_wrote(tmp_path):
    safetensors.numpy.save_file(TENSORS, tmp_path / "a.safetensors", {"format": "pt", "k": "ü"})
    file = io.SafetensorsFile(tmp_path / "a.safetensors")
    assert file.metadata == {"format": "pt", "k": "ü"}
    assert_same({name: file.read(name) for name in TENSORS}, TENSORS)


def test_the_library_reads_what_we_wrote(tmp_path):
    write(tmp_path / "a.safetensors", {**TENSORS, "brain": BRAIN}, {"format": "pt"})
    got = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    assert_same(got, {**{name: TENSORS[name] for name in got if name != "brain"}, "brain": BRAIN})


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_default_order_gives_the_librarys_bytes(tmp_path, metadata):
    """The whole file equals the reference writer's, so hashes of published files survive."""
    tensors = {
        f"{name}{index}": np.ones(index + 1).astype(dtype)
        for index, (name, dtype) in enumerate(reversed(io.DTYPES.items()))
        if not name.startswith("F8")  # the library's numpy writer lacks these two
    } | TENSORS
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors", metadata)
    specs = {name: io.TensorSpec(array.shape, array.dtype) for name, array in tensors.items()}
    io.write_safetensors(
        tmp_path / "b.safetensors", io.default_order(specs), tensors.__getitem__, metadata
    )
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
            lambda name: name != "__metadata__"
        ),
        st.sampled_from(list(io.DTYPES.values())).flatmap(
            lambda dtype: hnp.arrays(
                np.uint8, hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4)
            ).map(lambda raw: np.repeat(raw % 2, dtype.itemsize, axis=-1).view(dtype))
        ),
        max_size=5,
    )
)
def test_any_tensors_come_back_bit_for_bit(tmp_path_factory, tensors):
    path = tmp_path_factory.mktemp("io") / "x.safetensors"
    write(path, tensors)
    assert_same(read_all(path), tensors)


def test_reading_maps_the_file_and_cannot_write_to_it(tmp_path):
    write(tmp_path / "a.safetensors", TENSORS)
    view = io.SafetensorsFile(tmp_path / "a.safetensors").read("wide")
    assert not view.flags.owndata and not view.flags.writeable


def shard(folder):
    """TENSORS in two shards with an index."""
    names = list(TENSORS)
    parts = {"m-1.safetensors": names[:2], "m-2.safetensors": names[2:]}
    for file, part in parts.items():
        write(folder / file, {name: TENSORS[name] for name in part}, {"format": "pt"})
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder / "model.safetensors.index.json"


def test_shards_read_as_one(tmp_path):
    index = shard(tmp_path)
    assert_same(read_all(index), TENSORS)
    assert_same(read_all(tmp_path), TENSORS)
    assert io.open_safetensors(tmp_path).metadata == {"format": "pt"}


def test_index_errors_name_the_shard_and_the_tensor(tmp_path):
    index = shard(tmp_path)
    write(tmp_path / "m-2.safetensors", {"ids": TENSORS["ids"]})
    with pytest.raises(CheckpointError, match="m-2.*lacks 3 tensors.*flags, scalar, empty"):
        io.open_safetensors(index)
    write(tmp_path / "m-2.safetensors", {**TENSORS})
    with pytest.raises(CheckpointError, match="m-2.*holds 2 tensors.*does not place.*wide, half"):
        io.open_safetensors(index)
    (tmp_path / "m-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match="names the shard m-2.*missing.*4 tensors.*ids"):
        io.open_safetensors(index)
    index.write_text('{"weight_map": {"a": "../other.safetensors"}}')
    with pytest.raises(CheckpointError, match="is not a file name"):
        io.open_safetensors(index)
    for text in ("[]", "{}", "{", '{"weight_map": {}}'):
        index.write_text(text)
        with pytest.raises(CheckpointError, match="index"):
            io.open_safetensors(index)


def test_a_truncated_file_names_what_is_lost(tmp_path):
    path = tmp_path / "a.safetensors"
    write(path, TENSORS)
    raw = path.read_bytes()
    (header,) = struct.unpack("<Q", raw[:8])
    for size, message in [
        (0, "truncated: 0 bytes"),
        (5, "truncated: 5 bytes"),
        (8 + header // 2, "truncated inside its header"),
        (8 + header, "truncated: 0 data bytes.*6 of 6 tensors.*wide, half, ids"),
        (8 + header + 70, "truncated: 70 data bytes.*5 of 6 tensors.*half, ids"),
        (len(raw) - 1, "2 of 6 tensors.*scalar, empty"),
    ]:
        path.write_bytes(raw[:size])
        with pytest.raises(CheckpointError, match=message) as caught:
            io.open_safetensors(path)
        assert str(path) in str(caught.value)


def test_a_corrupt_file_names_the_tensor(tmp_path):
    path = tmp_path / "a.safetensors"
    for change, message in [
        (lambda h: h["half"].update(shape=[2, 3, 5]), "half is F16.*60 bytes.*holds 48"),
        (lambda h: h["half"].update(dtype="F7"), "half has the dtype 'F7'; known: U64"),
        (lambda h: h["half"].pop("shape"), "entry of half does not say"),
        (lambda h: h.update(half=3), "entry of half does not say"),
        (lambda h: h["half"].update(data_offsets=[60.0, 108]), "entry of half"),
        (lambda h: h["half"].update(data_offsets=[-1, 47]), "entry of half"),
        (lambda h: h["half"].update(data_offsets=[59, 107]), "range of half overlaps"),
        (lambda h: h["half"].update(data_offsets=[61, 109]), "range of half leaves a hole"),
        (lambda h: h.pop("scalar"), "4 bytes follow the last tensor|leaves a hole"),
        (lambda h: h.update(__metadata__={"a": 1}), "__metadata__ is not strings"),
    ]:
        write(path, TENSORS)
        rewrite(path, change)
        with pytest.raises(CheckpointError, match=message):
            io.open_safetensors(path)
    path.write_bytes(b"\x80\x02}q\x00X\x05\x00\x00\x00model" * 10)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        io.open_safetensors(path)
    for text in (b'{"a": 1, "a": 2}', b"[1, 2]", b"{{", b"\xff\xfe"):
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        with pytest.raises(CheckpointError, match="header is corrupt"):
            io.open_safetensors(path)


def test_missing_files_and_ambiguous_folders(tmp_path):
    with pytest.raises(CheckpointError, match="no such weights file"):
        io.open_safetensors(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="no such index file"):
        io.open_safetensors(tmp_path / "none.safetensors.index.json")
    with pytest.raises(CheckpointError, match="holds neither model.safetensors"):
        io.open_safetensors(tmp_path)
    write(tmp_path / "a.safetensors", TENSORS)
    assert find_weights(tmp_path) == tmp_path / "a.safetensors"
    write(tmp_path / "b.safetensors", TENSORS)
    assert find_weights(tmp_path) is None
    write(tmp_path / "model.safetensors", TENSORS)
    assert find_weights(tmp_path) == tmp_path / "model.safetensors"


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write(path, TENSORS)
    before = path.read_bytes()
    specs = {"x": io.TensorSpec((2,), np.dtype(np.float32)), "y": io.TensorSpec((2,), BRAIN.dtype)}
    with pytest.raises(CheckpointError, match="y was announced as bfloat16.*came as float32"):
        io.write_safetensors(path, specs, lambda name: np.zeros(2, np.float32))
    with pytest.raises(CheckpointError, match="cannot hold the dtype complex64"):
        io.write_safetensors(path, {"z": io.TensorSpec((1,), np.dtype(np.complex64))}, None)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]
