"""One frame of B independent sessions, as one pure function on a state pytree.

``frame_step`` serves every driver: the batch of scripts, the stream, replay against
recorded picks. A frame is: decoder, guidance filter, action draw, word machine,
codebook 0, then the depformer's draws. Nothing is read back to the host inside.

Inside the network a row is two rows, conditional and unconditional (the first B rows
and the last B rows of every cache), unless no row of the batch is guided.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax import lax

from dia2_jax.config import Dia2Config
from dia2_jax.generation import machine as word_machine
from dia2_jax.generation.machine import MachineOutput, MachineState, TextQueue
from dia2_jax.generation.sampling import MASKED_LOGIT, RowSettings, draw, guide
from dia2_jax.generation.state import GenerationState, hold
from dia2_jax.model.depformer import StageRun
from dia2_jax.model.dia2 import Dia2Model
from dia2_jax.text.tokenizer import TokenIds
from dia2_jax.typing import Array, ArrayLike, Bool, Float, Int


@struct.dataclass
class FrameTrace:
    """What a frame's draws were made from, for parity checks.

    Attributes:
      hidden: ``[R, D]`` decoder state of all network rows.
      action, cb0: ``[R, V]`` decoder logits of all network rows.
      draws: logits after guidance and masking of every draw in order (action, codebook 0, then
        codebooks 1 to C - 1), each ``[B, V]``.
      picks: ``[B, 1 + C]`` what was drawn, or replayed.
      tokens: ``[R, 2 + C]`` what the decoder read.
    """

    hidden: Float[Array, "R D"]
    action: Float[Array, "R A"]
    cb0: Float[Array, "R V"]
    draws: tuple[Float[Array, "B V"], ...]
    picks: Int[Array, "B P"]
    tokens: Int[Array, "R C"]


@struct.dataclass
class FrameOutput:
    """What the host needs to know of a frame, one entry a row.

    Attributes:
      advanced: the row computed a frame; where False everything else repeats the past.
      frame: the step t that was computed.
      codes: ``[B, C]`` column t + 1 of the delayed grid.
      word: index of the word that was started, or -1.
      ended: the text had run out by this step.
      done: no frame will follow.
      truncated: done because the context ended before the speech did.
      ready: the next frame can be computed from the text received so far.
      finite: every logit was finite.
    """

    advanced: Bool[Array, " B"]
    frame: Int[Array, " B"]
    codes: Int[Array, "B C"]
    word: Int[Array, " B"]
    ended: Bool[Array, " B"]
    done: Bool[Array, " B"]
    truncated: Bool[Array, " B"]
    ready: Bool[Array, " B"]
    finite: Bool[Array, " B"]


@struct.dataclass
class StepOptions:
    """Static choices of a compiled step.

    Attributes:
      ids: special token ids.
      guided: some row has guidance, so the network computes both guidance rows.
      bound: ranks sorted by the draws (``sampling.rank_bound``).
      trace: also return a :class:`FrameTrace`.
    """

    ids: TokenIds = struct.field(pytree_node=False)
    guided: bool = struct.field(pytree_node=False)
    bound: int = struct.field(pytree_node=False)
    trace: bool = struct.field(pytree_node=False, default=False)


def ready_rows(machine: MachineState, queue: TextQueue, ahead: int) -> Bool[Array, " B"]:
    """Whether each row's next frame cannot depend on text it has not received."""
    return jax.vmap(functools.partial(word_machine.ready, ahead=ahead))(machine, queue)


def decoder_tokens(
    state: GenerationState, config: Dia2Config, options: StepOptions
) -> Int[Array, "R C"]:
    """What the decoder reads at each row's step: codebooks inside their delay read bos."""
    data = config.data
    delays = jnp.asarray(data.delay_pattern)
    # A codebook without delay has no code yet at step 0 and reads bos there, too.
    started = (delays <= state.frame[:, None]) & (state.frame[:, None] > 0)
    audio = jnp.where(started, state.codes, data.audio_bos)
    conditional = jnp.concatenate([state.text, audio], axis=-1)
    if not options.guided:
        return conditional
    blank = jnp.asarray([options.ids.zero, options.ids.pad])
    blank = jnp.broadcast_to(blank, state.text.shape)
    unconditional = jnp.concatenate([blank, audio], axis=-1)
    return jnp.concatenate([conditional, unconditional])


