"""The network: upstream's numbers, and whole sequence == step by step on every branch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dia2_jax.config import Dia2Config
from dia2_jax.model import depformer
from dia2_jax.model.decoder import DecoderOutput
from dia2_jax.model.depformer import StageRun, stage_runs
from dia2_jax.model.dia2 import Dia2Model
from dia2_jax.nn import kernels, one_of

GOLDEN_TOLERANCE = 1e-4  # of the format, see the golden files
STEP_TOLERANCE = 2e-5  # whole against stepped: the same sums in another order

# What configs/tiny.yaml leaves off, and shapes that differ in kind.
SMALL: dict[str, Any] = {
    "data.channels": 6,
    "data.delay_pattern": [2, 3, 4, 3],
    "runtime.weights_schedule": [0, 1, 0],
    "model.decoder.n_layer": 1,
    "model.depformer.n_layer": 1,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "two layers": {
        **SMALL,
        "model.decoder.n_layer": 2,
        "model.depformer.n_layer": 2,
        "model.depformer.mlp_activations": ["silu", "linear"],
    },
    "plain": {
        **SMALL,
        "model.decoder.low_rank_dim": None,
        "model.depformer.text_embedding": False,
        "model.depformer.apply_rope": False,
        "model.depformer.mlp_activations": ["relu", "swish"],
        "model.linear.mlp_activations": ["GELU", "relu"],
        "data.second_stream_ahead": 0,
        "runtime.weights_schedule": [5, 5, 1],
    },
    "one stage": {
        **SMALL,
        "data.channels": 4,
        "data.delay_pattern": [0, 3],
        "runtime.weights_schedule": None,  # one set a stage
        "model.decoder.kv_heads": 4,
    },
    "no stage": {
        **SMALL,
        "data.channels": 3,
        "data.delay_pattern": [0],
        "runtime.weights_schedule": [],
    },
}
BATCH, STEPS = 3, 12


@pytest.fixture(scope="module", params=list(VARIANTS))
def model(request, tiny, random_model) -> Dia2Model:
    return random_model(tiny(VARIANTS[request.param]))


def random_tokens(config: Dia2Config, steps: int = STEPS, seed: int = 0) -> np.ndarray:
    """``[B, 2 + C, T]`` tokens, special ones among them."""
    data, rng = config.data, np.random.default_rng(seed)
    text = rng.integers(0, data.text_vocab_size, (BATCH, 2, steps))
    text[:, 1][rng.random((BATCH, steps)) < 0.4] = data.text_pad_token_id
    audio = rng.integers(0, data.audio_vocab_size, (BATCH, data.codebooks, steps))
    return np.concatenate([text, audio], axis=1).astype(np.int32)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function(model, ...)`` under jit. Tiny programs: compiling is what the tests wait for."""
    options = {"xla_backend_optimization_level": 0}

    @functools.partial(jax.jit, static_argnums=0, compiler_options=options)
    def run(graph: Any, params: Any, *args: Any) -> Any:
        return function(nnx.merge(graph, params), *args)

    return functools.update_wrapper(lambda model, *args: run(*nnx.split(model), *args), function)


@compiled
def whole(model: Dia2Model, tokens, positions=None) -> DecoderOutput:
    return model.transformer(tokens, positions)


@compiled
def stepped(model: Dia2Model, tokens, positions, slots, cache=None) -> DecoderOutput:
    """Step after step over ``[T, B, 2 + C]`` tokens at ``[T, B]`` positions and slots."""
    if cache is None:
        cache = model.transformer.init_cache(tokens.shape[1], int(tokens.shape[0]))

    def step(cache, item):
        out, cache = model.transformer.step(*item, cache)
        return cache, out

    return jax.lax.scan(step, cache, (tokens, positions, slots))[1]


@compiled
def states(model: Dia2Model, tokens):
    return model.transformer.states(tokens)


@compiled
def prefill(model: Dia2Model, tokens, cache):
    return model.transformer.prefill(tokens, cache)


@compiled
def all_stages(model: Dia2Model, previous, hidden, main, second):
    return model.depformer(previous, hidden, (main, second))


