"""What a frame changes: the state of B independent sessions, before their first frame and after."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dia2_jax.config import Dia2Config
from dia2_jax.generation import machine as word_machine
from dia2_jax.generation.machine import MachineState
from dia2_jax.model.decoder import Cache
from dia2_jax.model.dia2 import Dia2Model
from dia2_jax.text.tokenizer import TokenIds
from dia2_jax.typing import Array, Bool, Int

#: In the place of a cache, an empty tree.
NO_CACHE: Any = ()


@struct.dataclass
class GenerationState:
    """Everything that a frame changes.

    Attributes:
      cache: of the decoder; conditional rows, then unconditional ones if guided. :data:`NO_CACHE`
        where only the rest of a state is of interest.
      machine: word machine of every row, each field ``[B]``.
      frame: ``[B]`` step t that the row computes next.
      slot_offset: ``[B]`` cache slot minus position: 1 after an upstream warm-up, else 0.
      text: ``[B, 2]`` main and second token that step t reads.
      codes: ``[B, C]`` column t of the delayed grid.
      keys: ``[B]`` random keys, one a seed.
      done: ``[B]`` no frame will follow.
    """

    cache: Cache
    machine: MachineState
    frame: Int[Array, " B"]
    slot_offset: Int[Array, " B"]
    text: Int[Array, "B 2"]
    codes: Int[Array, "B C"]
    keys: Array
    done: Bool[Array, " B"]


def initial_state(
    model: Dia2Model,
    *,
    ids: TokenIds,
    seeds: list[int],
    initial_padding: list[int],
    guided: bool,
) -> GenerationState:
    """State of B rows before step 0, without a prefix; one seed and padding a row."""
    # An upstream warm-up decodes one position twice, hence one slot more than the context.
    slots = model.config.runtime.max_context_steps + 1
    rows = len(seeds) * (2 if guided else 1)
    small = initial_rows(model.config, ids=ids, seeds=seeds, initial_padding=initial_padding)
    return replace(small, cache=model.transformer.init_cache(rows, slots))


def initial_rows(
    config: Dia2Config, *, ids: TokenIds, seeds: list[int], initial_padding: list[int]
) -> GenerationState:
    """:func:`initial_state` without caches."""
    data = config.data
    arrays = np.array(seeds, np.uint32), np.array(initial_padding, np.int32)
    return _fresh_rows(*arrays, ids=ids, codebooks=data.codebooks, bos=data.audio_bos)


@functools.partial(jax.jit, static_argnames=("ids", "codebooks", "bos"))
def _fresh_rows(
    seeds: Array, padding: Int[Array, " B"], *, ids: TokenIds, codebooks: int, bos: int
) -> GenerationState:
    """All but the caches, by one program: made one by one, the fields are a dozen to compile."""
    batch = len(seeds)
    machine = jax.vmap(word_machine.init_state)(padding)
    # Fields that start out equal share a buffer, and a donated state may hold no buffer twice.
    machine = jax.tree.map(lambda value: jnp.array(value, copy=True), machine)
    return GenerationState(
        cache=NO_CACHE,
        machine=machine,
        frame=jnp.zeros(batch, jnp.int32),
        slot_offset=jnp.zeros(batch, jnp.int32),
        text=jnp.tile(jnp.asarray([[ids.bos, ids.pad]], jnp.int32), (batch, 1)),
        codes=jnp.full((batch, codebooks), bos, jnp.int32),
        keys=jax.vmap(jax.random.key)(seeds),
        done=jnp.zeros(batch, bool),
    )


def hold(active: Array, old: GenerationState, new: GenerationState) -> GenerationState:
    """Rows that did not advance keep their state.

    Caches need no choice: a row that waits wrote to the slot that its next frame overwrites, and
    no row attends beyond its own length.
    """

    def choose(before: Array, after: Array) -> Array:
        return jnp.where(active.reshape(-1, *[1] * (before.ndim - 1)), after, before)

    small = jax.tree.map(choose, replace(old, cache=NO_CACHE), replace(new, cache=NO_CACHE))
    kept: GenerationState = replace(small, cache=new.cache)
    return kept