def frame_step(
    model: Dia2Model,
    state: GenerationState,
    queue: TextQueue,
    settings: RowSettings,
    options: StepOptions,
    picks: Int[Array, "B P"] | None = None,
) -> tuple[GenerationState, FrameOutput, FrameTrace | None]:
    """Computes one frame of every row that is ready and not done; the others stay as they are.

    Args:
      model: the network.
      state: see :class:`GenerationState`.
      queue: text received so far, every field with a leading B.
      settings: sampling settings of every row.
      options: static choices.
      picks: ``[B, 1 + C]`` replaces the draws (replay); the logits are computed all the same.

    Returns:
      The next state, what happened, and the trace if ``options.trace``.
    """
    config, data = model.config, model.config.data
    ahead, batch = data.second_stream_ahead, state.frame.shape[0]
    active = ready_rows(state.machine, queue, ahead) & ~state.done
    doubled = functools.partial(jnp.tile, reps=2 if options.guided else 1)

    tokens = decoder_tokens(state, config, options)
    position = doubled(state.frame)
    slot = position + doubled(state.slot_offset)
    out, cache = model.transformer.step(tokens, position, slot, state.cache)

    keys = jax.vmap(jax.random.fold_in)(state.keys, state.frame)

    def choose(
        index: int | Array, logits: Array, temperature: Array, top_k: Array, *, masked: bool = False
    ) -> tuple[Array, Array, Array]:
        """Draw ``index`` of the frame: (pick, logits it was drawn from, all logits finite)."""
        finite = jnp.isfinite(logits).reshape(-1, batch, logits.shape[-1]).all((0, 2))
        chosen = logits[:batch]
        if options.guided:
            chosen = guide(
                chosen, logits[batch:], settings.cfg_scale, settings.cfg_filter_k, options.bound
            )
        usable = chosen
        if masked:
            special = jnp.asarray([data.audio_pad, data.audio_bos])
            chosen = chosen.at[:, special].set(MASKED_LOGIT)
            # A filter that kept special ids alone leaves nothing to speak; a special id would not
            # decode, so such a draw goes without the filter.
            left = jnp.isfinite(chosen).at[:, special].set(False).any(axis=-1, keepdims=True)
            whole = logits[:batch].at[:, special].set(MASKED_LOGIT)
            usable = jnp.where(left, chosen, whole)
        if picks is None:
            own = jax.vmap(lambda key: jax.random.fold_in(key, index))(keys)
            pick = draw(usable, temperature, top_k, own, options.bound)
        else:
            pick = picks[:, index]
        return pick, chosen, finite

    action, action_logits, action_finite = choose(
        0, out.action, settings.text_temperature, settings.text_top_k
    )

    def process(
        row: MachineState, text: TextQueue, step: Array, action: Array, max_padding: Array
    ) -> tuple[MachineState, MachineOutput]:
        return word_machine.process(
            row, text, step, action, ids=options.ids, ahead=ahead, max_padding=max_padding
        )

    machine, spoken = jax.vmap(process)(
        state.machine, queue, state.frame, action, settings.max_padding
    )
    audio = (settings.audio_temperature, settings.audio_top_k)
    code, cb0_logits, cb0_finite = choose(1, out.cb0, *audio, masked=True)
    finite = action_finite & cb0_finite

    # The depformer: a loop inside each run of stages.
    text = model.depformer.text(doubled(spoken.main), doubled(spoken.second))
    depth = model.depformer.init_cache(tokens.shape[0])
    conditions = model.depformer.conditions(out.hidden)
    codes, draws = [code[None]], []
    for run in model.depformer.runs():

        def stage_step(
            carry: tuple[Any, ...], stage: Array, run: StageRun = run
        ) -> tuple[tuple[Any, ...], tuple[Array, Array | None]]:
            code, finite, depth = carry
            logits, depth = model.depformer.step(
                stage, run.weight_set, doubled(code), conditions, text, depth
            )
            code, chosen, ok = choose(stage + 2, logits, *audio)
            return (code, finite & ok, depth), (code, chosen if options.trace else None)

        stages = jnp.arange(run.start, run.stop)
        (code, finite, depth), (picked, chosen) = lax.scan(
            stage_step, (code, finite, depth), stages
        )
        codes.append(picked)
        draws.append(chosen)
    column = jnp.concatenate(codes).T

    # The last frames are spoken after the text has run out: the delays, and one pause.
    # (Subtracted, because a sum with a very large setting would not fit 32 bits.)
    since_end = state.frame + 1 - machine.end_step - data.max_delay
    finished = (machine.end_step >= 0) & (since_end >= settings.max_padding)
    exhausted = state.frame + 1 >= config.runtime.max_context_steps
    moved = GenerationState(
        cache=cache,
        machine=machine,
        frame=state.frame + 1,
        slot_offset=state.slot_offset,
        text=jnp.stack([spoken.main, spoken.second], axis=-1),
        codes=column,
        keys=state.keys,
        done=jnp.asarray(finished | exhausted),
    )
    new = hold(active, state, moved)
    output = FrameOutput(
        advanced=active,
        frame=state.frame,
        codes=new.codes,
        word=jnp.where(active, spoken.word, -1),
        ended=jnp.asarray(new.machine.end_step >= 0),
        done=new.done,
        truncated=active & exhausted & ~finished,
        ready=ready_rows(new.machine, queue, ahead) & ~new.done,
        finite=finite | ~active,
    )
    trace = None
    if options.trace:
        trace = FrameTrace(
            hidden=out.hidden,
            action=out.action,
            cb0=out.cb0,
            draws=(
                action_logits,
                cb0_logits,
                *(x for run in draws if run is not None for x in run),
            ),
            picks=jnp.concatenate([action[:, None], column], axis=-1),
            tokens=tokens,
        )
    return new, output, trace


