"""Whole folders there and back, and every reason not to write one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from dia2_jax import checkpoint, hub
from dia2_jax.config import load_dia2_config
from dia2_jax.convert import models
from dia2_jax.convert.api import convert
from dia2_jax.errors import CheckpointError, ConfigError, HubError

KYUTAI = Path(__file__).parent.parent / "golden" / "kyutai"


@pytest.fixture
def folder(checkpoint_folder):
    """A whole model: weights, tokenizer files, a codec inside, and a file that is not ours."""
    folder = checkpoint_folder("dia2-b")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "merges.txt").write_bytes(b"a b\r\n")
    (folder / "notes.txt").write_text("not part of the model")
    checkpoint_folder("mimi-b", name="source/mimi")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_model_through_orbax_and_back_is_the_same_folder(tmp_path, folder):
    done = convert(folder, tmp_path / "orbax", to="orbax")
    assert (done.kind, done.layout, done.form, done.tensors) == ("dia2", "dia2", "orbax", 72)
    assert done.destination == tmp_path / "orbax"
    assert checkpoint.is_orbax(tmp_path / "orbax" / hub.ORBAX)
    assert checkpoint.is_orbax(tmp_path / "orbax" / "mimi" / hub.ORBAX)
    convert(tmp_path / "orbax", tmp_path / "again", to="orbax")
    convert(tmp_path / "again", tmp_path / "back")
    expected = contents(folder)
    del expected["notes.txt"]
    assert contents(tmp_path / "back") == expected


def test_an_orbax_folder_is_a_model_folder(tmp_path, folder):
    convert(folder, tmp_path / "orbax", to="orbax")
    files = hub.resolve(tmp_path / "orbax")
    config = load_dia2_config(files.config)
    model, _ = models.load_dia2(config, files.weights)
    stored = safetensors.numpy.load_file(folder / "model.safetensors")
    name = "transformer.layers.1.mlp.wo.weight"
    np.testing.assert_array_equal(model.transformer.layers[1].mlp.wo.weight[...], stored[name])
    codec, _, source = models.load_mimi(files.mimi)
    assert source.layout == "mimi-hf" and codec.codebooks == 4


def test_manifest_and_names_survive(tmp_path, folder):
    (folder / "weights").mkdir()
    (folder / "model.safetensors").rename(folder / "weights" / "small.safetensors")
    (folder / "config.json").rename(folder / "shape.json")
    (folder / "mimi").rename(folder / "codec")
    (folder / "words").mkdir()
    (folder / "tokenizer.json").rename(folder / "words" / "tokenizer.json")
    manifest = (
        '{"weights":"weights/small.safetensors", "config": "shape.json",'
        ' "mimi": "codec", "tokenizer": "words"}'
    )
    (folder / "dia2_assets.json").write_text(manifest)
    convert(folder, tmp_path / "orbax", to="orbax")
    assert hub.resolve(tmp_path / "orbax").weights == tmp_path / "orbax" / hub.ORBAX
    convert(tmp_path / "orbax", tmp_path / "back")
    expected = contents(folder)
    del expected["notes.txt"]
    assert contents(tmp_path / "back") == expected


def test_shards_become_one_file(tmp_path, folder):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"m-1.safetensors": names[:30], "m-2.safetensors": names[30:]}
    for file, part in parts.items():
        safetensors.numpy.save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "dia2_assets.json").write_text('{"weights": "model.safetensors.index.json"}')
    for source, to, out in (
        (folder, "published", "one"),
        (folder, "orbax", "orbax"),
        (tmp_path / "orbax", "published", "two"),
    ):
        convert(source, tmp_path / out, to=to)
    for out in ("one", "two"):
        files = hub.resolve(tmp_path / out)
        assert files.weights == tmp_path / out / "model.safetensors"
        got = safetensors.numpy.load_file(files.weights)
        assert got.keys() == tensors.keys()
        assert all(got[name].tobytes() == tensors[name].tobytes() for name in names)


@pytest.mark.parametrize("through", ["published", "orbax"])
def test_a_chosen_dtype_is_for_the_model_and_is_kept(tmp_path, folder, through):
    convert(folder, tmp_path / "narrow", to=through, dtype=jnp.bfloat16)
    convert(tmp_path / "narrow", tmp_path / "back")
    before = safetensors.numpy.load_file(folder / "model.safetensors")
    after = safetensors.numpy.load_file(tmp_path / "back" / "model.safetensors")
    for name, array in before.items():
        assert after[name].tobytes() == array.astype(ml_dtypes.bfloat16).tobytes()
    codec = "mimi/model.safetensors"
    assert (tmp_path / "back" / codec).read_bytes() == (folder / codec).read_bytes()


def test_a_codec_goes_to_kyutais_layout_and_back(tmp_path, folder):
    done = convert(folder / "mimi", tmp_path / "kyutai", to="kyutai")
    assert (done.kind, done.layout) == ("mimi", "mimi-kyutai")
    raw = json.loads((tmp_path / "kyutai" / hub.KYUTAI_CONFIG).read_text())
    assert raw["quantizer"]["n_q"] == 4
    assert models.mimi_layout(tmp_path / "kyutai") == "mimi-kyutai"
    convert(tmp_path / "kyutai", tmp_path / "back", to="hf")
    assert contents(tmp_path / "back") == contents(folder / "mimi")


@pytest.mark.parametrize("source", [KYUTAI, KYUTAI / "model.safetensors"])
def test_kyutais_own_codec_goes_to_hugging_face_through_orbax(tmp_path, source):
    convert(source, tmp_path / "orbax", to="orbax")
    convert(tmp_path / "orbax", tmp_path / "same")
    assert (tmp_path / "same" / "model.safetensors").read_bytes() == (
        KYUTAI / "model.safetensors"
    ).read_bytes()
    convert(tmp_path / "orbax", tmp_path / "hf", to="hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["model_type"] == "mimi" and config["sliding_window"] == 9
    assert models.mimi_layout(tmp_path / "hf") == "mimi-hf"
    convert(tmp_path / "hf", tmp_path / "kyutai", to="kyutai")
    assert (tmp_path / "kyutai" / "model.safetensors").read_bytes() == (
        KYUTAI / "model.safetensors"
    ).read_bytes()


def test_the_config_of_a_language_model_beside_the_codec_is_not_its_own(tmp_path):
    shutil.copytree(KYUTAI, tmp_path / "repo")
    (tmp_path / "repo" / "config.json").write_text('{"model_type": "moshi", "dim": 4096}')
    convert(tmp_path / "repo" / "model.safetensors", tmp_path / "hf", to="hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["hidden_size"] == 16


def test_a_destination_that_holds_something_is_left_alone_unless_forced(tmp_path, folder):
    out = tmp_path / "out"
    out.mkdir()
    convert(folder, out)
    before = contents(out)
    (out / "mine.txt").write_text("keep me")
    with pytest.raises(CheckpointError, match="out is not empty.*--force"):
        convert(folder, out, to="orbax")
    assert contents(out) == {**before, "mine.txt": b"keep me"}
    convert(folder, out, force=True)
    assert contents(out) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file; name a folder"):
        convert(folder, tmp_path / "file")


@pytest.mark.parametrize("where", ["", ".."])
def test_the_source_is_never_its_own_destination(folder, where):
    before = contents(folder)
    with pytest.raises(CheckpointError, match="holds the source"):
        convert(folder, folder / where, force=True)
    assert contents(folder) == before


def test_a_failed_conversion_leaves_nothing_and_keeps_the_old(tmp_path, folder):
    convert(folder, tmp_path / "out")
    before = contents(tmp_path / "out")
    weights = folder / "mimi" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="mimi/model.safetensors: truncated"):
        convert(folder, tmp_path / "out", force=True)
    assert contents(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_sources_that_are_no_folder_of_a_model_are_named(tmp_path, folder):
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="nowhere: no such file or folder"):
        convert(tmp_path / "nowhere", out)
    with pytest.raises(CheckpointError, match="unknown form 'gguf'; known: published, orbax"):
        convert(folder, out, to="gguf")
    with pytest.raises(CheckpointError, match="'kyutai' is a layout of the codec: convert .*mimi"):
        convert(folder, out, to="kyutai")
    with pytest.raises(CheckpointError, match="a Dia2 model without its config.json"):
        convert(folder / "model.safetensors", out)
    convert(folder, tmp_path / "orbax", to="orbax")
    with pytest.raises(CheckpointError, match="holds weights only; name the folder around it"):
        convert(tmp_path / "orbax" / hub.ORBAX, out)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no model.safetensors"):
        convert(folder, out)
    (folder / "config.json").write_text('{"data": {}, "model": {}}')
    with pytest.raises(ConfigError, match="missing field"):
        convert(folder, out)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json: not valid JSON"):
        convert(folder, out)
    assert not out.exists()


def say(folder: Path, **manifest: object) -> None:
    (folder / "dia2_assets.json").write_text(json.dumps(manifest))


def set_assets(folder: Path, **assets: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "assets": assets}))


@pytest.mark.parametrize("to", ["published", "orbax"])
def test_parts_that_only_the_config_names_come_along(tmp_path, folder, to):
    (folder / "mimi").rename(folder / "codec")
    (folder / "words").mkdir()
    for name in ("tokenizer.json", "merges.txt"):
        (folder / name).rename(folder / "words" / name)
    set_assets(folder, mimi="codec", tokenizer="./words/")
    convert(folder, tmp_path / "out", to=to)
    files = hub.resolve(tmp_path / "out")
    assert files.tokenizer == tmp_path / "out" / "words" / "tokenizer.json"
    assert files.mimi.config == tmp_path / "out" / "codec" / "config.json"
    convert(tmp_path / "out", tmp_path / "back")
    expected = contents(folder)
    del expected["notes.txt"]
    assert contents(tmp_path / "back") == expected


def test_the_manifest_outranks_the_config_and_both_outrank_the_mimi_folder(tmp_path, folder):
    shutil.copytree(folder / "mimi", folder / "codec")
    set_assets(folder, mimi="mimi")
    say(folder, mimi="codec")
    convert(folder, tmp_path / "out")
    assert hub.resolve(tmp_path / "out").mimi == hub.MimiFiles(
        tmp_path / "out" / "codec" / "model.safetensors", tmp_path / "out" / "codec" / "config.json"
    )
    assert not (tmp_path / "out" / "mimi").exists()


@pytest.mark.parametrize("to", ["published", "orbax"])
def test_a_codec_named_as_a_file_stays_that_file(tmp_path, folder, to):
    shutil.rmtree(folder / "mimi")
    shutil.copytree(KYUTAI, folder / "codec")
    say(folder, mimi="codec/model.safetensors")
    convert(folder, tmp_path / "out", to=to)
    codec = hub.resolve(tmp_path / "out").mimi
    assert codec.weights == tmp_path / "out" / "codec" / "model.safetensors"
    assert codec.config == tmp_path / "out" / "codec" / hub.KYUTAI_CONFIG
    assert codec.weights.read_bytes() == (KYUTAI / "model.safetensors").read_bytes()


@pytest.mark.parametrize("where", ["manifest", "config"])
def test_a_repository_stays_a_name(tmp_path, folder, where):
    shutil.rmtree(folder / "mimi")
    (folder / "tokenizer.json").unlink()
    names = {"mimi": "kyutai/mimi", "tokenizer": "nari-labs/Dia2-1B"}
    say(folder, **names) if where == "manifest" else set_assets(folder, **names)
    convert(folder, tmp_path / "orbax", to="orbax")
    convert(tmp_path / "orbax", tmp_path / "back")
    expected = contents(folder)
    del expected["notes.txt"]
    assert contents(tmp_path / "back") == expected


@pytest.mark.parametrize("form", ["..", "absolute", "config", "working directory"])
@pytest.mark.parametrize("key", ["mimi", "tokenizer"])
def test_a_part_outside_the_source_is_refused(tmp_path, folder, monkeypatch, key, form):
    """It could not lie at the same place of the destination, and is never written elsewhere."""
    place = tmp_path / "elsewhere" / key
    shutil.copytree(folder / "mimi", place)
    (folder / "tokenizer.json").rename(place / "tokenizer.json")
    monkeypatch.chdir(tmp_path / "elsewhere")
    name = {"..": f"../elsewhere/{key}", "working directory": key}.get(form, str(place))
    shutil.rmtree(folder / "mimi")
    set_assets(folder, **{key: name}) if form == "config" else say(folder, **{key: name})
    before = contents(tmp_path)
    remedy = f'copy it to {folder / key} and say "{key}": "{key}" in dia2_assets.json'
    with pytest.raises(CheckpointError, match=f"{key} '.*' lies outside the folder.*{remedy}"):
        convert(folder, tmp_path / "new" / "out")
    assert contents(tmp_path) == before
    shutil.copytree(place, folder / key)
    say(folder, **{key: key})
    convert(folder, tmp_path / "new" / "out")
    assert (tmp_path / "new" / "out" / key / "tokenizer.json").is_file() or key == "mimi"


@pytest.mark.parametrize("key", ["config", "weights"])
def test_config_and_weights_outside_the_source_are_refused(tmp_path, folder, key):
    name = {"config": "config.json", "weights": "model.safetensors"}[key]
    (folder / name).rename(tmp_path / name)
    for written in (f"../{name}", str(tmp_path / name)):
        say(folder, **{key: written})
        before = contents(tmp_path)
        with pytest.raises(CheckpointError, match=f"{key} '.*{name}' lies outside the folder"):
            convert(folder, tmp_path / "new" / "out")
        assert contents(tmp_path) == before


def test_manifest_mistakes_are_those_of_the_hub(tmp_path, folder):
    for manifest, kind, message in (
        ({"weights": "missing.safetensors"}, HubError, "missing.safetensors is missing"),
        ({"config": "missing.json"}, HubError, "missing.json is missing"),
        ({"tokenizer": "mimi"}, HubError, "mimi: tokenizer.json is missing"),
        ({"mimi": "missing"}, HubError, "there is no folder missing"),
        ({"wieghts": "x"}, ConfigError, r"unknown key 'wieghts' \(did you mean 'weights'\?\)"),
        ({"mimi": ["mimi"]}, ConfigError, r'mimi: must be a string, got \["mimi"\]'),
        ({"weights": ["x"]}, ConfigError, r'weights: must be a string, got \["x"\]'),
    ):
        say(folder, **manifest)
        for use in (hub.resolve, lambda source: convert(source, tmp_path / "out")):
            with pytest.raises(kind, match=message):
                use(folder)
    assert not (tmp_path / "out").exists()


def test_a_manifest_written_for_the_orbax_folder_is_kept(tmp_path, folder):
    convert(folder, tmp_path / "orbax", to="orbax")
    (tmp_path / "orbax" / "mimi").rename(tmp_path / "orbax" / "codec")
    say(tmp_path / "orbax", mimi="codec")
    convert(tmp_path / "orbax", tmp_path / "back")
    assert hub.resolve(tmp_path / "back").mimi.weights == (
        tmp_path / "back" / "codec" / "model.safetensors"
    )


def test_a_name_that_orbax_weights_remember_cannot_lead_out(tmp_path, folder, monkeypatch):
    convert(folder, tmp_path / "orbax", to="orbax")
    read = checkpoint.read_metadata
    monkeypatch.setattr(checkpoint, "read_metadata", lambda path: {**read(path), "weights": "../w"})
    with pytest.raises(CheckpointError, match=r"model.orbax: .*'../w' would lie outside"):
        convert(tmp_path / "orbax", tmp_path / "back")
    assert not (tmp_path / "w").exists() and not (tmp_path / "back").exists()


def test_a_codec_file_is_not_written_over_the_weights(tmp_path, folder):
    """Shards are written as one file, whose name the codec may have."""
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    names = safetensors.numpy.load_file(folder / "part.safetensors")
    index = {"weight_map": dict.fromkeys(names, "part.safetensors")}
    (folder / "m.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(folder / "mimi" / "model.safetensors", folder / "model.safetensors")
    say(folder, weights="m.safetensors.index.json", mimi="model.safetensors")
    with pytest.raises(CheckpointError, match="model.safetensors: .*rename the codec"):
        convert(folder, tmp_path / "out")
