"""Running the codec: streams equal whole takes, and what is refused."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streaming_contract import spec

from dia2_jax.errors import AudioError, SessionError
from dia2_jax.mimi import runtime
from dia2_jax.mimi.runtime import Codec, StreamingDecoder, StreamingEncoder


def pieces(total: int) -> st.SearchStrategy[list[int]]:
    """Sizes of pieces, from nothing to several frames, that add up to ``total``."""
    cuts = st.lists(st.integers(0, total), max_size=9).map(sorted)
    return cuts.map(lambda at: list(np.diff([0, *at, total])))


@settings(max_examples=12)
@given(data=st.data())
def test_streamed_encode_is_the_whole_encode(plain, data):
    samples = data.draw(st.integers(1, plain.audio.shape[1]))
    wave = plain.audio[:, :samples]
    stream, got, start = StreamingEncoder(plain.codec), [], 0
    for size in data.draw(pieces(samples)):
        start += size
        got.append(stream.push(wave[:, start - size : start]))
        assert sum(g.shape[2] for g in got) == start // 96
    got.append(stream.close())
    np.testing.assert_array_equal(np.concatenate(got, axis=2), plain.codec.encode(wave))


@settings(max_examples=12)
@given(data=st.data())
def test_streamed_decode_is_the_whole_decode(plain, data):
    stream, got, start = StreamingDecoder(plain.codec, batch=2), [], 0
    for size in data.draw(pieces(plain.codes.shape[2])):
        start += size
        got.append(stream.push(plain.codes[:, :, start - size : start]))
        assert got[-1].shape == (2, 96 * size)
    expected = plain.values["decoded"]
    np.testing.assert_allclose(np.concatenate(got, axis=1), expected, rtol=0, atol=1e-4)


def test_steps_keep_their_state_and_equal_the_whole(plain):
    state = plain.codec.init_decode_state(2)
    form, waves = spec(state), []
    for start in range(0, 28, 4):
        wave, state = plain.codec.decode_step(plain.codes[:, :, start : start + 4], state)
        assert spec(state) == form
        waves.append(wave)
    got = np.concatenate(waves, axis=1)
    expected = plain.values["decoded"][:, : 28 * 96]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
    state = plain.codec.init_encode_state(1)
    form = spec(state)
    codes, state = plain.codec.encode_step(plain.audio[:, : 4 * 96], state)
    assert spec(state) == form
    np.testing.assert_array_equal(codes[0], plain.values["encoded"][:, :4])


def test_a_donated_state_is_gone(plain):
    """Steps reuse the memory of the state they are given: that is what keeps it flat."""
    state = plain.codec.init_decode_state(2)
    old = jax.tree.leaves(state)
    plain.codec.decode_step(plain.codes[:, :, :4], state)
    assert all(leaf.is_deleted() for leaf in old)


def test_no_length_compiles_anything_new(plain):
    compiled = plain.codec._run
    plain.codec.decode(plain.codes)
    plain.codec.encode(plain.audio)
    sizes = [run._cache_size() for run in (compiled.decode_step, compiled.latents_step)]
    for frames in range(1, 30):
        plain.codec.decode(plain.codes[:, :, :frames])
        plain.codec.encode(plain.audio[:, : 90 * frames])
    assert sizes == [run._cache_size() for run in (compiled.decode_step, compiled.latents_step)]


def test_codecs_of_one_shape_share_their_programs(plain):
    assert Codec(plain.mimi)._run is plain.codec._run


def test_rows_of_different_lengths_are_each_its_own_take(plain):
    whole = plain.audio[0]
    lengths = np.array([1, 100, 1000, 2589, len(whole)])
    batch = np.stack([np.where(np.arange(len(whole)) < n, whole, 7.0) for n in lengths])
    codes = plain.codec.encode(batch, lengths)
    latents = plain.codec.encode_latents(batch, lengths)
    for row, n in enumerate(lengths):
        frames = plain.mimi.frames_for(int(n))
        alone = plain.codec.encode(whole[None, :n])
        np.testing.assert_array_equal(codes[row, :, :frames], alone[0])
        alone = plain.codec.encode_latents(whole[None, :n])
        np.testing.assert_allclose(latents[row, :frames], alone[0], rtol=0, atol=1e-5)


def test_decoding_nothing_is_silence_of_no_length(plain):
    assert plain.codec.decode(np.zeros((2, 5, 0), np.int32)).shape == (2, 0)


@settings(max_examples=50)
@given(frames=st.integers(0, 70))
def test_runs_cover_every_frame_once(frames):
    covered = [i for start, size in runtime.runs(frames) for i in range(start, start + size)]
    assert covered == list(range(frames))
    assert {size for _, size in runtime.runs(frames)} <= {1, runtime.SEGMENT}


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((5, 3), np.int32), r"integer codes \[batch, codebooks, frames\], got int32 \(5"),
        (np.zeros((1, 5, 3), np.float32), "integer codes .* got float32"),
        (np.zeros((1, 6, 3), np.int32), "asked for 6, this codec has 1 to 5"),
        (np.zeros((1, 0, 3), np.int32), "asked for 0, this codec has 1 to 5"),
    ],
)
def test_misshapen_codes_are_refused(plain, codes, message):
    with pytest.raises(AudioError, match=message):
        plain.codec.decode(codes)


@pytest.mark.parametrize("bad", [-1, 16])
def test_special_ids_are_refused_and_located(plain, bad):
    codes = plain.codes.copy()
    codes[1, 3, 7] = bad
    with pytest.raises(
        AudioError,
        match=rf"code {bad} at row 1, codebook 3, frame 7 is outside 0\.\.15; cut frames",
    ):
        plain.codec.decode(codes)


@pytest.mark.parametrize("wave", [np.zeros((1, 0)), np.zeros(100), np.zeros((1, 1, 100))])
def test_misshapen_waveforms_are_refused(plain, wave):
    with pytest.raises(AudioError, match=r"needs a waveform \[batch, samples > 0\], got"):
        plain.codec.encode(wave)


@pytest.mark.parametrize("wave", [np.zeros((1, 95)), np.zeros((1, 0)), np.zeros(96)])
def test_chunks_of_half_frames_are_refused(plain, wave):
    with pytest.raises(AudioError, match="whole frames of 96 samples, got"):
        plain.codec.encode_step(wave, plain.codec.init_encode_state(1))


def test_pieces_for_another_number_of_streams_are_refused(plain):
    with pytest.raises(AudioError, match=r"needs samples \[1, any\], got \(2, 9\)"):
        StreamingEncoder(plain.codec).push(np.zeros((2, 9)))
    with pytest.raises(AudioError, match=r"has 1 rows, got codes of shape \(2, 5, 30\)"):
        StreamingDecoder(plain.codec).push(plain.codes)


@pytest.mark.parametrize("lengths", [[0, 5], [5, 101], [5]])
def test_impossible_lengths_are_refused(plain, lengths):
    with pytest.raises(AudioError, match="lengths must be 2 numbers from 1 to 100"):
        plain.codec.encode(np.zeros((2, 100)), lengths)


@pytest.mark.parametrize("count", [0, 6])
def test_impossible_codebook_counts_are_refused(plain, count):
    with pytest.raises(AudioError, match=f"asked for {count}, this codec has 1 to 5"):
        plain.codec.encode(plain.audio, codebooks=count)


def test_a_closed_stream_is_closed(plain):
    stream = StreamingEncoder(plain.codec)
    assert stream.close().shape == (1, 5, 0)
    with pytest.raises(SessionError, match="push after close"):
        stream.push(plain.audio)
    with pytest.raises(SessionError, match="close after close"):
        stream.close()
