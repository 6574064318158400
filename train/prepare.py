"""``python -m train.prepare``: recordings and transcripts to a data set for training.

    python -m train.prepare recordings/ data/anna --model nari-labs/Dia2-1B --aligner pocketsphinx

The stages are in `train.preparation`; here are the options and what the user reads.
"""

from __future__ import annotations

import dataclasses
import errno
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from dia2_jax.cli.options import Finite
from dia2_jax.errors import DataError
from train.command import FailedRun, Program
from train.preparation.aligners import ALIGNERS, WhisperAligner
from train.preparation.checks import Limits
from train.preparation.shifted import ShiftedSource
from train.preparation.sources import (
    Columns,
    FolderSource,
    ManifestSource,
    Source,
    detect_kind,
)

if TYPE_CHECKING:
    from train.preparation.program import Outcome

EPILOG = """\b
SOURCE is one of
  a folder      audio files, each with NAME.txt beside it (what is said; [S1] and [S2] name
                speakers) and, where it is known, NAME.json (when: [{"text", "start", "end"}, …])
  a manifest    JSON lines {"path", "text" | "words" | "turns", "speaker"}; a transcript may also
                be in NAME.json (Kyutai's fine-tuning layout too) or NAME.txt beside the audio
  a data set    of Hugging Face datasets: a name on the hub, a saved folder, parquet files

\b
OUT becomes a data set (datasets.load_from_disk) with a data card, README.md. Rows that are left
out are in OUT/rejected.jsonl with their reason. Work in progress is in OUT.preparing: run the same
command again to go on after an interruption.

\b
Exit status:
  0    done, though rows may have been left out
  1    done, and not one row could be kept
  2    an option, the source or the model cannot be used: the message says why
  130  interrupted (Ctrl-C); 143 if terminated
"""


def _limit_options(command: Any) -> Any:
    """An option for each threshold of :class:`Limits`."""
    for field in reversed(dataclasses.fields(Limits)):
        low, high = field.metadata["low"], field.metadata["high"]
        kind = click.IntRange if isinstance(field.default, int) else Finite
        command = click.option(
            f"--{field.name.replace('_', '-')}",
            type=kind(min=low, max=high),
            default=field.default,
            show_default=True,
            metavar="N",
            help=field.metadata["help"],
        )(command)
    return command


def _column_options(command: Any) -> Any:
    for field in reversed(dataclasses.fields(Columns)):
        command = click.option(
            f"--{field.name}-column",
            default=field.default,
            show_default=True,
            metavar="NAME",
            help=f"Column of a data set that holds the {field.name}.",
        )(command)
    return command


class _Share(click.ParamType):
    """``i/n``, from 1."""

    name = "i/n"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        first, slash, last = str(value).partition("/")
        if not (slash and first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
            self.fail(f"{value!r} is not i/n with 1 <= i <= n, such as 1/4", param, ctx)
        return int(first), int(last)


@click.command(cls=Program, epilog=EPILOG)
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--model",
    "-m",
    required=True,
    metavar="DIR|REPO|CONFIG",
    help="Whose training data it becomes: a folder in the published layout, a hub repository, or a "
    "config file (then --tokenizer and --mimi are needed).",
)
@click.option("--tokenizer", metavar="DIR|FILE", help="tokenizer.json, if not the model's.")
@click.option("--mimi", metavar="DIR|FILE|REPO", help="The codec, if not the model's.")
@click.option(
    "--aligner",
    type=click.Choice(list(ALIGNERS)),
    default="data",
    show_default=True,
    help="Where word times come from if the data have none. data: such rows are left out. "
    "pocketsphinx: forced alignment, English, precise, but blind to a wrong transcript (extra "
    "`align`). whisper: recognised words are matched to the transcript, and others refused (extra "
    "`transcribe`). estimate: spread by syllables, rough.",
)
@click.option(
    "--recognizer",
    metavar="NAME|DIR",
    default="base.en",
    show_default=True,
    help="Whisper model of --aligner whisper and --transcribe.",
)
@click.option(
    "--transcribe",
    is_flag=True,
    help="Take the words that Whisper recognises where a recording has no transcript.",
)
@click.option("--kind", type=click.Choice(["folder", "manifest", "dataset"]), help="Of SOURCE.")
@click.option("--split", metavar="NAME", default="train", show_default=True, help="Of a data set.")
@click.option("--config", metavar="NAME", help="Configuration (subset) of a data set on the hub.")
@click.option("--revision", metavar="NAME", help="Branch, tag or commit of a data set on the hub.")
@_column_options
@click.option(
    "--channel",
    type=click.Choice(["auto", "mix", "left", "right"]),
    default="auto",
    show_default=True,
    help="Of stereo recordings. auto mixes them, but takes the left one where Kyutai's layout has "
    "words of its main speaker alone.",
)
@_limit_options
@click.option(
    "--word-step-offset",
    type=click.IntRange(min=0),
    metavar="N",
    default=2,
    show_default=True,
    help="Steps from the frame in which a word starts to the step that takes it; 2 in the "
    "published checkpoints.",
)
@click.option(
    "--initial-padding",
    type=click.IntRange(min=0),
    metavar="N",
    default=2,
    show_default=True,
    help="Steps before the first word, as generation will be set.",
)
@click.option(
    "--max-padding",
    type=click.IntRange(min=0),
    metavar="N",
    default=6,
    show_default=True,
    help="Steps without a word after which the machine goes on by itself.",
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    metavar="N",
    default=8,
    show_default=True,
    help="Recordings that are encoded together.",
)
@click.option(
    "--shard-rows",
    type=click.IntRange(min=1),
    metavar="N",
    default=128,
    show_default=True,
    help="Rows that are finished together; an interruption loses at most as many.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N rows.")
