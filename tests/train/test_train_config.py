"""Configurations of training: YAML, overrides, and one error for everything that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic.dataclasses import dataclass

from dia2_jax.config.reading import STRICT
from dia2_jax.errors import ConfigError
from train.config import MeshConfig, RunConfig, config_to_dict, flat, read_config


@dataclass(frozen=True, config=STRICT)
class Model:
    width: int
    rate: float = 1e-3
    frozen: tuple[str, ...] = ()


@dataclass(frozen=True, config=STRICT)
class Config:
    run: RunConfig
    model: Model
    mesh: MeshConfig = MeshConfig()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "toy.yaml"
    path.write_text("run: {folder: runs/toy, steps: 20}\nmodel: {width: 4, rate: 1e-4}\n")
    return path


def test_file_and_overrides_meet(path: Path) -> None:
    config = read_config(
        Config,
        path,
        ["run.steps=8", "model.frozen=[a.*,b]", "run.hooks.wandb.mode=offline", "run.best=null"],
    )
    assert config.run.steps == 8
    assert config.run.folder == "runs/toy"
    assert config.model == Model(width=4, rate=1e-4, frozen=("a.*", "b"))
    assert config.run.hooks.wandb.mode == "offline"
    assert config.mesh == MeshConfig(data=-1, fsdp=1, tensor=1)


def test_values_may_refer_to_each_other(path: Path) -> None:
    assert read_config(Config, path, ["run.folder=out/${model.width}"]).run.folder == "out/4"


def test_one_error_names_all_problems_with_the_nearest_name(path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(Config, path, ["run.stepz=8", "model.widht=3", "model.rate=fast"])
    message = str(caught.value)
    assert message.startswith(f"{path} with run.stepz=8 model.widht=3 model.rate=fast: ")
    assert "unknown key 'run.stepz' (did you mean 'steps'?)" in message
    assert "unknown key 'model.widht' (did you mean 'width'?)" in message
    assert "model.rate" in message and '"fast"' in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("steps", "override 'steps': expected NAME=VALUE"),
        ("=3", "expected NAME=VALUE"),
        ("run.steps=0", "run.steps: must be positive"),
        ("run.steps=2.5", "run.steps"),
        ("run.steps='8'", "run.steps"),
        ("run.seed=-1", "run.seed: must be in 0"),
        ("run.save_minutes=.inf", "run.save_minutes"),
        ("run={evaluate_every: 2, best: loss}", "run.best: 'loss' is no validation metric"),
        ("run.best=loss", "run.best: 'loss' is never measured: set evaluate_every too"),
        ("run.hooks.wandb.mode=of", "'online', 'offline' or 'disabled'"),
        ("mesh.fsdp=-1", "only one axis can be -1"),
        ("mesh.tensor=0", "mesh.tensor: must be positive"),
        ("model.width=[1", "cannot be read with its overrides"),
        ("run.folder=${run.nix}", "run.nix"),
    ],
)
def test_bad_overrides_are_named(path: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(Config, path, [override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "missing field 'run'; missing field 'model'"),
        ("- a", "expected names and values"),
        ("3", "cannot be read"),
        ("run: {folder: a", "cannot be read"),
        ("run: {folder: a, steps: 4}\nrun: {folder: b, steps: 4}", "duplicate key"),
        ("a: !!python/object:os.system {}", "cannot be read"),
    ],
)
def test_bad_files_are_named(path: Path, text: str, words: str) -> None:
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_config(Config, path)
    assert str(caught.value).startswith(str(path))
    assert words in str(caught.value)


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nix\.yaml: no such config file"):
        read_config(Config, tmp_path / "nix.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        read_config(Config, tmp_path)


def test_resolved_config_reads_as_itself(path: Path, tmp_path: Path) -> None:
    import yaml

    config = read_config(Config, path, ["model.frozen=[a]"])
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(yaml.safe_dump(config_to_dict(config)))
    assert read_config(Config, resolved) == config
    names = flat(config_to_dict(config))
    assert names["run.hooks.wandb.project"] == "dia2-jax"
    assert names["model.frozen"] == ["a"]
