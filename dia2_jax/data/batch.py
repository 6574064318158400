"""Which rows make up the batch of a step, and the arrays that a batch is.

Both are functions of (seed, step): `BatchPlan` says which piece of which recording stands in
which row, `collate` draws the random masks of each row from its own stream. Splitting a batch
over hosts or micro-batches therefore changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dia2_jax.config import Dia2Config
from dia2_jax.data.frames import Row
from dia2_jax.errors import DataError
from dia2_jax.text.tokenizer import TokenIds

#: Rows of one epoch are sorted by length inside pools of this many batches, then shuffled again.
_POOL = 32

# Streams of the run's seed.
_ORDER, _CROP, _MASKS = range(3)


@dataclass(frozen=True)
class Slot:
    """A piece of a recording.

    Attributes:
      recording: index in the data set.
      window, windows: its crop starts in the ``window``-th of ``windows`` equal parts of where
        a crop of full length can start; 1 window is the recording whole.
      steps: steps of the row it makes at most.
    """

    recording: int
    window: int
    windows: int
    steps: int


@dataclass(frozen=True)
class PlannedRow:
    """A row of a batch.

    Attributes:
      slot: what it shows.
      place: random in the slot's window of [0, 1): where between the first and the last possible
        start its crop is.
    """

    slot: Slot
    place: float


class BatchPlan:
    """The rows of every step: each slot once an epoch, grouped by length, shuffled.

    Attributes:
      steps_per_epoch: batches that hold every slot at least once.
    """

    def __init__(
        self,
        frames: Sequence[int],
        *,
        rows: int,
        max_steps: int,
        buckets: Sequence[int] = (),
        seed: int = 0,
        lead: int = 0,
    ) -> None:
        """
        Args:
          frames: length of every recording in code frames.
          rows: rows of a batch, over all hosts.
          max_steps: steps of a row at most; longer recordings make several slots.
          buckets: lengths to which batches are padded, below ``max_steps``. Every one is compiled
            once.
          seed: of the run.
          lead: steps of a row beyond its frames (the smallest codebook delay, less one).

        Raises:
          DataError: there is no recording.
        """
        if not len(frames):
            raise DataError(
                "the data set has no recording: prepare it anew and read rejected.jsonl"
            )
        self.rows, self.max_steps, self.seed = rows, max_steps, seed
        self.buckets = tuple(sorted({*(b for b in buckets if b < max_steps), max_steps}))
        self.slots: list[Slot] = []
        for recording, count in enumerate(frames):
            steps = max(1, count + lead)
            windows = math.ceil(steps / max_steps)
            self.slots += [
                Slot(recording, window, windows, min(steps, max_steps)) for window in range(windows)
            ]
        self.steps_per_epoch = math.ceil(len(self.slots) / rows)
        self._epoch = lru_cache(maxsize=2)(self._order)

    def batch(self, step: int) -> tuple[int, list[PlannedRow]]:
        """The padded length of step ``step``'s batch, and its rows."""
        epoch, index = divmod(step, self.steps_per_epoch)
        slots = [self.slots[i] for i in self._epoch(epoch)[index]]
        rng = _stream(self.seed, _CROP, step)
        rows = [
            PlannedRow(slot, (slot.window + place) / slot.windows)
            for slot, place in zip(slots, rng.random(self.rows), strict=True)
        ]
        longest = max(slot.steps for slot in slots)
        return min(bucket for bucket in self.buckets if bucket >= longest), rows

    def _order(self, epoch: int) -> np.ndarray:
        """``[steps_per_epoch, rows]`` slot indices."""
        rng = _stream(self.seed, _ORDER, epoch)
        order = rng.permutation(len(self.slots))
        # The last batch is filled up with slots from the front of the epoch.
        order = np.resize(order, self.steps_per_epoch * self.rows)
        steps = np.array([self.slots[i].steps for i in order])
        pool = _POOL * self.rows
        for start in range(0, len(order), pool):
            by_length = np.argsort(steps[start : start + pool], kind="stable")
            order[start : start + pool] = order[start : start + pool][by_length]
        batches = order.reshape(self.steps_per_epoch, self.rows)
        return batches[rng.permutation(self.steps_per_epoch)]


