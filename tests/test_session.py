"""The streaming laws: what a session says depends on text and seed, never on when text arrived."""

from __future__ import annotations

import gc
import itertools
import threading
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dia2_jax import Dia2
from dia2_jax.engine import Chunk, Result, Session
from dia2_jax.errors import NonFiniteError, ScriptError, SessionError

SCRIPT = (
    '[S1] Well, hello there! <break time="0.4s"/>[S2] (clears throat) Fine, and you? (laughs) ok'
)
SEED = 7
CHUNK = 3


@pytest.fixture(scope="module")
def whole(tiny_model: Dia2) -> Result:
    return tiny_model.generate(SCRIPT, seed=SEED)


def join(chunks: list[Chunk]) -> np.ndarray:
    return np.concatenate([chunk.pcm for chunk in chunks])


def codes(chunks: list[Chunk]) -> np.ndarray:
    return np.concatenate([chunk.codes for chunk in chunks], axis=1)


def live_bytes(*, collected: bool = True) -> int:
    if collected:
        gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


# ----------------------------------------------------------------------------- chunks and the whole


@pytest.mark.parametrize("chunk_frames", [1, CHUNK, 8])
def test_chunks_join_to_the_whole(tiny_model: Dia2, whole: Result, chunk_frames: int) -> None:
    chunks = list(tiny_model.stream(SCRIPT, seed=SEED, chunk_frames=chunk_frames))
    np.testing.assert_array_equal(codes(chunks), whole.codes)
    np.testing.assert_allclose(join(chunks), whole.waveform, atol=1e-4)
    assert whole.waveform.std() > 0.01  # silence would match anything
    sizes = [chunk.codes.shape[1] for chunk in chunks]
    assert set(sizes[:-1]) <= {chunk_frames} and sizes[-1] <= chunk_frames
    assert [chunk.pcm.shape[0] for chunk in chunks] == [1920 * size for size in sizes]
    np.testing.assert_allclose(
        [chunk.start for chunk in chunks], np.cumsum([0, *sizes[:-1]]) / 12.5
    )


@pytest.mark.parametrize("chunk_frames", [1, CHUNK])
def test_chunks_carry_the_words_that_begin_in_them(
    tiny_model: Dia2, whole: Result, chunk_frames: int
) -> None:
    chunks = list(tiny_model.stream(SCRIPT, seed=SEED, chunk_frames=chunk_frames))
    assert [word for chunk in chunks for word in chunk.words] == whole.words
    texts = [text for text, _ in whole.words]
    assert texts == "Well, hello there! (clears\tthroat) Fine, and you? (laughs) ok".replace(
        " ", "\n"
    ).replace("\t", " ").split("\n")
    for chunk in chunks[:-1]:
        end = chunk.start + chunk.codes.shape[1] / 12.5
        assert all(chunk.start <= seconds < end for _, seconds in chunk.words)


# --------------------------------------------------------------------------------- feed granularity


class Run(NamedTuple):
    codes: np.ndarray
    pcm: np.ndarray
    words: list[tuple[str, float]]


def run(session: Session, pieces: list[str], pauses: list[bool]) -> Run:
    """Feed pieces; take what there is in between where ``pauses`` says so."""
    chunks: list[Chunk] = []
    for piece, pause in zip(pieces, pauses, strict=True):
        session.feed(piece)
        if pause:
            chunks += session
    session.close()
    chunks += session
    assert session.finished and not session.waiting and not session.truncated
    return Run(codes(chunks), join(chunks), [word for chunk in chunks for word in chunk.words])


@pytest.fixture(scope="module")
def at_once(tiny_model: Dia2) -> Run:
    return run(tiny_model.session(seed=SEED, chunk_frames=CHUNK), [SCRIPT], [False])


def assert_same_bits(one: Run, other: Run) -> None:
    assert one.codes.tobytes() == other.codes.tobytes()
    assert one.pcm.tobytes() == other.pcm.tobytes()
    assert one.words == other.words