@compiled
def stage_by_stage(model: Dia2Model, previous, hidden, main, second):
    """As a frame does it: a loop in every run of stages."""
    depth = model.depformer
    text, cache, logits = depth.text(main, second), depth.init_cache(len(main)), []
    conditions = depth.conditions(hidden)
    for run in depth.runs():

        def step(cache, stage, run=run):
            code = previous[:, stage]
            out, cache = depth.step(stage, run.weight_set, code, conditions, text, cache)
            return cache, out

        cache, out = jax.lax.scan(step, cache, jnp.arange(run.start, run.stop))
        logits.append(out)
    return jnp.concatenate(logits).swapaxes(0, 1)


def depth_inputs(model: Dia2Model, rows: int = 5) -> tuple[np.ndarray, ...]:
    data, rng = model.config.data, np.random.default_rng(1)
    previous = rng.integers(0, data.depth_vocab_size, (rows, data.codebooks - 1))
    hidden = rng.standard_normal((rows, model.config.model.decoder.n_embd), np.float32)
    main, second = rng.integers(0, data.text_vocab_size, (2, rows))
    second[::2] = data.text_pad_token_id
    return previous, hidden, main, second


def assert_close(left: Any, right: Any, atol: float) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=0), left, right)


def test_decoder_gives_upstream_s_numbers(golden) -> None:
    model, values = golden
    tokens, expected = (
        values["tokens"],
        DecoderOutput(*(values[n] for n in ("hidden", "action", "cb0"))),
    )
    out = whole(model, tokens)
    assert_close(jax.tree.map(lambda x: x.swapaxes(0, 1), out), expected, GOLDEN_TOLERANCE)
    steps, batch = tokens.shape[2], tokens.shape[0]
    places = np.repeat(np.arange(steps)[:, None], batch, axis=1)
    out = stepped(model, tokens.transpose(2, 0, 1), places, places)
    assert_close(out, expected, GOLDEN_TOLERANCE)


def test_states_lead_from_the_embedding_to_the_output(model) -> None:
    tokens = random_tokens(model.config)
    flow = np.asarray(states(model, tokens))
    depth = model.config.model.decoder.n_layer
    assert flow.shape == (depth + 1, BATCH, STEPS, model.config.model.decoder.n_embd)
    assert all((one != next_).all(-1).any() for one, next_ in zip(flow, flow[1:], strict=False))
    hidden = model.transformer.norm(flow[-1])
    assert_close(hidden, whole(model, tokens).hidden, STEP_TOLERANCE)


def test_depformer_gives_upstream_s_numbers(golden) -> None:
    model, values = golden
    expected = values["dep_logits"]  # [T, stage, B, V]
    frames, stages, batch, _ = expected.shape
    previous = values["dep_in"].transpose(0, 2, 1).reshape(-1, stages)
    hidden = values["hidden"].reshape(frames * batch, -1)
    text = values["dep_main"].reshape(-1), values["dep_second"].reshape(-1)
    for form in (all_stages, stage_by_stage):
        out = np.asarray(form(model, previous, hidden, *text))
        out = out.reshape(frames, batch, stages, -1).transpose(0, 2, 1, 3)
        assert_close(out, expected, GOLDEN_TOLERANCE)


def test_decoder_whole_equals_stepped_whatever_the_rows_positions(model) -> None:
    """Rows that start 0, 1 and 5 steps late wait at their position 0, as sessions do."""
    tokens, late = random_tokens(model.config), np.array([0, 5, 1])
    ticks = np.arange(STEPS + late.max())[:, None]
    positions = np.clip(ticks - late, 0, STEPS - 1)
    fed = tokens[np.arange(BATCH), :, positions]
    out = stepped(model, fed, positions, positions)
    expected = whole(model, tokens)
    for row, start in enumerate(late):
        mine = jax.tree.map(lambda x, r=row, s=start: x[s : s + STEPS, r], out)
        assert_close(mine, jax.tree.map(lambda x, r=row: x[r], expected), STEP_TOLERANCE)


