"""The preparation itself: rows of a source through all stages, shard by shard, to a data set."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np

import dia2_jax
from dia2_jax.data import Alignment, SpokenWord, align
from dia2_jax.errors import AlignmentError, DataError
from dia2_jax.typing import Float
from train.preparation.aligners import Aligner, WhisperAligner, time_words, transcript_words
from train.preparation.card import Totals, data_card
from train.preparation.checks import (
    Limits,
    check_channel,
    check_recording,
    check_span,
    check_text_rate,
)
from train.preparation.encode import encode_waves, pad_to_frames
from train.preparation.model_files import SpeechModel
from train.preparation.recordings import to_mono
from train.preparation.records import Item, PreparedRow, Rejected, SourceRow, TimedWord, Turn
from train.preparation.shards import FORMAT, Shard, Workshop, finished_with, plan_shards
from train.preparation.shards import differences as changes
from train.preparation.sources import Source
from train.preparation.transcripts import number_speakers

#: Batches whose recordings wait in memory to be sorted by length.
_WINDOW = 4

#: Told after each row: how many are kept and rejected so far.
Progress = Callable[[int, int], None]


class NothingKept(DataError):
    """Not one row of a source could be kept."""


@dataclass(frozen=True)
class Plan:
    """What is to be prepared, and how.

    Attributes:
      source: the rows; `name` is what the data card calls them.
      model: whose data they become.
      aligner: for text without times.
      listener: recognises what is said where there is no transcript at all; None to reject.
      limits: thresholds of the checks.
      channel: of stereo recordings; "auto" mixes them except where a transcript is about one.
      batch: recordings encoded together.
      shard_rows: rows of the source that are finished together.
      limit: rows of the source to stop after.
    """

    source: Source
    name: str
    model: SpeechModel
    aligner: Aligner
    listener: WhisperAligner | None
    limits: Limits
    channel: Literal["auto", "mix", "left", "right"] = "auto"
    batch: int = 8
    shard_rows: int = 128
    limit: int | None = None

    @property
    def rows(self) -> int:
        """Rows of the source that are prepared."""
        count = len(self.source)
        return count if self.limit is None else min(count, self.limit)

    def settings(self) -> dict[str, Any]:
        """All that decides the data set, as JSON values."""
        found = {
            "source": {
                "kind": self.source.kind,
                "rows": self.rows,
                "fingerprint": self.source.fingerprint(),
            },
            "model": self.model.settings,
            "aligner": self.aligner.settings(),
            "listener": None if self.listener is None else self.listener.settings(),
            "limits": asdict(self.limits),
            "channel": self.channel,
            "batch": self.batch,
            "shard_rows": self.shard_rows,
        }
        return dict(json.loads(json.dumps(found)))


@dataclass(frozen=True)
class Outcome:
    """What a call of :func:`prepare` did.

    Attributes:
      totals: of the data set; None where only a share of its shards was prepared.
      shards: shards that are finished now, and how many there are.
      already: the data set was there, made of the same rows with the same settings.
    """

    totals: Totals | None
    shards: tuple[int, int]
    already: bool = False


@dataclass(frozen=True)
class _Ready:
    """A row that passed all checks and waits for its codes."""

    index: int
    row: SourceRow
    wave: Float[np.ndarray, " W"]
    seconds: float
    words: tuple[TimedWord, ...]
    alignment: Alignment


def prepare(
    plan: Plan,
    out: Path,
    *,
    share: tuple[int, int] | None = None,
    overwrite: bool = False,
    license: str | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Prepare all rows of a source, or one share of them, and write the data set when all are.

    Finished shards are not prepared again; the result does not depend on interruptions or shares.

    Args:
      plan: what and how.
      out: the data set's folder; work goes on in ``OUT.preparing`` beside it.
      share: ``(i, n)`` prepares the i-th of n shares (from 1) and writes no data set.
      overwrite: replace a finished data set or unfinished work of other settings.
      license: for the data card.
      progress: told after each row.

    Raises:
      DataError: something else is at ``out``, or work of other settings.
      NothingKept: every row was rejected.
    """
    settings = plan.settings()
    shards = plan_shards(plan.rows, plan.shard_rows)
    finished, workshop = finished_with(out), Workshop(out)
    if finished is not None:
        changed = changes(finished["settings"], settings)
        if not changed:
            workshop.clear(settings)
        if changed and not overwrite:
            raise DataError(
                f"{out}: is a finished data set with other settings ({'; '.join(changed[:4])}"
                f"{'; …' if len(changed) > 4 else ''}). Name another folder, or give --overwrite "
                "to replace it"
            )
        if not overwrite:
            return Outcome(_totals_of(finished), (len(shards), len(shards)), already=True)
    with workshop.open(settings, overwrite=overwrite, shared=share is not None):
        have = _prepare_shards(plan, workshop, shards, share, progress)
        if share is not None:
            return Outcome(None, (have, len(shards)))
        return Outcome(_finish(plan, workshop, settings, shards, license), (have, have))