@pytest.mark.parametrize("how", ["words", "characters"])
def test_arrival_changes_no_bit(tiny_model: Dia2, at_once: Run, how: str) -> None:
    pieces = SCRIPT.replace(" ", " \0").split("\0") if how == "words" else list(SCRIPT)
    session = tiny_model.session(seed=SEED, chunk_frames=CHUNK)
    assert_same_bits(run(session, pieces, [True] * len(pieces)), at_once)


@settings(max_examples=12)
@given(data=st.data())
def test_no_cut_of_the_text_changes_a_bit(tiny_model: Dia2, at_once: Run, data: Any) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(SCRIPT)), max_size=8)))
    edges = [0, *cuts, len(SCRIPT)]
    pieces = [SCRIPT[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    pauses = data.draw(st.lists(st.booleans(), min_size=len(pieces), max_size=len(pieces)))
    session = tiny_model.session(seed=SEED, chunk_frames=CHUNK)
    assert_same_bits(run(session, pieces, pauses), at_once)


def test_another_seed_says_something_else(tiny_model: Dia2, at_once: Run) -> None:
    other = run(tiny_model.session(seed=SEED + 1, chunk_frames=CHUNK), [SCRIPT], [False])
    frames = min(other.codes.shape[1], at_once.codes.shape[1])
    assert (other.codes[:, :frames] != at_once.codes[:, :frames]).mean() > 0.5


# ------------------------------------------------------------------------------------------ waiting


def test_a_frame_waits_for_its_text_and_no_longer(tiny_model: Dia2) -> None:
    session = tiny_model.session()
    # Before the first word may start there is nothing that text could change.
    assert not session.waiting
    assert list(session) == []
    assert session.frames_computed == 2 and session.waiting
    # A word is spoken with a look at the two behind it; the third is complete at its space.
    session.feed("[S1] one two three")
    assert list(session) == [] and session.waiting and session.frames_computed == 2
    session.feed(" ")
    assert not session.waiting
    list(session)
    assert [text for text, _ in session.words] == ["one"]
    assert session.waiting and session.frames_computed > 2 and not session.finished
    session.feed("fo")
    assert session.waiting
    session.close()
    assert not session.waiting and not session.finished
    list(session)
    assert [text for text, _ in session.words] == ["one", "two", "three", "fo"]
    assert session.finished and not session.truncated


def test_an_iterable_is_asked_for_text_only_when_nothing_else_can_be_done(
    tiny_model: Dia2,
) -> None:
    asked: list[int] = []
    heard = 0

    def words() -> Any:
        for word in ["[S1]", "one", "two", "three", "four", "five", "six", "seven", "eight"]:
            asked.append(heard)
            yield word + " "

    for chunk in tiny_model.stream(words()):
        heard += chunk.codes.shape[1]
    assert asked == sorted(asked) and asked[0] == 0
    assert 0 < asked[-1] < heard, "audio came before the text was complete"


# ---------------------------------------------------------------------------------- ends and memory


def test_feeding_after_the_end_of_the_text_is_refused(tiny_model: Dia2) -> None:
    session = tiny_model.session()
    session.feed("[S1] Hello.")
    session.close()
    session.close()
    with pytest.raises(SessionError, match="feed after close.*start a new session"):
        session.feed("more")


def test_a_session_without_text_says_so_at_its_close(tiny_model: Dia2) -> None:
    session = tiny_model.session()
    session.feed("  \n ")
    with pytest.raises(ScriptError, match="empty"):
        session.close()
    session = tiny_model.session()
    session.feed('[S1] ... <break time="0.2s"/>')
    with pytest.raises(ScriptError, match="no speakable word"):
        session.close()
    assert list(tiny_model.session()) == []


@settings(max_examples=6)
@given(frames=st.integers(0, 30))
def test_cancel_frees_memory_at_any_point(tiny_model: Dia2, whole: Result, frames: int) -> None:
    before = live_bytes()
    session = tiny_model.session(seed=SEED)
    session.feed(SCRIPT)
    session.close()
    chunks = iter(session)
    for _ in range(frames):
        next(chunks)
    assert live_bytes() > before
    # At once, not when cycles are collected, which may be long after memory is needed.
    gc.disable()
    try:
        session.cancel()
        assert live_bytes(collected=False) == before
    finally:
        gc.enable()
    assert session.cancelled and not session.waiting and not session.finished
    assert list(chunks) == [] and list(session) == [] and not session.step()
    for use in (lambda: session.feed("more"), session.close):
        with pytest.raises(SessionError, match="after cancel: start a new session"):
            use()
    # What was said stays readable.
    assert session.codes.shape[1] >= frames
    np.testing.assert_array_equal(session.codes, whole.codes[:, : session.codes.shape[1]])
    session.cancel()


def test_cancel_may_come_from_another_thread(tiny_model: Dia2) -> None:
    before = live_bytes()
    session = tiny_model.session()
    session.feed("[S1] " + "and again and " * 60)
    session.close()
    first = threading.Event()
    failures: list[BaseException] = []

    def listen() -> None:
        try:
            for _ in session:
                first.set()
        except BaseException as error:
            failures.append(error)

    listener = threading.Thread(target=listen)
    listener.start()
    assert first.wait(60)
    session.cancel()
    listener.join(60)
    assert not listener.is_alive() and failures == [] and not session.finished
    assert live_bytes() == before


def test_a_stream_that_is_dropped_frees_its_memory(tiny_model: Dia2) -> None:
    before = live_bytes()
    chunks = tiny_model.stream(SCRIPT)
    next(chunks)
    chunks.close()
    assert live_bytes() == before


@pytest.fixture(scope="module")
def long_take(tiny_model: Dia2) -> tuple[Session, list[int], int]:
    """A script far beyond the context, with the bytes alive on the device after every chunk."""
    before = live_bytes()
    session = tiny_model.session(chunk_frames=CHUNK)
    session.feed("[S1] " + "so it goes on, " * 100)
    session.close()
    alive = [live_bytes() for index, _ in enumerate(session) if index % 8 == 0]
    return session, alive, before


def test_memory_is_flat_over_a_long_take_and_free_behind_it(
    long_take: tuple[Session, list[int], int],
) -> None:
    _, alive, before = long_take
    assert len(alive) > 8
    # The last chunks come when the network's state was dropped with the last frame.
    assert len(set(alive[:-1])) == 1 and alive[0] > before + 100_000
    assert live_bytes() < before + 100  # its settings


def test_a_take_that_reaches_the_context_ends_cleanly_and_says_so(
    tiny_model: Dia2, long_take: tuple[Session, list[int], int]
) -> None:
    session, _, _ = long_take
    context, longest_delay = tiny_model.max_context_steps, 4
    assert session.truncated and session.finished
    assert session.frames_computed == context
    assert session.codes.shape[1] == context + 1 - longest_delay
    assert 10 < len(session.words) < 400
    with pytest.raises(SessionError, match="feed after close"):
        session.feed("more")


def test_a_text_without_end_ends_with_the_context(tiny_model: Dia2) -> None:
    chunks = list(tiny_model.stream(itertools.repeat("and on it goes "), chunk_frames=CHUNK))
    assert [chunk.truncated for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_damaged_weights_are_an_error_not_a_noise(
    tiny_model: Dia2, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tiny_model._programs
    leaves, treedef = jax.tree.flatten(programs.params)
    broken = [leaf.at[(0,) * leaf.ndim].set(np.nan) for leaf in leaves]
    monkeypatch.setattr(programs, "params", jax.tree.unflatten(treedef, broken))
    session = tiny_model.session()
    session.feed("[S1] Hello there.")
    session.close()
    with pytest.raises(NonFiniteError, match=r"NaN or infinite logits in frame 0 .*float32"):
        list(session)
    assert session.cancelled and list(session) == []
    with pytest.raises(NonFiniteError, match="frame 0"):
        tiny_model.generate("[S1] Hello there.")
