"""The temporal transformer: one position a frame, whole sequences or one step at a time."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jax.typing import DTypeLike

from dia2_jax.config import Dia2Config
from dia2_jax.model.layers import (
    GatedMLP,
    MultiStreamEmbedding,
    layer_weights,
    weights_for_kernel,
)
from dia2_jax.nn.attention import KVCache, attend, attend_cache
from dia2_jax.nn.int8_cache import Int8Cache, nearest
from dia2_jax.nn.kernels.layers import LayerWeights, step_layers
from dia2_jax.nn.linear import Embedding, Linear
from dia2_jax.nn.norm import RMSNorm
from dia2_jax.nn.one_of import in_turn
from dia2_jax.nn.remat import rematerialised
from dia2_jax.nn.rope import angles, inverse_frequencies, rotate
from dia2_jax.sharding import constrain
from dia2_jax.typing import Array, Float, Int

#: What the layers remember of the positions before: of an int8 model the second.
Cache = KVCache | Int8Cache

# Per-head RMS normalisation of queries and keys takes the place of 1 / sqrt(H).
_SCALE = 1.0


@struct.dataclass
class DecoderOutput:
    """What the decoder says of each position.

    Attributes:
      hidden: ``[..., D]`` normalised state that conditions the depformer, compute dtype.
      action: ``[..., A]`` float32 logits over (pad, new word).
      cb0: ``[..., V]`` float32 logits over codebook 0 of the next frame.
    """

    hidden: Float[Array, "*B D"]
    action: Float[Array, "*B A"]
    cb0: Float[Array, "*B V"]


class DecoderAttention(nnx.Module):
    """Grouped-query attention with per-head q/k RMSNorm before RoPE."""

    def __init__(
        self,
        config: Dia2Config,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        int8: bool,
        rngs: nnx.Rngs,
    ) -> None:
        model, shape = config.model, config.model.decoder
        self.heads, self.kv_heads = shape.gqa_query_heads, shape.kv_heads
        self.head_dim, self.dtype, self.int8 = shape.gqa_head_dim, dtype, int8
        self.min_timescale = model.rope_min_timescale
        self.max_timescale = model.rope_max_timescale
        query, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = Linear(shape.n_embd, query, param_dtype=param_dtype, rngs=rngs)
        self.k_proj = Linear(shape.n_embd, keys, param_dtype=param_dtype, rngs=rngs)
        self.v_proj = Linear(shape.n_embd, keys, param_dtype=param_dtype, rngs=rngs)
        self.o_proj = Linear(query, shape.n_embd, param_dtype=param_dtype, rngs=rngs)
        epsilon = model.normalization_layer_epsilon
        self.q_norm = RMSNorm(self.head_dim, epsilon=epsilon, param_dtype=param_dtype)
        self.k_norm = RMSNorm(self.head_dim, epsilon=epsilon, param_dtype=param_dtype)

    def frequencies(self) -> np.ndarray:
        """``[H/2]``, radians a position, by which queries and keys are rotated."""
        return inverse_frequencies(
            self.head_dim, min_timescale=self.min_timescale, max_timescale=self.max_timescale
        )

    def _heads(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]
    ) -> tuple[Array, Array, Array]:
        # Upstream projects in fp32, then casts; norms and rotation follow in compute dtype.
        def split(y: Array) -> Array:
            return y.reshape(*y.shape[:-1], -1, self.head_dim).astype(self.dtype)

        frequencies = self.frequencies()
        query = rotate(self.q_norm(split(self.q_proj(x))), positions, frequencies)
        keys = rotate(self.k_norm(split(self.k_proj(x))), positions, frequencies)
        return query, keys, split(self.v_proj(x))

    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
        """Causal attention over a whole sequence; also returns its keys and values."""
        query, keys, values = self._heads(x, positions)
        if self.int8:  # as a step finds them
            keys, values = nearest(keys), nearest(values)
        steps = x.shape[1]
        mask = jnp.tril(jnp.ones((1, steps, steps), bool))
        out = attend(query, keys, values, mask, scale=_SCALE)
        return self._merge(out), (keys, values)

    def step(
        self,
        x: Float[Array, "B D"],
        layer: int | Int[Array, ""],
        position: Int[Array, " B"],
        index: Int[Array, " B"],
        cache: Cache,
    ) -> tuple[Float[Array, "B D"], Cache]:
        """One position a row of layer ``layer``; its key and value go to slot ``index[b]``."""
        query, keys, values = (y[:, 0] for y in self._heads(x[:, None], position[:, None]))
        cache = cache.write_step(layer, keys, values, index)
        out = attend_cache(query, cache, layer, index + 1, scale=_SCALE)
        return self._merge(out), cache

    def _merge(self, out: Array) -> Array:
        flat = out.reshape(*out.shape[:-2], self.heads * self.head_dim)
        return self.o_proj(flat).astype(self.dtype)


class DecoderLayer(nnx.Module):
    """Pre-norm attention and gated MLP, each with a residual."""

    def __init__(
        self,
        config: Dia2Config,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        int8: bool,
        rngs: nnx.Rngs,
    ) -> None:
        shape, epsilon = config.model.decoder, config.model.normalization_layer_epsilon
        self.pre_norm = RMSNorm(shape.n_embd, epsilon=epsilon, param_dtype=param_dtype)
        self.attn = DecoderAttention(
            config, dtype=dtype, param_dtype=param_dtype, int8=int8, rngs=rngs
        )
        self.post_norm = RMSNorm(shape.n_embd, epsilon=epsilon, param_dtype=param_dtype)
        self.mlp = GatedMLP(
            shape.n_embd,
            shape.n_hidden,
            config.model.linear.mlp_activations,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
        attended, keys_values = self.attn(self.pre_norm(x), positions)
        x = x + attended
        return x + self.mlp(self.post_norm(x)), keys_values

    def step(
        self,
        x: Float[Array, "B D"],
        layer: int | Int[Array, ""],
        position: Int[Array, " B"],
        index: Int[Array, " B"],
        cache: Cache,
    ) -> tuple[Float[Array, "B D"], Cache]:
        attended, cache = self.attn.step(self.pre_norm(x), layer, position, index, cache)
        x = x + attended
        return x + self.mlp(self.post_norm(x)), cache

    def weights(self) -> LayerWeights | None:
        """As the kernel of all layers reads them; None if it computes something else."""
        attention = self.attn
        inward = (attention.q_proj, attention.k_proj, attention.v_proj)
        return layer_weights(
            (self.pre_norm, attention.q_norm, attention.k_norm, self.post_norm),
            [(inward, attention.o_proj)],
            self.mlp,
        )


class Decoder(nnx.Module):
    """Reads two text streams and C delayed codes a frame; predicts an action and codebook 0.

    Tokens are ``[B, 2 + C, T]``: main text, second text, then the codebooks.
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
        data, shape = config.data, config.model.decoder
        self.config, self.dtype, self.int8, self.remat = config, dtype, int8, remat
        self.audio_embeds = nnx.List(
            [
                Embedding(data.audio_vocab_size, shape.n_embd, param_dtype=param_dtype, rngs=rngs)
                for _ in range(data.codebooks)
            ]
        )
        self.text_embed = MultiStreamEmbedding(
            data.text_vocab_size,
            shape.n_embd,
            data.text_pad_token_id,
            low_rank=shape.low_rank_dim,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.layers = nnx.List(
            [
                DecoderLayer(config, dtype=dtype, param_dtype=param_dtype, int8=int8, rngs=rngs)
                for _ in range(shape.n_layer)
            ]
        )
        epsilon = config.model.normalization_layer_epsilon
        self.norm = RMSNorm(shape.n_embd, epsilon=epsilon, param_dtype=param_dtype)
        self.action_head = Linear(
            shape.n_embd, data.action_vocab_size, param_dtype=param_dtype, rngs=rngs
        )
        self.cb0_head = Linear(
            shape.n_embd, data.audio_vocab_size, param_dtype=param_dtype, rngs=rngs
        )

    def init_cache(self, batch: int, slots: int) -> Cache:
        """An empty cache of at least ``slots`` positions of every layer."""
        shape = self.config.model.decoder
        size = (batch, shape.n_layer, shape.kv_heads, slots, shape.gqa_head_dim)
        return Int8Cache.empty(*size) if self.int8 else KVCache.empty(*size, self.dtype)

    def __call__(
        self, tokens: Int[Array, "B C T"], positions: Int[Array, "B T"] | None = None
    ) -> DecoderOutput:
        """Teacher-forced forward of whole sequences from position 0."""
        return self.prefill(tokens, None, positions)[0]

    def prefill(
        self,
        tokens: Int[Array, "B C T"],
        cache: Cache | None,
        positions: Int[Array, "B T"] | None = None,
    ) -> tuple[DecoderOutput, Cache | None]:
        """The whole-sequence forward that also fills slots 0 to T - 1 of a cache."""
        batch, _, steps = tokens.shape
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(steps), (batch, steps))
        x = constrain(self._embed(tokens.swapaxes(1, 2)), "B T D")
        for index, layer in enumerate(self.layers):
            x, (keys, values) = rematerialised(layer, self.remat)(x, positions)
            x = constrain(x, "B T D")
            if cache is not None:
                cache = cache.write_prefix(index, keys, values)
        return self._heads(x), cache

    def states(self, tokens: Int[Array, "B C T"]) -> Float[Array, "L B T D"]:
        """What flows between the layers, to look at: the embedding, then each layer's output."""
        batch, _, steps = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(steps), (batch, steps))
        states = [self._embed(tokens.swapaxes(1, 2))]
        for layer in self.layers:
            states.append(layer(states[-1], positions)[0])
        return jnp.stack(states)

    def step(
        self,
        tokens: Int[Array, "B C"],
        position: Int[Array, " B"],
        index: Int[Array, " B"],
        cache: Cache,
    ) -> tuple[DecoderOutput, Cache]:
        """One frame a row. It has no gradient where a kernel computes it.

        Args:
          tokens: main text, second text and codes of the previous frame.
          position: rotary position of the row.
          index: cache slot of the row; it runs ahead of ``position`` by one after a prefix that
            was warmed up as upstream does.
          cache: of the positions before.
        """

        def run(
            number: int | Array, layer: DecoderLayer, carry: tuple[Array, Cache]
        ) -> tuple[Array, Cache]:
            x, cache = carry
            return layer.step(x, number, position, index, cache)

        x = self._embed(tokens)
        if weights := weights_for_kernel(self.layers, len(x), cache):
            angle = angles(position, self.layers[0].attn.frequencies())
            x, cache = step_layers(x, angle, index, cache, weights, epsilon=self.norm.epsilon)
        else:
            x, cache = in_turn(self.layers, run, (x, cache))
        return self._heads(x), cache

    def _embed(self, tokens: Int[Array, "*B C"]) -> Float[Array, "*B D"]:
        x = self.text_embed(tokens[..., 0], tokens[..., 1]).astype(self.dtype)
        for index, table in enumerate(self.audio_embeds):
            x = x + table(tokens[..., 2 + index])
        return x.astype(self.dtype)

    def _heads(self, x: Float[Array, "*B D"]) -> DecoderOutput:
        hidden = self.norm(x)
        return DecoderOutput(
            hidden=hidden, action=self.action_head(hidden), cb0=self.cb0_head(hidden)
        )
