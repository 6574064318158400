"""The depth transformer: codebooks 1 to C - 1 of one frame, one stage after another.

Stage s reads codebook s and predicts codebook s + 1. Its attention projections are those
of weight set ``schedule[s]``; the MLP, the norms and the rest are shared by all stages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jax import lax
from jax.typing import DTypeLike

from dia2_jax.config import Dia2Config
from dia2_jax.model.layers import (
    GatedMLP,
    MultiStreamEmbedding,
    layer_weights,
    weights_for_kernel,
)
from dia2_jax.nn.attention import attend
from dia2_jax.nn.kernels.layers import LayerWeights, step_layers
from dia2_jax.nn.linear import Embedding, Linear
from dia2_jax.nn.norm import RMSNorm
from dia2_jax.nn.one_of import one_of
from dia2_jax.nn.platform import on_cpu
from dia2_jax.nn.remat import rematerialised
from dia2_jax.nn.rope import angles, inverse_frequencies, rotate
from dia2_jax.sharding import constrain
from dia2_jax.typing import Array, Float, Int

_SCALE = 1.0  # see decoder: queries and keys are normalised per head


@struct.dataclass
class DepthCache:
    """Keys and values of all layers over the S stages of the current frame.

    Nothing survives a frame: a stage attends to itself and the stages before, all of which were
    written in the same frame. They lie as in :class:`dia2_jax.nn.attention.KVCache`.
    """

    keys: Float[Array, "B L K H S"]
    values: Float[Array, "B L K S H"]

    def write(
        self,
        layer: int,
        keys: Float[Array, "B K H"],
        values: Float[Array, "B K H"],
        stage: Int[Array, ""],
    ) -> DepthCache:
        """Put one stage of a layer, the same one of every row."""
        new_keys, new_values = keys[:, None, :, :, None], values[:, None, :, None]
        return DepthCache(
            keys=lax.dynamic_update_slice(self.keys, new_keys, (0, layer, 0, 0, stage)),
            values=lax.dynamic_update_slice(self.values, new_values, (0, layer, 0, stage, 0)),
        )


@dataclass(frozen=True)
class StageRun:
    """Consecutive stages ``start`` to ``stop - 1``, and the weight set of them all.

    It is None where they have several, and each is looked up as the program runs.
    """

    weight_set: int | None
    start: int
    stop: int


def stage_runs(schedule: tuple[int, ...]) -> tuple[StageRun, ...]:
    """The schedule as runs of equal weight sets, in order.

    A frame loops inside a run, so that its program grows with the runs and not with the stages.
    """
    runs: list[StageRun] = []
    for stage, index in enumerate(schedule):
        if runs and runs[-1].weight_set == index:
            runs[-1] = StageRun(index, runs[-1].start, stage + 1)
        else:
            runs.append(StageRun(index, stage, stage + 1))
    return tuple(runs)


def _of_set(linears: nnx.Dict, weight_set: int | Array) -> Linear:
    """The Linear of a weight set: its number, or while a program runs its place among them."""
    if isinstance(weight_set, int):
        found: Linear = linears[str(weight_set)]
        return found
    return one_of([linears[key] for key in sorted(linears, key=int)], weight_set)


def _per_set(
    config: Dia2Config, in_features: int, out_features: int, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.Dict:
    """One Linear for every weight set the schedule names, keyed as in the published files."""
    return nnx.Dict(
        {
            str(index): Linear(in_features, out_features, param_dtype=dtype, rngs=rngs)
            for index in sorted(set(config.schedule))
        }
    )


class DepformerAttention(nnx.Module):
    """Multi-head attention over the stages of a frame, with scheduled projections."""

    def __init__(
        self, config: Dia2Config, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        model, shape = config.model, config.model.depformer
        self.schedule, self.dtype = config.schedule, dtype
        self.heads, self.head_dim = shape.gqa_query_heads, shape.gqa_head_dim
        self.apply_rope = shape.apply_rope
        self.min_timescale = model.rope_min_timescale
        self.max_timescale = model.rope_max_timescale
        inner = self.heads * self.head_dim
        self.in_proj = _per_set(config, shape.n_embd, 3 * inner, param_dtype, rngs)
        self.out_proj = _per_set(config, inner, shape.n_embd, param_dtype, rngs)
        epsilon = model.normalization_layer_epsilon
        self.q_norm = RMSNorm(self.head_dim, epsilon=epsilon, param_dtype=param_dtype)
        self.k_norm = RMSNorm(self.head_dim, epsilon=epsilon, param_dtype=param_dtype)

    def frequencies(self) -> np.ndarray:
        """``[H/2]``, radians a position, by which queries and keys are rotated: zeros without."""
        rotated = inverse_frequencies(
            self.head_dim, min_timescale=self.min_timescale, max_timescale=self.max_timescale
        )
        return rotated if self.apply_rope else np.zeros_like(rotated)

    def _heads(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], weight_set: int | Array
    ) -> tuple[Array, Array, Array]:
        fused = _of_set(self.in_proj, weight_set)(x)
        split = fused.reshape(*x.shape[:-1], 3, self.heads, self.head_dim).astype(self.dtype)
        query, keys, values = (split[..., part, :, :] for part in range(3))
        query, keys = self.q_norm(query), self.k_norm(keys)
        if self.apply_rope:  # else the width of a head may be odd
            query = rotate(query, positions, self.frequencies())
            keys = rotate(keys, positions, self.frequencies())
        return query, keys, values

    def step(
        self,
        x: Float[Array, "B D"],
        layer: int,
        stage: Int[Array, ""],
        weight_set: int | Array,
        cache: DepthCache,
    ) -> tuple[Float[Array, "B D"], DepthCache]:
        """Stage ``stage`` of a frame in layer ``layer``, attending to itself and the stages before.

        ``weight_set`` is its number, or while a program runs its place among the sets.
        """
        positions = jnp.broadcast_to(stage, (x.shape[0], 1))
        query, keys, values = self._heads(x[:, None], positions, weight_set)
        cache = cache.write(layer, keys[:, 0], values[:, 0], stage)
        held_keys = jnp.moveaxis(cache.keys[:, layer], 3, 1)
        held_values = cache.values[:, layer].swapaxes(1, 2)
        mask = (jnp.arange(held_keys.shape[1]) <= stage)[None, None]
        out = attend(query, held_keys, held_values, mask, scale=_SCALE)
        merged = _of_set(self.out_proj, weight_set)(out.reshape(x.shape[0], -1))
        return merged.astype(self.dtype), cache

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """All stages at once, T of them, each under its own weight set."""
        batch, stages, _ = x.shape
        groups = _stages_by_set(self.schedule)

        def scatter(parts: list[Array]) -> Array:
            order = jnp.argsort(jnp.concatenate([jnp.array(group) for group in groups.values()]))
            return jnp.concatenate(parts, axis=1)[:, order]

        heads = []
        for index, group in groups.items():
            positions = jnp.broadcast_to(jnp.array(group), (batch, len(group)))
            heads.append(self._heads(x[:, jnp.array(group)], positions, index))
        query, keys, values = (scatter([part[i] for part in heads]) for i in range(3))
        mask = jnp.tril(jnp.ones((1, stages, stages), bool))
        out = attend(query, keys, values, mask, scale=_SCALE).reshape(batch, stages, -1)
        merged = [
            self.out_proj[str(index)](out[:, jnp.array(group)]) for index, group in groups.items()
        ]
        return scatter(merged).astype(self.dtype)


def _stages_by_set(schedule: tuple[int, ...]) -> dict[int, list[int]]:
    groups: dict[int, list[int]] = {}
    for stage, index in enumerate(schedule):
        groups.setdefault(index, []).append(stage)
    return groups


class DepformerLayer(nnx.Module):
    """Pre-norm attention and gated MLP, each with a residual."""

    def __init__(
        self, config: Dia2Config, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        shape, epsilon = config.model.depformer, config.model.normalization_layer_epsilon
        self.pre_norm = RMSNorm(shape.n_embd, epsilon=epsilon, param_dtype=param_dtype)
        self.self_attention = DepformerAttention(
            config, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.post_norm = RMSNorm(shape.n_embd, epsilon=epsilon, param_dtype=param_dtype)
        self.mlp = GatedMLP(
            shape.n_embd,
            shape.n_hidden,
            shape.mlp_activations,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def step(
        self,
        x: Float[Array, "B D"],
        layer: int,
        stage: Int[Array, ""],
        weight_set: int | Array,
        cache: DepthCache,
    ) -> tuple[Float[Array, "B D"], DepthCache]:
        attended, cache = self.self_attention.step(
            self.pre_norm(x), layer, stage, weight_set, cache
        )
        x = x + attended
        return x + self.mlp(self.post_norm(x)), cache

    def weights(self) -> LayerWeights | None:
        """As the kernel of all layers reads them; None if it computes something else."""
        attention = self.self_attention
        sets = sorted(set(attention.schedule))
        return layer_weights(
            (self.pre_norm, attention.q_norm, attention.k_norm, self.post_norm),
            [((_of_set(attention.in_proj, i),), _of_set(attention.out_proj, i)) for i in sets],
            self.mlp,
        )

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        x = x + self.self_attention(self.pre_norm(x))
        return x + self.mlp(self.post_norm(x))


class Depformer(nnx.Module):
    """Predicts codebooks 1 to C - 1 of a frame from the decoder's state and codebook 0."""

    def __init__(
        self,
        config: Dia2Config,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        remat: str = "none",
        rngs: nnx.Rngs,
    ) -> None:
        data, shape = config.data, config.model.depformer
        self.config, self.dtype, self.remat = config, dtype, remat
        self.stages = data.codebooks - 1
        self.vocabulary = data.depth_vocab_size
        self.audio_embeds = nnx.List(
            [
                Embedding(data.audio_vocab_size, shape.n_embd, param_dtype=param_dtype, rngs=rngs)
                for _ in range(self.stages)
            ]
        )
        if shape.text_embedding:
            self.text_embed: MultiStreamEmbedding | None = MultiStreamEmbedding(
                data.text_vocab_size,
                shape.n_embd,
                data.text_pad_token_id,
                param_dtype=param_dtype,
                rngs=rngs,
            )
        else:
            self.text_embed = None
        self.depformer_in = _per_set(
            config, config.model.decoder.n_embd, shape.n_embd, param_dtype, rngs
        )
        self.layers = nnx.List(
            [
                DepformerLayer(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
                for _ in range(shape.n_layer)
            ]
        )
        epsilon = config.model.normalization_layer_epsilon
        self.norm = RMSNorm(shape.n_embd, epsilon=epsilon, param_dtype=param_dtype)
        self.logits = nnx.List(
            [
                Linear(shape.n_embd, data.audio_vocab_size, param_dtype=param_dtype, rngs=rngs)
                for _ in range(self.stages)
            ]
        )

    def init_cache(self, batch: int) -> DepthCache:
        """The cache of a frame before its first stage."""
        shape = self.config.model.depformer
        size = (batch, shape.n_layer, shape.gqa_query_heads)
        return DepthCache(
            keys=jnp.zeros((*size, shape.gqa_head_dim, self.stages), self.dtype),
            values=jnp.zeros((*size, self.stages, shape.gqa_head_dim), self.dtype),
        )

    def runs(self) -> tuple[StageRun, ...]:
        """What a frame loops over: all stages where a choice costs nothing, else equal ones."""
        if on_cpu() and self.stages:
            return (StageRun(None, 0, self.stages),)
        return stage_runs(self.config.schedule)

    def conditions(self, hidden: Float[Array, "B D"]) -> dict[int, Float[Array, "B D"]]:
        """The decoder's state as the stages of each weight set read it."""
        return {
            index: self.depformer_in[str(index)](hidden).astype(self.dtype)
            for index in sorted(set(self.config.schedule))
        }

    def text(self, main: Int[Array, " B"], second: Int[Array, " B"]) -> Float[Array, "B D"] | None:
        """What stage 0 reads of the frame's text tokens, if the model has a text embedding.

        Both guidance rows are given the tokens of the conditional row.
        """
        if self.text_embed is None:
            return None
        return self.text_embed(main, second).astype(self.dtype)

    def step(
        self,
        stage: int | Int[Array, ""],
        weight_set: int | None,
        previous: Int[Array, " B"],
        conditions: Mapping[int, Float[Array, "B D"]],
        text: Float[Array, "B D"] | None,
        cache: DepthCache,
    ) -> tuple[Float[Array, "B V"], DepthCache]:
        """One stage of one frame. It has no gradient where a kernel computes it.

        Args:
          stage: 0 to C - 2, may be traced inside a run of :meth:`runs`.
          weight_set: of that run.
          previous: code of codebook ``stage``.
          conditions: :meth:`conditions` of the frame.
          text: :meth:`text` of the frame.
          cache: the stages before; :meth:`init_cache` at stage 0.

        Returns:
          float32 logits ``[B, min(pad, bos)]`` over codebook ``stage + 1``, and the cache.
        """
        stage = jnp.asarray(stage)
        # A switch over separate tables reads one of them; indexing a stacked one would copy it.
        embedded = lax.switch(stage, [table for table in self.audio_embeds], previous)
        embedded = embedded.astype(self.dtype)
        if text is not None:
            embedded = embedded + jnp.where(stage == 0, text, 0)
        sets = sorted(conditions)
        if weight_set is None:
            place: int | Array = jnp.asarray([sets.index(i) for i in self.config.schedule])[stage]
            chosen, condition = place, jnp.stack([conditions[index] for index in sets])[place]
        else:
            place = sets.index(weight_set)
            chosen, condition = weight_set, conditions[weight_set]
        x = condition + embedded
        if weights := weights_for_kernel(self.layers, len(x), cache):
            where = jnp.broadcast_to(stage, (len(x),))
            angle = angles(where, self.layers[0].self_attention.frequencies())
            x, cache = step_layers(
                x, angle, where, cache, weights, weight_set=place, epsilon=self.norm.epsilon
            )
        else:
            for number, layer in enumerate(self.layers):
                x, cache = layer.step(x, number, stage, chosen, cache)
        logits = one_of(self.logits, stage)(self.norm(x))
        return logits[:, : self.vocabulary], cache

    def __call__(
        self,
        previous: Int[Array, "B T"],
        hidden: Float[Array, "B D"],
        text: tuple[Int[Array, " B"], Int[Array, " B"]],
    ) -> Float[Array, "B T V"]:
        """All stages of many frames at once, teacher-forced.

        Args:
          previous: codes of codebooks 0 to C - 2 of B frames (rows and frames flattened).
          hidden: decoder state of each frame.
          text: main and second text token of each frame.

        Returns:
          float32 logits ``[B, C - 1, min(pad, bos)]`` over codebooks 1 to C - 1.
        """
        if not self.stages:  # a model of codebook 0 alone
            return jnp.zeros((previous.shape[0], 0, self.vocabulary), jnp.float32)
        columns = []
        conditions = self.conditions(hidden)
        for stage, index in enumerate(self.config.schedule):
            embedded = self.audio_embeds[stage](previous[:, stage]).astype(self.dtype)
            spelled = self.text(*text)
            if stage == 0 and spelled is not None:
                embedded = embedded + spelled
            columns.append(conditions[index] + embedded)
        x = constrain(jnp.stack(columns, axis=1), "B C D")
        for layer in self.layers:
            x = constrain(rematerialised(layer, self.remat)(x), "B C D")
        x = self.norm(x)
        logits = [head(x[:, stage]) for stage, head in enumerate(self.logits)]
        return jnp.stack(logits, axis=1)[..., : self.vocabulary]
