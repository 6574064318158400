"""``dia2-jax stream``: text from standard input to audio while both are being produced.

A thread reads the text, the main thread computes: text that comes slowly never holds up audio
that can be computed, and computing never holds up the writer of the text.
"""

from __future__ import annotations

import codecs
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from dia2_jax.cli.files import OutputPath, refuse_one_target, refuse_terminal, write_json
from dia2_jax.cli.generate import end_truncated, report
from dia2_jax.cli.options import model_options, sampling_options, take_model, take_settings
from dia2_jax.cli.prompts import Prompts, voice_options
from dia2_jax.cli.startup import Startup, verbose_option
from dia2_jax.cli.terminal import Meter, is_quiet, note, talk_options, warn

if TYPE_CHECKING:
    import numpy as np

    from dia2_jax.audio import WavWriter
    from dia2_jax.engine import Chunk, Session
    from dia2_jax.typing import Float

_READ_BYTES = 65_536


@click.command(short_help="Speak text from standard input while it is being written.")
@model_options
@click.option(
    "--output",
    "-o",
    type=OutputPath(stdout=True),
    metavar="FILE|-",
    default="-",
    show_default="standard output",
    help="Where the audio goes. A file can be played while it grows; an existing one is replaced "
    "when the first audio is there.",
)
@click.option(
    "--raw",
    is_flag=True,
    help="Bare samples (signed 16-bit little-endian, mono, 24 kHz) instead of a WAV.",
)
@click.option(
    "--chunk-frames",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Frames (80 ms) of audio written at a time. More cost less and come later.",
)
@click.option(
    "--json",
    "json_target",
    type=OutputPath(stdout=True),
    metavar="FILE|-",
    help="At the end, write what `generate --json` writes and the times to the first audio.",
)
@sampling_options
@voice_options
@verbose_option
@talk_options
def stream(
    output: str,
    raw: bool,
    chunk_frames: int,
    json_target: str | None,
    verbose: bool,
    **options: Any,
) -> None:
    """Speak the text on standard input while it is being written.

    Text is taken as its bytes arrive, in UTF-8, cut anywhere; it is one script, as for `generate`.
    A word is spoken once the two words after it are known, or the text has ended. Audio comes out
    in chunks, in the pace of the model.

    The line at the end of standard error (unless --quiet) gives the time to the first audio: to
    the moment when its first chunk was written, from the moment when the first byte of text was
    read (the model is loaded and compiled before), and from the moment when the last word was read
    without which the model could not begin to speak. --verbose adds what the program did from its
    own start to the first audio.

    Ctrl-C stops at once: a WAV file then holds what was said so far.

    \b
      llm "Tell me a story" | dia2-jax stream | aplay
      llm "Tell me a story" | dia2-jax stream -m DIR --raw | aplay -f S16_LE -r 24000
    """
    startup = Startup(verbose)
    refuse_one_target(output, json_target)
    if output == "-":
        refuse_terminal("the audio")
    seed = options.pop("seed")
    given, prompts = take_settings(options), Prompts(options)
    model, names = take_model(options, startup)
    settings = given.over(model.defaults)
    voices = prompts.prepare(model)
    if voices:
        startup.passed("voices")
    note("compiling")
    model.warm_up(settings, voices=voices, chunk_frames=chunk_frames)
    startup.passed("compiling, or reading what was compiled")
    if sys.stdin.isatty():
        note("ready; type the text, and Ctrl-D at its end")
    else:
        note("ready")
    session = model.session(settings, voices=voices, seed=seed, chunk_frames=chunk_frames)
    startup.passed("session")
    if startup.wanted:
        session.on_work = startup.worked
    clock, said = Clock(), Said()

    def finish(finished: bool) -> None:
        content = report(
            names,
            settings,
            seed,
            shape=(model.config.data.codebooks, said.frames),
            sample_rate=session.sample_rate,
            frame_rate=model.frame_rate,
            words=said.words,
            truncated=session.truncated,
        )
        write_json(json_target, {**content, "finished": finished, **clock.seconds()})
        if not is_quiet():
            click.echo(clock.sentence(), err=True)
        startup.write()

    try:
        with (
            Sink(output, session.sample_rate, raw=raw) as sink,
            Meter(model.frame_rate) as meter,
        ):
            for chunk in chunks_as_text_arrives(session, Pieces(), clock, startup):
                sink.write(chunk.pcm)
                clock.wrote()
                startup.heard()
                said.take(chunk)
                meter(said.frames)
        finish(True)
    except (KeyboardInterrupt, BrokenPipeError):
        finish(False)
        raise
    finally:
        session.cancel()
        startup.end()
    if session.truncated:
        end_truncated(model.max_context_steps)


