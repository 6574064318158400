"""The task of decoder training around its steps: starting points, adapters, freezing, export."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from click.testing import CliRunner

from dia2_jax import checkpoint
from dia2_jax.convert.api import convert
from dia2_jax.convert.safetensors_io import SafetensorsFile
from dia2_jax.errors import ConfigError, DataError
from train import export
from train.config import config_to_dict, read_config
from train.dia2_config import Dia2TrainingConfig, ModelSource
from train.dia2_task import Dia2Task
from train.export import task_of
from train.lora import LoraConfig, load_adapters


def changed(config: Dia2TrainingConfig, **parts: dict[str, Any]) -> Dia2TrainingConfig:
    """The configuration with fields of its parts replaced."""
    new = {name: dataclasses.replace(getattr(config, name), **part) for name, part in parts.items()}
    return dataclasses.replace(config, **new)


def weights(folder: Path) -> dict[str, bytes]:
    file = SafetensorsFile(folder / "model.safetensors")
    return {name: np.asarray(file.read(name)).tobytes() for name in file.specs}


@pytest.fixture(scope="module")
def config(small_config: Dia2TrainingConfig, tiny_model_folder: Path) -> Dia2TrainingConfig:
    return changed(
        small_config,
        model={"codec": str(tiny_model_folder / "mimi")},
        data={"validation": small_config.data.train, "validation_batches": 1},
    )


@pytest.fixture(scope="module")
def pretrained(config: Dia2TrainingConfig, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A random model, exported, and its validation losses."""
    task = Dia2Task(config)
    state = task.initial_state()
    folder = tmp_path_factory.mktemp("start") / "model"
    task.export(state, folder)
    return folder, task.evaluate(state)


@pytest.fixture(scope="module")
def from_it(config: Dia2TrainingConfig, pretrained: Any) -> Dia2TrainingConfig:
    """Fine-tuning of that model."""
    return dataclasses.replace(config, model=ModelSource(start=str(pretrained[0])))


@pytest.fixture(scope="module")
def adapted(from_it: Dia2TrainingConfig) -> tuple[Dia2Task, dict[str, Any], dict[str, float]]:
    """A LoRA run after two steps, and its validation losses before the first."""
    lora = LoraConfig(rank=2, scaling=2.0)
    task = Dia2Task(dataclasses.replace(from_it, lora=lora), "finetune")
    state = task.initial_state()
    before = task.evaluate(state)
    batches = task.batches(0)
    for _ in range(2):
        state, _ = task.train_step(state, next(batches))
    return task, state, before


def test_an_export_starts_where_the_run_was(pretrained: Any, adapted: Any) -> None:
    # Untrained adapters change nothing, and neither does a checkpoint's way through the file.
    assert adapted[2] == pretrained[1]


def test_only_adapters_train_and_merge_into_their_targets(
    pretrained: Any, adapted: Any, tmp_path: Path
) -> None:
    task, state, _ = adapted
    assert all(path.endswith((".lora_a", ".lora_b")) for path in state["params"])
    task.export(state, tmp_path / "out")
    old, new = weights(pretrained[0]), weights(tmp_path / "out")
    targets = {path.rsplit(".", 1)[0] + ".weight" for path in state["params"]}
    assert {name for name in old if old[name] != new[name]} == targets
    adapters, lora, metadata = load_adapters(tmp_path / "out" / "adapters.safetensors")
    assert (lora.rank, metadata["step"]) == (2, 2)
    assert all((adapters[path] == np.asarray(leaf)).all() for path, leaf in state["params"].items())
    size = (tmp_path / "out" / "adapters.safetensors").stat().st_size
    assert size < 0.2 * (tmp_path / "out" / "model.safetensors").stat().st_size


def test_merged_weights_have_the_losses_of_the_adapters(
    from_it: Dia2TrainingConfig, adapted: Any, tmp_path: Path
) -> None:
    task, state, _ = adapted
    unmerged = task.evaluate(state)
    task.export(state, tmp_path / "merged")
    merged = Dia2Task(
        dataclasses.replace(from_it, model=ModelSource(start=str(tmp_path / "merged")))
    )
    losses = merged.evaluate(merged.initial_state())
    for name in ("validation/loss", "validation/loss/code_0", "validation/loss/depth"):
        assert losses[name] == pytest.approx(unmerged[name], rel=1e-5)


def test_a_merged_model_speaks_samples_and_converts(adapted: Any, tmp_path: Path) -> None:
    task, state, _ = adapted
    samples = task.samples(state, 2)
    assert [sample.name for sample in samples] == ["00", "01"]
    assert all(len(sample.waveform) and np.isfinite(sample.waveform).all() for sample in samples)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("{}")
    task.export(state, run / "export")
    convert(run, tmp_path / "orbax", to="orbax")
    convert(tmp_path / "orbax", tmp_path / "published")
    assert weights(tmp_path / "published") == weights(run / "export")


def test_frozen_parts_keep_their_bits_and_the_average_is_exported(
    pretrained: Any, from_it: Dia2TrainingConfig, tmp_path: Path
) -> None:
    frozen = dataclasses.replace(from_it, frozen=("transformer.*",))
    task = Dia2Task(changed(frozen, optimizer={"ema_decay": 0.5}), "finetune")
    state = task.initial_state()
    abstract = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), task.abstract_state())
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == abstract
    batches = task.batches(0)
    for _ in range(2):
        state, _ = task.train_step(state, next(batches))
    task.export(state, tmp_path / "out")
    old, new = weights(pretrained[0]), weights(tmp_path / "out")
    moved = {name for name in old if old[name] != new[name]}
    assert moved == {name for name in old if name.startswith("depformer.")}
    for path, leaf in state["ema"].items():
        assert new[path] == np.asarray(leaf).tobytes()
        assert not np.array_equal(leaf, state["params"][path])


