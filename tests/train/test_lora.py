"""Adapters: nothing at first, equal in every form, alone in what moves, small on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from dia2_jax.checkpoint import flatten_tree, unflatten_tree
from dia2_jax.config import load_dia2_config
from dia2_jax.config.reading import validate
from dia2_jax.convert.load import abstract_params
from dia2_jax.convert.models import abstract_dia2
from dia2_jax.errors import CheckpointError, ConfigError
from dia2_jax.nn.linear import Linear
from train import lora
from train.lora import LoraConfig, attach, init_adapters, load_adapters, merge, save_adapters
from train.optimizer import OptimizerConfig, make_optimizer, state_paths

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
CONFIG = LoraConfig(rank=3, scaling=2.0)
FAST = {"xla_backend_optimization_level": 0}  # compiling is most of the time here
Params = dict[str, jax.Array]
compiled_merge = jax.jit(merge, static_argnums=2)


class Tiny(NamedTuple):
    """A network of one layer and three codebooks: its whole-sequence outputs and a gradient.

    ``plain`` takes all parameters, ``attached`` those and adapters; ``slopes`` is a loss of the
    latter and its gradient in the adapters.
    """

    graphdef: Any
    abstract: Any
    params: Params
    adapters: Params  # untrained
    plain: Callable[[Params], Any]
    attached: Callable[[Params], Any]
    slopes: Callable[[Params, Params], Any]


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    raw = yaml.safe_load(TINY.read_text())
    raw["model"]["decoder"]["n_layer"] = raw["model"]["depformer"]["n_layer"] = 1
    raw["data"].update(channels=5, delay_pattern=[2, 3, 4])
    raw["runtime"]["weights_schedule"] = [0, 1]
    graphdef, abstract = abstract_dia2(load_dia2_config(raw))
    rng = np.random.default_rng(0)
    params = {
        path: jnp.asarray(
            rng.standard_normal(leaf.shape, np.float32) * leaf.shape[-1] ** -0.5
            + (len(leaf.shape) == 1)
        )
        for path, leaf in flatten_tree(abstract)[0].items()
    }
    tokens = jnp.asarray(rng.integers(0, 60, (2, 5, 4)))
    previous, text = tokens[..., 0][:, :2], tokens[:, 0, 0]

    def forward(graphdef: Any, treedef: Any, named: Params) -> Any:
        model = nnx.merge(graphdef, unflatten_tree(treedef, named))
        out = model.transformer(tokens)
        depth = model.depformer(previous, out.hidden[:, -1], (text, text))
        return out.action, out.cb0, depth

    adapted, both = attach(graphdef, abstract, CONFIG)
    forms = {
        "plain": (graphdef, flatten_tree(abstract)[1]),
        "attached": (adapted, flatten_tree(both)[1]),
    }

    def loss(adapters: Params, params: Params) -> jax.Array:
        logits = forward(*forms["attached"], {**params, **adapters})
        return sum(jnp.mean((part - 1) ** 2) for part in logits)

    init = jax.jit(lambda params: init_adapters(params, CONFIG, jax.random.key(0)))
    return Tiny(
        graphdef,
        abstract,
        params,
        init(params),
        jax.jit(lambda named: forward(*forms["plain"], named), compiler_options=FAST),
        jax.jit(lambda named: forward(*forms["attached"], named), compiler_options=FAST),
        jax.jit(jax.value_and_grad(loss), compiler_options=FAST),
    )


def adapter_shapes(params: Any, config: LoraConfig) -> Any:
    return jax.eval_shape(lambda: init_adapters(params, config, jax.random.key(0)))


def trained(adapters: Any) -> Params:
    """Adapters as after training: no zeros, an update of about a tenth of the weights."""
    rng = np.random.default_rng(1)
    return {
        name: jnp.asarray(0.1 * rng.standard_normal(leaf.shape, np.float32))
        for name, leaf in adapters.items()
    }


def assert_same_bits(got: Params, wanted: Params) -> None:
    assert got.keys() == wanted.keys()
    for path, leaf in wanted.items():
        assert np.asarray(got[path]).tobytes() == np.asarray(leaf).tobytes(), path


# ------------------------------------------------------------------------------- untrained adapters


def test_untrained_adapters_change_nothing(tiny: Tiny) -> None:
    adapters = tiny.adapters
    assert all(bool(jnp.any(leaf)) == name.endswith("lora_a") for name, leaf in adapters.items())
    effective = lora.apply(tiny.params, adapters, CONFIG.scaling)
    for path, leaf in tiny.params.items():
        np.testing.assert_array_equal(effective[path], leaf, strict=True)
    zeros = {**tiny.params}
    path = "transformer.layers.0.mlp.wo.weight"
    zeros[path] = zeros[path].at[0].set(-0.0)
    assert_same_bits(compiled_merge(zeros, adapters, CONFIG), zeros)
    wanted, got = tiny.plain(tiny.params), tiny.attached({**tiny.params, **adapters})
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_initial_values_are_of_the_key_and_the_path_alone(tiny: Tiny) -> None:
    def draw(seed: int, *targets: str) -> Params:
        return init_adapters(tiny.params, LoraConfig(4, 1.0, targets), jax.random.key(seed))

    few, many = draw(0, "*.q_proj.weight"), draw(0, "*.[qk]_proj.weight")
    assert_same_bits({name: many[name] for name in few}, few)
    name = "transformer.layers.0.attn.q_proj.lora_a"
    assert not np.array_equal(draw(1, "*.q_proj.weight")[name], few[name])
    assert not np.array_equal(many[name], many["transformer.layers.0.attn.k_proj.lora_a"])
    wide = init_adapters(
        {"w.weight": jax.ShapeDtypeStruct((8, 400), jnp.float32)},
        LoraConfig(64, 1.0, ("*",)),
        jax.random.key(0),
    )
    assert wide["w.lora_a"].shape == (64, 400) and wide["w.lora_b"].shape == (8, 64)
    assert float(jnp.std(wide["w.lora_a"])) == pytest.approx(400**-0.5, rel=0.03)


# ----------------------------------------------------------------------------------- the same model


def test_merged_equals_unmerged_in_both_forms(tiny: Tiny) -> None:
    adapters = trained(tiny.adapters)
    merged = compiled_merge(tiny.params, adapters, CONFIG)
    stem = "depformer.layers.0.self_attention.in_proj.1"
    weight = np.asarray(tiny.params[f"{stem}.weight"], np.float64)
    product = np.asarray(adapters[f"{stem}.lora_b"]) @ np.asarray(adapters[f"{stem}.lora_a"])
    np.testing.assert_allclose(merged[f"{stem}.weight"], weight + 2.0 * product, atol=1e-6)
    wanted = tiny.plain(merged)
    untouched = tiny.plain(tiny.params)
    for form in (
        tiny.attached({**tiny.params, **adapters}),
        tiny.plain(jax.jit(lora.apply)(tiny.params, adapters, CONFIG.scaling)),
    ):
        for got, logits, before in zip(form, wanted, untouched, strict=True):
            scale = float(jnp.abs(logits).max())
            np.testing.assert_allclose(got, logits, rtol=0, atol=1e-5 * scale)
            assert float(jnp.abs(got - before).max()) > 0.01 * scale


def test_a_step_has_the_adapters_too(tiny: Tiny) -> None:
    """What computes a step otherwise, such as a kernel of all layers, knows plain weights alone."""
    graphdef, both = attach(tiny.graphdef, tiny.abstract, CONFIG)
    named = {**tiny.params, **trained(tiny.adapters)}
    model = nnx.merge(graphdef, unflatten_tree(flatten_tree(both)[1], named))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 60, (2, 5, 1)))
    start = jnp.zeros(2, jnp.int32)

    def run(model: Any) -> Any:
        cache = model.transformer.init_cache(2, 1)
        whole = model.transformer(tokens)
        out, _ = model.transformer.step(tokens[..., 0], start, start, cache)
        depth, text = model.depformer, (tokens[:, 0, 0], tokens[:, 1, 0])
        stages = depth(tokens[:, 2:4, 0], out.hidden, text)
        first, _ = depth.step(
            0, 0, tokens[:, 2, 0], depth.conditions(out.hidden), depth.text(*text),
            depth.init_cache(2),
        )  # fmt: skip
        return (whole.cb0[:, 0], stages[:, 0]), (out.cb0, first)

    wanted, got = jax.jit(run, compiler_options=FAST)(model)
    for left, right in zip(wanted, got, strict=True):
        np.testing.assert_allclose(left, right, atol=2e-5 * float(jnp.abs(left).max()))


class Small(nnx.Module):
    """Linears in every kind of place: an attribute with a bias, a list, a dict."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = Linear(3, 4, use_bias=True, rngs=rngs)
        self.stack = nnx.List([Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.heads = nnx.Dict({"7": Linear(4, 2, rngs=rngs)})

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.tanh(self.first(x))
        for layer in self.stack:
            x = jnp.tanh(layer(x))
        return self.heads["7"](x)


def test_both_forms_have_the_same_gradient() -> None:
    rng = np.random.default_rng(0)
    config = LoraConfig(2, 1.5, ("*.weight",))
    graphdef, abstract = abstract_params(Small)
    adapted, both = attach(graphdef, abstract, config)
    names, treedef = flatten_tree(abstract)
    params = {
        path: jnp.asarray(rng.standard_normal(leaf.shape, np.float32))
        for path, leaf in names.items()
    }
    adapters = trained(adapter_shapes(params, config))
    assert len(adapters) == 8 and set(flatten_tree(both)[0]) == {*params, *adapters}
    x = jnp.asarray(rng.standard_normal((5, 3), np.float32))

    def formed(adapters: Params) -> jax.Array:
        effective = lora.apply(params, adapters, config.scaling)
        return jnp.sum(nnx.merge(graphdef, unflatten_tree(treedef, effective))(x) ** 2)

    def beside(adapters: Params) -> jax.Array:
        named = unflatten_tree(flatten_tree(both)[1], {**params, **adapters})
        return jnp.sum(nnx.merge(adapted, named)(x) ** 2)

    loss, wanted = jax.jit(jax.value_and_grad(formed))(adapters)
    other, got = jax.jit(jax.value_and_grad(beside))(adapters)
    np.testing.assert_allclose(other, loss, rtol=1e-5)
    for name, leaf in wanted.items():
        largest = float(jnp.abs(leaf).max())
        assert largest > 0
        np.testing.assert_allclose(got[name], leaf, rtol=0, atol=1e-5 * largest, err_msg=name)


def test_a_bfloat16_base_keeps_small_updates() -> None:
    low = {
        "layer.weight": jnp.ones((2, 3), jnp.bfloat16),
        "norm.weight": jnp.ones(3, jnp.bfloat16),
    }
    adapters = {"layer.lora_a": jnp.full((1, 3), 1e-3), "layer.lora_b": jnp.full((2, 1), 0.5)}
    effective = lora.apply(low, adapters, 2.0)  # bfloat16 has nothing between 1 and 1.0078
    np.testing.assert_allclose(effective["layer.weight"], np.full((2, 3), 1.001), rtol=1e-6)
    assert effective["norm.weight"].dtype == jnp.bfloat16


# ----------------------------------------------------------------------------------------- training


def test_only_adapters_move(tiny: Tiny) -> None:
    adapters = tiny.adapters
    before = {path: np.array(leaf) for path, leaf in tiny.params.items()}
    start, losses = adapters, []
    config = OptimizerConfig(learning_rate=0.01, weight_decay=0.0)
    optimizer, _ = make_optimizer(config, 10, adapters)
    state = jax.jit(optimizer.init)(adapters)
    assert set(state_paths(state, adapters).values()) == {*adapters, None}

    @jax.jit
    def update(adapters: Params, state: Any, gradients: Params) -> Any:
        updates, state = optimizer.update(gradients, state, adapters)
        return optax.apply_updates(adapters, updates), state

    for _ in range(4):
        loss, gradients = tiny.slopes(adapters, tiny.params)
        assert gradients.keys() == adapters.keys()
        adapters, state = update(adapters, state, gradients)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert all(not np.array_equal(adapters[name], start[name]) for name in start)
    assert_same_bits(tiny.params, before)
    merged = compiled_merge(tiny.params, adapters, CONFIG)
    targets = {name.removesuffix("lora_a") + "weight" for name in adapters if "lora_a" in name}
    changed = {path for path in before if not np.array_equal(merged[path], before[path])}
    assert changed == targets


# ----------------------------------------------------------------------------------------- refusals


def test_default_targets_are_all_projections_of_the_layers(tiny: Tiny) -> None:
    found = lora.target_paths(tiny.params, LoraConfig())
    layers = [path for path in tiny.params if ".layers." in path and "norm" not in path]
    assert found == layers and len(found) == 6 + 6


def test_targets_that_are_no_matrices_are_named(tiny: Tiny) -> None:
    config = LoraConfig(2, 1.0, ("transformer.*norm.weight", "*text_embed.*", "*.wo.weight"))
    with pytest.raises(ConfigError, match="are not 2-D weights of a Linear") as error:
        init_adapters(tiny.params, config, jax.random.key(0))
    assert "transformer.layers.0.pre_norm.weight" in str(error.value)
    assert "transformer.text_embed.embedding.weight" in str(error.value)
    assert "wo.weight" not in str(error.value) and "main_proj" not in str(error.value)
    with pytest.raises(ConfigError, match=r"lora.targets: '\*.query.weight' matches no parameter"):
        attach(tiny.graphdef, tiny.abstract, LoraConfig(2, 1.0, ("*.query.weight",)))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"rank": 0}, "rank: must be positive"),
        ({"scaling": -1.0}, "scaling: must be positive"),
        ({"targets": []}, "targets: names no weight"),
        ({"dropout": 0.1}, "unknown key 'dropout'"),
    ],
)
def test_settings_that_make_no_sense_are_named(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(LoraConfig, raw, "lora")


# ------------------------------------------------------------------------------------------ on disk


def test_saved_adapters_come_back_and_are_small(tiny: Tiny, tmp_path: Path) -> None:
    config = LoraConfig(2, 0.5, ("*.attn.*_proj.weight",))
    adapters = trained(adapter_shapes(tiny.params, config))
    path = tmp_path / "run" / "adapters.safetensors"
    save_adapters(path, adapters, config, {"base": "tiny", "step": 7})
    loaded, settings, metadata = load_adapters(path, tiny.params)
    assert_same_bits(loaded, adapters)
    assert settings == config and metadata == {"base": "tiny", "step": 7}
    numbers = sum(leaf.size for leaf in adapters.values())
    assert path.stat().st_size < 4 * numbers + 2000
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with safe_open(path, "numpy") as file:  # the reference implementation reads it too
        assert set(file.keys()) == set(adapters)
    # Owned memory: the file may be replaced while the adapters are in use.
    assert all(leaf.flags.owndata and leaf.flags.writeable for leaf in loaded.values())


def test_adapters_that_do_not_fit_are_refused_with_every_problem(
    tiny: Tiny, tmp_path: Path
) -> None:
    config = LoraConfig(2, 1.0, ("*.q_proj.weight", "*.k_proj.weight", "*.wo.weight"))
    good = trained(adapter_shapes(tiny.params, config))
    stem = "transformer.layers.0.attn"
    bad = {name: leaf for name, leaf in good.items() if f"{stem}.k_proj" not in name}
    bad[f"{stem}.q_proj.lora_a"] = jnp.zeros((2, 5))
    del bad["transformer.layers.0.mlp.wo.lora_b"]
    bad["elsewhere.lora_a"], bad["elsewhere.lora_b"] = jnp.zeros((2, 5)), jnp.zeros((5, 2))
    bad["transformer.norm.lora_a"] = jnp.zeros((2, 5))
    bad["transformer.norm.lora_b"] = jnp.zeros((5, 2))
    bad["bias"] = jnp.zeros(3)
    path = tmp_path / "adapters.safetensors"
    save_adapters(path, bad, config, {})
    problems = [
        f"{stem}.q_proj.lora_a is [2, 5], must be [2, 32]",
        "transformer.layers.0.mlp.wo.lora_a has no transformer.layers.0.mlp.wo.lora_b",
        "elsewhere.lora_a: the model has no elsewhere.weight",
        "elsewhere.lora_b: the model has no elsewhere.weight",
        "transformer.norm.lora_a: transformer.norm.weight is not the 2-D weight of a Linear",
        "transformer.norm.lora_b: transformer.norm.weight is not the 2-D weight of a Linear",
        "bias is no adapter",
        f"{stem}.k_proj.weight is a target without adapters",
    ]
    with pytest.raises(CheckpointError) as error:
        load_adapters(path, tiny.params)
    message = str(error.value)
    assert message.startswith(f"{path}: the adapters do not fit the model (8 problems)")
    assert [problem for problem in problems if problem not in message] == []
    with pytest.raises(CheckpointError, match="merge: the adapters do not fit"):
        merge(tiny.params, bad, config)
    assert len(load_adapters(path)[0]) == len(bad)


def test_other_files_are_no_adapters(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"w": np.zeros(2, np.float32)}, path)
    with pytest.raises(CheckpointError, match="not adapters of this project"):
        load_adapters(path)
    header = {"format": "dia2-jax-lora-1", "lora": "{", "metadata": "{}"}
    save_file({"w": np.zeros(2, np.float32)}, path, header)
    with pytest.raises(CheckpointError, match="its metadata is damaged"):
        load_adapters(path)
    save_file({"w": np.zeros(2, np.float32)}, path, {**header, "lora": '{"rank": 0}'})
    with pytest.raises(ConfigError, match="lora: rank: must be positive"):
        load_adapters(path)
    with pytest.raises(CheckpointError, match="no such weights file"):
        load_adapters(tmp_path / "none.safetensors")


def test_what_cannot_be_saved_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "adapters.safetensors"
    with pytest.raises(CheckpointError, match="no adapters to save"):
        save_adapters(path, {}, CONFIG, {})
    with pytest.raises(CheckpointError, match="not JSON"):
        save_adapters(path, {"w.lora_a": jnp.zeros((3, 2))}, CONFIG, {"path": tmp_path})
    assert list(tmp_path.iterdir()) == []
