"""What the network does differently on a CPU than on an accelerator."""

from __future__ import annotations

import jax


def on_cpu() -> bool:
    """Whether this process computes on a CPU.

    There a product of few rows wants its weights in another order (`nn.linear`), and a choice
    between layers while a program runs costs nothing (`nn.one_of`); an accelerator would wait for
    the host at every choice.
    """
    return jax.default_backend() == "cpu"
