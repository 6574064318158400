"""The delay pattern: a grid and back."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dia2_jax.model.delays import delay, undelay


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(0, 8))
def test_delay_shifts_every_codebook_and_undelay_inverts_it(delays: list[int], frames: int) -> None:
    codes = 100 + np.arange(len(delays) * frames).reshape(len(delays), frames)
    grid = delay(codes, delays, fill=-7)
    assert grid.shape == (len(delays), frames + max(delays)) and grid.dtype == codes.dtype
    for index, offset in enumerate(delays):
        assert (grid[index, offset : offset + frames] == codes[index]).all()
        assert (np.delete(grid[index], range(offset, offset + frames)) == -7).all()
    assert (undelay(grid, delays) == codes).all()


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(0, 5))
def test_a_grid_shorter_than_its_delays_holds_no_whole_frame(
    delays: list[int], frames: int
) -> None:
    grid = np.zeros((len(delays), frames), np.int32)
    assert undelay(grid, delays).shape == (len(delays), max(0, frames - max(delays)))
