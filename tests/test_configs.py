"""The YAML files of configs/: valid, and of the sizes that their headers claim."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
import yaml
from flax import nnx

from dia2_jax.config import Dia2Config, load_dia2_config, load_mimi_config
from dia2_jax.mimi.codec import Mimi
from dia2_jax.model.dia2 import Dia2Model
from train.codec_training.config import CodecConfig
from train.config import read_config
from train.dia2_config import Dia2TrainingConfig

CONFIGS = Path(__file__).parent.parent / "configs"


def raw(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    return content


def header(name: str) -> str:
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    return " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))


def sizes(make: Callable[[], nnx.Module], kind: type[nnx.Variable] = nnx.Variable) -> list[int]:
    """Element count of every weight tensor, without making any."""
    return [leaf.size for leaf in jax.tree.leaves(nnx.state(nnx.eval_shape(make), kind))]


def cache_bytes(config: Dia2Config) -> int:
    """Float32 keys and values of both guidance rows at full context."""
    decoder = config.model.decoder
    slots = 2 * config.runtime.max_context_steps * decoder.n_layer
    return 2 * 4 * slots * decoder.kv_heads * decoder.gqa_head_dim


@pytest.mark.parametrize(
    ("name", "tensors", "parameters", "weight_sets"),
    # The first two rows are the published checkpoints'.
    [
        ("dia2_1b", 440, 1_076_244_736, 3),
        ("dia2_2b", 450, 1_919_556_608, 5),
        ("tiny", 79, 106_232, 3),
    ],
)
def test_dia2_has_the_published_size_and_says_so(
    name: str, tensors: int, parameters: int, weight_sets: int
) -> None:
    config = load_dia2_config(raw(name))
    counted = sizes(lambda: Dia2Model(config, rngs=nnx.Rngs(0)))
    assert (len(counted), sum(counted)) == (tensors, parameters)
    assert set(config.schedule) == set(range(weight_sets))
    text = header(name)
    assert f"{parameters:,} in {tensors} tensors" in text
    if name != "tiny":
        assert f"weights {parameters * 4 / 1e9:.2f} GB in float32" in text
        assert f"{parameters * 2 / 1e9:.2f} GB in bfloat16" in text
        assert f"{cache_bytes(config) / 1e6:.0f} MB in float32" in text


@pytest.mark.parametrize(
    ("name", "tensors", "values", "trained"),
    # The first row is what a MimiModel of transformers with the published config holds.
    [("mimi", 350, 96_151_393, 79_308_609), ("mimi_tiny", 134, 435_793, 427_081)],
)
def test_mimi_has_the_published_size_and_says_so(
    name: str, tensors: int, values: int, trained: int
) -> None:
    config = load_mimi_config(raw(name))
    counted = sizes(lambda: Mimi(config, rngs=nnx.Rngs(0)))
    assert (len(counted), sum(counted)) == (tensors, values)
    assert sum(sizes(lambda: Mimi(config, rngs=nnx.Rngs(0)), nnx.Param)) == trained
    assert f"{values:,} values in {tensors} tensors" in header(name)
    assert f"weights {values * 4 / 1e6:.0f} MB in" in header(name)


@pytest.mark.parametrize(("codec", "speaker"), [("mimi", "dia2_2b"), ("mimi_tiny", "tiny")])
def test_codec_and_model_fit_together(codec: str, speaker: str) -> None:
    mimi, dia2 = load_mimi_config(raw(codec)), load_dia2_config(raw(speaker))
    assert mimi.frames_per_second == 12.5
    assert mimi.num_quantizers == dia2.data.codebooks
    assert mimi.codebook_size == dia2.data.depth_vocab_size


def test_tiny_turns_the_branches_on() -> None:
    config = load_dia2_config(raw("tiny"))
    assert config.model.decoder.low_rank_dim is not None
    assert config.model.depformer.text_embedding
    assert len(set(config.data.delay_pattern)) > 2
    assert len(config.schedule) > len(set(config.schedule))
    assert config.model.decoder.gqa_query_heads > config.model.decoder.kv_heads


#: What every header of a training configuration tells: key, and what it is about.
RUNS = {
    "codec_mimi": CodecConfig,
    "codec_tiny": CodecConfig,
    "finetune_full_1b": Dia2TrainingConfig,
    "finetune_lora_2b": Dia2TrainingConfig,
    "pretrain_small": Dia2TrainingConfig,
    "pretrain_tiny": Dia2TrainingConfig,
}


@pytest.mark.parametrize("name", RUNS)
def test_training_configs_are_read_and_say_what_to_expect(name: str) -> None:
    read_config(RUNS[name], CONFIGS / f"{name}.yaml")
    text = header(name)
    for key in ("command", "hardware", "memory", "time", "to expect"):
        assert f" {key} " in text, key
    program = name.split("_")[0]
    assert f"python -m train.{program} configs/{name}.yaml" in text


def test_the_small_shape_says_its_size() -> None:
    config = load_dia2_config(raw("dia2_small"))
    counted = sizes(lambda: Dia2Model(config, rngs=nnx.Rngs(0)))
    assert f"{sum(counted):,} in {len(counted)} tensors" in header("dia2_small")


def test_every_config_is_tested_and_says_what_it_is() -> None:
    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    shapes = {"dia2_1b", "dia2_2b", "dia2_small", "tiny", "mimi", "mimi_tiny"}
    assert names == shapes | RUNS.keys()
    for name in names:
        assert (CONFIGS / f"{name}.yaml").read_text().startswith("# "), name
