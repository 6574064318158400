"""The frame step for accelerators that are not here: it lowers for each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import pytest
import yaml
from flax import nnx

from dia2_jax.config import load_dia2_config
from dia2_jax.convert.models import abstract_dia2
from dia2_jax.generation.machine import QueueBuilder
from dia2_jax.generation.sampling import RowSettings, rank_bound
from dia2_jax.generation.settings import GenerationConfig
from dia2_jax.generation.state import initial_state
from dia2_jax.generation.step import StepOptions, frame_step

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_a_frame_lowers_for_gpu_and_tpu(
    kind: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    config, int8 = load_dia2_config(yaml.safe_load(TINY.read_text())), kind == "int8"
    dtype = jnp.float32 if int8 else jnp.bfloat16
    graph, params = abstract_dia2(config, dtype=dtype, param_dtype=dtype, int8=int8)
    settings = GenerationConfig()
    options = StepOptions(ids=tokenizer.ids, guided=True, bound=rank_bound([settings]))
    queue = QueueBuilder(16, config.data.second_stream_ahead)
    texts = jax.tree.map(lambda x: jnp.asarray(x)[None], queue.arrays())
    state = jax.eval_shape(
        lambda: initial_state(
            nnx.merge(graph, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)),
            ids=tokenizer.ids,
            seeds=[0],
            initial_padding=[2],
            guided=True,
        )
    )

    @jax.jit
    def step(params: Any, state: Any, queue: Any, settings: Any) -> Any:
        model = nnx.merge(graph, params)
        # Only arrays: an exported program has no use for the classes around them.
        return jax.tree.leaves(frame_step(model, state, queue, settings, options)[:2])

    exported = jax.export.export(step, platforms=("cuda", "tpu"))
    program = exported(params, state, texts, RowSettings.of([settings]))
    assert program.platforms == ("cuda", "tpu")
    narrow = "xi8>" if int8 else "xbf16>"
    assert "stablehlo.dot_general" in program.mlir_module() and narrow in program.mlir_module()
