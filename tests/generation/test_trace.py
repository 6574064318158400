"""The action stream: what is told of a generation is what happened in it."""

from __future__ import annotations

import numpy as np
import pytest

from dia2_jax import Dia2, GenerationConfig, SamplingConfig
from dia2_jax.text.script import parse_script
from dia2_jax.text.timing import WordTime

SCRIPT = '[S1] Well, hello there! <break time="0.8s"/> [S2] Fine, and you?'


@pytest.mark.parametrize("with_voice", [False, True])
def test_a_trace_tells_what_generate_does(tiny_model: Dia2, with_voice: bool) -> None:
    voices = None
    if with_voice:
        noise = np.random.default_rng(1).standard_normal(36_000).astype(np.float32) / 10
        voices = tiny_model.prepare_voice(noise, words=[WordTime("Anna.", 0.3, 1.0)])
    config = GenerationConfig(text=SamplingConfig(1.0, 2))
    result, actions = tiny_model.trace(SCRIPT, config, voices=voices, seed=3)
    spoken = tiny_model.generate(SCRIPT, config, voices=voices, seed=3)
    np.testing.assert_array_equal(result.codes, spoken.codes)
    assert result.words == spoken.words

    steps = len(actions.started)
    assert actions.drawn.shape == actions.probability.shape == (steps,)
    assert (actions.first > 0) == with_voice
    assert list(actions.words) == [word for word, _ in spoken.words]
    # A word's time is that of the step which took it.
    starts = np.flatnonzero(actions.started >= 0)
    np.testing.assert_array_equal(actions.started[starts], np.arange(len(starts)))
    np.testing.assert_allclose(starts / tiny_model.frame_rate, [at for _, at in spoken.words])

    # Draws are between certain and impossible here, and those overruled are told apart.
    assert 0 <= actions.probability.min() < actions.probability.max() <= 1
    assert actions.held.any() and not (actions.held & actions.pushed).any()
    taken = actions.started >= 0
    np.testing.assert_array_equal(taken, (actions.drawn & ~actions.held) | actions.pushed)


def test_a_trace_tells_what_was_read(tiny_model: Dia2) -> None:
    """The step after a start reads the word's first token, and new-word in the second stream."""
    _, actions = tiny_model.trace(SCRIPT, seed=3)
    ids = tiny_model.tokenizer.ids
    assert actions.text[0].tolist() == [ids.bos, ids.pad]
    words = [entry for entry in parse_script(SCRIPT, tiny_model.tokenizer) if entry.tokens]
    after = np.flatnonzero(actions.started >= 0) + 1
    assert actions.text[after, 0].tolist() == [entry.tokens[0] for entry in words]
    assert (actions.text[after, 1] == ids.new_word).all()


def test_greedy_actions_are_certain(tiny_model: Dia2) -> None:
    _, actions = tiny_model.trace(SCRIPT, GenerationConfig(text=SamplingConfig(0.0, 0)))
    assert set(actions.probability.tolist()) <= {0.0, 1.0}
    np.testing.assert_array_equal(actions.drawn, actions.probability == 1)
