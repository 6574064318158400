"""Rematerialisation: computing activations again in the backward pass instead of keeping them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

#: What the backward pass keeps of a layer, by name. ``none`` keeps everything; ``dots`` keeps
#: the results of matrix products with weights (attention scores are computed again); ``full``
#: keeps a layer's input alone.
POLICIES: dict[str, Any] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def rematerialised(layer: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """``layer`` under one of `POLICIES`. Values are the same; memory and time change."""
    if policy == "none":
        return layer
    return jax.checkpoint(lambda *inputs: layer(*inputs), policy=POLICIES[policy])
