"""Batches: which rows, and what is random in them, follows from (seed, step) alone."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from dia2_jax.data import Row
from dia2_jax.data.batch import BatchPlan, Masking, Slot, collate, real_share
from dia2_jax.errors import DataError
from dia2_jax.text.tokenizer import TokenIds

LENGTHS = np.random.default_rng(0).integers(20, 400, 500).tolist()
IDS = TokenIds(
    card=64, new_word=2, pad=3, bos=1, zero=7, spk1=60, spk2=61, audio_pad=65, audio_bos=64
)


def plan(**changes: Any) -> BatchPlan:
    options = {"rows": 8, "max_steps": 250, "buckets": (64, 128, 192), "seed": 3, "lead": 1}
    return BatchPlan(LENGTHS, **{**options, **changes})


def epoch(made: BatchPlan, number: int) -> list[tuple[int, list[Slot]]]:
    first = number * made.steps_per_epoch
    steps = range(first, first + made.steps_per_epoch)
    return [(length, [row.slot for row in rows]) for length, rows in map(made.batch, steps)]


# -------------------------------------------------------------------------------------------- plan


def test_slots_cover_every_recording() -> None:
    made = plan()
    for index, frames in enumerate(LENGTHS):
        mine = [slot for slot in made.slots if slot.recording == index]
        steps = frames + 1
        assert [slot.window for slot in mine] == list(range(math.ceil(steps / 250)))
        assert all(slot.windows == len(mine) for slot in mine)
        assert all(slot.steps == min(steps, 250) for slot in mine)


@pytest.mark.parametrize("rows", [1, 8, 13])
def test_every_slot_comes_once_an_epoch(rows: int) -> None:
    made = plan(rows=rows)
    for number in (0, 5):
        count = Counter(slot for _, slots in epoch(made, number) for slot in slots)
        assert set(count) == set(made.slots)
        # Only the last batch's empty places are filled with slots that come again.
        places = made.steps_per_epoch * rows
        assert places - len(made.slots) < rows
        assert count.total() == places and max(count.values()) <= 2


def test_fewer_slots_than_rows_are_repeated() -> None:
    made = BatchPlan([10, 20], rows=5, max_steps=50)
    length, rows = made.batch(7)
    assert made.steps_per_epoch == 1 and length == 50
    assert sorted(Counter(row.slot.recording for row in rows).values()) == [2, 3]
    assert len({row.place for row in rows}) == 5  # the same recording, cropped elsewhere


def test_any_step_is_reached_directly() -> None:
    walked = plan()
    steps = [walked.batch(step) for step in range(3 * walked.steps_per_epoch)]
    for step in (0, 17, walked.steps_per_epoch, len(steps) - 1):
        assert plan().batch(step) == steps[step]
    far = 10**12 + 5
    orders: list[int] = []
    made = plan()
    inner = made._epoch
    made._epoch = lambda number: orders.append(number) or inner(number)  # type: ignore
    assert made.batch(far) == plan().batch(far)
    assert orders == [far // made.steps_per_epoch]  # no other epoch was looked at


def test_epochs_and_seeds_differ() -> None:
    made = plan()
    first, second, other = epoch(made, 0), epoch(made, 1), epoch(plan(seed=4), 0)
    assert first != second and first != other
    # Not the same batches in another order, either.
    groups = {frozenset(slots) for _, slots in first}
    assert len(groups & {frozenset(slots) for _, slots in second}) < len(groups) / 4


def test_crops_are_placed_at_random_inside_their_windows() -> None:
    made = plan(max_steps=100)
    rows = [row for step in range(400) for row in made.batch(step)[1]]
    inside = []
    for row in rows:
        slot = row.slot
        assert slot.window <= row.place * slot.windows < slot.window + 1
        inside.append(row.place * slot.windows - slot.window)
    assert {row.slot.windows for row in rows} == {1, 2, 3, 4}
    assert len(set(inside)) > 0.99 * len(inside)
    assert np.abs(np.quantile(inside, [0.1, 0.5, 0.9]) - [0.1, 0.5, 0.9]).max() < 0.03


def test_batches_group_lengths_and_are_padded_to_the_smallest_bucket() -> None:
    made = BatchPlan(
        [length for length in LENGTHS if length <= 250],
        rows=8,
        max_steps=250,
        buckets=(64, 128, 192),
    )
    padded = real = 0
    lengths = []
    for length, slots in epoch(made, 0):
        longest = max(slot.steps for slot in slots)
        assert length == min(bucket for bucket in (64, 128, 192, 250) if bucket >= longest)
        padded, real = padded + 8 * length, real + sum(slot.steps for slot in slots)
        lengths.append(length)
    assert set(lengths) == {64, 128, 192, 250}
    # Neither sorted nor in runs: short and long batches alternate.
    assert sum(a != b for a, b in zip(lengths, lengths[1:], strict=False)) > len(lengths) / 4
    # Measured: 0.82 of the steps are real with these coarse buckets; 0.56 if only shuffled.
    shuffled = np.array([slot.steps for slot in made.slots])
    np.random.default_rng(1).shuffle(shuffled)
    batches = shuffled[: len(shuffled) // 8 * 8].reshape(-1, 8)
    buckets = np.array(made.buckets)
    padded_too = 8 * buckets[np.searchsorted(buckets, batches.max(axis=1))].sum()
    assert real / padded > 0.8 > 0.6 > batches.sum() / padded_too


def test_without_recordings_there_is_no_plan() -> None:
    with pytest.raises(DataError, match=r"no recording: prepare it anew and read rejected\.jsonl"):
        BatchPlan([], rows=2, max_steps=10)


# ----------------------------------------------------------------------------------------- collate


def random_row(config: Any, steps: int, seed: int) -> Row:
    """Not what a machine would do: every field tells its column."""
    rng, books = np.random.default_rng(seed), config.data.codebooks
    known = np.arange(steps) >= rng.integers(0, 5, books)[:, None]
    codes = np.where(known, rng.integers(1, 64, (books, steps)), 64).astype(np.int32)
    text = rng.integers(8, 60, (2, steps)).astype(np.int32)
    audio = rng.integers(1, 64, (books, steps)).astype(np.int32)
    audio[:, :3] = 64
    return Row(
        tokens=np.concatenate([text, audio]),
        spoken=rng.integers(8, 60, (2, steps)).astype(np.int32),
        actions=rng.integers(0, 2, steps).astype(np.int32),
        free=rng.random(steps) < 0.5,
        codes=codes,
        known=known,
    )


@pytest.fixture(scope="module")
def rows(configs) -> list[Row]:
    lengths = [30, 7, 40, 1, 25, 33]
    return [random_row(configs(), steps, seed) for seed, steps in enumerate(lengths)]


def build(configs, rows: list[Row], masking: Masking, **changes: Any) -> dict[str, np.ndarray]:
    options = {"steps": 36, "seed": 1, "step": 4, "first": 0, **changes}
    return collate(rows, options.pop("steps"), configs(), IDS, masking, **options)


EVERYTHING = Masking(depth_share=0.3, text_dropout=0.5, code_noise=0.2)


def test_rows_of_one_step_do_not_depend_on_how_they_are_divided(configs, rows) -> None:
    whole = build(configs, rows, EVERYTHING)
    for cut in (1, 3):
        parts = [
            build(configs, rows[:cut], EVERYTHING),
            build(configs, rows[cut:], EVERYTHING, first=cut),
        ]
        for name, value in whole.items():
            assert (np.concatenate([part[name] for part in parts]) == value).all(), name
    again, other = build(configs, rows, EVERYTHING), build(configs, rows, EVERYTHING, step=5)
    assert all((again[name] == whole[name]).all() for name in whole)
    assert (other["depth_index"] != whole["depth_index"]).any()
    assert (build(configs, rows, EVERYTHING, seed=2)["tokens"] != whole["tokens"]).any()


def test_nothing_random_gives_the_rows_and_padding_is_no_target(configs, rows) -> None:
    batch = build(configs, rows, Masking())
    assert {name: value.shape for name, value in batch.items()} == {
        "tokens": (6, 10, 36),
        **dict.fromkeys(("action", "action_known", "action_free", "code", "code_known"), (6, 36)),
        "depth_index": (6, 36),
        "depth_codes": (6, 36, 8),
        "depth_known": (6, 36, 7),
        "depth_text": (6, 36, 2),
    }
    assert all(value.dtype in (np.int32, bool) for value in batch.values())
    for index, row in enumerate(rows):
        length = min(row.steps, 36)  # the third row is cut
        mine = {name: value[index] for name, value in batch.items()}
        assert (mine["tokens"][:, :length] == row.tokens[:, :length]).all()
        assert (mine["tokens"][:2, length:] == 3).all() and (
            mine["tokens"][2:, length:] == 65
        ).all()
        assert (mine["action"][:length] == row.actions[:length]).all()
        assert (mine["action_known"] == (np.arange(36) < length)).all()
        assert (mine["action_free"][:length] == row.free[:length]).all()
        assert (mine["code_known"][:length] == row.known[0, :length]).all()
        known = row.known[0, :length]
        assert (mine["code"][:length] == np.where(known, row.codes[0, :length], 0)).all()
        for name in ("action", "action_free", "code", "code_known"):
            assert not mine[name][length:].any()
        # Every frame with a target of codebook 1 or more, in order.
        deep = np.flatnonzero(row.known[1:, :length].any(axis=0))
        assert (mine["depth_index"][: len(deep)] == deep).all()
        assert (mine["depth_known"][: len(deep)] == row.known[1:, deep].T).all()
        assert not mine["depth_known"][len(deep) :].any()
        wanted = np.where(row.known[:, deep], row.codes[:, deep], 0).T
        assert (mine["depth_codes"][: len(deep)] == wanted).all()
        assert (mine["depth_text"][: len(deep)] == row.spoken[:, deep].T).all()
    # No target is a special id.
    assert batch["code"].max() < 64 and batch["depth_codes"].max() < 64
    steps = [min(row.steps, 36) for row in rows]
    assert real_share(batch) == sum(steps) / (6 * 36)


@pytest.mark.parametrize("share", [1 / 16, 0.3, 1.0])
def test_the_depth_share_is_that_of_every_row(configs, rows, share) -> None:
    batch = build(configs, rows, Masking(depth_share=share))
    count = math.ceil(share * 36)
    assert batch["depth_index"].shape == (6, count)
    for index, row in enumerate(rows):
        deep = np.flatnonzero(row.known[1:, :36].any(axis=0))
        chosen = batch["depth_index"][index][batch["depth_known"][index].any(axis=1)]
        assert len(chosen) == math.ceil(share * len(deep))
        assert (np.diff(chosen) > 0).all() and set(chosen) <= set(deep)
    # Every frame has its turn.
    seen = {
        int(frame)
        for step in range(200)
        for frame in build(configs, rows[:1], Masking(depth_share=share), step=step)["depth_index"][
            0
        ]
    }
    assert seen >= set(np.flatnonzero(rows[0].known[1:].any(axis=0)).tolist())


def test_dropped_text_reads_zero_and_pad_at_the_rate_asked_for(configs, rows) -> None:
    dropped = total = 0
    for step in range(150):
        batch = build(configs, rows, Masking(text_dropout=0.2), step=step)
        for index, row in enumerate(rows):
            length = min(row.steps, 36)
            text = batch["tokens"][index, :2, :length]
            blank = (text == np.array([[7], [3]])).all()
            assert blank or (text == row.tokens[:2, :length]).all()
            dropped, total = dropped + blank, total + 1
        assert (batch["tokens"][:, 2:] == build(configs, rows, Masking())["tokens"][:, 2:]).all()
        # The depformer reads the text even so, and the targets stay.
        assert (batch["depth_text"] == build(configs, rows, Masking())["depth_text"]).all()
    assert abs(dropped / total - 0.2) < 3 * math.sqrt(0.2 * 0.8 / total)


def test_noise_replaces_input_codes_only_at_the_rate_asked_for(configs, rows) -> None:
    plain = build(configs, rows, Masking())
    changed = total = 0
    for step in range(40):
        batch = build(configs, rows, Masking(code_noise=0.25), step=step)
        for name in plain:
            if name != "tokens":
                assert (batch[name] == plain[name]).all(), name
        special = plain["tokens"][:, 2:] >= 64
        different = batch["tokens"] != plain["tokens"]
        assert not different[:, :2].any() and not different[:, 2:][special].any()
        changed, total = changed + different.sum(), total + (~special).sum()
    share = 0.25 * 63 / 64  # a random code may be the same one
    assert abs(changed / total - share) < 3 * math.sqrt(share * (1 - share) / total)


def test_one_kind_of_randomness_does_not_move_another(configs, rows) -> None:
    all_on = build(configs, rows, EVERYTHING)
    depth = build(configs, rows, Masking(depth_share=0.3))
    text = build(configs, rows, Masking(text_dropout=0.5))
    noise = build(configs, rows, Masking(code_noise=0.2))
    assert (all_on["depth_index"] == depth["depth_index"]).all()
    assert (all_on["tokens"][:, :2] == text["tokens"][:, :2]).all()
    assert (all_on["tokens"][:, 2:] == noise["tokens"][:, 2:]).all()


def test_a_model_of_one_codebook_has_no_depth_targets(configs) -> None:
    config = configs(data={"channels": 3, "delay_pattern": [2]}, runtime={"weights_schedule": []})
    batch = collate([random_row(config, 9, 0)], 12, config, IDS, Masking(), seed=0, step=0)
    assert batch["depth_known"].shape == (1, 12, 0)
    assert batch["code_known"].sum() > 0