def _prepare_shards(
    plan: Plan,
    workshop: Workshop,
    shards: Sequence[Shard],
    share: tuple[int, int] | None,
    progress: Progress | None,
) -> int:
    """Finish the shards of a share, or all; returns how many are finished now."""
    kept = rejected = 0
    for shard in shards:
        counts = workshop.counts(shard)
        if counts is None:
            if share is not None and shard.index % share[1] != share[0] - 1:
                continue
            told = _further(progress, kept, rejected)
            ready, refused = prepare_shard(plan, shard, told)
            workshop.write(shard, ready, refused)
            counts = len(ready), len(refused)
        _further(progress, kept, rejected)(*counts)
        kept, rejected = kept + counts[0], rejected + counts[1]
    return sum(workshop.counts(shard) is not None for shard in shards)


def _further(progress: Progress | None, kept: int, rejected: int) -> Callable[[int, int], None]:
    """Tells of rows of a shard, on top of those before it."""

    def told(more_kept: int, more_rejected: int) -> None:
        if progress is not None:
            progress(kept + more_kept, rejected + more_rejected)

    return told


def prepare_shard(
    plan: Plan, shard: Shard, told: Callable[[int, int], None]
) -> tuple[list[PreparedRow], list[tuple[int, SourceRow, Rejected]]]:
    """The rows of one shard, in order: those that are kept, and the others with their reason."""
    kept: list[PreparedRow] = []
    rejected: list[tuple[int, SourceRow, Rejected]] = []
    waiting: list[_Ready] = []
    for index in range(shard.start, shard.stop):
        row = plan.source.row(index)
        try:
            waiting.append(examine(plan, index, row))
        except Rejected as error:
            rejected.append((index, row, error))
        if len(waiting) == _WINDOW * plan.batch:
            kept += _encode(plan, waiting)
            waiting = []
        told(len(kept) + len(waiting), len(rejected))
    kept += _encode(plan, waiting)
    return kept, rejected


def examine(plan: Plan, index: int, row: SourceRow) -> _Ready:
    """Everything about a row but its codes.

    Raises:
      Rejected: it cannot be used.
    """
    if row.item is None:
        raise row.rejected or Rejected("bad_record", f"{row.source}: no record")
    item, where, limits = row.item, row.source, plan.limits
    tags, rate = plan.model.tokenizer.sound_tags, plan.model.codec.sample_rate
    if item.turns or plan.listener is None:
        transcript_words(item, tags)  # before the audio is decoded
    recording = item.read(limits.max_seconds)
    check_recording(recording, item.seconds, limits, where)
    channel = item.channel if plan.channel == "auto" else plan.channel
    wave = to_mono(recording, channel, rate, where)
    check_channel(wave, rate, limits, where)
    if not item.turns and plan.listener is not None:
        item = _listen(item, wave, rate, plan.listener)
    check_text_rate(transcript_words(item, tags), wave, rate, limits, where)
    words = time_words(item, wave, rate, plan.aligner, tags, limits.min_agreement)
    words = number_speakers(check_span(words, recording.seconds, where), where)
    spoken = [SpokenWord(w.text, w.start, w.end, int(w.speaker or 1)) for w in words]
    try:
        alignment = align(spoken, plan.model.tokenizer, plan.model.pace)
    except AlignmentError as error:
        raise Rejected("unusable_words", f"{where}: {error}") from None
    latest = max(alignment.drift)
    if latest > limits.max_drift:
        raise Rejected(
            "drift",
            f"{where}: speech so fast that a word would be taken {latest} frames late, --max-drift "
            f"is {limits.max_drift}",
        )
    samples = plan.model.codec.samples_per_frame
    wave = pad_to_frames(wave, alignment.frames_needed, samples)
    return _Ready(index, row, wave, recording.seconds, words, alignment)


