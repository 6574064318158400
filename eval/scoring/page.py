"""``report.html``: a run in one file that needs nothing else: tables, distributions, and the takes
that went worst, to hear and to see."""

from __future__ import annotations

import base64
import importlib
import inspect
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from dia2_jax.audio import HOP, window_levels
from dia2_jax.typing import Float
from eval.page import render
from eval.scoring.metric import Metric, Row, Unavailable
from eval.scoring.report import NEITHER, VALUES, Section, groups_of, name_of, table_of
from eval.scoring.summary import sources_in
from eval.scoring.takes import RECORDING

#: How many takes are shown, and failures are listed; seconds of a take that are shown.
_TAKES, _FAILURES, _SECONDS = 8, 100, 20.0

#: What says that a take went badly: metric, figure, and its name. The first one that was measured
#: counts, then how many things failed in a take, then the others.
_JUDGED_BY = (
    ("intelligibility", "wer", "word errors"),
    ("utmos", "mos", "UTMOS"),
    ("quality", "overall", "DNSMOS"),
    ("fidelity", "mel_distance", "mel distance"),
)

#: Beside the name of a direction.
_ARROWS = {"lower": "↓", "higher": "↑", "near 1": "→", NEITHER: ""}

#: Scores of single takes whose distribution is shown: metric, score, label.
_DISTRIBUTIONS = (
    ("intelligibility", "wer", "word errors, %"),
    ("quality", "overall", "DNSMOS overall"),
    ("utmos", "mos", "UTMOS"),
    ("fidelity", "mel_distance", "mel distance, nats"),
    ("stopping", "length", "length, × reference"),
    ("stopping", "tail", "sound after the text, s"),
    ("word_times", "difference", "words from where they are aligned, ms"),
    ("signal", "level", "level, dBFS"),
    ("prosody", "rate", "words a second"),
)


def page(
    title: str,
    about: Mapping[str, Any],
    summary: Mapping[str, Any],
    rows: Sequence[Row],
    metrics: Sequence[Metric],
    folder: Path,
    more: Sequence[Section] = (),
    judged: str | None = None,
) -> str:
    """The report of a run as HTML; without pictures, and saying so, where what draws them lacks.

    Args:
      about: what is said at the top, name by name.
      summary: as :func:`eval.scoring.summary.summarise` returns it.
      folder: of the run; the audio of its rows is read.
      more: tables after those of figures.
      judged: source whose worst takes are shown; by default the first that is no recording.

    Raises:
      Unavailable: jinja2 is not installed.
    """
    try:
        importlib.import_module("jinja2")  # before anything is drawn
    except ImportError as error:
        raise Unavailable(f'needs jinja2 ({error}): pip install "dia2-jax[eval]"') from error
    no_pictures = _lacking()
    sources = sources_in(summary)
    # Recordings are there to compare with.
    first = next((s for s in sources if s != RECORDING), RECORDING if sources else None)
    source = judged if judged in sources else first
    shown = [row for row in rows if row["source"] == source and "scores" in row]
    failures = summary["failures"]
    worst, order = worst_first(shown, metrics, failures)
    return render(
        Path(__file__).with_suffix(".html"),
        title=title,
        about=about,
        tables=[_table(group, summary, metrics) for group in groups_of(summary)],
        arrows=_ARROWS,
        values=VALUES,
        more=more,
        no_pictures=no_pictures,
        distributions=None if no_pictures else _histograms(rows, sources),
        failures=[
            {"name": name_of(row), "what": "; ".join(row["what"])} for row in failures[:_FAILURES]
        ],
        more_failures=max(0, len(failures) - _FAILURES),
        listening=f"the worst of {source or 'none'} by {order}",
        takes=[_take(row, folder, failures, pictures=not no_pictures) for row in worst[:_TAKES]],
    )