@pytest.mark.parametrize("variant", ["two layers", "plain"])
def test_prefill_then_steps_equals_whole(tiny, random_model, variant) -> None:
    model = random_model(tiny(VARIANTS[variant]))
    tokens, filled = random_tokens(model.config), 5
    cache = model.transformer.init_cache(BATCH, STEPS)
    first, cache = prefill(model, tokens[:, :, :filled], cache)
    places = np.repeat(np.arange(filled, STEPS)[:, None], BATCH, axis=1)
    rest = stepped(model, tokens[:, :, filled:].transpose(2, 0, 1), places, places, cache)
    expected = whole(model, tokens)
    assert_close(first, jax.tree.map(lambda x: x[:, :filled], expected), STEP_TOLERANCE)
    rest = jax.tree.map(lambda x: x.swapaxes(0, 1), rest)
    assert_close(rest, jax.tree.map(lambda x: x[:, filled:], expected), STEP_TOLERANCE)


def test_depformer_whole_equals_stage_by_stage(model) -> None:
    inputs = depth_inputs(model)
    out = all_stages(model, *inputs)
    data = model.config.data
    assert out.shape == (5, data.codebooks - 1, data.depth_vocab_size)
    if data.codebooks > 1:
        assert_close(stage_by_stage(model, *inputs), out, STEP_TOLERANCE)


@pytest.mark.skipif(not kernels.kernels().float32, reason=kernels.kernels().reason)
def test_a_step_of_all_layers_is_one_call_where_the_kernel_computes_the_same(
    tiny, random_model
) -> None:
    def calls(variant: str) -> tuple[int, int]:
        model = random_model(tiny(VARIANTS[variant]))
        tokens, places = random_tokens(model.config), np.zeros((STEPS, BATCH), int)
        step = jax.jit(lambda m, *args: stepped.__wrapped__(m, *args))
        stages = jax.jit(lambda m, *args: stage_by_stage.__wrapped__(m, *args))
        texts = (
            step.lower(model, tokens.transpose(2, 0, 1), places, places).as_text(),
            stages.lower(model, *depth_inputs(model)).as_text(),
        )
        decoder, depth = (text.count(f"@{kernels.FLOAT32_LAYERS}") for text in texts)
        return decoder, depth

    assert calls("two layers") == (1, 1)
    assert calls("plain") == (0, 0)  # other activations


@pytest.mark.parametrize("elsewhere", [[kernels], [kernels, one_of, depformer]])
def test_programs_for_other_platforms_give_the_same(model, monkeypatch, elsewhere) -> None:
    """Without kernels layers are looped over. On accelerators every layer, and every run of stages,
    has operations of its own."""
    tokens, inputs = random_tokens(model.config), depth_inputs(model)
    places = np.repeat(np.arange(STEPS)[:, None], BATCH, axis=1)
    for module in elsewhere:
        monkeypatch.setattr(module, "on_cpu", lambda: False)
    # Compiled anew: what was compiled for the processor is found by the model's structure.
    step = compiled(lambda *args: stepped.__wrapped__(*args))
    out = jax.tree.map(
        lambda x: x.swapaxes(0, 1), step(model, tokens.transpose(2, 0, 1), places, places)
    )
    assert_close(out, whole(model, tokens), STEP_TOLERANCE)
    if model.config.data.codebooks > 1:
        stages = compiled(lambda *args: stage_by_stage.__wrapped__(*args))(model, *inputs)
        assert_close(stages, all_stages(model, *inputs), STEP_TOLERANCE)


def test_a_position_decoded_twice_keeps_both_slots(tiny, random_model) -> None:
    """After an upstream warm-up the slot runs one ahead of the position."""
    model = random_model(tiny(SMALL))
    tokens = random_tokens(model.config)
    positions = np.array([0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9, 10])
    rows = np.repeat(positions[:, None], BATCH, axis=1)
    slots = np.repeat(np.arange(STEPS)[:, None], BATCH, axis=1)
    out = stepped(model, tokens.transpose(2, 0, 1), rows, slots)
    expected = whole(model, tokens, np.repeat(positions[None], BATCH, axis=0))
    assert_close(jax.tree.map(lambda x: x.swapaxes(0, 1), out), expected, STEP_TOLERANCE)
    once = whole(model, tokens)
    assert np.abs(out.cb0.swapaxes(0, 1)[:, 5:] - once.cb0[:, 5:]).max() > 1e-2