@dataclass(frozen=True)
class Masking:
    """What is random in a row.

    Attributes:
      depth_share: share of frames on which the depformer is trained (CSM: 1 / 16).
      text_dropout: share of rows whose text reads (zero, pad), as the unconditional guidance row
        does.
      code_noise: share of input codes replaced by random ones (against copying; 0 in generation).
    """

    depth_share: float = 1.0
    text_dropout: float = 0.0
    code_noise: float = 0.0


def collate(
    rows: Sequence[Row],
    steps: int,
    config: Dia2Config,
    ids: TokenIds,
    masking: Masking,
    *,
    seed: int,
    step: int,
    first: int = 0,
) -> dict[str, np.ndarray]:
    """Rows ``first``, ``first + 1``, … of step ``step``, padded to ``steps`` steps.

    Returns (C codebooks, L steps, K frames with depth loss; integers are int32):
      tokens: ``[B, 2 + C, L]`` what the decoder reads, dropped text and noise applied.
      action, action_known, action_free: ``[B, L]`` target; inside the row; the machine listens.
      code, code_known: ``[B, L]`` target of codebook 0, and whether it is one.
      depth_index: ``[B, K]`` step of each frame with depth loss.
      depth_codes: ``[B, K, C]`` its codes; depth_known ``[B, K, C - 1]`` which of codebooks 1 on
        are targets.
      depth_text: ``[B, K, 2]`` its text tokens for the depformer, never dropped.
    """
    data = config.data
    books = data.codebooks
    count = min(steps, max(1, math.ceil(masking.depth_share * steps)))
    batch = {
        "tokens": np.empty((len(rows), 2 + books, steps), np.int32),
        "action": np.zeros((len(rows), steps), np.int32),
        "action_known": np.zeros((len(rows), steps), bool),
        "action_free": np.zeros((len(rows), steps), bool),
        "code": np.zeros((len(rows), steps), np.int32),
        "code_known": np.zeros((len(rows), steps), bool),
        "depth_index": np.zeros((len(rows), count), np.int32),
        "depth_codes": np.zeros((len(rows), count, books), np.int32),
        "depth_known": np.zeros((len(rows), count, books - 1), bool),
        "depth_text": np.zeros((len(rows), count, 2), np.int32),
    }
    batch["tokens"][:, :2] = ids.pad
    batch["tokens"][:, 2:] = data.audio_pad
    for index, row in enumerate(rows):
        rng = _stream(seed, _MASKS, step, first + index)
        drop, frames, noise = rng.spawn(3)
        length = min(row.steps, steps)
        tokens = row.tokens[:, :length].copy()
        if drop.random() < masking.text_dropout:
            tokens[0], tokens[1] = ids.zero, ids.pad
        if masking.code_noise:
            audio = tokens[2:]
            real = audio < data.depth_vocab_size
            hit = real & (noise.random(audio.shape) < masking.code_noise)
            audio[hit] = noise.integers(0, data.depth_vocab_size, int(hit.sum()))
        batch["tokens"][index, :, :length] = tokens
        batch["action"][index, :length] = row.actions[:length]
        batch["action_known"][index, :length] = True
        batch["action_free"][index, :length] = row.free[:length]
        # Unknown codes are special ids, which are no targets: 0 stands for them.
        batch["code"][index, :length] = np.where(row.known[0], row.codes[0], 0)[:length]
        batch["code_known"][index, :length] = row.known[0, :length]
        deep = np.flatnonzero(row.known[1:, :length].any(axis=0))
        wanted = min(count, math.ceil(masking.depth_share * len(deep)))
        chosen = np.sort(frames.choice(deep, wanted, replace=False))
        batch["depth_index"][index, :wanted] = chosen
        known = row.known[:, chosen].T
        batch["depth_codes"][index, :wanted] = np.where(known, row.codes[:, chosen].T, 0)
        batch["depth_known"][index, :wanted] = known[:, 1:]
        batch["depth_text"][index, :wanted] = row.spoken[:, chosen].T
    return batch


def real_share(batch: Mapping[str, np.ndarray]) -> float:
    """Share of a batch's steps that are not padding."""
    return float(batch["action_known"].mean())


def _stream(seed: int, *key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))