def chunks_as_text_arrives(
    session: Session, pieces: Pieces, clock: Clock, startup: Startup
) -> Iterator[Chunk]:
    """Everything that the session says, fed with what is there whenever it needs more."""
    while True:
        yield from session
        if session.finished:
            return
        # Nothing more can be computed from the text so far: wait for more of it.
        began = time.perf_counter()
        arrived, text = pieces.get()
        clock.waited(began)
        startup.passed("waiting for text")
        if text is None:
            session.close()
        else:
            clock.read(arrived)
            session.feed(text)
        if not session.waiting:
            clock.could_begin(arrived)


@dataclass
class Said:
    """What was written so far."""

    frames: int = 0
    words: list[tuple[str, float]] = field(default_factory=list)

    def take(self, chunk: Chunk) -> None:
        """A chunk was written."""
        self.frames += chunk.codes.shape[1]
        self.words += chunk.words


class Pieces:
    """Standard input as it arrives, read by a thread of its own."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[float, str | None]] = queue.SimpleQueue()
        # A daemon: at an interruption it may well be waiting for a writer that never writes.
        threading.Thread(target=self._read, name="stdin", daemon=True).start()

    def get(self) -> tuple[float, str | None]:
        """(when it arrived, the next piece of text or None at the end); waits for it."""
        return self._queue.get()

    def _read(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        damaged = False
        while True:
            try:
                # The descriptor itself: a buffered reader would wait until its buffer is full.
                content = os.read(0, _READ_BYTES)
            except OSError:
                content = b""
            arrived = time.perf_counter()
            text = decoder.decode(content, final=not content)
            if "\ufffd" in text and not damaged:
                damaged = True
                warn("the text on standard input is not all UTF-8; damaged characters are replaced")
            if text:
                self._queue.put((arrived, text))
            if not content:
                self._queue.put((arrived, None))
                return


class Sink:
    """Where audio goes, opened with its first samples so that a failed start destroys nothing."""

    def __init__(self, target: str, sample_rate: int, *, raw: bool) -> None:
        self._target, self._sample_rate, self._raw = target, sample_rate, raw
        self._file: BinaryIO | None = None
        self._wav: WavWriter | None = None

    def write(self, pcm: Float[np.ndarray, " W"]) -> None:
        """Write and flush samples."""
        from dia2_jax.audio import WavWriter, to_pcm16

        if self._raw:
            if self._file is None:
                self._file = self._open()
            self._file.write(to_pcm16(pcm))
            self._file.flush()
            return
        if self._wav is None:
            self._wav = WavWriter(self._target, self._sample_rate)
        self._wav.write(pcm)

    def _open(self) -> BinaryIO:
        if self._target == "-":
            return sys.stdout.buffer
        path = Path(self._target)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("wb")

    def __enter__(self) -> Sink:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._wav is not None:
            self._wav.__exit__(kind, error, trace)
        if self._file is not None and self._target != "-":
            self._file.close()


class Clock:
    """Times to the first audio."""

    def __init__(self) -> None:
        self._first_byte: float | None = None
        self._begin: float | None = None
        self._first_audio: float | None = None
        self._waited = 0.0

    def read(self, arrived: float) -> None:
        """Text arrived."""
        if self._first_byte is None:
            self._first_byte = arrived

    def could_begin(self, arrived: float) -> None:
        """What arrived then was enough to go on."""
        if self._begin is None:
            self._begin = arrived

    def waited(self, began: float) -> None:
        """Nothing could be computed from ``began`` until now."""
        if self._begin is not None and self._first_audio is None:
            self._waited += time.perf_counter() - began

    def wrote(self) -> None:
        """Audio was written."""
        if self._first_audio is None:
            self._first_audio = time.perf_counter()

    def seconds(self) -> dict[str, float | None]:
        """The times, None where there is none."""
        audio, begin = self._first_audio, self._begin
        return {
            "first_audio_after_first_byte": _between(self._first_byte, audio),
            "first_audio_after_look_ahead": _between(begin, audio),
            "waited_for_text_meanwhile": None if begin is None else round(self._waited, 3),
        }

    def sentence(self) -> str:
        """The times in words."""
        byte, ahead, waited = self.seconds().values()
        if byte is None or ahead is None or waited is None:
            return "no audio was written"
        text = (
            f"first audio {byte:.2f} s after the first byte of text, {ahead:.2f} s after the words "
            "needed to begin"
        )
        return text + (f" ({waited:.2f} s of that waiting for text)" if waited >= 0.01 else "")


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else round(end - start, 4)
