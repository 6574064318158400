"""Audio files and sample formats: reading, resampling, WAV and PCM writing, where speech is.

Inside the package a waveform is a float32 array ``[W]``, mono, full scale at ±1; this module is
where other rates, channels and sample formats end. It reads through libsndfile (WAV, FLAC, OGG,
MP3) and writes 16-bit WAV, whole or while it is produced.
"""

from __future__ import annotations

import os
import secrets
import struct
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import soundfile
import soxr
from jaxtyping import Float

from dia2_jax.errors import AudioError

#: Rate of Dia2 and Mimi, in samples per second.
SAMPLE_RATE = 24_000

#: Lowest and highest rate that is taken for one, in samples per second.
_RATES = (100, 768_000)

#: Length and distance of the windows of :func:`window_levels`, in seconds.
WINDOW, HOP = 0.020, 0.010

#: No window is quieter than this, in dB of full scale.
_SILENCE = -100.0

#: Size fields of a WAV whose length is not known when its header is written. Readers take it as
#: "until the stream ends" (the convention of ffmpeg and sox when they write to a pipe).
_UNKNOWN_SIZE = 0xFFFF_FFFF

_HEADER = struct.Struct("<4sI4s4sIHHIIHH4sI")
_BYTES_PER_SAMPLE = 2

#: Samples convert as x · 32768, which int16 → float → int16 survives bit for bit.
_PCM_SCALE = 32_768.0


def read_audio(
    path: str | os.PathLike[str], sample_rate: int = SAMPLE_RATE
) -> Float[np.ndarray, " W"]:
    """Read an audio file as one float32 channel at `sample_rate`.

    Args:
      path: a file that libsndfile reads: WAV, FLAC, OGG, MP3 and others, any rate and number of
        channels. Channels are averaged.
      sample_rate: samples per second of the result.

    Raises:
      AudioError: the file is missing, empty, not audio, damaged, or holds NaN or infinity. A WAV
        or MP3 that was cut off is not detected: it reads as the shorter recording that it is.
    """
    path = Path(path)
    _check_rate(sample_rate, "sample_rate")
    if not path.is_file():
        what = "is a folder, not an audio file" if path.is_dir() else "no such audio file"
        raise AudioError(f"{path}: {what}; give the path of a WAV, FLAC, OGG or MP3 file")
    try:
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            channels = file.read(dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError, ValueError) as error:
        if path.stat().st_size == 0:
            raise AudioError(
                f"{path}: the file is empty (0 bytes); record or copy it again"
            ) from None
        reason = str(getattr(error, "error_string", error)).removeprefix("Error : ").rstrip(". ")
        raise AudioError(
            f"{path}: cannot be read as audio ({reason}); it is damaged or of another format: copy "
            f"it again, or convert it with ffmpeg -i {path.name!r} -ac 1 -ar {sample_rate} new.wav"
        ) from None
    if len(channels) == 0:
        raise AudioError(f"{path}: holds no samples; record or export it again")
    _check_finite(channels, str(path))
    mono = channels.mean(axis=1, dtype=np.float32)
    return resample(mono, rate, sample_rate)


def resample(
    wave: Float[np.ndarray, " W"], rate: int, target_rate: int
) -> Float[np.ndarray, " W2"]:
    """Resample a mono waveform; the result has round(W · target_rate / rate) samples, at least 1.

    Band-limited and linear-phase (soxr "HQ"), so nothing shifts in time. Overshoot beyond ±1 is
    kept: only writing clips.
    """
    _check_rate(rate, "rate")
    _check_rate(target_rate, "target_rate")
    wave = _as_mono(wave)
    if rate == target_rate or len(wave) == 0:
        return wave
    length = max(1, round(len(wave) * target_rate / rate))
    out = np.asarray(soxr.resample(wave, rate, target_rate, quality="HQ"), np.float32)
    # soxr rounds its length in its own way, off by a sample or two on short inputs.
    return np.pad(out[:length], (0, max(0, length - len(out))))


