"""``dia2-jax voice``: a recording prepared as a voice, in one small file."""

from __future__ import annotations

from pathlib import Path

import click

from dia2_jax.cli.files import EXISTING_FILE, OutputPath, text_or_file
from dia2_jax.cli.options import MIMI, MODEL, RECOGNIZER
from dia2_jax.cli.prompts import TRANSCRIPT_HELP, WORDS_HELP
from dia2_jax.cli.terminal import note, talk_options
from dia2_jax.hub import NANO


@click.command(no_args_is_help=True, short_help="Prepare a recording as a voice.")
@click.argument("audio", type=EXISTING_FILE, metavar="AUDIO")
@click.argument("output", type=OutputPath(), metavar="OUT.voice")
@MODEL
@MIMI
@click.option("--words", type=EXISTING_FILE, metavar="FILE", help=WORDS_HELP)
@click.option("--transcript", metavar="TEXT|FILE", help=TRANSCRIPT_HELP)
@RECOGNIZER
@talk_options
def voice(
    audio: Path,
    output: str,
    model: str | None,
    mimi: str | None,
    words: Path | None,
    transcript: str | None,
    recognizer: str,
) -> None:
    """Prepare a recording of one speaker as a voice for `generate` and `stream`.

    The file holds the recording's codes and its words with times (about 4 KB a second with the
    published codec), and serves every model with the same codec. An existing file is replaced.
    Without --words or --transcript the recording is transcribed.
    """
    if words is not None and transcript is not None:
        raise click.UsageError("--words and --transcript exclude each other")
    if transcript is not None:
        transcript = text_or_file(transcript)
    note(f"loading the codec of {model or NANO}")
    from dia2_jax import hub
    from dia2_jax.compilation_cache import enable_compilation_cache
    from dia2_jax.config import load_dia2_config
    from dia2_jax.convert.models import load_mimi
    from dia2_jax.mimi.runtime import Codec
    from dia2_jax.text.timing import load_word_times
    from dia2_jax.text.tokenizer import Tokenizer
    from dia2_jax.voice import prepare_voice

    enable_compilation_cache()
    timed = load_word_times(words) if words is not None else None
    files = hub.resolve(model, mimi=mimi)
    data = load_dia2_config(files.config).data
    prepared = prepare_voice(
        audio,
        Codec(load_mimi(files.mimi)[0]),
        Tokenizer.from_file(files.tokenizer, data),
        codebooks=data.codebooks,
        words=timed,
        transcript=transcript,
        recognizer=recognizer,
    )
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    prepared.save(output)
    note(f"{output}: {len(prepared.words)} words in {prepared.codes.shape[1]} frames")