def _lacking() -> str | None:
    """What is said where pictures cannot be drawn; None where they can."""
    try:
        for package in ("librosa", "matplotlib"):
            importlib.import_module(package)
    except ImportError as error:
        return (
            f"Pictures are left out: they need librosa and matplotlib ({error}): "
            'pip install "dia2-jax[eval]", and the same command draws them.'
        )
    return None


def _table(group: str, summary: Mapping[str, Any], metrics: Sequence[Metric]) -> dict[str, Any]:
    table = table_of(group, summary, metrics)
    by_metric = [
        (
            {"name": metric.name, "about": (inspect.getdoc(metric) or "").split("\n")[0]},
            [row for row in table["rows"] if row["metric"] == metric.name],
        )
        for metric in metrics
    ]
    shown = [(metric, rows) for metric, rows in by_metric if rows]
    return {**table, "metrics": shown, "anchor": re.sub(r"\W+", "-", group)}


def worst_first(
    rows: Sequence[Row], metrics: Sequence[Metric], failures: Sequence[Mapping[str, Any]]
) -> tuple[list[Row], str]:
    """Rows with scores by how badly they went, and what that goes by, in words.

    A figure counts in its own direction; what a row lacks is no fault of it.
    """
    better = {(m.name, figure.name): figure.better for m in metrics for figure in m.figures}
    measured = [
        one
        for one in _JUDGED_BY
        if one[:2] in better and any(_score(row, *one[:2]) is not None for row in rows)
    ]

    def badness(row: Row) -> tuple[float, ...]:
        found = []
        for metric, name, _ in measured:
            value = _score(row, metric, name)
            sign = 1.0 if better[metric, name] == "lower" else -1.0
            found.append(-np.inf if value is None else sign * value)
        return (*found[:1], float(len(_what(row, failures))), *found[1:])

    order = [measured[0][2], "failures"] if measured else ["failures"]
    return sorted(rows, key=badness, reverse=True), ", then by ".join(order)


def _what(row: Row, failures: Sequence[Mapping[str, Any]]) -> Sequence[str]:
    """What failed in a take."""
    keys = ("set", "id", "source", "seed")
    return next((f["what"] for f in failures if all(f[k] == row[k] for k in keys)), ())


def _score(row: Row, metric: str, name: str) -> float | None:
    """A score of a single take; some are ratios of two that are stored."""
    scores = row.get("scores", {}).get(metric)
    if not scores:
        return None
    if name == "wer":  # of what is heard where nothing is written, too
        return 100.0 * float(scores["errors"]) / max(scores["words"], 1)
    ratios = {"rate": ("words", "seconds", 1.0)}
    if name in ratios:
        above, below, scale = ratios[name]
        if not scores.get(below) or scores.get(above) is None:
            return None
        return scale * float(scores[above]) / float(scores[below])
    value = scores.get(name)
    return None if value is None else float(value)


def _take(
    row: Row, folder: Path, failures: Sequence[Mapping[str, Any]], *, pictures: bool
) -> dict[str, Any]:
    # Recordings are where the user has them.
    path = Path(row["audio"]) if row["source"] == RECORDING else folder / row["audio"]
    shown = [
        f"{label}: {value:.3g}"
        for metric, name, label in _DISTRIBUTIONS
        if (value := _score(row, metric, name)) is not None
    ]
    found = {
        "name": name_of(row),
        "script": row["script"],
        "heard": row["scores"].get("intelligibility", {}).get("transcript"),
        "scores": ", ".join(shown),
        "what": "; ".join(_what(row, failures)),
    }
    try:
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            wave = file.read(int(_SECONDS * rate), dtype="float32", always_2d=True).mean(axis=1)
    except (soundfile.SoundFileError, OSError):
        # Of a run that goes on, audio may be gone meanwhile; its scores are as they were.
        lost = f"{path}: its audio is gone or damaged, its scores are of before"
        if row["source"] != RECORDING:
            lost += "; delete its line in utterances.jsonl, and the same command makes it again"
        return {**found, "lost": lost}
    starts = row["scores"].get("word_times", {}).get("starts", ())
    picture = spectrogram(wave, rate, row["words"], starts) if pictures else None
    return {**found, "audio": _audio(wave, rate), "picture": picture}