def to_pcm16(wave: Float[np.ndarray, " W"]) -> bytes:
    """Raw PCM of a mono waveform: signed 16-bit little-endian, clipped at ±1.

    Raises:
      AudioError: the waveform is not one-dimensional or holds NaN or infinity.
    """
    wave = _as_mono(wave)
    _check_finite(wave, "waveform")
    scaled = np.rint(wave.astype(np.float64) * _PCM_SCALE)
    return np.clip(scaled, -32_768, 32_767).astype("<i2").tobytes()


def write_wav(
    path: str | os.PathLike[str], wave: Float[np.ndarray, " W"], sample_rate: int = SAMPLE_RATE
) -> None:
    """Write a mono 16-bit WAV, clipped at ±1; parent folders are made.

    The file appears under its name only when it is complete: an interrupted or failed call leaves
    what was there before.

    Raises:
      AudioError: NaN or infinity in `wave`, a wrong shape or rate, more than 4 GiB of samples, or
        a place that cannot be written to.
    """
    path = Path(path)
    data = to_pcm16(wave)
    header = _header(sample_rate, len(data))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        try:
            with temporary.open("xb") as file:
                file.write(header)
                file.write(data)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise AudioError(f"{path}: cannot be written ({error.strerror or error})") from None


class WavWriter:
    """A mono 16-bit WAV written while its audio is produced.

    Samples go out with every :meth:`write`, so another program can play the file or pipe as it
    grows. The header first says "length unknown" (sizes 0xFFFFFFFF); closing a regular file puts
    the true sizes in, also when the block ends by an exception, so that what was produced up to
    there is a valid recording. A pipe keeps the unknown sizes.

        with WavWriter("-") as out:  # "-" is standard output
            for chunk in session:
                out.write(chunk.pcm)

    Args:
      target: a path (parent folders are made, an existing file is replaced), "-" for standard
        output, or an open binary stream, which is flushed but not closed.
      sample_rate: samples per second.
    """

    def __init__(
        self, target: str | os.PathLike[str] | BinaryIO, sample_rate: int = SAMPLE_RATE
    ) -> None:
        header = _header(sample_rate, None)
        self.sample_rate = sample_rate
        self.samples = 0
        self._owned = False
        self._closed = False
        if isinstance(target, (str, os.PathLike)) and target != "-":
            path = Path(target)
            self.name = str(path)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file: BinaryIO = path.open("wb")
            except OSError as error:
                raise AudioError(f"{path}: cannot be written ({error.strerror or error})") from None
            self._owned = True
        elif isinstance(target, (str, os.PathLike)):
            self.name, self._file = "standard output", sys.stdout.buffer
        else:
            self.name, self._file = str(getattr(target, "name", "stream")), target
        # Standard output may be a file opened for appending or shared with another program: only
        # a file that was opened here is rewritten at its start.
        self._file.write(header)
        self._file.flush()

    def write(self, wave: Float[np.ndarray, " W"]) -> None:
        """Append samples and flush them.

        Raises:
          AudioError: the writer is closed, or `wave` holds NaN or infinity.
        """
        if self._closed:
            raise AudioError(f"{self.name}: written to after close; open a new WavWriter")
        data = to_pcm16(wave)
        self._file.write(data)
        self._file.flush()
        self.samples += len(data) // _BYTES_PER_SAMPLE

    def close(self) -> None:
        """Put the true sizes into the header of a regular file and close it; safe to call twice."""
        if self._closed:
            return
        self._closed = True
        if not self._owned:
            self._file.flush()
            return
        try:
            size = self.samples * _BYTES_PER_SAMPLE
            if self._file.seekable() and size + _HEADER.size <= _UNKNOWN_SIZE:
                self._file.seek(0)
                self._file.write(_header(self.sample_rate, size))
        finally:
            self._file.close()

    def __enter__(self) -> WavWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, BrokenPipeError):
            # The reader left; closing would only raise the same again.
            with suppress(OSError):
                self.close()
        else:
            self.close()


def window_levels(wave: Float[np.ndarray, " W"], rate: int) -> Float[np.ndarray, " T"]:
    """RMS of every window of 20 ms in dB of full scale; window t begins at ``t * HOP`` seconds."""
    window, hop = max(2, round(WINDOW * rate)), max(1, round(HOP * rate))
    if len(wave) < window:
        return np.zeros(0)
    power = np.concatenate([[0.0], np.cumsum(np.square(wave, dtype=np.float64))])
    starts = np.arange(0, len(wave) - window + 1, hop)
    mean = (power[starts + window] - power[starts]) / window
    return 10 * np.log10(np.maximum(mean, 10 ** (_SILENCE / 10)))


