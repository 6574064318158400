"""The name ``nano``: the model inside the package, and the default where none is named.

What the package holds is replaced by a tiny model that `train.package` wrote.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner, Result

import dia2_jax
from dia2_jax import Dia2, GenerationConfig, SamplingConfig, hub
from dia2_jax.cli import main
from dia2_jax.errors import ConfigError, HubError

SCRIPT = "[S1] How are you?"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def model(packaged: Path) -> Dia2:
    return Dia2.from_pretrained(packaged)


def dia2_jax_command(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], stdin)


# ------------------------------------------------------------------------------------ what it means


def test_it_lies_in_the_package() -> None:
    assert hub.nano_folder() == Path(dia2_jax.__file__).parent / "nano"


def test_the_name_and_no_name_mean_the_package_s_model(nano: Path) -> None:
    for files in (hub.resolve("nano"), hub.resolve()):
        assert files.name == "nano"
        assert {path.parent for path in (files.config, files.weights, files.tokenizer)} == {nano}
        assert files.generation == nano / "dia2_generation.json"
        assert files.mimi == hub.resolve_mimi(nano / "mimi")
    assert hub.resolve_mimi("nano") == hub.resolve_mimi(nano / "mimi")
    assert hub.resolve(nano, mimi="nano").mimi == hub.resolve_mimi("nano")


def test_a_folder_of_that_name_neither_wins_nor_loses_unnoticed(
    nano: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HubError, match="there is no folder nano"):
        hub.resolve(Path("nano"))  # a path is never the package's model
    Path("nano").mkdir()
    assert hub.resolve("nano").weights.parent == nano  # a folder, but no model
    shutil.copytree(nano, "nano", dirs_exist_ok=True)
    for ask in (hub.resolve, hub.resolve_mimi):
        with pytest.raises(HubError, match=r"inside the package, and .*write \./nano for the fold"):
            ask("nano")
    assert hub.resolve().weights.parent == nano
    for own in ("./nano", Path("nano"), os.path.abspath("nano")):
        assert hub.resolve(own).weights.resolve() == Path("nano/model.safetensors").resolve()
    # Inside the package both are the same.
    monkeypatch.setattr(hub, "nano_folder", lambda: Path("nano").absolute())
    assert hub.resolve("nano").config == Path("nano/config.json").absolute()


@pytest.mark.parametrize("name", hub.NANO_FILES)
def test_an_incomplete_installation_is_named(
    packaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    shutil.copytree(packaged, tmp_path / "installed")
    (tmp_path / "installed" / name).unlink()
    monkeypatch.setattr(hub, "nano_folder", lambda: tmp_path / "installed")
    for ask in (hub.resolve, hub.resolve_mimi):
        with pytest.raises(HubError, match=rf"not whole: .*installed lacks {name}\. Install dia2"):
            ask("nano")


# --------------------------------------------------------------------------------- its own defaults


def test_a_model_brings_its_defaults(model: Dia2, nano: Path) -> None:
    own = GenerationConfig(
        audio=SamplingConfig(0.4, 9), cfg_scale=1.0, initial_padding=1, max_padding=3
    )
    assert model.defaults == own == Dia2.from_pretrained().defaults
    expected = model.generate(SCRIPT, own, seed=4)
    np.testing.assert_array_equal(model.generate(SCRIPT, seed=4).codes, expected.codes)
    chunks = [chunk.codes for chunk in model.stream(SCRIPT, seed=4)]
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), expected.codes)
    other = model.generate(SCRIPT, GenerationConfig(), seed=4)
    assert other.codes.shape != expected.codes.shape  # the settings do matter


def test_a_model_without_the_file_has_the_library_s(tiny_model: Dia2) -> None:
    assert tiny_model.defaults == GenerationConfig()


def test_a_wrong_file_is_named_while_loading(nano: Path, tmp_path: Path) -> None:
    shutil.copytree(nano, tmp_path / "model")
    (tmp_path / "model" / hub.GENERATION).write_text('{"cfg_scales": 2}')
    with pytest.raises(ConfigError, match=r"dia2_generation.json: unknown key 'cfg_scales' \(did"):
        Dia2.from_pretrained(tmp_path / "model")


# ----------------------------------------------------------------------------- on the command line


def test_it_speaks_where_no_model_is_named(nano: Path, model: Dia2) -> None:
    run = dia2_jax_command(
        "generate", SCRIPT, "-o", "a.wav", "--codes", "a.npz", "--json", "a.json"
    )
    assert (run.exit_code, run.stderr) == (0, "")
    expected = model.generate(SCRIPT)
    np.testing.assert_array_equal(np.load("a.npz")["codes"], expected.codes)
    report = json.loads(Path("a.json").read_text())
    assert (report["model"], report["settings"]["max_padding"]) == ("nano", 3)
    for arguments in (("--mimi", "nano"), ("-m", "nano")):
        assert dia2_jax_command("decode", "a.npz", "b.wav", *arguments).exit_code == 0
        np.testing.assert_array_equal(soundfile.read("a.wav")[0], soundfile.read("b.wav")[0])
    run = dia2_jax_command("encode", "a.wav", "c.npz", "--mimi", "nano")
    assert run.exit_code == 0 and np.load("c.npz")["codes"].shape[1] == expected.codes.shape[1]
    run = dia2_jax_command("voice", "a.wav", "a.voice", "--transcript", "How are you?")
    assert run.exit_code == 0, run.stderr


def test_convert_carries_its_defaults_both_ways(nano: Path) -> None:
    for arguments in ((nano, "orbax", "--to", "orbax"), ("orbax", "back")):
        assert dia2_jax_command("convert", *arguments).exit_code == 0
    for path in nano.rglob("*"):
        if path.is_file():
            assert (Path("back") / path.relative_to(nano)).read_bytes() == path.read_bytes()
    assert hub.resolve("./orbax").generation == Path("orbax/dia2_generation.json")
