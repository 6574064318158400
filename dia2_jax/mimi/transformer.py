"""The codec's transformer: causal attention over a sliding window, whole and streaming.

Pre-norm layers with LayerNorm, half-split rotary positions, an exact-GELU MLP and LayerScale
(Touvron et al., 2021). A step sees itself and the ``window - 1`` steps before it, so a stream
remembers that many keys and values, in a ring.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax import lax
from jax.typing import DTypeLike

from dia2_jax.config import MimiConfig
from dia2_jax.nn.linear import Linear
from dia2_jax.nn.norm import LayerNorm
from dia2_jax.nn.one_of import in_turn
from dia2_jax.nn.rope import inverse_frequencies, rotate
from dia2_jax.typing import Array, Bool, Float, Int

# Large and finite, so that a fully masked row of padding stays finite.
_MASKED = -1e30


#: Up to this many new steps, of all rows, are written one by one.
_FEW = 8


@struct.dataclass
class Ring:
    """Keys and values of the last S steps in every layer; step p lives in slot ``p % S``.

    Attributes:
      keys: ``[B, L, K, S, H]``, rotated to their absolute positions.
      values: ``[B, L, K, S, H]``.
    """

    keys: Float[Array, "B L K S H"]
    values: Float[Array, "B L K S H"]

    def positions(self, position: Int[Array, " B"]) -> Int[Array, "B S"]:
        """Which step each slot holds when ``position[b]`` steps were written; negative: none."""
        slots = self.keys.shape[3]
        last = position[:, None] - 1
        return last - (last - jnp.arange(slots)) % slots

    def of(self, layer: int | Int[Array, ""]) -> tuple[Array, Array]:
        """Keys and values ``[B, K, S, H]`` of a layer."""

        def choose(held: Array) -> Array:
            return lax.dynamic_index_in_dim(held, layer, 1, keepdims=False)

        return choose(self.keys), choose(self.values)

    def write(
        self,
        layer: int | Int[Array, ""],
        keys: Float[Array, "B K T H"],
        values: Float[Array, "B K T H"],
        position: Int[Array, " B"],
    ) -> Ring:
        """Put steps ``position[b] ...`` of a layer over the oldest ones of every row."""
        slots, batch, steps = self.keys.shape[3], keys.shape[0], keys.shape[2]
        kept = min(slots, steps)
        first = steps - kept
        if batch * kept <= _FEW:

            def put_each(held: Array, new: Array) -> Array:
                for row in range(batch):
                    for step in range(first, steps):
                        slot = (position[row] + step) % slots
                        piece = new[row, :, step][None, None, :, None]
                        held = lax.dynamic_update_slice(held, piece, (row, layer, 0, slot, 0))
                return held

            return Ring(keys=put_each(self.keys, keys), values=put_each(self.values, values))
        # Which of the kept steps falls into each slot. A select over the whole ring instead of a
        # scatter of many steps: XLA's CPU backend scatters element by element.
        source = (jnp.arange(slots) - position[:, None] - first) % slots
        written = (source < kept)[:, None, :, None]
        index = jnp.minimum(source, kept - 1)[:, None, :, None]

        def put(held: Array, old: Array, new: Array) -> Array:
            new = jnp.where(written, jnp.take_along_axis(new[:, :, first:], index, axis=2), old)
            return lax.dynamic_update_index_in_dim(held, new, layer, 1)

        old_keys, old_values = self.of(layer)
        return Ring(
            keys=put(self.keys, old_keys, keys), values=put(self.values, old_values, values)
        )


@struct.dataclass
class TransformerState:
    """Past of the transformer.

    Attributes:
      position: steps fed so far, by row.
      ring: keys and values of the steps in the window.
    """

    position: Int[Array, " B"]
    ring: Ring


def _attend(
    query: Float[Array, "*X T H"],
    sources: list[tuple[Array, Array, Array]],
    scale: float,
) -> Float[Array, "*X T H"]:
    """Softmax attention over several (keys, values, mask) at once, without joining them.

    Keys and values are ``[*X, S, H]`` and masks ``[*X, T, S]``, each S its own; the leading axes
    broadcast against those of the query.
    """
    scores = [
        jnp.where(
            mask,
            scale * jnp.einsum("...TH,...SH->...TS", query, keys, precision=lax.Precision.HIGHEST),
            _MASKED,
        )
        for keys, _, mask in sources
    ]
    peak = functools.reduce(jnp.maximum, [part.max(axis=-1, keepdims=True) for part in scores])
    total, out = jnp.zeros_like(peak), jnp.zeros_like(query)
    for part, (_, values, _) in zip(scores, sources, strict=True):
        weights = jnp.exp(part - peak)
        total = total + weights.sum(axis=-1, keepdims=True)
        out = out + jnp.einsum(
            "...TS,...SH->...TH", weights, values, precision=lax.Precision.HIGHEST
        )
    return out / total


def _band(queries: Int[Array, "B T"], keys: Int[Array, "B S"], window: int) -> Bool[Array, "B T S"]:
    """Which key positions a query position sees; negative key positions do not exist."""
    gap = queries[:, :, None] - keys[:, None, :]
    return (gap >= 0) & (gap < window) & (keys[:, None, :] >= 0)


class Attention(nnx.Module):
    """Multi-head attention of N query over K key-value heads within the window."""

    def __init__(self, config: MimiConfig, *, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.attention_head_dim
        self.window = config.sliding_window
        self.rope_theta = config.rope_theta
        width, wide, narrow = (
            config.hidden_size,
            self.heads * self.head_dim,
            self.kv_heads * self.head_dim,
        )
        self.q_proj = Linear(width, wide, param_dtype=param_dtype, rngs=rngs)
        self.k_proj = Linear(width, narrow, param_dtype=param_dtype, rngs=rngs)
        self.v_proj = Linear(width, narrow, param_dtype=param_dtype, rngs=rngs)
        self.o_proj = Linear(wide, width, param_dtype=param_dtype, rngs=rngs)

    def _project(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]
    ) -> tuple[Array, Array, Array]:
        """Rotated queries ``[B, K, G, T, H]``, rotated keys and values ``[B, K, T, H]``."""
        batch, steps, _ = x.shape
        frequencies = inverse_frequencies(self.head_dim, max_timescale=self.rope_theta)
        query = self.q_proj(x).reshape(batch, steps, self.heads, self.head_dim)
        keys = self.k_proj(x).reshape(batch, steps, self.kv_heads, self.head_dim)
        values = self.v_proj(x).reshape(batch, steps, self.kv_heads, self.head_dim)
        query = rotate(query, positions, frequencies)
        query = query.reshape(batch, steps, self.kv_heads, -1, self.head_dim)
        keys = rotate(keys, positions, frequencies)
        return query.transpose(0, 2, 3, 1, 4), keys.swapaxes(1, 2), values.swapaxes(1, 2)

    def _merge(self, out: Float[Array, "B K G T H"]) -> Float[Array, "B T D"]:
        batch, _, _, steps, _ = out.shape
        return self.o_proj(out.transpose(0, 3, 1, 2, 4).reshape(batch, steps, -1))

    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """The whole sequence. Memory grows with T * window, not with T * T."""
        query, keys, values = self._project(x, positions)
        steps, window = x.shape[1], self.window
        if steps <= 2 * window:
            mask = _band(positions, positions, window)[:, None, None]
            source = (keys[:, :, None], values[:, :, None], mask)
            return self._merge(_attend(query, [source], self.head_dim**-0.5))
        # Blocks of one window each: a query sees its own block and the one before.
        blocks = -(-steps // window)
        extra = blocks * window - steps

        def fold(y: Array, axis: int, fill: int = 0) -> Array:
            pad = [(0, 0)] * y.ndim
            pad[axis] = (0, extra)
            y = jnp.pad(y, pad, constant_values=fill)
            return y.reshape(*y.shape[:axis], blocks, window, *y.shape[axis + 1 :])

        def previous(y: Array, axis: int, fill: int = 0) -> Array:
            pad = [(0, 0)] * y.ndim
            pad[axis] = (1, 0)
            y = jnp.pad(y, pad, constant_values=fill)
            return lax.slice_in_dim(y, 0, blocks, axis=axis)

        batch = x.shape[0]
        query = fold(query, 3)
        where = fold(positions, 1, fill=-1)
        own = (fold(keys, 2)[:, :, None], fold(values, 2)[:, :, None])
        old = (previous(own[0], 3), previous(own[1], 3))
        sources = []
        for (k, v), at in ((old, previous(where, 1, fill=-1)), (own, where)):
            flat = (batch * blocks, window)
            mask = _band(where.reshape(flat), at.reshape(flat), window)
            sources.append((k, v, mask.reshape(batch, 1, 1, blocks, window, window)))
        out = _attend(query, sources, self.head_dim**-0.5)
        out = out.reshape(*out.shape[:3], blocks * window, -1)[:, :, :, :steps]
        return self._merge(out)

    def step(
        self,
        x: Float[Array, "B T D"],
        layer: int | Int[Array, ""],
        ring: Ring,
        position: Int[Array, " B"],
    ) -> tuple[Float[Array, "B T D"], Ring]:
        """The next T steps, of which the first is step ``position[b]`` of row b."""
        positions = position[:, None] + jnp.arange(x.shape[1])
        query, keys, values = self._project(x, positions)
        past = _band(positions, ring.positions(position), self.window)
        new = _band(positions, positions, self.window)
        old_keys, old_values = ring.of(layer)
        sources = [
            (old_keys[:, :, None], old_values[:, :, None], past[:, None, None]),
            (keys[:, :, None], values[:, :, None], new[:, None, None]),
        ]
        out = self._merge(_attend(query, sources, self.head_dim**-0.5))
        return out, ring.write(layer, keys, values, position)


class LayerScale(nnx.Module):
    """A learnt factor a feature on a residual branch."""

    def __init__(self, width: int, initial: float, *, param_dtype: DTypeLike) -> None:
        self.scale = nnx.Param(jnp.full((width,), initial, param_dtype))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return x * self.scale[...]


class TransformerLayer(nnx.Module):
    """Attention and MLP, each normalised before and scaled after."""

    def __init__(self, config: MimiConfig, *, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        width, scale = config.hidden_size, config.layer_scale_initial_scale
        self.attention_norm = LayerNorm(width, epsilon=config.norm_eps, param_dtype=param_dtype)
        self.attention = Attention(config, param_dtype=param_dtype, rngs=rngs)
        self.attention_scale = LayerScale(width, scale, param_dtype=param_dtype)
        self.mlp_norm = LayerNorm(width, epsilon=config.norm_eps, param_dtype=param_dtype)
        self.fc1 = Linear(width, config.intermediate_size, param_dtype=param_dtype, rngs=rngs)
        self.fc2 = Linear(config.intermediate_size, width, param_dtype=param_dtype, rngs=rngs)
        self.mlp_scale = LayerScale(width, scale, param_dtype=param_dtype)

    def _mlp(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        hidden = jax.nn.gelu(self.fc1(self.mlp_norm(x)), approximate=False)
        return x + self.mlp_scale(self.fc2(hidden))

    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """The whole sequence."""
        y = self.attention(self.attention_norm(x), positions)
        return self._mlp(x + self.attention_scale(y))

    def step(
        self,
        x: Float[Array, "B T D"],
        layer: int | Int[Array, ""],
        ring: Ring,
        position: Int[Array, " B"],
    ) -> tuple[Float[Array, "B T D"], Ring]:
        """The next T steps."""
        y, ring = self.attention.step(self.attention_norm(x), layer, ring, position)
        return self._mlp(x + self.attention_scale(y)), ring


class Transformer(nnx.Module):
    """A stack of layers over ``[B, T, D]``; the same on the encoder and the decoder side."""

    def __init__(
        self, config: MimiConfig, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        self.layers = nnx.List(
            TransformerLayer(config, param_dtype=param_dtype, rngs=rngs)
            for _ in range(config.num_hidden_layers)
        )

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The whole sequence."""
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        for layer in self.layers:
            x = layer(x, positions)
        return x

    def init_state(self, batch: int, dtype: DTypeLike = jnp.float32) -> TransformerState:
        """An empty past for ``batch`` streams."""
        one = self.layers[0].attention
        shape = (batch, len(self.layers), one.kv_heads, one.window, one.head_dim)
        return TransformerState(
            position=jnp.zeros((batch,), jnp.int32),
            ring=Ring(keys=jnp.zeros(shape, dtype), values=jnp.zeros(shape, dtype)),
        )

    def step(
        self, x: Float[Array, "B T D"], state: TransformerState
    ) -> tuple[Float[Array, "B T D"], TransformerState]:
        """The next T steps of every row."""

        def run(
            number: int | Array, layer: TransformerLayer, carry: tuple[Array, Ring]
        ) -> tuple[Array, Ring]:
            x, ring = carry
            return layer.step(x, number, ring, state.position)

        x, ring = in_turn(self.layers, run, (x, state.ring))
        return x, TransformerState(position=state.position + x.shape[1], ring=ring)