def voiced_span(wave: Float[np.ndarray, " W"], rate: int) -> tuple[float, float]:
    """Start and end of the speech in a recording, in seconds, by its energy.

    The level of 20 ms windows every 10 ms is held against a threshold: 35 dB below the loud parts
    (the level that 0.1 s reach), or 6 dB above the quiet ones (5th percentile) where noise reaches
    up to there. Five windows (60 ms) in a row must exceed it, which leaves clicks out.

    Returns:
      ``(start, end)`` with 0 <= start <= end <= duration; ``(0.0, 0.0)`` when nothing rises above
      −60 dB of full scale.
    """
    _check_rate(rate, "rate")
    wave = _as_mono(wave)
    _check_finite(wave, "waveform")
    duration = len(wave) / rate
    hop, window = max(1, round(HOP * rate)), max(2, round(WINDOW * rate))
    if len(wave) < window:
        wave = np.pad(wave, (0, window - len(wave)))
    # A recorder's constant offset is no sound.
    level = window_levels(wave - np.median(wave).astype(np.float64), rate)
    loud, quiet = np.sort(level)[-min(10, len(level))], np.percentile(level, 5)
    threshold = max(loud - 35, -60.0)
    if quiet > threshold - 6 and loud - quiet > 12:
        threshold = quiet + 6
    above = level > threshold
    run = 5 if len(above) > 5 else 1
    # held[i]: the windows i … i + run - 1 are all above.
    held = np.lib.stride_tricks.sliding_window_view(above, run).all(axis=1)
    found = np.flatnonzero(held)
    if len(found) == 0:
        return 0.0, 0.0
    start = float(hop * found[0]) / rate
    end = float(hop * (found[-1] + run - 1) + window) / rate
    return start, min(end, duration)


def _header(sample_rate: int, data_bytes: int | None) -> bytes:
    """RIFF header of a mono 16-bit WAV; `data_bytes` None means a length not known yet."""
    _check_rate(sample_rate, "sample_rate")
    if data_bytes is None:
        riff, data = _UNKNOWN_SIZE, _UNKNOWN_SIZE
    else:
        riff, data = data_bytes + _HEADER.size - 8, data_bytes
        if riff > _UNKNOWN_SIZE:
            raise AudioError(
                f"a WAV holds at most 4 GiB, {data_bytes / 2**30:.1f} GiB given; split the audio"
            )
    byte_rate = sample_rate * _BYTES_PER_SAMPLE
    return _HEADER.pack(
        b"RIFF", riff, b"WAVE",
        b"fmt ", 16, 1, 1, sample_rate, byte_rate, _BYTES_PER_SAMPLE, 8 * _BYTES_PER_SAMPLE,
        b"data", data,
    )  # fmt: skip


def _as_mono(wave: Float[np.ndarray, " W"]) -> Float[np.ndarray, " W"]:
    wave = np.asarray(wave)
    if wave.ndim != 1:
        raise AudioError(
            f"expected a mono waveform [W], got shape {wave.shape}; average its channels first"
        )
    if not np.issubdtype(wave.dtype, np.floating):
        raise AudioError(
            f"expected float samples of full scale ±1, got {wave.dtype}; divide integers by their "
            "full scale first"
        )
    return wave.astype(np.float32, copy=False)


def _check_rate(rate: int, name: str) -> None:
    low, high = _RATES
    if not low <= rate <= high:
        raise AudioError(f"{name}: {rate} samples per second is outside {low}…{high}")


def _check_finite(samples: np.ndarray, where: str) -> None:
    bad = ~np.isfinite(samples)
    if bad.any():
        first = int(np.flatnonzero(bad.reshape(len(samples), -1).any(axis=1))[0])
        raise AudioError(
            f"{where}: {int(bad.sum())} samples are NaN or infinite, the first at index {first}; "
            "the audio was damaged before it came here"
        )
