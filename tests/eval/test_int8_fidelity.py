"""Fidelity of int8: every part rounds something, and little of it, on a small shape."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

from dia2_jax import checkpoint
from dia2_jax.convert.models import abstract_dia2
from dia2_jax.nn.quantized import SCALE_SUFFIX
from eval.int8_fidelity import PARTS, WEIGHTS, drawn, main
from eval.latency_models import Source


def test_every_part_is_a_line_of_cosines() -> None:
    run = CliRunner().invoke(main, ["--config", "tiny", "--steps", "3", "--weights", "fan_in"])
    assert run.exit_code == 0, run.output
    head, *lines = run.output.splitlines()
    found = {line.split()[0]: [float(value) for value in line.split()[1:]] for line in lines}
    assert list(found) == list(PARTS) and "of 7 stages" in head
    for part, cosines in found.items():
        assert len(cosines) == 4 and all(0.99 < value <= 1 for value in cosines), part
    # Two digits of activations are finer than anything else.
    assert min(found["activations"]) > max(found["bfloat16"])
    wrong = CliRunner().invoke(main, ["--config", "tiny", "--part", "weight"])
    assert wrong.exit_code == 2 and "weights, activations" in wrong.output


@pytest.mark.parametrize("weights", WEIGHTS)
def test_int8_weights_are_the_same_draw_rounded(weights: str) -> None:
    config = Source.of("tiny").dia2_config()
    whole, narrow = (
        checkpoint.flatten_tree(drawn(abstract_dia2(config, int8=int8)[1], weights, 0.5))[0]
        for int8 in (False, True)
    )
    for name, value in whole.items():
        held = np.asarray(narrow[name], np.float32)
        step = np.zeros(1)
        if narrow[name].dtype == jnp.int8:
            step = np.asarray(narrow[name + SCALE_SUFFIX])[:, None]
            held = held * step
        assert (np.abs(held - value) <= 0.5001 * step).all(), name
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            assert (np.asarray(value) == 0.5).all()
        elif value.size > 100:
            table = "audio_embeds" in name or "embedding" in name
            wanted = {"fan_in": 1.0, "upstream": value.shape[1] if table else 1 / 3}[weights]
            assert np.var(value) * value.shape[1] == pytest.approx(wanted, rel=0.3), name
