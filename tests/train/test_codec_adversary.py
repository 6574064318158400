"""The balancer, the discriminator and its losses, and what teaches the semantic codebooks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.codec_training import discriminator as adversary
from train.codec_training.balancer import Balance, balance
from train.codec_training.config import DiscriminatorConfig
from train.codec_training.semantic import BIAS, WEIGHT, semantic_loss
from train.codec_training.teacher import average

WEIGHTS = {"mel": 3.0, "waveform": 1.0}


def slopes(seed: int, scales: dict[str, float]) -> dict[str, jax.Array]:
    random = np.random.default_rng(seed)
    return {
        name: jnp.asarray(scale * random.standard_normal((2, 50)).astype(np.float32))
        for name, scale in scales.items()
    }


def test_balanced_gradients_have_the_norms_of_their_weights() -> None:
    state = Balance.start(tuple(WEIGHTS))
    found = slopes(0, {"mel": 1e-3, "waveform": 40.0})
    _, state = balance(found, WEIGHTS, state, 0.9)
    for name, share in (("mel", 0.75), ("waveform", 0.25)):
        # What one loss contributes: the other's gradient is nothing.
        alone = {n: g * (n == name) for n, g in found.items()}
        part, _ = balance(alone, WEIGHTS, Balance.start(tuple(WEIGHTS)), 0.9)
        assert float(jnp.linalg.norm(part, axis=1).mean()) == pytest.approx(share, rel=1e-4)


def test_the_balancer_remembers_norms_over_steps() -> None:
    state = Balance.start(tuple(WEIGHTS))
    norms: dict[str, list[float]] = {"mel": [], "waveform": []}
    for step in range(4):
        found = slopes(step, {"mel": 1.0 + step, "waveform": 0.1})
        total, state = balance(found, WEIGHTS, state, 0.9)
        expected = np.zeros((2, 50))
        for name, gradient in found.items():
            norms[name].append(float(np.linalg.norm(gradient, axis=1).mean()))
            ages = 0.9 ** np.arange(step, -1, -1)
            typical = (ages * norms[name]).sum() / ages.sum()
            expected += WEIGHTS[name] / 4 * np.asarray(gradient) / typical
        np.testing.assert_allclose(total, expected, rtol=2e-4, atol=1e-6)


def test_a_loss_that_starts_late_starts_balanced() -> None:
    state = Balance.start(tuple(WEIGHTS))
    for step in range(3):
        _, state = balance(slopes(step, {"mel": 1.0}), WEIGHTS, state, 0.9)
    assert float(state.weights["waveform"]) == 0
    late = slopes(9, {"waveform": 7.0}) | {"mel": jnp.zeros((2, 50))}
    total, _ = balance(late, WEIGHTS, state, 0.9)
    assert float(jnp.linalg.norm(total, axis=1).mean()) == pytest.approx(0.25, rel=1e-4)


def test_discriminator_sees_every_scale() -> None:
    settings = DiscriminatorConfig(windows=(64, 32), filters=3)
    build, shapes = adversary.abstract_discriminator(settings)
    weights = adversary.random_weights(shapes, 0)
    assert {path: x.shape for path, x in weights.items()} == {
        path: x.shape for path, x in shapes.items()
    }
    run = jax.jit(lambda weights, wave: build(weights)(wave))
    wave = jax.random.normal(jax.random.key(0), (2, 160))
    logits, features = run(weights, wave)
    # Frames of a quarter window; three strides of 2 along 33 and 17 frequencies.
    assert [x.shape for x in logits] == [(2, 10, 5, 1), (2, 20, 3, 1)]
    assert [len(layers) for layers in features] == [5, 5]
    assert features[0][0].shape == (2, 10, 33, 3)
    # The length of a direction is the gain's business.
    longer = {p: x * (2 if p.endswith("direction") else 1) for p, x in weights.items()}
    np.testing.assert_allclose(run(longer, wave)[0][1], logits[1], atol=1e-5)
    louder = {p: x * (2 if p == "scales.1.last.gain" else 1) for p, x in weights.items()}
    np.testing.assert_allclose(run(louder, wave)[0][1], 2 * logits[1], atol=1e-5)


def test_hinge_and_feature_matching_are_their_definitions() -> None:
    real, fake = (
        [jnp.array([2.0, 0.5]), jnp.array([-1.0])],
        [jnp.array([-2.0, 0.5]), jnp.array([3.0])],
    )
    # Scale 1: relu(1 - 2, 1 - 0.5) and relu(1 - 2, 1 + 0.5); scale 2: relu(2) and relu(4).
    assert float(adversary.discriminator_loss(real, fake)) == pytest.approx(
        ((0.25 + 0.75) + (2.0 + 4.0)) / 2
    )
    assert float(adversary.adversarial_loss(fake)) == pytest.approx(((3 + 0.5) / 2 + 0) / 2)
    ours, theirs = (
        [[jnp.array([1.0, -3.0])], [jnp.array([4.0])]],
        [[jnp.array([0.0, 0.0])], [jnp.array([5.0])]],
    )
    assert float(adversary.feature_matching_loss(ours, theirs)) == pytest.approx(
        (2 / 2 + 1 / 4) / 2, rel=1e-5
    )


def test_semantic_losses_are_their_definitions() -> None:
    random = np.random.default_rng(0)
    features = random.standard_normal((2, 3, 4)).astype(np.float32)
    targets = random.uniform(0, 1, (2, 3, 5)).astype(np.float32)
    targets[0, 1] = 0
    weight, bias = random.standard_normal((5, 4)), random.standard_normal(5)
    params = {WEIGHT: jnp.asarray(weight, jnp.float32), BIAS: jnp.asarray(bias, jnp.float32)}
    real = np.array([[1, 1, 0], [1, 1, 1]], np.float32)
    logits = features @ weight.T + bias
    cosines = (logits * targets).sum(-1) / (
        np.linalg.norm(logits, axis=-1) * np.maximum(np.linalg.norm(targets, axis=-1), 1e-9)
    )
    found = semantic_loss(params, jnp.asarray(features), jnp.asarray(targets), real, "cosine")
    assert float(found) == pytest.approx(((1 - cosines) * real).sum() / 5, rel=1e-4)
    kept = real * (targets.sum(-1) > 0)
    share = targets / np.maximum(targets.sum(-1, keepdims=True), 1e-9)
    predicted = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    divergence = (share * (np.log(np.maximum(share, 1e-12)) - predicted)).sum(-1)
    found = semantic_loss(params, jnp.asarray(features), jnp.asarray(targets), real, "histogram")
    assert float(found) == pytest.approx((divergence * kept).sum() / kept.sum(), rel=1e-4)


def test_a_teachers_steps_are_averaged_over_frames() -> None:
    steps = np.arange(7, dtype=np.float32)[:, None]
    # Frames of 80 ms hold four steps of 20 ms; the last ones are missing.
    found = average(steps, 0.02, 0.08, 3)
    np.testing.assert_allclose(found[:, 0], [1.5, 5.0, 5.0])
