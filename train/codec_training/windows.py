"""Batches of windows: the batch of any step in O(1), a function of (seed, step) alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from dia2_jax.errors import DataError
from dia2_jax.typing import Float
from train.codec_training.sources import Corpus

#: A batch: ``step`` (int, for the host), ``wave`` float32 ``[B, W]``, and with targets ``targets``
#: ``[B, T, K]`` and ``real`` ``[B, T]``, 1 where a target exists.
Windows = dict[str, Any]


class WindowSource:
    """The windows of every step, by step: what grain reads at random.

    Row r of step s draws from ``SeedSequence([seed, s, r])``: a recording in proportion to its
    length, a place in it, and a gain.

    Args:
      corpus: decoded recordings.
      frames: code frames of a window.
      samples_per_frame: of the codec.
      rows: of the whole batch.
      seed: of the run.
      gain_db: lowest and highest gain.
      with_targets: windows begin at frames, and bring the frames' targets along.
      mine: rows that this process makes; all by default.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        frames: int,
        samples_per_frame: int,
        rows: int,
        seed: int,
        gain_db: tuple[float, float] = (0.0, 0.0),
        with_targets: bool = False,
        mine: range | None = None,
    ) -> None:
        if with_targets and corpus.targets is None:
            raise DataError(
                "data: semantic training needs targets (and codebooks.predicted codes), and the "
                "recordings have none: name .npy files in a manifest, or set semantic.targets to "
                "teacher"
            )
        self.corpus, self.frames, self.samples_per_frame = corpus, frames, samples_per_frame
        self.samples = frames * samples_per_frame
        self.seed, self.gain_db, self.with_targets = seed, gain_db, with_targets
        self.mine = range(rows) if mine is None else mine
        self._shares = corpus.lengths / corpus.lengths.sum()
        self._edges = np.cumsum(self._shares)

    def __len__(self) -> int:
        return 2**31

    def __getitem__(self, step: Any) -> Windows:
        rows = [self.row(int(step), row) for row in self.mine]
        stacked: Windows = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        return {"step": int(step), **stacked}

    def row(self, step: int, row: int) -> dict[str, np.ndarray]:
        """One window: ``wave`` [W], and its targets."""
        random = np.random.default_rng(np.random.SeedSequence([self.seed, step, row]))
        chosen = int(np.searchsorted(self._edges, random.random(), side="right"))
        recording = min(chosen, len(self._edges) - 1)
        spare = max(0, int(self.corpus.lengths[recording]) - self.samples)
        gain = 10 ** (random.uniform(*self.gain_db) / 20)
        grid = self.samples_per_frame if self.with_targets else 1
        start = int(random.integers(spare // grid + 1)) * grid
        return self._at(recording, start, np.float32(gain))

    def _at(self, recording: int, start: int, gain: np.float32) -> dict[str, np.ndarray]:
        # int16 holds up to 1, and a louder window would be clipped by any player.
        wave = np.clip(gain * self.corpus.window(recording, start, self.samples), -1, 1)
        result = {"wave": wave}
        if self.with_targets:
            first = start // self.samples_per_frame
            targets, real = self.corpus.target_window(recording, first, self.frames)
            result |= {"targets": targets, "real": real}
        return result


def fixed_windows(
    corpus: Corpus, *, count: int, frames: int, samples_per_frame: int
) -> Float[np.ndarray, "B W"]:
    """Windows for evaluation: spread evenly over all recordings, the same each time."""
    size = frames * samples_per_frame
    total = int(corpus.starts[-1])
    windows = []
    for index in range(count):
        place = (2 * index + 1) * total // (2 * count)
        recording = int(np.searchsorted(corpus.starts, place, side="right")) - 1
        spare = max(0, int(corpus.lengths[recording]) - size)
        start = min(place - int(corpus.starts[recording]), spare)
        windows.append(corpus.window(recording, start, size))
    return np.stack(windows)
