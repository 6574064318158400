"""Patterns over parameter paths: what they choose, refuse, and that freezing is exact."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml
from flax import nnx

from dia2_jax.checkpoint import flatten_tree
from dia2_jax.config import load_dia2_config, load_mimi_config
from dia2_jax.convert.models import abstract_dia2, abstract_mimi
from dia2_jax.errors import ConfigError
from dia2_jax.nn.linear import Embedding, Linear
from train.optimizer import OptimizerConfig, make_optimizer, state_paths
from train.trainable import EMBEDDINGS, combine, is_projection, matches, partition, select

CONFIGS = Path(__file__).parents[2] / "configs"
PATHS = [
    "transformer.layers.0.attn.q_proj.weight",
    "transformer.layers.1.attn.q_proj.weight",
    "transformer.layers.1.mlp.wi.weight",
    "transformer.norm.weight",
    "depformer.norm.weight",
]


def leaves(paths: list[str]) -> dict[str, jax.Array]:
    return {path: jnp.full((2,), index, jnp.float32) for index, path in enumerate(paths)}


def test_everything_trains_by_default() -> None:
    params = leaves(PATHS)
    assert partition(params) == (params, {})


def test_frozen_wins_over_trainable() -> None:
    params = leaves(PATHS)
    trainable, frozen = partition(params, ["*.1.attn.*"], ["transformer.layers.*"])
    assert list(trainable) == [PATHS[0], PATHS[2]]
    assert list(frozen) == [PATHS[1], PATHS[3], PATHS[4]]
    assert combine(trainable, frozen) == params


def test_patterns_cover_whole_paths_and_mind_case() -> None:
    assert not matches("transformer.norm.weight", ["norm.weight", "transformer.norm", "Trans*"])
    assert select(PATHS, ["*norm.weight", "depformer.*"], "frozen") == PATHS[3:]


def test_patterns_without_a_match_are_all_named_with_near_paths() -> None:
    with pytest.raises(ConfigError) as error:
        partition(leaves(PATHS), ["transformer.layer.*.attention.*", "depformers.*", "*.mlp.*"])
    message = str(error.value)
    assert message.startswith("frozen: 'transformer.layer.*.attention.*' matches no parameter")
    assert "transformer.layers.*.attn.q_proj.weight" in message
    assert "'depformers.*' matches no parameter; near it: depformer.norm.weight" in message
    assert "*.mlp.*'" not in message
    with pytest.raises(ConfigError, match=r"^trainable: 'x\.\*'"):
        partition(leaves(PATHS), trainable=["x.*"])


def test_nothing_left_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="leave nothing to train"):
        partition(leaves(PATHS), ["*"])


def test_a_path_on_both_sides_is_refused() -> None:
    with pytest.raises(ValueError, match="both trainable and frozen: a"):
        combine({"a": 1}, {"a": 2, "b": 3})


@pytest.mark.parametrize("kind", ["dia2", "mimi"])
def test_kinds_told_by_path_are_those_of_the_modules(kind: str) -> None:
    if kind == "dia2":
        raw = yaml.safe_load((CONFIGS / "tiny.yaml").read_text())
        graphdef, abstract = abstract_dia2(load_dia2_config(raw))
    else:
        raw = yaml.safe_load((CONFIGS / "mimi_tiny.yaml").read_text())
        graphdef, abstract = abstract_mimi(load_mimi_config(raw))
    modules = list(nnx.iter_graph(nnx.merge(graphdef, abstract)))

    def weights_of(module: type) -> set[str]:
        found = [".".join(map(str, path)) for path, node in modules if isinstance(node, module)]
        return {f"{path}.weight" for path in found}

    params, _ = flatten_tree(abstract)
    linear = {path for path, leaf in params.items() if is_projection(path, leaf.shape)}
    tables = {path for path in params if matches(path, EMBEDDINGS)}
    assert linear == weights_of(Linear) != set()
    codebooks = {path for path in params if path.endswith(".embed_sum")}
    assert tables == weights_of(Embedding) | codebooks != set()


def test_frozen_tensors_are_no_arguments_of_the_gradient() -> None:
    # A denormal and a negative zero: adding an update of zero could change either.
    rng = np.random.default_rng(0)
    params = {
        "body.weight": jnp.asarray(rng.standard_normal((3, 3), np.float32)).at[0, 0].set(-0.0),
        "body.scale": jnp.asarray([1e-40, 1.0, 2.0], jnp.float32),
        "head.weight": jnp.asarray(rng.standard_normal((2, 3), np.float32)),
    }
    before = {path: np.asarray(leaf).tobytes() for path, leaf in params.items()}
    trainable, frozen = partition(params, ["body.*"])
    optimizer, _ = make_optimizer(OptimizerConfig(learning_rate=0.1), 3, trainable)
    state = optimizer.init(trainable)
    mirrored = set(state_paths(state, params).values())
    assert mirrored == {"head.weight", None}
    x = jnp.asarray(rng.standard_normal((4, 3), np.float32))

    def loss(trainable: dict[str, jax.Array]) -> jax.Array:
        full = combine(trainable, frozen)
        hidden = (x @ full["body.weight"].T) * full["body.scale"]
        return jnp.sum((hidden @ full["head.weight"].T - 1) ** 2)

    slope = jax.jit(jax.grad(loss))
    for _ in range(3):
        gradients = slope(trainable)
        assert gradients.keys() == {"head.weight"}
        updates, state = optimizer.update(gradients, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    after = {path: np.asarray(leaf).tobytes() for path, leaf in combine(trainable, frozen).items()}
    assert [path for path in before if after[path] != before[path]] == ["head.weight"]
