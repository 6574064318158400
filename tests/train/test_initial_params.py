"""Random weights: a function of seed and path, at the scale that each kind of parameter needs."""

from __future__ import annotations

import numpy as np

from train.dia2_task import Dia2Task
from train.starting_point import initial_params


def test_fresh_weights_have_their_scale_and_depend_on_seed_and_path_alone(small_config) -> None:
    task = Dia2Task(small_config)
    first, other = (initial_params(task.start, task.base, seed) for seed in (0, 1))
    again = initial_params(task.start, dict(list(task.base.items())[::-3]), 0)
    for path, values in again.items():
        np.testing.assert_array_equal(values, first[path], err_msg=path)

    queries = np.asarray(first["transformer.layers.0.attn.q_proj.weight"])
    inputs = queries.shape[1]
    np.testing.assert_allclose(queries.std() * np.sqrt(inputs), 1, rtol=0.05)
    assert 1.9 < np.abs(queries).max() * 0.87962566 * np.sqrt(inputs) <= 2
    table = np.asarray(first["transformer.text_embed.embedding.weight"])
    np.testing.assert_allclose(table.std(), 0.02, rtol=0.05)
    assert np.abs(table).max() > 3 * 0.02
    assert (np.asarray(first["transformer.norm.weight"]) == 1).all()

    matrices = [path for path, leaf in first.items() if leaf.ndim > 1]
    assert not any(np.array_equal(first[path], other[path]) for path in matrices)
    values = {np.asarray(first[path]).ravel()[0] for path in matrices}
    assert len(values) == len(matrices)
