"""The contract of every streaming layer (dia2_jax/nn/streaming.py), as checks to call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from hypothesis import strategies as st

from dia2_jax.nn.streaming import Streaming


def spec(state: Any) -> Any:
    """Tree structure, shapes and dtypes of a state."""
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state), jax.tree.structure(state)


def chunkings(total: int, block: int) -> st.SearchStrategy[list[int]]:
    """Ways of cutting ``total`` steps into chunks of one and of five blocks."""

    def cut(large: list[bool]) -> list[int]:
        chunks: list[int] = []
        for five in large:
            size = 5 * block if five else block
            if sum(chunks) + size <= total:
                chunks.append(size)
        return chunks + [block] * ((total - sum(chunks)) // block)

    return st.lists(st.booleans(), min_size=2, max_size=total // block).map(cut)


def run(step: Callable[..., Any], x: Any, state: Any, chunks: Sequence[int]) -> np.ndarray:
    """All outputs of feeding ``x`` in chunks; the state must keep its form throughout."""
    assert sum(chunks) == x.shape[1]
    form, outputs, start = spec(state), [], 0
    for size in chunks:
        y, state = step(x[:, start : start + size], state)
        assert spec(state) == form
        outputs.append(np.asarray(y))
        start += size
    return np.concatenate(outputs, axis=1)


def uniform(total: int, size: int) -> list[int]:
    """Chunks of one size, and a smaller last one."""
    return [min(size, total - start) for start in range(0, total, size)]


class Contract:
    """One layer under the contract, its two forms compiled.

    Args:
      layer: what to check.
      x: ``[B, T, D]`` with two rows at least.
      block: input steps that the layer takes as one (its stride).
      atol: largest difference between chunked and whole.
    """

    def __init__(
        self, layer: Streaming[Any], x: np.ndarray, *, block: int = 1, atol: float = 1e-5
    ) -> None:
        # Host arrays: cutting one on the device compiles a program a shape.
        self.layer, self.x, self.block, self.atol = layer, x, block, atol
        self.whole = jax.jit(lambda x: layer(x))
        self.step = jax.jit(lambda x, state: layer.step(x, state))
        self.expected = np.asarray(self.whole(self.x))

    def state(self, batch: int | None = None) -> Any:
        return self.layer.init_state(self.x.shape[0] if batch is None else batch)

    def check_chunks(self, chunks: Sequence[int]) -> None:
        """whole == chunked, and the state keeps its form."""
        got = run(self.step, self.x, self.state(), chunks)
        np.testing.assert_allclose(got, self.expected, rtol=0, atol=self.atol)

    def check_rows(self, chunks: Sequence[int]) -> None:
        """A row in a batch is the row alone, even beside a row that is not a number."""
        alone = run(self.step, self.x[:1], self.state(1), [self.x.shape[1]])
        np.testing.assert_allclose(alone, self.expected[:1], rtol=0, atol=self.atol)
        broken = self.x.copy()
        broken[1:] = np.nan
        beside = run(self.step, broken, self.state(), chunks)
        np.testing.assert_allclose(beside[:1], self.expected[:1], rtol=0, atol=self.atol)

    def check_causal(self, at: Sequence[int]) -> None:
        """What comes from step t on, padding included, changes nothing before t's own block."""
        per_block = self.expected.shape[1] * self.block // self.x.shape[1]
        for t in at:
            disturbed = self.x.copy()
            disturbed[:, t:] += 1
            changed = np.asarray(self.whole(disturbed))
            first = t // self.block * per_block
            np.testing.assert_array_equal(changed[:, :first], self.expected[:, :first])
            assert np.any(changed[:, first:] != self.expected[:, first:])

    def check_all(self) -> None:
        """Everything. Chunks are of one and of five blocks, so that few programs serve all."""
        total = self.x.shape[1]
        self.check_chunks(uniform(total, self.block))
        self.check_chunks(uniform(total, 5 * self.block))
        self.check_rows(uniform(total, 5 * self.block))
        self.check_causal([0, self.block - 1, self.block, total // 2, total - 1])


def filled(make: Callable[[], Any], seed: int = 0) -> Any:
    """A module with normal weights of variance 1 / fan-in, biases included; nothing compiled."""
    rng = np.random.default_rng(seed)
    graphdef, abstract = nnx.split(nnx.eval_shape(make))

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(normal(rng, *leaf.shape) / max(1, leaf.size // leaf.shape[0]) ** 0.5)

    return nnx.merge(graphdef, jax.tree.map(fill, abstract))


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Normal test input."""
    return rng.standard_normal(shape).astype(np.float32)
