"""``train.package``: a whole small folder, rounded once, or none at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from click.testing import CliRunner, Result
from safetensors.numpy import load_file

from dia2_jax import Dia2, GenerationConfig, hub
from dia2_jax.checkpoint import flatten_tree
from dia2_jax.config import load_dia2_config
from dia2_jax.convert.api import convert
from dia2_jax.convert.models import load_dia2, load_mimi
from train.package import main, package_model

MODEL = Path(__file__).parent.parent / "golden" / "parity"
WEIGHTS = ("model.safetensors", "mimi/model.safetensors")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def rounded(values: np.ndarray) -> np.ndarray:
    """fp32 to the nearest value of 16 leading bits, ties to the even one; by bits."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    kept = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return kept.astype(np.uint32).view(np.float32)


def weights(folder: Path) -> list[dict[str, Any]]:
    """Parameters of model and codec, as they are loaded."""
    from flax import nnx

    files = hub.resolve(folder)
    model, _ = load_dia2(load_dia2_config(files.config), files.weights)
    return [flatten_tree(nnx.state(module))[0] for module in (model, load_mimi(files.mimi)[0])]


def test_weights_are_rounded_to_nearest_and_load_as_float32(tmp_path: Path) -> None:
    source = shutil.copytree(MODEL, tmp_path / "model")
    spoil_with_ties(source / "model.safetensors")
    package_model(source, tmp_path / "out")
    for name in WEIGHTS:
        before, after = load_file(source / name), load_file(tmp_path / "out" / name)
        assert before.keys() == after.keys()
        for key, value in before.items():
            assert after[key].dtype == ml_dtypes.bfloat16
            np.testing.assert_array_equal(after[key].astype(np.float32), rounded(value), key)
    for original, loaded in zip(weights(source), weights(tmp_path / "out"), strict=True):
        for key, value in loaded.items():
            assert value.dtype == np.float32
            np.testing.assert_array_equal(value, rounded(np.asarray(original[key])), key)


def spoil_with_ties(file: Path) -> None:
    """The first tensor's values end halfway between two that are kept, to even and to odd."""
    from safetensors.numpy import save_file

    tensors = load_file(file)
    key = next(iter(tensors))
    bits = tensors[key].astype(np.float32).view(np.uint32)
    tensors[key] = ((bits & 0xFFFF0000) | 0x8000).view(np.float32)
    save_file(tensors, file)


def test_packaging_again_and_converting_there_and_back_changes_nothing(
    packaged: Path, tmp_path: Path
) -> None:
    package_model(packaged, tmp_path / "again")
    convert(packaged, tmp_path / "orbax", "orbax")
    convert(tmp_path / "orbax", tmp_path / "back")
    expected = {path.relative_to(packaged): path for path in packaged.rglob("*") if path.is_file()}
    for folder in ("again", "back"):
        found = {path.relative_to(tmp_path / folder) for path in (tmp_path / folder).rglob("*.*")}
        assert found == expected.keys()
        for name, path in expected.items():
            assert (tmp_path / folder / name).read_bytes() == path.read_bytes(), name


def test_it_holds_all_that_the_package_needs(tmp_path: Path) -> None:
    card, defaults = tmp_path / "card.md", tmp_path / "own.json"
    card.write_text("# nano\n")
    defaults.write_text('{"max_padding": 9, "audio": {"temperature": 0.4}}')
    out = tmp_path / "out"
    done = run(MODEL, out, "--card", card, "--defaults", defaults)
    assert done.exit_code == 0, done.output
    names = {path.relative_to(out).as_posix() for path in out.rglob("*.*")}
    assert names == {*hub.NANO_FILES, "tokenizer_config.json", "README.md"}
    assert (out / "README.md").read_text() == "# nano\n"
    assert Dia2.from_pretrained(out).defaults.max_padding == 9
    total = sum(path.stat().st_size for path in out.rglob("*.*"))
    assert f"{total / 1e6:8.3f} MB  in all" in done.output
    assert all(f"MB  {name}" in done.output for name in names)
    # Without them: the model's card, and the library's settings.
    assert run(MODEL, out, "--overwrite").exit_code == 0
    assert (out / "README.md").read_bytes() == (MODEL / "README.md").read_bytes()
    assert Dia2.from_pretrained(out).defaults == GenerationConfig()


def test_another_codec_comes_along_in_the_published_layout(tmp_path: Path) -> None:
    source = shutil.copytree(MODEL, tmp_path / "model")
    convert(source / "mimi", tmp_path / "kyutai", "kyutai")
    shutil.rmtree(source / "mimi")
    config = json.loads((source / "config.json").read_text())
    config["assets"] = {"mimi": "kyutai/mimi"}
    (source / "config.json").write_text(json.dumps(config))
    package_model(source, tmp_path / "out", mimi=tmp_path / "kyutai")
    package_model(MODEL, tmp_path / "plain")
    assert hub.resolve(tmp_path / "out").mimi.weights.parent == tmp_path / "out" / "mimi"
    found = load_file(tmp_path / "out" / WEIGHTS[1])
    for key, value in load_file(tmp_path / "plain" / WEIGHTS[1]).items():
        np.testing.assert_array_equal(found[key].astype(np.float32), value.astype(np.float32), key)


def test_too_large_is_refused_with_the_sizes_and_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(MODEL, out, "--limit", 0.04)
    assert done.exit_code == 2 and list(tmp_path.iterdir()) == []
    assert "0.04 MB in all, the limit is 0.04 MB (--limit)" in done.output
    assert "MB  mimi/model.safetensors" in done.output and "MB  in all" in done.output


def test_what_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert "exists; choose another folder" in run(MODEL, out).output
    (out / "thesis.txt").write_text("years of work")
    done = run(MODEL, out, "--overwrite")
    assert done.exit_code == 2 and "is no checkpoint, so it is not replaced" in done.output
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    source = shutil.copytree(MODEL, tmp_path / "model")
    done = run(source, source, "--overwrite")
    assert done.exit_code == 2 and "is the model itself" in done.output
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"cfg": 1}')
    done = run(MODEL, tmp_path / "new", "--defaults", wrong)
    assert done.exit_code == 2 and "wrong.json: unknown key 'cfg'" in done.output
    assert not (tmp_path / "new").exists()