def test_second_stream_counts_only_where_it_is_not_pad(tiny, random_model) -> None:
    model = random_model(tiny(SMALL))
    embed, pad = model.transformer.text_embed, model.config.data.text_pad_token_id
    main = jnp.asarray([9, 9, pad])
    out = np.asarray(embed(main, jnp.asarray([pad, 11, pad])))
    alone = np.asarray(embed.main_proj(embed.embedding(main)))
    assert (out[[0, 2]] == alone[[0, 2]]).all()
    assert np.abs(out[1] - alone[1]).max() > 0.1


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_bfloat16_keeps_float32_logits_within_a_bound(tiny, random_model, param_dtype) -> None:
    """Computed in bfloat16, logits stay float32; what they lose is measured and bounded.

    Root mean square of the error over that of the logits, measured here: 0.4 % to 0.5 % with
    float32 weights, 0.6 % to 0.65 % with bfloat16 ones, whole and stepped alike.
    """
    exact = random_model(tiny(SMALL))
    rounded = random_model(exact.config, dtype=jnp.bfloat16, param_dtype=jnp.dtype(param_dtype))
    assert rounded.transformer.init_cache(1, 1).keys.dtype == jnp.bfloat16
    tokens, inputs = random_tokens(exact.config), depth_inputs(exact)
    places = np.repeat(np.arange(STEPS)[:, None], BATCH, axis=1)

    def decoded(model: Dia2Model) -> list[jax.Array]:
        out = whole(model, tokens)
        assert out.hidden.dtype == model.transformer.dtype
        return [out.action, out.cb0, all_stages(model, *inputs)]

    right, narrow = decoded(exact), decoded(rounded)
    if param_dtype == "bfloat16":
        out = stepped(rounded, tokens.transpose(2, 0, 1), places, places)
        narrow += [out.action.swapaxes(0, 1), out.cb0.swapaxes(0, 1)]
        right += right[:2]
        narrow.append(stage_by_stage(rounded, *inputs))
        right.append(right[2])
    for wide, small in zip(right, narrow, strict=True):
        assert small.dtype == wide.dtype == jnp.float32
        error = np.asarray(wide, np.float64) - np.asarray(small, np.float64)
        assert 1e-3 < np.sqrt(np.square(error).mean() / np.square(np.asarray(wide)).mean()) < 0.02


@pytest.mark.parametrize(
    ("schedule", "runs"),
    [
        ((), []),
        ((4,), [(4, 0, 1)]),
        ((0, 1, 1, 0), [(0, 0, 1), (1, 1, 3), (0, 3, 4)]),
        ((2, 2, 2), [(2, 0, 3)]),
    ],
)
def test_stage_runs_join_neighbours_only(schedule, runs) -> None:
    assert stage_runs(schedule) == tuple(StageRun(*run) for run in runs)


def test_parameter_names_are_the_published_ones(tiny) -> None:
    """The conversion table is a renaming; weight sets are keyed by their own ids."""
    config = tiny(VARIANTS["plain"])
    state = nnx.state(nnx.eval_shape(lambda: Dia2Model(config, rngs=nnx.Rngs(0))))
    names = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(state)}
    assert "transformer.layers.0.attn.q_proj.weight" in names
    sets = {name.split(".")[2] for name in names if name.startswith("depformer.depformer_in")}
    assert sets == {"1", "5"}


def test_reading_every_activation_is_a_different_function(tiny, random_model) -> None:
    outputs: list[np.ndarray] = []
    for name in ("silu", "gelu", "relu", "linear"):
        mlp = random_model(tiny({**SMALL, "model.linear.mlp_activations": [name, "linear"]}))
        x = np.linspace(-2, 2, 32, dtype=np.float32)[None]
        layer: Callable[[Any], Any] = mlp.transformer.layers[0].mlp
        outputs.append(np.asarray(layer(jnp.asarray(x))))
    for i in range(4):
        for j in range(i):
            assert np.abs(outputs[i] - outputs[j]).max() > 1e-2