compiled_ready = jax.jit(ready_rows, static_argnames="ahead")


class Programs:
    """A model split once into structure and weights, and the compiled steps on it.

    Structure and options are closed over, so a dispatch hashes nothing but array types. The
    weights are arguments of every program, one after another: as a tree, Python would walk through
    it in every frame. The state is donated.
    """

    def __init__(self, model: Dia2Model) -> None:
        self.config = model.config
        self.graph, params = nnx.split(model)
        self._tree: Any
        self._weights, self._tree = jax.tree.flatten(params)
        self._steps: dict[tuple[StepOptions, bool], Any] = {}
        self._prefills: dict[StepOptions, Any] = {}

    @property
    def params(self) -> Any:
        """The weights as the tree that ``graph`` goes with."""
        return jax.tree.unflatten(self._tree, self._weights)

    @params.setter
    def params(self, params: Any) -> None:
        self._weights = self._tree.flatten_up_to(params)

    def model(self) -> Dia2Model:
        """The module again; it shares the weights."""
        return self._with(self._weights)

    def _with(self, weights: list[Array]) -> Dia2Model:
        model: Dia2Model = nnx.merge(self.graph, jax.tree.unflatten(self._tree, weights))
        return model

    def jitted(self, options: StepOptions, *, replay: bool = False) -> Any:
        """:func:`frame_step` under jit for one set of static choices."""
        key = (options, replay)
        if key not in self._steps:

            def run(
                weights: list[Array],
                state: GenerationState,
                queue: TextQueue,
                settings: RowSettings,
                picks: Array | None = None,
            ) -> tuple[GenerationState, FrameOutput, FrameTrace | None]:
                return frame_step(self._with(weights), state, queue, settings, options, picks)

            self._steps[key] = jax.jit(run, donate_argnums=1)
        return self._steps[key]

    def prefill(
        self,
        state: GenerationState,
        tokens: Int[ArrayLike, "B C T"],
        rows: Bool[ArrayLike, " B"],
        options: StepOptions,
    ) -> GenerationState:
        """:func:`prefill` under jit; ``state`` must not be used again."""
        if options not in self._prefills:

            def run(
                weights: list[Array], state: GenerationState, tokens: Array, rows: Array
            ) -> GenerationState:
                return prefill(self._with(weights), state, tokens, rows, options)

            self._prefills[options] = jax.jit(run, donate_argnums=1)
        run = self._prefills[options]
        filled: GenerationState = run(self._weights, state, jnp.asarray(tokens), jnp.asarray(rows))
        return filled

    def step(
        self,
        state: GenerationState,
        queue: TextQueue,
        settings: RowSettings,
        options: StepOptions,
        picks: Int[ArrayLike, "B P"] | None = None,
    ) -> tuple[GenerationState, FrameOutput, FrameTrace | None]:
        """One compiled frame; ``state`` must not be used again."""
        program = self.jitted(options, replay=picks is not None)
        if picks is None:
            return program(self._weights, state, queue, settings)
        return program(self._weights, state, queue, settings, jnp.asarray(picks))


def prefill(
    model: Dia2Model,
    state: GenerationState,
    tokens: Int[Array, "B C T"],
    rows: Bool[Array, " B"],
    options: StepOptions,
) -> GenerationState:
    """Fill the decoder's cache with the warm-up of some ``rows`` in one pass.

    Their warm-ups may be shorter than T: what is written beyond a row's own length is never
    attended, and is overwritten as the row goes on. The other rows keep their caches.
    """
    if options.guided:
        rows = jnp.tile(rows, 2)
        blank = jnp.asarray([options.ids.zero, options.ids.pad])[None, :, None]
        text = jnp.broadcast_to(blank, tokens[:, :2].shape)
        tokens = jnp.concatenate([tokens, jnp.concatenate([text, tokens[:, 2:]], axis=1)])
    _, cache = model.transformer.prefill(tokens, state.cache)

    def choose(new: Array, old: Array) -> Array:
        return jnp.where(rows.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return replace(state, cache=jax.tree.map(choose, cache, state.cache))
