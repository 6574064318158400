"""The data card: what a prepared data set holds, how it was made, and what was left out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from train.preparation.records import REASONS

_COLUMNS = {
    "id": "name of the recording, unique in the data set",
    "source": "file, line or row that it came from",
    "text": "the script: what generation is given to say the same, breaks and speakers included",
    "duration": "seconds of the recording, without the silence that was added behind it",
    "frames": "number of code frames T, with that silence",
    "codes": "Mimi codes, frame by frame: `reshape(frames, codebooks)`",
    "word_text": "the words as written",
    "word_start": "when each starts, in seconds",
    "word_end": "when each ends, in seconds",
    "word_speaker": "who says it, 1 or 2",
    "drift": "frames by which the latest word lags behind its sound at the machine's pace",
    "breaks": "number of break entries in the script",
}


@dataclass(frozen=True)
class Totals:
    """What a data set adds up to.

    Attributes:
      rows: rows of the source.
      kept: those that are in the data set.
      seconds: length of the kept recordings.
      words: number of words in them.
      two_speakers: kept recordings in which two people speak.
      rejected: rejected rows by reason.
    """

    rows: int
    kept: int
    seconds: float
    words: int
    two_speakers: int
    rejected: Mapping[str, int]

    @property
    def hours(self) -> float:
        """Length of the kept recordings in hours."""
        return self.seconds / 3600


def data_card(
    *,
    name: str,
    source: str,
    license: str | None,
    totals: Totals,
    settings: Mapping[str, Any],
    versions: Mapping[str, str],
) -> str:
    """The text of README.md, with the header that the Hugging Face hub reads."""
    codebooks = settings["model"]["codebooks"]
    lines = [
        "---",
        *([f"license: {json.dumps(license)}"] if license else []),
        "language:",
        "- en",
        "task_categories:",
        "- text-to-speech",
        "tags:",
        "- dia2-jax",
        "- mimi",
        "---",
        "",
        f"# {name}",
        "",
        f"Recordings of `{source}` as training data for Dia2: Mimi codes ({codebooks} codebooks, "
        f"{settings['model']['frame_rate']:g} frames a second) and words with times. Written by "
        "`python -m train.prepare` of dia2-jax.",
        "",
        "    import datasets",
        f'    data = datasets.load_from_disk("{name}")',
        f'    codes = numpy.array(data[0]["codes"]).reshape(-1, {codebooks})',
        "",
        "## Contents",
        "",
        "| | |",
        "|---|---|",
        f"| recordings | {totals.kept} of {totals.rows} |",
        f"| hours | {totals.hours:.3f} |",
        f"| words | {totals.words} |",
        f"| with two speakers | {totals.two_speakers} |",
        f"| license | {license or 'not stated'} |",
        "",
        "| column | type | |",
        "|---|---|---|",
        *(f"| `{column}` | {_type(column)} | {text} |" for column, text in _COLUMNS.items()),
        "",
        "`scripts.jsonl` repeats `id` and `text`; `dia2_jax.json` holds the settings below for "
        "programs.",
        "",
        "## Left out",
        "",
    ]
    if totals.rejected:
        lines += [
            "Every one of them is in `rejected.jsonl` with its reason.",
            "",
            "| reason | rows | |",
            "|---|---|---|",
            *(
                f"| `{reason}` | {totals.rejected[reason]} | {text} |"
                for reason, text in REASONS.items()
                if reason in totals.rejected
            ),
        ]
    else:
        lines.append("Nothing.")
    lines += [
        "",
        "## Settings",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | `{json.dumps(value)}` |" for key, value in _flat(settings)),
        "",
        "## Versions",
        "",
        ", ".join(f"{package} {version}" for package, version in versions.items()),
        "",
    ]
    return "\n".join(lines)


def _type(column: str) -> str:
    from train.preparation.shards import FEATURES

    feature = FEATURES[column]
    inner = getattr(feature, "feature", None)
    return feature.dtype if inner is None else f"list of {inner.dtype}"


def _flat(settings: Mapping[str, Any], path: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{path}{key}.")
        else:
            found.append((path + key, value))
    return found
