"""``dia2-jax generate``: one script to one WAV."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from dia2_jax.cli.files import (
    OutputPath,
    read_script,
    refuse_one_target,
    refuse_terminal,
    save_codes,
    write_audio,
    write_json,
)
from dia2_jax.cli.options import (
    model_options,
    sampling_options,
    take_model,
    take_settings,
)
from dia2_jax.cli.prompts import Prompts, voice_options
from dia2_jax.cli.startup import FURTHER, Startup, verbose_option
from dia2_jax.cli.terminal import Meter, note, talk_options, warn

if TYPE_CHECKING:
    from dia2_jax.generation.settings import GenerationConfig

#: Exit status of a take that the model's context cut off.
TRUNCATED = 3


@click.command(no_args_is_help=True, short_help="Speak a script, written as one WAV.")
@click.argument("script", metavar="[TEXT|FILE|-]", required=False)
@model_options
@click.option(
    "--output",
    "-o",
    type=OutputPath(stdout=True),
    metavar="FILE|-",
    required=True,
    help="WAV to write (24 kHz, mono, 16 bit); an existing file is replaced. - is standard output.",
)
@click.option(
    "--json",
    "json_target",
    type=OutputPath(stdout=True),
    metavar="FILE|-",
    help="Write words with times, shape of the codes, sample rate, truncation, seed and settings.",
)
@click.option(
    "--codes",
    type=OutputPath(".npz", ".safetensors"),
    metavar="FILE",
    help="Write the codes, too: .npz or .safetensors, as `encode` does and `decode` reads.",
)
@sampling_options
@voice_options
@verbose_option
@talk_options
def generate(
    script: str | None,
    output: str,
    json_target: str | None,
    codes: str | None,
    verbose: bool,
    **options: Any,
) -> None:
    """Speak a script and write it as one WAV.

    The argument is a file's path if such a file exists, otherwise the text itself; - or nothing
    reads standard input. It is one script: its newlines are white space. [S1] and [S2] name the
    speaker of what follows, <break time="0.5s"/> is a pause, (laughs) and the like are sounds.

    \b
      dia2-jax generate "[S1] Hello. [S2] Hi!" -o hello.wav --json hello.json
      dia2-jax generate talk.txt -m DIR -o talk.wav \\
          --voice-1 anna.wav --transcript-1 "This is how I sound." --voice-2 ben.voice
    """
    startup = Startup(verbose)
    startup.passed("Python, options")
    text = read_script(script)
    startup.passed("script")
    refuse_one_target(output, json_target)
    if output == "-":
        refuse_terminal("the WAV")
    if not text.strip():
        from dia2_jax.text.script import require_speakable

        require_speakable([])
    seed = options.pop("seed")
    given, prompts = take_settings(options), Prompts(options)
    model, names = take_model(options, startup)
    settings = given.over(model.defaults)
    voices = prompts.prepare(model)
    if voices:
        startup.passed("voices")
    with Meter(model.frame_rate) as meter:

        def progress(frames: int) -> None:
            startup.passed("prefill and first frame" if frames == 1 else FURTHER)
            meter(frames)

        result = model.generate(text, settings, voices=voices, seed=seed, progress=progress)
    startup.passed("codec, all frames")
    write_audio(output, result.waveform, result.sample_rate)
    startup.heard()
    if codes is not None:
        from dia2_jax.voice import codec_fingerprint

        save_codes(
            codes,
            result.codes,
            sample_rate=result.sample_rate,
            samples=len(result.waveform),
            codec=codec_fingerprint(model.codec),
        )
    write_json(
        json_target,
        report(
            names,
            settings,
            seed,
            shape=result.codes.shape,
            sample_rate=result.sample_rate,
            frame_rate=model.frame_rate,
            words=result.words,
            truncated=result.truncated,
        ),
    )
    seconds = len(result.waveform) / result.sample_rate
    note(f"{output}: {seconds:.2f} s, {result.codes.shape[1]} frames{meter.summary()}")
    startup.write()
    if result.truncated:
        end_truncated(model.max_context_steps)


def end_truncated(context: int) -> None:
    """Say that a take was cut off, and leave with its status."""
    warn(
        f"truncated: the model's context of {context} frames ended before the text did; split the "
        "script"
    )
    click.get_current_context().exit(TRUNCATED)


def report(
    names: dict[str, Any],
    settings: GenerationConfig,
    seed: int,
    *,
    shape: tuple[int, ...],
    sample_rate: int,
    frame_rate: float,
    words: list[tuple[str, float]],
    truncated: bool,
) -> dict[str, Any]:
    """What ``--json`` writes; times in seconds from the start of the audio."""
    return {
        **names,
        "seed": seed,
        "settings": dataclasses.asdict(settings),
        "sample_rate": sample_rate,
        "frame_rate": frame_rate,
        "codes_shape": list(shape),
        "seconds": shape[1] / frame_rate,
        "words": [{"text": text, "start": round(start, 6)} for text, start in words],
        "truncated": truncated,
    }
