"""The streaming contract: what a layer that works on a stream promises.

Weights live in the module, the stream's past lives in a state that the caller holds and
hands back. A state is a frozen pytree dataclass of constant structure, shapes and dtypes,
whatever has been fed so far, and rows of a batch never look at each other. For every way of
cutting ``x`` along time into chunks that the layer accepts::

    layer(x) == concatenate([y0, y1, ...])   where   y0, state = layer.step(x0, state), ...

and a change of ``x`` at time t changes nothing that was produced from steps before t.
``tests/nn/streaming_contract.py`` holds every streaming layer to this.
"""

from __future__ import annotations

from typing import Protocol, TypeVar, runtime_checkable

from jax.typing import DTypeLike

from dia2_jax.typing import Array, Float

State = TypeVar("State")


@runtime_checkable
class Streaming(Protocol[State]):
    """A layer over ``[B, T, D]`` that can also be driven chunk by chunk.

    Layers that change the rate accept chunks of a whole number of their input blocks.
    """

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B Y F"]:
        """The whole sequence at once, from an empty past."""
        ...

    def init_state(self, batch: int, dtype: DTypeLike = ...) -> State:
        """The state of ``batch`` streams to which nothing has been fed."""
        ...

    def step(self, x: Float[Array, "B T D"], state: State) -> tuple[Float[Array, "B Y F"], State]:
        """The next chunk; the state handed in must not be used again."""
        ...
