"""The optimiser against plain numpy: schedules, AdamW, masks, EMA, accumulation."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dia2_jax.config.reading import validate
from dia2_jax.errors import ConfigError
from train.optimizer import (
    OptimizerConfig,
    accumulate,
    decay_mask,
    ema_update,
    make_optimizer,
    make_schedule,
    map_state,
    split_batch,
    state_paths,
)

SHAPES = {
    "transformer.layers.0.attn.q_proj.weight": (4, 3),
    "transformer.layers.0.pre_norm.weight": (3,),
    "transformer.text_embed.embedding.weight": (5, 2),
    "depformer.audio_embeds.3.weight": (6, 2),
    "depformer.logits.0.weight": (2, 3),
    "conv.weight": (2, 3, 4),
    "conv.bias": (2,),
}


def draws(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {path: scale * rng.standard_normal(shape, np.float32) for path, shape in SHAPES.items()}


def arrays(tree: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {path: jnp.asarray(leaf) for path, leaf in tree.items()}


def read(**raw: Any) -> OptimizerConfig:
    return validate(OptimizerConfig, raw, "optimizer")


# --------------------------------------------------------------------------------------- schedules


def test_constant_rises_then_stays() -> None:
    rate = make_schedule(
        read(learning_rate=2.0, schedule={"kind": "constant", "warmup_steps": 4}), 9
    )
    np.testing.assert_allclose([rate(s) for s in range(6)], [0.5, 1, 1.5, 2, 2, 2], rtol=1e-6)


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_cosine_falls_over_the_rest_of_the_run(final: float) -> None:
    schedule = {"kind": "cosine", "warmup_steps": 10, "final_share": final}
    rate = make_schedule(read(learning_rate=3e-4, schedule=schedule), 110)
    steps = np.array([0, 9, 10, 35, 60, 109, 110, 500])
    progress = np.clip((steps - 10) / 100, 0, 1)
    wanted = 3e-4 * (final + (1 - final) * 0.5 * (1 + np.cos(np.pi * progress)))
    wanted[:2] = 3e-4 * np.array([0.1, 1.0])
    np.testing.assert_allclose([rate(s) for s in steps], wanted, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("length", [{"decay_steps": 25}, {"decay_share": 0.25}])
def test_wsd_is_stable_then_decays_as_one_minus_root(length: dict[str, float]) -> None:
    schedule = {"kind": "wsd", "warmup_steps": 5, "final_share": 0.2, **length}
    rate = make_schedule(read(learning_rate=1.0, schedule=schedule), 100)
    wanted = {0: 0.2, 4: 1.0, 40: 1.0, 75: 1.0, 79: 1 - 0.8 * 0.4, 84: 1 - 0.8 * 0.6, 100: 0.2}
    np.testing.assert_allclose([rate(s) for s in wanted], list(wanted.values()), rtol=1e-6)


def test_schedules_take_traced_steps() -> None:
    rate = make_schedule(read(schedule={"kind": "cosine", "warmup_steps": 3}), 20)
    traced = jax.jit(jax.vmap(rate))(jnp.arange(20))
    np.testing.assert_allclose(traced, [rate(s) for s in range(20)], rtol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "steps", "message"),
    [
        ({"kind": "cosine", "warmup_steps": 11}, 10, "11 warm-up steps and a decay from step 11"),
        ({"kind": "wsd", "warmup_steps": 6, "decay_steps": 5}, 10, "do not fit into 10 steps"),
        ({"kind": "constant", "warmup_steps": 11}, 10, "do not fit into 10 steps"),
        ({"kind": "constant"}, 0, "at least one step"),
    ],
)
def test_schedules_that_do_not_fit_are_refused(schedule: Any, steps: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_schedule(read(schedule=schedule), steps)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"learning_rat": 1.0}, "did you mean 'learning_rate'"),
        ({"learning_rate": 0.0}, "learning_rate: must be positive"),
        ({"name": "lion"}, "'adamw' or 'sgd'"),
        ({"betas": [0.9, 1.0]}, "betas: must lie in"),
        ({"clip": -1.0}, "clip: must be positive"),
        ({"weight_decay": -0.1}, "weight_decay: must not be negative"),
        ({"ema_decay": 1.0}, "ema_decay: must lie in"),
        ({"schedule": {"kind": "wsd"}}, "needs one of decay_steps and decay_share"),
        ({"schedule": {"kind": "wsd", "decay_steps": 0}}, "decay_steps: must be positive"),
        ({"schedule": {"kind": "wsd", "decay_share": 1.5}}, "decay_share: is at most 1"),
        ({"schedule": {"kind": "cosine", "decay_steps": 3}}, "decay_steps: is read by kind wsd"),
        ({"schedule": {"kind": "constant", "final_share": 0.1}}, "final_share: is not read"),
        ({"schedule": {"final_share": 1.1}}, "final_share: must lie in"),
        ({"schedule": {"warmup_steps": -1}}, "warmup_steps: must not be negative"),
    ],
)
def test_settings_that_make_no_sense_are_named(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(**raw)


# --------------------------------------------------------------------------------------- the update


def plain_adamw(
    params: dict[str, np.ndarray],
    gradients: list[dict[str, np.ndarray]],
    config: OptimizerConfig,
    decayed: set[str],
    rates: list[float],
) -> dict[str, np.ndarray]:
    """Loshchilov and Hutter's algorithm 2 in float64, after clipping by the global norm."""
    params = {path: leaf.astype(np.float64) for path, leaf in params.items()}
    first = {path: np.zeros_like(leaf) for path, leaf in params.items()}
    second = {path: np.zeros_like(leaf) for path, leaf in params.items()}
    beta1, beta2 = config.betas
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        norm = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in gradient.values()))
        shrink = 1.0 if config.clip is None else min(1.0, config.clip / norm)
        for path in params:
            g = gradient[path].astype(np.float64) * shrink
            first[path] = beta1 * first[path] + (1 - beta1) * g
            second[path] = beta2 * second[path] + (1 - beta2) * g * g
            mean = first[path] / (1 - beta1**t)
            root = np.sqrt(second[path] / (1 - beta2**t))
            decay = config.weight_decay * params[path] if path in decayed else 0.0
            params[path] = params[path] - rate * (mean / (root + config.epsilon) + decay)
    return params


