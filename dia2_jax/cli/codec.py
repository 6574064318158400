"""``dia2-jax encode`` and ``dia2-jax decode``: audio to Mimi codes and back."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dia2_jax.cli.files import EXISTING_FILE, OutputPath, load_codes, save_codes, write_audio
from dia2_jax.cli.options import apply
from dia2_jax.cli.terminal import Meter, note, talk_options
from dia2_jax.errors import AudioError

if TYPE_CHECKING:
    from dia2_jax.mimi.runtime import Codec

#: Frames that are handed to the codec at a time: memory stays flat, and few sizes are compiled.
_PIECE = 32

codec_options = apply(
    [
        click.option(
            "--mimi",
            metavar="DIR|FILE|REPO|nano",
            help="The codec, in either published layout, or nano; kyutai/mimi by default.",
        ),
        click.option(
            "--model",
            "-m",
            metavar="DIR|REPO|nano",
            help="Take the codec that this Dia2 model uses.",
        ),
    ]
)


def load_codec(mimi: str | None, model: str | None) -> tuple[Codec, int]:
    """The codec of one of the two options, and how many codebooks its user reads."""
    if mimi is not None and model is not None:
        raise click.UsageError("--mimi and --model both name a codec: give one of them")
    note(f"loading {mimi or model or 'kyutai/mimi'}")
    from dia2_jax import hub
    from dia2_jax.compilation_cache import enable_compilation_cache
    from dia2_jax.config import load_dia2_config
    from dia2_jax.convert.models import load_mimi
    from dia2_jax.mimi.runtime import Codec

    enable_compilation_cache()
    if model is None:
        codec = Codec(load_mimi(hub.resolve_mimi(mimi or hub.DEFAULT_MIMI))[0])
        return codec, codec.codebooks
    files = hub.resolve(model)
    codebooks = load_dia2_config(files.config).data.codebooks
    return Codec(load_mimi(files.mimi)[0]), codebooks


@click.command(no_args_is_help=True, short_help="Audio to Mimi codes.")
@click.argument("audio", type=EXISTING_FILE, metavar="AUDIO")
@click.argument("codes", type=OutputPath(".npz", ".safetensors"), metavar="CODES.npz|.safetensors")
@codec_options
@click.option(
    "--codebooks",
    type=click.IntRange(min=1),
    metavar="N",
    help="How many codebooks to keep: all of the codec, or those that the model reads.",
)
@talk_options
def encode(
    audio: Path, codes: str, mimi: str | None, model: str | None, codebooks: int | None
) -> None:
    """Encode a recording (WAV, FLAC, OGG, MP3; any rate, mono or stereo) as Mimi codes.

    W samples at the codec's rate become ceil(W / samples per frame) frames; 24 kHz and 1,920 in
    the published codec. CODES holds the array "codes" [codebooks, frames], int32, with
    "sample_rate", "samples" (W) and "codec" (a fingerprint) beside it. An existing file is
    replaced.
    """
    runner, own = load_codec(mimi, model)

    import numpy as np

    from dia2_jax.audio import read_audio
    from dia2_jax.mimi.runtime import StreamingEncoder
    from dia2_jax.voice import codec_fingerprint

    wave = read_audio(audio, runner.sample_rate)
    encoder = StreamingEncoder(runner, codebooks=own if codebooks is None else codebooks)
    frame_rate = runner.sample_rate / runner.samples_per_frame
    span, pieces, started = _PIECE * runner.samples_per_frame, [], time.perf_counter()
    with Meter(frame_rate, total=-(-len(wave) // runner.samples_per_frame)) as meter:
        for start in range(0, len(wave), span):
            pieces.append(encoder.push(wave[None, start : start + span]))
            meter(sum(piece.shape[2] for piece in pieces))
        pieces.append(encoder.close())
    found = np.concatenate(pieces, axis=2)[0]
    save_codes(
        codes,
        found,
        sample_rate=runner.sample_rate,
        samples=len(wave),
        codec=codec_fingerprint(runner),
    )
    seconds = time.perf_counter() - started
    note(f"{codes}: {found.shape[0]} codebooks x {found.shape[1]} frames in {seconds:.2f} s")


@click.command(no_args_is_help=True, short_help="Mimi codes to a WAV.")
@click.argument("codes", type=EXISTING_FILE, metavar="CODES")
@click.argument("output", type=OutputPath(), metavar="OUT.wav")
@codec_options
@talk_options
def decode(codes: Path, output: str, mimi: str | None, model: str | None) -> None:
    """Decode Mimi codes (a file of `encode`, or a voice file) to a WAV.

    T frames become T x samples per frame, so the WAV of an encoded recording ends up to one frame
    later than the recording. An existing file is replaced.
    """
    found, made_by = load_codes(codes)
    runner, _ = load_codec(mimi, model)

    import numpy as np

    from dia2_jax.mimi.runtime import StreamingDecoder
    from dia2_jax.voice import codec_fingerprint

    fingerprint = codec_fingerprint(runner)
    if made_by is not None and made_by != fingerprint:
        raise AudioError(
            f"{codes}: made by another codec ({made_by}; this one is {fingerprint}): decode it "
            "with the one that made it"
        )
    decoder = StreamingDecoder(runner)
    frame_rate = runner.sample_rate / runner.samples_per_frame
    pieces, started = [], time.perf_counter()
    with Meter(frame_rate, total=found.shape[1]) as meter:
        for start in range(0, found.shape[1], _PIECE):
            pieces.append(decoder.push(found[None, :, start : start + _PIECE])[0])
            meter(min(start + _PIECE, found.shape[1]))
    wave = np.concatenate(pieces)
    write_audio(output, wave, runner.sample_rate)
    seconds = time.perf_counter() - started
    note(f"{output}: {len(wave) / runner.sample_rate:.2f} s of audio in {seconds:.2f} s")