def _listen(item: Item, wave: Float[np.ndarray, " W"], rate: int, listener: WhisperAligner) -> Item:
    words = listener.hear(wave, rate, item.source)
    return replace(item, turns=(Turn(words=words),))


def _encode(plan: Plan, ready: Sequence[_Ready]) -> list[PreparedRow]:
    codes = encode_waves(
        plan.model.codec, [one.wave for one in ready], plan.model.codebooks, plan.batch
    )
    return [
        PreparedRow(
            id=one.row.id,
            source=one.row.source,
            script=one.alignment.script,
            seconds=one.seconds,
            words=one.words,
            drift=max(one.alignment.drift),
            breaks=one.alignment.breaks,
            codes=found,
        )
        for one, found in zip(ready, codes, strict=True)
    ]


def _finish(
    plan: Plan,
    workshop: Workshop,
    settings: dict[str, Any],
    shards: Sequence[Shard],
    license: str | None,
) -> Totals:
    data = workshop.rows(shards)
    reasons = Counter(line["reason"] for line in workshop.rejected(shards))
    totals = _totals(plan.rows, data, reasons)
    if totals.kept + sum(reasons.values()) != plan.rows:
        raise AssertionError(f"{plan.rows} rows became {totals.kept} and {dict(reasons)}")
    if totals.kept == 0:
        first = next(iter(workshop.rejected(shards)))
        raise NothingKept(
            f"none of {plan.rows} rows could be kept ({_listed(reasons)}); for example "
            f"{first['message']}. All of them are in {workshop.path}/shard-*/rejected.jsonl"
        )
    packages = ("datasets", "jax", "numpy", "soundfile", "soxr", "tokenizers")
    versions = {"dia2-jax": dia2_jax.__version__} | {name: _version(name) for name in packages}
    about = {
        "format": FORMAT,
        **plan.model.settings,
        "aligner": plan.aligner.name,
        "max_drift": plan.limits.max_drift,
        "rows": totals.kept,
        "seconds": totals.seconds,
        "words": totals.words,
        "two_speakers": totals.two_speakers,
        "rejected": dict(totals.rejected),
        "settings": settings,
        "settings_sha256": hashlib.sha256(json.dumps(settings).encode()).hexdigest(),
        "versions": versions,
    }
    card = data_card(
        name=workshop.out.name,
        source=plan.name,
        license=license,
        totals=totals,
        settings=settings,
        versions=versions,
    )
    workshop.finish(data, shards, about, card)
    return totals


def _totals(rows: int, data: datasets.Dataset, rejected: Counter[str]) -> Totals:
    seconds, words, dialogues = 0.0, 0, 0
    for batch in data.select_columns(["duration", "word_speaker"]).iter(1000):
        seconds += float(np.sum(batch["duration"], dtype=np.float64))
        words += sum(map(len, batch["word_speaker"]))
        dialogues += sum(len(set(speakers)) > 1 for speakers in batch["word_speaker"])
    return Totals(rows, len(data), seconds, words, dialogues, dict(sorted(rejected.items())))


def _totals_of(manifest: dict[str, Any]) -> Totals:
    rejected = manifest["rejected"]
    return Totals(
        rows=manifest["rows"] + sum(rejected.values()),
        kept=manifest["rows"],
        seconds=manifest["seconds"],
        words=manifest["words"],
        two_speakers=manifest["two_speakers"],
        rejected=rejected,
    )


def _listed(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