@pytest.mark.parametrize("clip", [None, 1.0])
def test_adamw_equals_its_definition(clip: float | None) -> None:
    # Norms of about 8, 4 and 0.08: two are clipped. The large epsilon shows where it is added.
    config = read(
        learning_rate=0.05,
        clip=clip,
        weight_decay=0.3,
        epsilon=0.01,
        no_decay=["depformer.logits.*"],
        schedule={"kind": "constant", "warmup_steps": 2},
    )
    params, gradients = draws(0), [draws(1, 1.0), draws(2, 0.5), draws(3, 0.01)]
    optimizer, schedule = make_optimizer(config, 10, arrays(params))
    decayed = {"transformer.layers.0.attn.q_proj.weight", "conv.weight"}
    rates = [float(schedule(step)) for step in range(3)]
    wanted = plain_adamw(params, gradients, config, decayed, rates)

    @jax.jit
    def step(params: Any, state: Any, gradient: Any) -> Any:
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    got, state = arrays(params), optimizer.init(arrays(params))
    for gradient in gradients:
        got, state = step(got, state, arrays(gradient))
    for path, leaf in wanted.items():
        np.testing.assert_allclose(got[path], leaf, rtol=2e-6, atol=2e-6, err_msg=path)


def test_sgd_is_the_gradient_and_the_decay() -> None:
    config = read(
        name="sgd",
        learning_rate=0.5,
        clip=None,
        weight_decay=0.1,
        decay_vectors=True,
        decay_embeddings=True,
        schedule={"kind": "constant"},
    )
    params, gradient = draws(0), draws(1)
    optimizer, _ = make_optimizer(config, 1, arrays(params))
    state = optimizer.init(arrays(params))
    updates, _ = jax.jit(optimizer.update)(arrays(gradient), state, arrays(params))
    for path, update in updates.items():
        wanted = -0.5 * (gradient[path] + 0.1 * params[path])
        np.testing.assert_allclose(update, wanted, rtol=1e-5, atol=1e-6, err_msg=path)


def test_decay_spares_vectors_and_tables_unless_told() -> None:
    def decayed(**raw: Any) -> set[str]:
        return {path for path, yes in decay_mask(read(**raw), arrays(draws(0))).items() if yes}

    matrices = {
        "transformer.layers.0.attn.q_proj.weight",
        "depformer.logits.0.weight",
        "conv.weight",
    }
    tables = {path for path in SHAPES if "embed" in path}
    vectors = {path for path, shape in SHAPES.items() if len(shape) == 1}
    assert decayed() == matrices
    assert decayed(decay_embeddings=True) == matrices | tables
    assert decayed(decay_vectors=True) == matrices | vectors
    assert decayed(no_decay=["conv.*", "*.logits.*"]) == {"transformer.layers.0.attn.q_proj.weight"}
    with pytest.raises(ConfigError, match=r"no_decay: 'depformer\.logit\.\*' matches no parameter"):
        decayed(no_decay=["depformer.logit.*"])


