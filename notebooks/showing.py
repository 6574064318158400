"""Sound and spectrograms in a notebook, small enough to be kept in it."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping
from typing import Any

import librosa
import matplotlib.pyplot as plt
import numpy as np
import soundfile
from IPython.display import HTML, Audio, Image, display
from matplotlib.figure import Figure

from dia2_jax.typing import Float

#: Of spectrograms: samples of a window and from one to the next, and decibels below the loudest.
_WINDOW, _HOP, _DEPTH = 1024, 240, 70.0


def listen(takes: Mapping[str, Float[np.ndarray, " W"]], rate: int) -> HTML:
    """A player for each take, in a table. MP3: a tenth of what 16-bit samples would take.

    Args:
      takes: mono waveforms by what is written beside them, full scale at ±1.
      rate: samples per second.
    """
    rows = []
    for name, wave in takes.items():
        file = io.BytesIO()
        soundfile.write(file, np.clip(wave, -1, 1), rate, format="MP3", compression_level=0.6)
        audio = Audio(data=file.getvalue())
        audio.mimetype = "audio/mpeg"
        player = f'<audio controls preload="none" src="{audio.src_attr()}"></audio>'
        rows.append(
            f'<tr><td style="text-align:left">{html.escape(name)}</td><td>{player}</td></tr>'
        )
    return HTML(f"<table>{''.join(rows)}</table>")


def spectrogram(axes: Any, wave: Float[np.ndarray, " W"], rate: int, top: float = 8000.0) -> None:
    """Draw decibels over time and frequency, up to `top` Hz."""
    power = np.abs(librosa.stft(np.asarray(wave), n_fft=_WINDOW, hop_length=_HOP))
    level = librosa.amplitude_to_db(power, ref=np.max, top_db=_DEPTH)
    axes.imshow(
        level,
        origin="lower",
        aspect="auto",
        cmap="magma",
        extent=(0, len(wave) / rate, 0, rate / 2000),
    )
    axes.set(ylim=(0, top / 1000), xlabel="time, s", ylabel="frequency, kHz")


def show(figure: Figure) -> None:
    """Display a figure as JPEG: with spectrograms in it a PNG would take five times as much."""
    file = io.BytesIO()
    figure.savefig(file, format="jpeg", dpi=80, pil_kwargs={"quality": 82})
    plt.close(figure)
    display(Image(file.getvalue(), format="jpeg"))
