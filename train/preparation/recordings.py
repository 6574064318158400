"""Reading audio for preparation: as it was stored, and then as the codec's one channel."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import soundfile

from dia2_jax.audio import read_audio, resample
from dia2_jax.errors import AudioError
from dia2_jax.typing import Float
from train.preparation.records import Channel, Recording, Rejected


def read_recording(source: Path | bytes, name: str, longest: float) -> Recording:
    """Decode a file, or the bytes of one.

    Args:
      source: what libsndfile reads: WAV, FLAC, OGG, MP3 and others.
      name: what messages call it.
      longest: seconds beyond which nobody needs it; such a file is not decoded.

    Raises:
      Rejected: it is missing, damaged, empty, holds NaN or infinity, or is too long.
    """
    if isinstance(source, Path) and not os.path.isfile(source):
        raise Rejected("missing_audio", f"{name}: there is no such file")
    try:
        with soundfile.SoundFile(_opened(source)) as f:
            rate = f.samplerate
            if f.frames / rate > longest:
                raise too_long(name, f.frames / rate, longest)
            samples = f.read(dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError, ValueError) as error:
        raise Rejected("unreadable_audio", _why(source, name, error)) from None
    if len(samples) == 0:
        raise Rejected("unreadable_audio", f"{name}: holds no samples")
    if not np.isfinite(samples).all():
        raise Rejected("unreadable_audio", f"{name}: holds samples that are NaN or infinite")
    return Recording(samples, rate)


def as_recording(array: object, rate: object, name: str, longest: float) -> Recording:
    """Samples that a data set holds decoded: ``[W]`` or ``[channels, W]``, full scale ±1.

    Raises:
      Rejected: they are of another form.
    """
    samples = np.asarray(array)
    if samples.ndim not in (1, 2) or samples.size == 0 or samples.dtype.kind not in "fi":
        raise Rejected(
            "unreadable_audio", f"{name}: samples of shape {samples.shape}, type {samples.dtype}"
        )
    if isinstance(rate, float) and rate.is_integer():
        rate = int(rate)
    if not isinstance(rate, int) or rate < 1:
        raise Rejected("unreadable_audio", f"{name}: a sample rate of {rate!r}")
    if samples.dtype == np.int64:
        raise Rejected(
            "unreadable_audio",
            f"{name}: samples of type int64, whose full scale nobody knows: cast the column to "
            "int16, int32 or float32",
        )
    if samples.dtype.kind == "i":
        samples = samples / np.float32(np.iinfo(samples.dtype).max + 1.0)
    samples = np.atleast_2d(samples).T.astype(np.float32)
    if len(samples) / rate > longest:
        raise too_long(name, len(samples) / rate, longest)
    if not np.isfinite(samples).all():
        raise Rejected("unreadable_audio", f"{name}: holds samples that are NaN or infinite")
    return Recording(samples, rate)


def too_long(name: str, seconds: float, longest: float) -> Rejected:
    """The rejection of a recording that is."""
    return Rejected("too_long", f"{name}: {seconds:.1f} s, --max-seconds is {longest:g}")


def to_mono(
    recording: Recording, channel: Channel, sample_rate: int, name: str
) -> Float[np.ndarray, " W"]:
    """One channel at ``sample_rate``.

    Raises:
      Rejected: the recording's own rate is none that audio has.
    """
    samples = recording.samples
    if channel == "mix" or samples.shape[1] == 1:
        mono = samples.mean(axis=1, dtype=np.float32)
    else:
        mono = samples[:, ("left", "right").index(channel)]
    try:
        return resample(np.ascontiguousarray(mono), recording.rate, sample_rate)
    except AudioError as error:
        raise Rejected("unreadable_audio", f"{name}: {error}") from None


def _opened(source: Path | bytes) -> Path | bytes | io.BytesIO:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    # Names need not be UTF-8 where they are bytes.
    return os.fsencode(source) if os.name == "posix" else source


def _why(source: Path | bytes, name: str, error: Exception) -> str:
    if isinstance(source, Path):
        try:
            read_audio(source)  # fails the same way, and says more about it
        except AudioError as said:
            return str(said)
    reason = str(getattr(error, "error_string", error)).removeprefix("Error : ").rstrip(". ")
    return f"{name}: cannot be read as audio ({reason})"
