"""The quantiser against its definition: nearest entry, residual after residual."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from streaming_contract import filled, normal

from dia2_jax.config import MimiConfig
from dia2_jax.mimi.rvq import Codebook, SplitQuantizer


def config(inner=4):
    return MimiConfig(
        hidden_size=6,
        num_attention_heads=1,
        num_key_value_heads=1,
        upsample_groups=6,
        num_quantizers=5,
        num_semantic_quantizers=2,
        codebook_size=8,
        codebook_dim=inner,
        vector_quantization_hidden_dimension=inner,
    )


def make(inner=4):
    quantizer = filled(lambda: SplitQuantizer(config(inner), rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(1)
    for half in (quantizer.semantic, quantizer.acoustic):
        for codebook in half.codebooks:
            usage = rng.uniform(0.5, 9, 8).astype(np.float32)
            codebook.cluster_usage[...] = jnp.asarray(usage)
            codebook.embed_sum[...] = jnp.asarray(normal(rng, 8, inner) * usage[:, None])
    return quantizer


def tables(half):
    """Entries of every codebook, by the definition ``sum / max(count, 1e-5)``."""
    return [
        np.asarray(c.embed_sum[...]) / np.maximum(np.asarray(c.cluster_usage[...]), 1e-5)[:, None]
        for c in half.codebooks
    ]


def project(layer, x):
    return x if layer is None else x @ np.asarray(layer.weight[...])[:, 0].T


@pytest.mark.parametrize("inner", [4, 6])
def test_codes_and_features_are_their_definition(inner):
    """Where the inner width is that of the features there is nothing to project."""
    quantizer = make(inner)
    assert (quantizer.semantic.input_proj is None) == (inner == 6)
    x = normal(np.random.default_rng(2), 2, 9, 6)
    codes, features = jax.jit(lambda x: (c := quantizer.encode(x), quantizer.decode(c)))(x)
    expected, total = [], 0
    for half in (quantizer.semantic, quantizer.acoustic):
        residual = project(half.input_proj, x)
        quantised = 0
        for entries in tables(half):
            distance = np.square(residual[:, :, None] - entries).sum(-1)
            expected.append(distance.argmin(-1))
            quantised = quantised + entries[expected[-1]]
            residual = residual - entries[expected[-1]]
        total = total + project(half.output_proj, quantised)
    np.testing.assert_array_equal(codes, np.stack(expected, axis=1))
    assert codes.dtype == jnp.int32
    np.testing.assert_allclose(features, total, rtol=0, atol=1e-5)


def test_fewer_codebooks():
    quantizer = make()
    x = normal(np.random.default_rng(2), 1, 3, 6)
    every, *fewer = jax.jit(
        lambda x: [quantizer.encode(x, codebooks=count) for count in (5, 1, 2, 3)]
    )(x)
    for codes, count in zip(fewer, (1, 2, 3), strict=True):
        np.testing.assert_array_equal(codes, every[:, :count])

    @jax.jit
    def parts(codes):
        semantic, acoustic = quantizer.semantic, quantizer.acoustic
        one, both, rest = (
            semantic.decode(codes[:, :1]),
            semantic.decode(codes[:, :2]),
            acoustic.decode(codes[:, 2:4]),
        )
        return (quantizer.decode(codes[:, :1]), one), (quantizer.decode(codes[:, :4]), both + rest)

    for got, expected in parts(every):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


def test_half_norms_given_are_half_norms_computed():
    quantizer = make()
    x = normal(np.random.default_rng(2), 1, 3, 6)
    given = jax.jit(lambda: quantizer.half_norms())()
    codes = jax.jit(lambda x, given: (quantizer.encode(x, given), quantizer.encode(x)))(x, given)
    np.testing.assert_array_equal(*codes)
    norms = [np.square(entries).sum(-1) / 2 for entries in tables(quantizer.acoustic)]
    np.testing.assert_allclose(np.stack(given[1]), np.stack(norms), rtol=1e-5)


def test_an_entry_never_used_is_divided_by_the_floor():
    codebook = filled(lambda: Codebook(2, 3, param_dtype=jnp.float32, rngs=nnx.Rngs(0)))
    codebook.cluster_usage[...] = jnp.asarray([0.0, 2.0])
    codebook.embed_sum[...] = jnp.asarray([[1e-5, 2e-5, 0], [2.0, 0, 0]])
    entries = codebook.decode(jnp.asarray([0, 1]))
    np.testing.assert_allclose(entries, [[1, 2, 0], [1, 0, 0]], rtol=1e-6)
    near_first = jnp.asarray([[[1, 1.1, 0]]])
    assert codebook.encode(near_first, codebook.half_norms()).item() == 0


def test_the_first_of_equals_is_taken():
    codebook = filled(lambda: Codebook(4, 2, param_dtype=jnp.float32, rngs=nnx.Rngs(0)))
    codebook.cluster_usage[...] = jnp.ones(4)
    codebook.embed_sum[...] = jnp.asarray([[9.0, 9], [1, 2], [1, 2], [1, 2]])
    x = jnp.asarray([[[1.0, 2.5], [8, 8]]])
    np.testing.assert_array_equal(codebook.encode(x, codebook.half_norms()), [[1, 0]])
