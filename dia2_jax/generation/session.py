"""A streaming session: words in while audio comes out.

A session drives one row of ``Rows`` and the streaming codec. What it computes depends on
the text and the seed, never on when the text arrived: a frame waits until its outcome
cannot depend on text not yet received, and chunks are cut by frame number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from dia2_jax.errors import NonFiniteError, SessionError
from dia2_jax.generation.rows import Row, Rows
from dia2_jax.mimi.codec import DecodeState
from dia2_jax.mimi.runtime import Codec
from dia2_jax.typing import Float, Int


@dataclass(frozen=True)
class Chunk:
    """A piece of output audio.

    Attributes:
      pcm: ``[W]`` float32 samples within +-1.
      words: (text, seconds from the start of the output) of the words that begin in it.
      start: seconds from the start of the output to its first sample.
      codes: ``[C, T]`` Mimi codes of its frames.
      truncated: this is the last chunk, and the model's context ended before the speech did.
    """

    pcm: Float[np.ndarray, " W"]
    words: list[tuple[str, float]]
    start: float
    codes: Int[np.ndarray, "C T"]
    truncated: bool = False


class Session:
    """One speaker of text, one listener.

    Iterating yields the chunks that can be computed now and stops; ``waiting`` says that more
    text (or :meth:`close`) is needed, ``finished`` that everything was said. Feed and iterate
    again to go on::

        session.feed("[S1] Hello there, ")
        for chunk in session: play(chunk.pcm)
        session.feed("how are you?")
        session.close()
        for chunk in session: play(chunk.pcm)

    A session is for one thread at a time; only :meth:`cancel` may come from another.

    Attributes:
      on_work: if set, called after a piece of work with what it was: ``text`` (new text is on the
        device, and a prefix computed), ``frame`` or ``chunk`` (decoded). For timing.
    """

    def __init__(self, rows: Rows, codec: Codec, *, chunk_frames: int) -> None:
        self._rows: Rows | None = rows
        self._row: Row = rows.rows[0]
        self._codec = codec
        self._chunk_frames = chunk_frames
        self._decoder: DecodeState | None = None
        self._emitted = 0
        self._words_emitted = 0
        self._cancelled = False
        self.on_work: Callable[[str], None] | None = None
        self._rate = codec.sample_rate / codec.samples_per_frame

    @property
    def sample_rate(self) -> int:
        """Samples per second of every chunk."""
        return self._codec.sample_rate

    @property
    def closed(self) -> bool:
        """The text is complete: :meth:`close` was called."""
        return self._row.closed

    @property
    def cancelled(self) -> bool:
        """:meth:`cancel` was called."""
        return self._cancelled

    @property
    def finished(self) -> bool:
        """Every chunk was handed out."""
        return self._row.done and self._emitted >= self._row.available

    @property
    def waiting(self) -> bool:
        """The next frame depends on text that was not fed yet: feed more, or close."""
        rows = self._rows
        if rows is None or self._row.done or self.closed:
            return False
        return not self._refresh(rows)

    @property
    def truncated(self) -> bool:
        """The model's context ended before the speech did."""
        return self._row.truncated

    @property
    def words(self) -> list[tuple[str, float]]:
        """(text, seconds from the start of the output) of every word started so far."""
        return [(text, frame / self._rate) for text, frame in self._row.word_steps()]

    @property
    def codes(self) -> Int[np.ndarray, "C T"]:
        """Codes of every complete output frame so far."""
        return self._row.frames(0, self._row.available)

    @property
    def frames_computed(self) -> int:
        """Steps of the model so far, warm-up not counted."""
        return self._row.steps

    def feed(self, text: str) -> None:
        """More of the script, cut anywhere: in words, half words or single characters.

        Raises:
          SessionError: the session was closed or cancelled.
        """
        rows = self._alive("feed")
        if self.closed:
            raise SessionError("feed after close: the text is complete, start a new session")
        rows.feed(0, text)

    def close(self) -> None:
        """The script is complete. Closing twice is harmless.

        Raises:
          ScriptError: nothing of it can be spoken.
          SessionError: the session was cancelled.
        """
        self._alive("close").close(0)

    def cancel(self) -> None:
        """Stop, and free the session's memory; what was said so far stays readable."""
        self._cancelled = True
        # Another thread may be in the middle of a frame: it ends that on references of its own.
        self._rows = None
        self._decoder = None

    def step(self) -> bool:
        """Compute one frame if the text received so far allows it; True if it did."""
        rows = self._rows
        if rows is None or self._row.done or not self._refresh(rows):
            return False
        try:
            rows.step()
            self._did("frame")
        except NonFiniteError:
            self.cancel()
            raise
        if self._row.done:
            rows.cancel()  # no frame will follow: the caches are not needed any more
        return True

    def __iter__(self) -> Iterator[Chunk]:
        while not self._cancelled:
            chunk = self._next_chunk()
            if chunk is not None:
                yield chunk
            elif not self.step():
                return

    def _next_chunk(self) -> Chunk | None:
        """The next chunk if its frames are complete; a shorter one at the very end."""
        ready = self._row.available - self._emitted
        frames = self._chunk_frames if ready >= self._chunk_frames else ready
        if frames <= 0 or (frames < self._chunk_frames and not self._row.done):
            return None
        start = self._emitted
        codes = self._row.frames(start, start + frames)
        decoder = self._decoder
        if decoder is None:
            decoder = self._codec.init_decode_state(1)
        # The last chunk is filled up to the size that is compiled. The codec is causal, so what
        # follows a frame never changes its samples.
        filled = np.pad(codes, ((0, 0), (0, self._chunk_frames - frames)), mode="edge")
        wave, self._decoder = self._codec.decode_step(filled[None], decoder)
        pcm = np.asarray(wave)[0, : frames * self._codec.samples_per_frame]
        self._did("chunk")
        self._emitted += frames
        words = self.words[self._words_emitted :]
        end = np.inf if self.finished else self._emitted / self._rate
        begun = [word for word in words if word[1] < end]
        self._words_emitted += len(begun)
        if self.finished or self._cancelled:
            self._decoder = None
        return Chunk(
            pcm=np.clip(pcm, -1.0, 1.0),
            words=begun,
            start=start / self._rate,
            codes=codes,
            truncated=self.finished and self.truncated,
        )

    def _refresh(self, rows: Rows) -> bool:
        ready = rows.refresh()
        self._did("text")
        return ready

    def _did(self, what: str) -> None:
        if self.on_work is not None:
            self.on_work(what)

    def _alive(self, what: str) -> Rows:
        rows = self._rows
        if rows is None:
            raise SessionError(f"{what} after cancel: start a new session")
        return rows