@click.option(
    "--shifts",
    type=click.IntRange(min=1),
    metavar="N",
    default=1,
    show_default=True,
    help="Rows made of each recording: it begins 0, 1/N, 2/N … of a frame late, which gives "
    "other codes for the same speech. More data from few recordings; --limit counts all of them.",
)
@click.option(
    "--shard",
    "share",
    type=_Share(),
    metavar="i/n",
    help="Prepare only the i-th of n shares, on as many hosts or processes; the same command "
    "without --shard then makes the data set of all shards in OUT.preparing.",
)
@click.option("--license", metavar="NAME", help="Named in the data card, such as cc-by-4.0.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier data set of this program.")
@click.option("--quiet", "-q", is_flag=True, help="No progress; errors and the result only.")
def main(source: str, out: Path, **options: Any) -> None:
    """Prepare the recordings of SOURCE as training data for Dia2, in the folder OUT."""
    columns = Columns(
        **{f.name: options.pop(f"{f.name}_column") for f in dataclasses.fields(Columns)}
    )
    limits = Limits(**{f.name: options.pop(f.name) for f in dataclasses.fields(Limits)})
    from train.preparation.program import NothingKept

    if options["share"] is not None and options["overwrite"]:
        raise click.UsageError(
            "--overwrite with --shard would delete the work of other shares: name another folder "
            f"than {out}, or remove it and {out}.preparing first"
        )
    try:
        with _terminable():
            outcome = _run(source, out, columns, limits, **options)
    except NothingKept as error:
        raise FailedRun(str(error)) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(
            f"{out}.preparing: {error.strerror}; free some space and run the same command again: "
            "what is finished stays"
        ) from error
    except KeyboardInterrupt:
        click.echo(f"run the same command again to go on with {out}.preparing", err=True)
        raise
    _report(outcome, out)


def _run(
    source: str,
    out: Path,
    columns: Columns,
    limits: Limits,
    *,
    model: str,
    tokenizer: str | None,
    mimi: str | None,
    aligner: str,
    recognizer: str,
    transcribe: bool,
    kind: str | None,
    split: str,
    config: str | None,
    revision: str | None,
    channel: Any,
    word_step_offset: int,
    initial_padding: int,
    max_padding: int,
    batch: int,
    shard_rows: int,
    limit: int | None,
    shifts: int,
    share: tuple[int, int] | None,
    license: str | None,
    overwrite: bool,
    quiet: bool,
) -> Outcome:
    from dia2_jax.compilation_cache import enable_compilation_cache
    from train.preparation.model_files import load_speech_model
    from train.preparation.program import Plan, prepare
    from train.preparation.shards import finished_with

    finished_with(out)  # before anything is loaded
    rows = _source(source, kind, split, config, revision, columns)
    places_words = ALIGNERS[aligner](recognizer, limits.min_agreement)
    listener = None
    if transcribe and isinstance(places_words, WhisperAligner):
        listener = places_words
    elif transcribe:
        listener = WhisperAligner(recognizer, limits.min_agreement)
    enable_compilation_cache()
    speech = load_speech_model(
        model,
        tokenizer=tokenizer,
        mimi=mimi,
        word_step_offset=word_step_offset,
        initial_padding=initial_padding,
        max_padding=max_padding,
    )
    if shifts > 1:
        rows = ShiftedSource(rows, shifts, speech.pace.frame_rate)
    plan = Plan(
        source=rows,
        name=Path(source).name if Path(source).exists() else source,
        model=speech,
        aligner=places_words,
        listener=listener,
        limits=limits,
        channel=channel,
        batch=batch,
        shard_rows=shard_rows,
        limit=limit,
    )
    with _meter(plan.rows, quiet) as progress:
        return prepare(
            plan, out, share=share, overwrite=overwrite, license=license, progress=progress
        )


def _source(
    source: str,
    kind: str | None,
    split: str,
    config: str | None,
    revision: str | None,
    columns: Columns,
) -> Source:
    kind = kind or detect_kind(source)
    path = Path(source).expanduser()
    if kind == "folder":
        return FolderSource(path)
    if kind == "manifest":
        return ManifestSource(path)
    from train.preparation.dataset_source import load_dataset_source

    return load_dataset_source(
        source, config=config, split=split, revision=revision, columns=columns
    )


def _report(outcome: Outcome, out: Path) -> None:
    totals = outcome.totals
    if totals is None:
        done, all_shards = outcome.shards
        click.echo(
            f"{done} of {all_shards} shards are finished in {out}.preparing; when all shares are, "
            "run the same command without --shard"
        )
        return
    if outcome.already:
        click.echo(f"{out}: is finished already, with these rows and settings")
    rejected = sum(totals.rejected.values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in totals.rejected.items())
    click.echo(
        f"{out}: {totals.kept} of {totals.rows} recordings, {totals.hours:.3f} h, "
        f"{totals.words} words"
    )
    if rejected:
        click.echo(f"left out {rejected} ({reasons}): see {out / 'rejected.jsonl'}")


@contextmanager
def _meter(rows: int, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    from tqdm import tqdm

    shown = not quiet and sys.stderr.isatty()
    with tqdm(total=rows, unit=" rows", disable=not shown, leave=False) as bar:

        def progress(kept: int, rejected: int) -> None:
            bar.set_postfix(kept=kept, rejected=rejected, refresh=False)
            bar.update(kept + rejected - bar.n)

        yield progress


class _Terminated(SystemExit):
    """SIGTERM: what is half done is left under its temporary name, and cleaned up later."""


@contextmanager
def _terminable() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise _Terminated(143)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    main(prog_name="python -m train.prepare")
