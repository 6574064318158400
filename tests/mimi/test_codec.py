"""The codec against `transformers`, and its two written rules: sample counts and causality."""

from __future__ import annotations

import functools

import jax
import numpy as np
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st


def jitted(mimi, function):
    graphdef, params = nnx.split(mimi)
    run = jax.jit(lambda params, *args: function(nnx.merge(graphdef, params), *args))
    return functools.partial(run, params)


def test_whole_encode_is_that_of_transformers(golden):
    latents, codes = jitted(
        golden.mimi, lambda mimi, wave: (mimi.encode_latents(wave), mimi.encode(wave))
    )(golden.audio)
    np.testing.assert_allclose(latents[0].T, golden.values["latents"], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(codes[0], golden.values["encoded"])


def test_whole_decode_is_that_of_transformers(golden):
    wave = jitted(golden.mimi, lambda mimi, codes: mimi.decode(codes))(golden.codes)
    np.testing.assert_allclose(wave, golden.values["decoded"], rtol=0, atol=1e-4)


def test_compiled_encode_is_that_of_transformers(golden):
    latents = golden.codec.encode_latents(golden.audio)[0].T
    np.testing.assert_allclose(latents, golden.values["latents"], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(golden.codec.encode(golden.audio)[0], golden.values["encoded"])


def test_compiled_decode_is_that_of_transformers(golden):
    wave = golden.codec.decode(golden.codes)
    np.testing.assert_allclose(wave, golden.values["decoded"], rtol=0, atol=1e-4)


def test_codes_of_a_ragged_take_are_those_of_transformers(golden):
    """Cut inside a frame, at an odd number of feature steps."""
    cut = int(golden.values["cut"])
    assert -(-cut * 2 // golden.mimi.samples_per_frame) % 2 == 1
    codes = golden.codec.encode(golden.audio[:, :cut])[0]
    np.testing.assert_array_equal(codes, golden.values["encoded_cut"])


def test_fewer_codebooks_decode_as_in_transformers(branches):
    """Two semantic codebooks and one acoustic."""
    expected = branches.values["decoded_three"]
    wave = branches.codec.decode(branches.codes[:1, :3])[0]
    np.testing.assert_allclose(wave[-len(expected) :], expected, rtol=0, atol=1e-4)


def test_fewer_codebooks_are_the_first_codebooks(plain):
    every = plain.codec.encode(plain.audio)
    for count in range(1, plain.mimi.codebooks):
        codes = plain.codec.encode(plain.audio, codebooks=count)
        np.testing.assert_array_equal(codes, every[:, :count])


@settings(max_examples=12)
@given(samples=st.integers(1, 1200))
def test_sample_counts(plain, samples):
    frame = plain.codec.samples_per_frame
    assert frame == 96
    frames = -(-samples // frame)
    codes = plain.codec.encode(plain.audio[:, :samples])
    assert codes.shape == (1, 5, frames) == (1, 5, plain.mimi.frames_for(samples))
    wave = plain.codec.decode(np.repeat(codes, 2, axis=0))
    assert wave.shape == (2, frames * frame) == (2, plain.mimi.samples_for(frames))


@settings(max_examples=10)
@given(at=st.integers(0, 10 * 96 - 1))
def test_a_sample_changes_no_frame_before_its_own(plain, at):
    wave = plain.audio[:, : 10 * 96]
    changed = wave.copy()
    changed[:, at:] += 0.5
    before, after = plain.codec.encode_latents(wave), plain.codec.encode_latents(changed)
    np.testing.assert_array_equal(after[:, : at // 96], before[:, : at // 96])
    assert np.any(after[:, at // 96] != before[:, at // 96])


@settings(max_examples=10)
@given(at=st.integers(0, 9))
def test_a_code_changes_no_sample_before_its_own_frame(plain, at):
    codes = plain.codes[:, :, :10]
    changed = codes.copy()
    changed[:, :, at:] = (changed[:, :, at:] + 1) % plain.mimi.codebook_size
    before, after = plain.codec.decode(codes), plain.codec.decode(changed)
    np.testing.assert_array_equal(after[:, : at * 96], before[:, : at * 96])
    own = slice(at * 96, at * 96 + 96)
    assert np.any(after[:, own] != before[:, own])
