"""Array aliases and the axis legend used in every annotation and einsum string.

====  =======================================  ====  ==============================
B     batch rows (sessions, or both guidance   C     codebooks
      rows of every session inside the model)  V     vocabulary entries
T     time: frames, steps or latent steps      W     waveform samples
S     cache slots                              N     query heads
D, F  input / output features                  K     key-value heads
H     head dimension                           G     query heads per key-value head
L     layers
====  =======================================  ====  ==============================
"""

from __future__ import annotations

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

Array = jax.Array
ArrayLike = jax.Array | np.ndarray

__all__ = ["Array", "ArrayLike", "Bool", "Float", "Int"]