def test_an_export_lacks_nothing_or_is_not_there(
    adapted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise OSError("no space left")

    task, state, _ = adapted
    monkeypatch.setattr("train.lora.save_adapters", fail)
    with pytest.raises(OSError, match="no space"):
        task.export(state, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_is_exported_where_its_data_is_not(pretrained: Any, adapted: Any) -> None:
    task, state, _ = adapted
    folder = pretrained[0].parent / "away"
    away = changed(task.config, data={"train": "gone", "validation": "gone", "rows": 7})
    task_of("finetune", config_to_dict(away), "run").export(state, folder)
    task.export(state, folder.with_name("here"))
    assert weights(folder) == weights(folder.with_name("here"))


def test_random_weights_depend_on_the_seed_alone(config: Dia2TrainingConfig) -> None:
    def params(seed: int) -> dict[str, Any]:
        return Dia2Task(changed(config, run={"seed": seed})).initial_state()["params"]

    first, again, other = params(1), params(1), params(2)
    assert all(np.array_equal(first[path], again[path]) for path in first)
    assert not any(
        np.array_equal(first[path], other[path]) for path in first if first[path].ndim > 1
    )


def test_what_does_not_fit_is_refused(
    config: Dia2TrainingConfig, small_run: Path, tmp_path: Path
) -> None:
    from small_data import write_recordings

    narrow = write_recordings(tmp_path / "two", count=2, codebooks=2)
    with pytest.raises(DataError, match=r"holds 2 codebooks, the model has 3"):
        Dia2Task(changed(config, data={"train": str(narrow)}))
    large = write_recordings(tmp_path / "large", count=2, codes=65)
    with pytest.raises(DataError, match=r"holds codes below 65, the model knows those below 64"):
        Dia2Task(changed(config, data={"train": str(large)}))
    with pytest.raises(DataError, match=r"no prepared data set.*train\.prepare"):
        Dia2Task(changed(config, data={"train": str(tmp_path)}))
    with pytest.raises(ConfigError, match="frozen: 'nothing.*' matches no parameter"):
        Dia2Task(dataclasses.replace(config, frozen=("nothing.*",)))
    with pytest.raises(ConfigError, match=r"data\.max_steps: 257 steps do not fit .* of 256"):
        Dia2Task(changed(config, data={"max_steps": 257}))
    for wrong in ("temperature=-1", "cfg_scale=0", "count=0", "scripts=[' ']"):
        with pytest.raises(ConfigError, match=rf"samples\.{wrong.split('=')[0]}: "):
            read_config(Dia2TrainingConfig, small_run, [f"samples.{wrong}"])
    with pytest.raises(ConfigError, match="loss.first_codebook_multiplier: must be finite"):
        read_config(Dia2TrainingConfig, small_run, ["loss.first_codebook_multiplier=.inf"])
    with pytest.raises(ConfigError, match="microbatches: 3 do not divide data.rows 8"):
        read_config(Dia2TrainingConfig, small_run, ["microbatches=3"])
    with pytest.raises(ConfigError, match="lora: trains its adapters alone"):
        read_config(Dia2TrainingConfig, small_run, ["lora={rank: 2}", "frozen=[depformer.*]"])
    with pytest.raises(ConfigError, match="tokenizer: must be given where start is null"):
        read_config(Dia2TrainingConfig, small_run, ["model.tokenizer=null"])


def test_checkpoints_hold_what_trains_alone(adapted: Any) -> None:
    task, state, _ = adapted
    names = checkpoint.flatten_tree(state)[0]
    assert not any(name.endswith("weight") for name in names)
    assert task.metadata()["parameters"] == sum(leaf.size for leaf in state["params"].values())


def test_a_run_knows_the_weights_and_the_tokenizer_that_it_does_not_keep(
    pretrained: Any, from_it: Dia2TrainingConfig, tmp_path: Path
) -> None:
    def metadata(start: Path) -> dict[str, Any]:
        model = ModelSource(start=str(start))
        return Dia2Task(dataclasses.replace(from_it, model=model, lora=LoraConfig(2))).metadata()

    def changes(start: Path) -> set[str]:
        now = metadata(start)
        return {name for name in known if known[name] != now[name]}

    known = metadata(pretrained[0])
    other = tmp_path / "other"
    shutil.copytree(pretrained[0], other)
    assert changes(other) == set(), "the same files in another place"
    tokenizer = other / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    assert changes(other) == {"tokenizer"}
    shutil.copy(pretrained[0] / "tokenizer.json", tokenizer)
    flip_a_bit(other / "model.safetensors")
    assert changes(other) == {"frozen_weights"}


def flip_a_bit(file: Path) -> None:
    """Of the last value of a safetensors file."""
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)


def test_an_export_replaces_checkpoints_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    done = CliRunner().invoke(export.main, [str(tmp_path / "run"), str(tmp_path), "--overwrite"])
    assert done.exit_code == 2
    assert "is no exported checkpoint, so it is not replaced" in done.output
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
