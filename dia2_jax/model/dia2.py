"""The whole Dia2 network, with the published names of its two halves."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from dia2_jax.config import Dia2Config
from dia2_jax.model.decoder import Decoder
from dia2_jax.model.depformer import Depformer
from dia2_jax.nn.linear import Linear


class Dia2Model(nnx.Module):
    """Decoder (``transformer``) and depformer.

    Args:
      config: shapes.
      dtype: compute dtype of activations and caches; logits are float32 in any case.
      param_dtype: dtype in which weights are held.
      int8: hold the weights of linear maps as int8 (:mod:`dia2_jax.nn.quantized`), to be filled
        in from a checkpoint, and the decoder's cache. Embeddings, norms and the action head, whose
        two outputs decide when a word starts and cost nothing, stay in ``param_dtype``.
      remat: what the backward pass keeps of each layer (``dia2_jax.nn.remat.POLICIES``).
    """

    def __init__(
        self,
        config: Dia2Config,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        int8: bool = False,
        remat: str = "none",
        rngs: nnx.Rngs,
    ) -> None:
        self.config = config
        self.transformer = Decoder(
            config, dtype=dtype, param_dtype=param_dtype, int8=int8, remat=remat, rngs=rngs
        )
        self.depformer = Depformer(
            config, dtype=dtype, param_dtype=param_dtype, remat=remat, rngs=rngs
        )
        if int8:
            for _, module in nnx.iter_modules(self):
                if isinstance(module, Linear) and module is not self.transformer.action_head:
                    module.make_int8()
