"""Losses against their definitions in numpy, on logits that a stand-in network gives."""

from __future__ import annotations

import copy
import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.losses import (
    LossConfig,
    cross_entropy,
    dia2_loss,
    metrics,
    token_counts,
)

ROWS, STEPS, FRAMES, BOOKS, VOCAB, CODES = 4, 12, 5, 6, 11, 9
KEYS = ("loss", "loss/action", "loss/code_0", "loss/depth")


def random_batch(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    length = np.array([12, 9, 12, 4])
    real = np.arange(STEPS) < length[:, None]
    share = np.array([0.9, 0.5, 0.4, 0.8, 0.2])  # codebooks have different numbers of targets
    return {
        "tokens": np.arange(ROWS)[:, None, None] * np.ones((1, 2 + BOOKS, STEPS), np.int32),
        "action": rng.integers(0, 2, (ROWS, STEPS)) * real,
        "action_known": real,
        "action_free": real & (rng.random((ROWS, STEPS)) < 0.5),
        "code": rng.integers(0, CODES, (ROWS, STEPS)),
        "code_known": real & (rng.random((ROWS, STEPS)) < 0.7),
        "depth_index": rng.integers(0, STEPS, (ROWS, FRAMES)),
        "depth_codes": rng.integers(0, CODES, (ROWS, FRAMES, BOOKS)),
        "depth_known": rng.random((ROWS, FRAMES, BOOKS - 1)) < share,
        "depth_text": rng.integers(0, 5, (ROWS, FRAMES, 2)),
    }


class StandIn:
    """Gives fixed logits; the depformer's depend on all that it is given."""

    def __init__(self, seed: int = 1) -> None:
        rng = np.random.default_rng(seed)
        normal = rng.standard_normal
        self.action = normal((ROWS, STEPS, 2)).astype(np.float32)
        self.cb0 = normal((ROWS, STEPS, VOCAB)).astype(np.float32)
        self.hidden = normal((ROWS, STEPS, 3)).astype(np.float32)
        self.by_hidden = normal((3, BOOKS - 1, CODES)).astype(np.float32)
        self.by_code = normal((CODES, CODES)).astype(np.float32)
        self.by_text = normal((2, 5, CODES)).astype(np.float32)

    def transformer(self, tokens: Any) -> Any:
        row = tokens[:, 0, 0]
        outputs = {"action": self.action, "cb0": self.cb0, "hidden": self.hidden}
        return SimpleNamespace(**{name: jnp.asarray(x)[row] for name, x in outputs.items()})

    def depformer(self, previous: Any, hidden: Any, text: Any) -> Any:
        logits = jnp.einsum("BD,DCV->BCV", hidden, self.by_hidden)
        spoken = jnp.asarray(self.by_text)[0][text[0]] + jnp.asarray(self.by_text)[1][text[1]]
        return logits + jnp.asarray(self.by_code)[previous] + spoken[:, None]


def entropy(logits: np.ndarray, target: int, settings: LossConfig) -> float:
    """The definition: cross-entropy against the smoothed one-hot target, and the z-loss."""
    logits = logits.astype(np.float64)
    log_partition = np.log(np.exp(logits).sum())
    wanted = np.full(len(logits), settings.label_smoothing / len(logits))
    wanted[target] += 1 - settings.label_smoothing
    return -(wanted * (logits - log_partition)).sum() + settings.z_loss * log_partition**2


def define(net: StandIn, batch: dict[str, np.ndarray], settings: LossConfig) -> dict[str, float]:
    """Losses and accuracies, token by token."""
    action, weights, code, right = [], [], [], {"action": [], "word": [], "code_0": []}
    for b in range(ROWS):
        for t in range(STEPS):
            pick = net.action[b, t].argmax()
            wanted = batch["action"][b, t]
            if batch["action_known"][b, t]:
                weight = 1.0 if wanted else settings.action_padding_weight
                if not batch["action_free"][b, t]:
                    weight *= settings.overruled_action_weight
                weights.append(weight)
                action.append(weight * entropy(net.action[b, t], wanted, settings))
            if batch["action_free"][b, t]:
                right["action"].append(pick == wanted)
                if wanted:
                    right["word"].append(pick == wanted)
            if batch["code_known"][b, t]:
                code.append(entropy(net.cb0[b, t], batch["code"][b, t], settings))
                right["code_0"].append(net.cb0[b, t].argmax() == batch["code"][b, t])
    deep: dict[int, list[float]] = {book: [] for book in range(1, BOOKS)}
    hits: dict[int, list[bool]] = {book: [] for book in range(1, BOOKS)}
    for b in range(ROWS):
        for k in range(FRAMES):
            codes, (main, second) = batch["depth_codes"][b, k], batch["depth_text"][b, k]
            hidden = net.hidden[b, batch["depth_index"][b, k]]
            for book in range(1, BOOKS):
                if batch["depth_known"][b, k, book - 1]:
                    logits = hidden @ net.by_hidden[:, book - 1] + net.by_code[codes[book - 1]]
                    logits = logits + net.by_text[0, main] + net.by_text[1, second]
                    deep[book].append(entropy(logits, codes[book], settings))
                    hits[book].append(logits.argmax() == codes[book])
    losses = {"action": sum(action) / sum(weights), "code_0": np.mean(code)}
    if settings.depth == "pooled":
        losses["depth"] = np.mean([loss for book in deep.values() for loss in book])
    else:
        losses["depth"] = np.mean([np.mean(book) for book in deep.values()])
    m = settings.first_codebook_multiplier
    audio = (m * losses["code_0"] + (BOOKS - 1) * losses["depth"]) / (m + BOOKS - 1)
    return {
        "loss": settings.action_weight * losses["action"] + audio,
        **{f"loss/{name}": loss for name, loss in losses.items()},
        **{f"accuracy/{name}": np.mean(each) for name, each in right.items()},
        "accuracy/code_1_3": np.mean(hits[1] + hits[2] + hits[3]),
        "accuracy/code_4_5": np.mean(hits[4] + hits[5]),
    }


# Many small programs: compiling is what the tests wait for.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(jit, static_argnums=3)
def partial_loss(weights: Any, batch: Any, counts: Any, settings: LossConfig) -> Any:
    net = StandIn()
    vars(net).update(weights)
    return dia2_loss(net, batch, counts, settings)  # type: ignore[arg-type]


count_tokens = functools.partial(jit, static_argnums=1)(token_counts)
read_metrics = functools.partial(jit, static_argnums=2)(metrics)


def found(net: StandIn, batch: dict[str, np.ndarray], settings: LossConfig) -> dict[str, float]:
    counts = count_tokens(batch, settings)
    total, sums = partial_loss(vars(net), batch, counts, settings)
    result = {name: float(value) for name, value in read_metrics(sums, counts, settings).items()}
    assert result["loss"] == pytest.approx(float(total), rel=1e-6)
    return result


SETTINGS = {
    "default": LossConfig(),
    "per codebook": LossConfig(depth="per_codebook", first_codebook_multiplier=1.0),
    "smoothed": LossConfig(label_smoothing=0.15),
    "z-loss": LossConfig(z_loss=0.02, action_weight=3.0),
    "overruled": LossConfig(overruled_action_weight=0.4, action_padding_weight=0.0),
    "no code 0": LossConfig(first_codebook_multiplier=0.0),
}


@pytest.mark.parametrize("name", list(SETTINGS))
def test_losses_and_accuracies_are_those_defined(name: str) -> None:
    net, batch, settings = StandIn(), random_batch(), SETTINGS[name]
    mine, wanted = found(net, batch, settings), define(net, batch, settings)
    assert mine.keys() == wanted.keys()
    for key, value in wanted.items():
        assert mine[key] == pytest.approx(value, rel=2e-6), key


def test_every_setting_changes_what_it_names_and_nothing_else() -> None:
    net, batch = StandIn(), random_batch()
    plain = found(net, batch, LossConfig())
    changes: dict[str, tuple[dict[str, Any], set[str]]] = {
        "action_weight": ({"action_weight": 2.0}, {"loss"}),
        "padding": ({"action_padding_weight": 0.9}, {"loss", "loss/action"}),
        "overruled": ({"overruled_action_weight": 0.9}, {"loss", "loss/action"}),
        "multiplier": ({"first_codebook_multiplier": 3.0}, {"loss"}),
        "depth": ({"depth": "per_codebook"}, {"loss", "loss/depth"}),
        "smoothing": ({"label_smoothing": 0.1}, set(KEYS)),
        "z_loss": ({"z_loss": 0.1}, set(KEYS)),
    }
    for name, (options, moved) in changes.items():
        other = found(net, batch, LossConfig(**options))
        found_moved = {key for key in plain if other[key] != pytest.approx(plain[key], rel=1e-5)}
        assert found_moved == moved, name


def test_pooled_and_per_codebook_agree_where_all_codebooks_are_known() -> None:
    batch = random_batch()
    batch["depth_known"][:] = True
    pooled = found(StandIn(), batch, LossConfig())["loss/depth"]
    assert found(StandIn(), batch, LossConfig(depth="per_codebook"))["loss/depth"] == pytest.approx(
        pooled, rel=1e-6
    )


def test_what_is_not_known_has_no_influence() -> None:
    batch, net = random_batch(), StandIn()
    before = found(net, batch, LossConfig())
    other, noisy = random_batch(seed=7), copy.deepcopy(net)
    mask = ~batch["action_known"]
    noisy.action[mask], noisy.cb0[~batch["code_known"]] = 50.0, -50.0
    batch["code"] = np.where(batch["code_known"], batch["code"], other["code"])
    hidden = ~batch["depth_known"].any(axis=2)
    assert hidden.sum() >= 1
    batch["depth_codes"][hidden] = other["depth_codes"][hidden]
    batch["depth_index"][hidden] = 0
    assert found(noisy, batch, LossConfig()) == before


def test_micro_batches_with_global_counts_add_up_to_the_large_batch() -> None:
    net, batch = StandIn(), random_batch()
    weights = vars(net)
    parts = [{name: value[rows] for name, value in batch.items()} for rows in ([0, 1], [2, 3])]
    for settings in (LossConfig(), SETTINGS["per codebook"], SETTINGS["smoothed"]):
        counts = count_tokens(batch, settings)
        whole, sums = partial_loss(weights, batch, counts, settings)
        part_counts = [count_tokens(part, settings) for part in parts]
        for name, value in counts.items():
            added = sum(np.asarray(each[name]) for each in part_counts)
            assert added == pytest.approx(np.asarray(value)), name
        made = [partial_loss(weights, part, counts, settings) for part in parts]
        assert sum(float(loss) for loss, _ in made) == pytest.approx(float(whole), rel=1e-6)
        total = {name: sum(np.asarray(each[name]) for _, each in made) for name in sums}
        wanted = read_metrics(sums, counts, settings)
        for name, value in read_metrics(total, counts, settings).items():
            assert float(value) == pytest.approx(float(wanted[name]), rel=1e-6), name
        # With counts of their own they would not: rows differ in length.
        own = [
            float(partial_loss(weights, part, count, settings)[0])
            for part, count in zip(parts, part_counts, strict=True)
        ]
        assert abs(sum(own) / len(own) - float(whole)) > 1e-3


def test_a_batch_without_a_target_of_some_kind_has_a_finite_loss() -> None:
    for name in ("action_free", "code_known", "depth_known"):
        for settings in (LossConfig(), SETTINGS["per codebook"]):
            batch = random_batch()
            batch[name][:] = False
            result = found(StandIn(), batch, settings)
            assert all(np.isfinite(value) for value in result.values()), name
            kind = {"action_free": "action", "code_known": "code_0", "depth_known": "depth"}[name]
            assert result[f"loss/{kind}"] == 0


def test_codebook_groups_are_named_by_their_books() -> None:
    for books, names in (
        (2, ["1_1"]),
        (4, ["1_3"]),
        (9, ["1_3", "4_7", "8_8"]),
        (32, ["1_3", "4_7", "8_15", "16_31"]),
    ):
        depth = np.arange(1.0, books, dtype=np.float32)
        names_of_sums = ("action", "code", "action_right", "taken_right", "code_right")
        sums = dict.fromkeys(names_of_sums, np.float32(0))
        counts = dict.fromkeys(("action", "action_free", "taken_free", "code"), np.float32(1))
        result = read_metrics(
            {**sums, "depth": depth, "depth_right": depth},
            {**counts, "depth": np.full(books - 1, 100, np.float32)},
            LossConfig(),
        )
        groups = {name: result[name] for name in result if name.startswith("accuracy/code_")}
        groups.pop("accuracy/code_0")
        assert set(groups) == {f"accuracy/code_{name}" for name in names}
        for name, value in groups.items():
            first, last = map(int, name.split("_")[1:])
            assert value == pytest.approx(np.mean(np.arange(first, last + 1)) / 100)


def test_cross_entropy_survives_large_logits() -> None:
    logits = jnp.asarray([[1000.0, 0.0], [-1000.0, -1001.0]])
    targets = jnp.asarray([1, 0])
    loss = cross_entropy(logits, targets, smoothing=0.0, z_loss=0.0)
    np.testing.assert_allclose(loss, [1000.0, np.log1p(np.exp(-1.0))], rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"z_loss": -0.1}, "z_loss"),
        ({"action_weight": -1.0}, "action_weight"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
    ],
)
def test_impossible_settings_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        LossConfig(**options)
