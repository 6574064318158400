"""Layers in a loop: one of several equal ones, chosen while a program runs.

A program that runs its layers one after another holds every layer's operations, which at the 1B
shape is most of the memory beside the weights and of the time to start (`eval/SPEED.md`). A loop
over the layers holds one layer's. It could slice stacked weights, but XLA's CPU backend copies a
slice before it multiplies with it. So the matrices stay where they are, and a conditional with a
branch for each reads the one that is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from dia2_jax.nn.platform import on_cpu
from dia2_jax.typing import Array, Int

Module = TypeVar("Module", bound=nnx.Module)
Carry = TypeVar("Carry")


@dataclass(frozen=True)
class OneOf:
    """``choices[index]``, matrices of one shape and dtype; it stands where a weight does.

    Attributes:
      choices: the matrices.
      index: which one, within a compiled program.
    """

    choices: tuple[Array, ...]
    index: Int[Array, ""]

    def __getitem__(self, whole: object) -> OneOf:
        """Itself, as ``[...]`` of a parameter asks."""
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        return self.choices[0].shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.choices[0].dtype

    def apply(self, product: Callable[[Array, Array], Array], x: Array) -> Array:
        """``product(x, choices[index])``."""
        branches = [lambda x, weight=weight: product(x, weight) for weight in self.choices]
        return lax.switch(self.index, branches, x)


def one_of(modules: Sequence[Module], index: Int[Array, ""]) -> Module:
    """A module that computes what ``modules[index]`` does; they differ in nothing but weights.

    Vectors (norms, biases, scales) are small: they are stacked, and a row is taken.
    """

    def choose(*weights: Array) -> Array | OneOf:
        if weights[0].ndim < 2:
            return jnp.stack(weights)[index]
        return OneOf(weights, index)

    graph, first = nnx.split(modules[0])
    states = [nnx.state(module) for module in modules[1:]]
    chosen: Module = nnx.merge(graph, jax.tree.map(choose, first, *states))
    return chosen


def in_turn(
    modules: Sequence[Module],
    run: Callable[[int | Int[Array, ""], Module, Carry], Carry],
    carry: Carry,
) -> Carry:
    """``carry = run(number, module, carry)`` of every module, one after another.

    On a CPU in a loop; on an accelerator by a program that holds every module.
    """
    if on_cpu():
        return lax.fori_loop(
            0,
            len(modules),
            lambda number, carry: run(number, one_of(modules, number), carry),
            carry,
        )
    for number, module in enumerate(modules):
        carry = run(number, module, carry)
    return carry