def test_masters_below_float32_are_refused() -> None:
    params = arrays(draws(0))
    params["conv.weight"] = params["conv.weight"].astype(jnp.bfloat16)
    with pytest.raises(
        ConfigError, match=r"1 trainable parameters are not float32 \(conv.weight\)"
    ):
        make_optimizer(OptimizerConfig(), 1, params)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_every_leaf_of_the_state_knows_its_parameter(name: str) -> None:
    abstract = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in SHAPES.items()}
    abstract["scale"] = jax.ShapeDtypeStruct((), jnp.float32)  # shaped like a counter
    optimizer, _ = make_optimizer(read(name=name), 1, abstract)
    state = jax.eval_shape(optimizer.init, abstract)
    mirrored = [path for path in state_paths(state, abstract).values() if path is not None]
    moments = 2 if name == "adamw" else 0
    assert sorted(mirrored) == sorted([*abstract] * moments)

    def check(path: str | None, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        assert leaf.shape == (() if path is None else SHAPES.get(path, ()))
        return jnp.zeros(leaf.shape, leaf.dtype)

    zeros = map_state(check, state, abstract)
    assert jax.tree.structure(zeros) == jax.tree.structure(state)


# ---------------------------------------------------------------------------------------------- EMA


@pytest.mark.parametrize("decay", [0.5, 0.9999])
def test_ema_is_the_corrected_average_of_what_came(decay: float) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((6, 3), np.float32)
    ema = {"w": jnp.full((3,), 10.0, jnp.float32)}  # the start must not count
    for step, value in enumerate(values):
        ema = ema_update(ema, {"w": jnp.asarray(value)}, decay, step)
        ages = np.arange(step, -1, -1)
        weights = (1 - decay) * decay**ages / (1 - decay ** (step + 1))
        np.testing.assert_allclose(ema["w"], weights @ values[: step + 1], rtol=1e-5, atol=2e-6)


def test_ema_keeps_float32_and_what_does_not_move() -> None:
    still = jnp.asarray(np.random.default_rng(0).standard_normal(50, np.float32))
    ema = {"still": still, "low": jnp.zeros(2, jnp.float32)}
    update = jax.jit(
        lambda ema, step: ema_update(
            ema, {"still": still, "low": jnp.ones(2, jnp.bfloat16)}, 0.99, step
        )
    )
    for step in range(4):
        ema = update(ema, step)
    np.testing.assert_array_equal(ema["still"], still)
    assert ema["low"].dtype == jnp.float32


# ------------------------------------------------------------------------------------- accumulation


def ragged_batch() -> dict[str, jax.Array]:
    """Rows of very different counts, so that a mean of means would be wrong."""
    rng = np.random.default_rng(0)
    lengths = np.array([1, 9, 2, 12, 12, 1, 3, 5])
    return {
        "x": jnp.asarray(rng.standard_normal((8, 12, 4), np.float32)),
        "y": jnp.asarray(rng.integers(0, 5, (8, 12))),
        "mask": jnp.asarray(np.arange(12) < lengths[:, None]),
    }


def gradient_of(count: jax.Array) -> Any:
    def loss(params: dict[str, jax.Array], batch: Any) -> Any:
        logits = jnp.tanh(batch["x"] @ params["in"]) @ params["out"]
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        right = (logits.argmax(-1) == batch["y"]) & batch["mask"]
        return (entropy * batch["mask"]).sum() / count, {"right": right.sum()}

    return jax.value_and_grad(loss, has_aux=True)


@pytest.mark.parametrize("parts", [1, 4])
def test_accumulation_equals_the_large_batch(parts: int) -> None:
    batch, rng = ragged_batch(), np.random.default_rng(1)
    params = {
        "in": jnp.asarray(rng.standard_normal((4, 6), np.float32)),
        "out": jnp.asarray(rng.standard_normal((6, 5), np.float32)),
    }
    gradient = gradient_of(batch["mask"].sum())
    (loss, metrics), whole = jax.jit(gradient)(params, batch)
    run = jax.jit(lambda params, batch: accumulate(gradient, params, split_batch(batch, parts)))
    (summed, sums), total = run(params, batch)
    np.testing.assert_allclose(summed, loss, rtol=1e-6)
    assert int(sums["right"]) == int(metrics["right"])
    for path, leaf in whole.items():
        np.testing.assert_allclose(total[path], leaf, rtol=0, atol=1e-6 * np.abs(leaf).max())


def test_gradients_of_low_precision_are_summed_in_float32() -> None:
    # A bfloat16 sum of ones stalls at 256.
    parts = {"x": jnp.ones((300, 1), jnp.bfloat16)}
    gradient = jax.value_and_grad(lambda params, batch: (params["w"] * batch["x"]).sum())
    loss, total = accumulate(gradient, {"w": jnp.ones(1, jnp.bfloat16)}, parts)
    assert (float(loss), float(total["w"][0])) == (300, 300)
    assert total["w"].dtype == loss.dtype == jnp.float32


def test_microbatches_are_strided_rows() -> None:
    split = split_batch({"row": jnp.arange(6)}, 3)
    np.testing.assert_array_equal(split["row"], [[0, 3], [1, 4], [2, 5]])
    with pytest.raises(ConfigError, match="6 rows does not divide into 4"):
        split_batch({"row": jnp.arange(6)}, 4)
