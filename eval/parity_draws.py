"""The draws of a generation against the recorded ones, and what counts as a tie.

A greedy draw must pick the recorded entry, and every draw is compared by its whole distribution
(a greedy one at temperature 1), given that all draws before it were the recorded ones. Two
entries that lie within ``TIE`` of each other are a tie, in either order right: the two best of a
greedy draw, and those on either side of the guidance filter's cut.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dia2_jax.generation.sampling import distribution
from dia2_jax.generation.settings import GenerationConfig, SamplingConfig
from eval.parity_checks import DRAW_BAR, NETWORK_BAR, TIE, Checks, difference
from eval.parity_network import filtered_difference, guided


@dataclass
class Recorded:
    """The arrays of one generation by step.

    Attributes:
      arrays: as they lie in the file.
      codebooks: C.
      steps: number S of network steps.
      picks: ``[S, 1 + C]`` every draw, action first; None where none were recorded.
    """

    arrays: dict[str, np.ndarray]
    codebooks: int
    steps: int = field(init=False)
    picks: np.ndarray | None = field(init=False)

    def __post_init__(self) -> None:
        """
        Raises:
          ValueError: the draws are not in the order action, codebooks 0 to C - 1.
        """
        width = 1 + self.codebooks
        lengths = {
            name: len(array) // (width if name.startswith("draw_") else 1)
            for name, array in self.arrays.items()
            if name.startswith(("draw_", "step_"))
        }
        if not lengths:
            raise ValueError("it holds neither steps nor draws")
        if len(set(lengths.values())) != 1:
            raise ValueError(f"its arrays disagree about the number of steps: {lengths}")
        self.steps = next(iter(lengths.values()))
        for name, array in self.arrays.items():
            if name.startswith("draw_") and len(array) != self.steps * width:
                raise ValueError(f"{name} has {len(array)} entries, not a multiple of {width}")
        kinds = self.arrays.get("draw_kind")
        if kinds is not None:
            expected = np.tile(np.arange(width) > 0, self.steps)
            if not np.array_equal(kinds, expected):
                raise ValueError("draw_kind is not action, then every codebook, in each step")
        picks = self.arrays.get("draw_pick")
        self.picks = None if picks is None else picks.reshape(self.steps, width).astype(np.int32)

    def logits(self, step: int, draw: int) -> np.ndarray | None:
        """What a draw was made from; None where it was not recorded."""
        if "draw_logits" not in self.arrays:
            return None
        index = step * (1 + self.codebooks) + draw
        row = self.arrays["draw_logits"][index]
        if "draw_len" in self.arrays:
            return row[: int(self.arrays["draw_len"][index])]
        return row[: len(row) - int(np.isnan(row[::-1]).cumprod().sum())]


@dataclass
class Pairs:
    """Logits before guidance of every draw, conditional and unconditional.

    Attributes:
      action, cb0: ``[S, 2, V]``.
      depth: ``[S, 2, C - 1, V]``.
    """

    action: np.ndarray
    cb0: np.ndarray
    depth: np.ndarray

    def guided(self, step: int, draw: int, scale: float) -> np.ndarray:
        """What the guidance filter ranks the entries of a draw by."""
        if draw == 0:
            rows = self.action[step]
        elif draw == 1:
            rows = self.cb0[step]
        else:
            rows = self.depth[step, :, draw - 2]
        return guided(rows[0], rows[1], scale)


@dataclass
class Worst:
    """The largest of many errors, and where it was."""

    error: float = 0.0
    detail: str = ""

    def take(self, error: float, detail: str) -> None:
        """Keep `error` if it is larger; a NaN is infinite."""
        error = math.inf if math.isnan(error) else error
        if error > self.error:
            self.error, self.detail = error, detail


@dataclass
class Tally:
    """Sums up the draws of a run.

    Attributes:
      recorded: what to compare with.
      config: the run's settings.
      pairs: for ties at the filter's cut; None where there is no unconditional row.
      logits: worst difference of what was drawn from.
      variation: worst total variation of a draw.
      greedy: how many greedy draws were compared.
      wrong: greedy draws that differ without a tie.
      ties: draws that differ by a tie.
      smallest_gap: between the two best entries of any recorded greedy draw.
    """

    recorded: Recorded
    config: GenerationConfig
    pairs: Pairs | None
    logits: Worst = field(default_factory=Worst)
    variation: Worst = field(default_factory=Worst)
    greedy: int = 0
    wrong: list[str] = field(default_factory=list)
    ties: list[str] = field(default_factory=list)
    smallest_gap: float = math.inf

    def draw(self, step: int, draw: int, ours: np.ndarray, pick: int) -> None:
        """Compare one draw, made after the recorded ones.

        Args:
          ours: logits after guidance and masking.
          pick: what was drawn from them, if the draw is greedy.
        """
        where = f"step {step}, " + ("action" if draw == 0 else f"codebook {draw - 1}")
        sampling = self.config.text if draw == 0 else self.config.audio
        golden = self.recorded.logits(step, draw)
        cut_tie = False
        if golden is not None:
            ranked = None
            if self.pairs is not None:
                ranked = self.pairs.guided(step, draw, self.config.cfg_scale)
            error, cut_tie = filtered_difference(ours, golden, ranked, self.config.cfg_filter_k)
            self.logits.take(error, where)
            if cut_tie:
                self.ties.append(f"{where}: the filter's cut")
            else:
                self.variation.take(_variation(ours, golden, sampling, error), where)
        if sampling.temperature <= 0:
            self._greedy(where, ours if golden is None else golden, pick, step, draw, cut_tie)

    def _greedy(
        self, where: str, judged_by: np.ndarray, pick: int, step: int, draw: int, cut_tie: bool
    ) -> None:
        assert self.recorded.picks is not None
        self.greedy += 1
        wanted = int(self.recorded.picks[step, draw])
        best = np.sort(judged_by)[::-1]
        if len(best) > 1:
            self.smallest_gap = min(self.smallest_gap, float(best[0]) - float(best[1]))
        if pick == wanted:
            return
        gap = math.inf
        if max(pick, wanted) < len(judged_by):
            # Both must be near the best, or the recorded pick would be none.
            gap = float(best[0]) - float(min(judged_by[pick], judged_by[wanted]))
        if gap <= TIE:
            self.ties.append(f"{where}: {pick} for {wanted}, {gap:.1e} apart")
        elif not cut_tie:
            self.wrong.append(f"{where}: drew {pick}, golden {wanted}, {gap:.1e} apart")

    def report(self, name: str, checks: Checks) -> None:
        """The items of all draws."""
        ties = len(self.ties)
        explained = "; ".join(self.ties[:2])
        if self.greedy:
            checks.at_most(
                f"{name}: picks",
                len(self.wrong),
                0,
                "wrong",
                detail="; ".join(self.wrong[:2]) or explained,
                ties=ties,
                of=self.greedy,
                smallest_gap=self.smallest_gap,
            )
        if "draw_logits" not in self.recorded.arrays:
            checks.absent(f"{name}: draws", "no draw_logits")
            return
        error = self.variation.error
        checks.at_most(
            f"{name}: draws",
            error,
            DRAW_BAR,
            "TV",
            detail=self.variation.detail if error > DRAW_BAR else explained,
            ties=ties,
            of=self.recorded.steps * (1 + self.recorded.codebooks),
            largest_logit_difference=self.logits.error,
        )


def _variation(
    ours: np.ndarray, golden: np.ndarray, sampling: SamplingConfig, error: float
) -> float:
    """Total variation of two draws of which the logits differ by ``error``."""
    if math.isinf(error):
        return math.inf  # other survivors of the filter are no small matter, however unlikely
    greedy = sampling.temperature <= 0
    temperature, top_k = (1.0, 0) if greedy else (sampling.temperature, sampling.top_k)
    gap = distribution(ours, temperature, top_k) - distribution(golden, temperature, top_k)
    return 0.5 * float(np.abs(gap).sum())


@dataclass
class StepTally:
    """Sums up what the network read and said in every step of a run."""

    recorded: Recorded
    network: Worst = field(default_factory=Worst)
    wrong: list[str] = field(default_factory=list)

    def step(self, step: int, position: int, trace: Any) -> None:
        """Compare one step; the trace's rows are the recorded ones, or the first of them."""
        arrays = self.recorded.arrays
        rows = len(trace.tokens)
        if "step_pos" in arrays and position != int(arrays["step_pos"][step]):
            self.wrong.append(f"step {step}: position {position}")
        if "step_tokens" in arrays:
            golden = arrays["step_tokens"][step][:rows]
            if not np.array_equal(trace.tokens, golden):
                self.wrong.append(f"step {step}: read {trace.tokens.tolist()}")
        for name in ("hidden", "action", "cb0"):
            if f"step_{name}" in arrays:
                golden = arrays[f"step_{name}"][step][:rows]
                error, where = difference(getattr(trace, name), golden)
                self.network.take(error, f"step {step}, {name} {where}")

    def report(self, name: str, checks: Checks) -> None:
        """The items of all steps."""
        arrays = self.recorded.arrays
        for key in ("step_tokens", "step_pos"):
            if key not in arrays:
                checks.absent(f"{name}: {key}")
        if "step_tokens" in arrays or "step_pos" in arrays:
            detail = "; ".join(self.wrong[:1])
            checks.at_most(
                f"{name}: tokens",
                len(self.wrong),
                0,
                "wrong",
                detail=detail,
                of=self.recorded.steps,
            )
        held = [key for key in ("hidden", "action", "cb0") if f"step_{key}" in arrays]
        for key in ("hidden", "action", "cb0"):
            if key not in held:
                checks.absent(f"{name}: step_{key}")
        if held:
            error = self.network.error
            detail = self.network.detail if error > NETWORK_BAR else ""
            checks.at_most(f"{name}: network", error, NETWORK_BAR, detail=detail)