def _audio(wave: Float[np.ndarray, " W"], rate: int) -> str:
    # FLAC takes any rate, loses nothing that the 16-bit file holds, and every browser plays it.
    data = io.BytesIO()
    soundfile.write(data, wave, rate, format="FLAC", subtype="PCM_16")
    return "data:audio/flac;base64," + base64.b64encode(data.getvalue()).decode()


def spectrogram(
    wave: Float[np.ndarray, " W"],
    rate: int,
    words: Sequence[Mapping[str, Any]],
    aligned: Sequence[float] = (),
) -> str:
    """A picture as a data URL: mel spectrogram and level, and where words start by the take.

    Args:
      aligned: where forced alignment finds words to start, in seconds.
    """
    import librosa

    mel = librosa.feature.melspectrogram(y=wave, sr=rate, n_fft=1024, hop_length=256, n_mels=80)
    figure, (top, bottom) = _subplots(2, 1, (11, 3.6), height_ratios=[3, 1], sharex=True)
    span = (0.0, len(wave) / rate)
    top.imshow(
        librosa.power_to_db(mel, ref=1.0, top_db=80.0),
        origin="lower", aspect="auto", extent=(*span, 0, 80), cmap="magma",
    )  # fmt: skip
    colours = {"[S1]": "#6cf", "[S2]": "#fc6"}
    for word in words:
        if word["start"] >= span[1]:
            continue
        colour = colours.get(word["speaker"], "#fff")
        for axis in (top, bottom):
            axis.axvline(word["start"], color=colour, linewidth=0.8)
        top.text(word["start"], 81, word["text"], fontsize=7, rotation=40, va="bottom")
    levels = window_levels(wave, rate)
    for start in aligned:
        if start < span[1]:
            bottom.axvline(start, color="#c33", linewidth=0.8, linestyle=":")
    bottom.plot(np.arange(len(levels)) * HOP, levels, linewidth=0.8, color="#444")
    bottom.set(ylim=(-80, 0), xlim=span, xlabel="s", ylabel="dBFS")
    top.set(ylabel="mel band")
    return _png(figure)


def _histograms(rows: Sequence[Row], sources: Sequence[str]) -> str | None:
    """Distributions of single takes' scores, sources on top of each other."""
    found = []
    for metric, name, label in _DISTRIBUTIONS:
        by_source = {
            s: [v for r in rows if r["source"] == s and (v := _score(r, metric, name)) is not None]
            for s in sources
        }
        if max(map(len, by_source.values()), default=0) >= 2:
            found.append((label, by_source))
    if not found:
        return None
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    figure, axes = _subplots(lines, columns, (11, 2.6 * lines), squeeze=False)
    for axis in axes.flat[len(found) :]:
        axis.set_axis_off()
    for axis, (label, by_source) in zip(axes.flat, found, strict=False):
        every = np.concatenate([np.array(values, float) for values in by_source.values()])
        low, high = float(every.min()), float(every.max())
        if high - low < 1e-6:  # all the same: a bar of a width that can be seen
            low, high = low - 0.5, high + 0.5
        bins = np.linspace(low, high, 21)
        for source, values in by_source.items():
            axis.hist(values, bins=bins, alpha=0.6, label=source)
        axis.set(xlabel=label, ylabel="takes")
        axis.yaxis.get_major_locator().set_params(integer=True)
    axes.flat[0].legend(fontsize=8)
    return _png(figure)


def _subplots(lines: int, columns: int, size: tuple[float, float], **options: Any) -> Any:
    # Without pyplot, which keeps figures in a global and looks for a screen.
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    ratios = options.pop("height_ratios", None)
    return figure, figure.subplots(lines, columns, height_ratios=ratios, **options)


def _png(figure: Any) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=90)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
