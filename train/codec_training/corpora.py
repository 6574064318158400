"""The training and validation audio of a configuration, opened or decoded into the cache."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dia2_jax.config import MimiConfig
from train.codec_training.config import CodecConfig
from train.codec_training.sources import (
    Corpus,
    Teacher,
    list_recordings,
    open_corpus,
    split_recordings,
)
from train.command import note, warn
from train.processes import barrier, is_leader

#: Recordings between two lines of progress where standard error is no terminal.
_EVERY = 1000


@dataclass(frozen=True)
class Corpora:
    """Decoded audio to train on, and audio held out."""

    train: Corpus
    validation: Corpus


def open_corpora(config: CodecConfig, mimi: MimiConfig) -> Corpora:
    """Find the recordings, split them, and decode what the cache does not hold yet.

    In several processes the first decodes, and the others wait and read.

    Raises:
      DataError: a source that holds nothing usable.
      ConfigError: a teacher that cannot be loaded.
    """
    data = config.data
    train = list_recordings(data.train)
    if data.validation:
        held_out = list_recordings(data.validation)
    else:
        train, held_out = split_recordings(train, data.validation_share)
    train = train[: data.recordings]
    teacher: Teacher | None = None
    name = ""
    if config.semantic is not None and config.semantic.targets == "teacher":
        settings = config.semantic
        name = f"{settings.teacher}:{settings.teacher_layer}"
        teacher = _lazy_teacher(settings.teacher, settings.teacher_layer, mimi)

    def open_both() -> Corpora:
        rate, frame, cache = mimi.sampling_rate, mimi.samples_per_frame, Path(data.cache)
        return Corpora(
            open_corpus(
                train,
                cache,
                rate,
                frame,
                teacher=teacher,
                teacher_name=name,
                progress=_progress("training"),
            ),
            open_corpus(held_out, cache, rate, frame, progress=_progress("validation")),
        )

    if is_leader():
        corpora = open_both()
        for recording, reason in corpora.train.left_out + corpora.validation.left_out:
            warn(f"left out: {recording}: {reason}")
    barrier("codec corpora")
    return corpora if is_leader() else open_both()


def _lazy_teacher(name: str, layer: int, mimi: MimiConfig) -> Teacher:
    """A teacher that is loaded with the first recording that needs it."""
    loaded: list[Teacher] = []

    def teach(wave: object) -> object:
        if not loaded:
            from train.codec_training.teacher import SpeechTeacher

            loaded.append(SpeechTeacher(name, layer, mimi.sampling_rate, mimi.samples_per_frame))
        return loaded[0](wave)  # type: ignore[arg-type]

    return teach  # type: ignore[return-value]


def _progress(kind: str) -> Callable[[int, int], None]:
    def tell(done: int, of: int) -> None:
        if done % _EVERY == 0 or (done == of and of >= _EVERY):
            note(f"decoded {done} of {of} {kind} recordings")
        elif sys.stderr.isatty() and done % 20 == 0:
            print(f"\rdecoded {done} of {of} {kind} recordings", end="\r", file=sys.stderr)

    return tell
