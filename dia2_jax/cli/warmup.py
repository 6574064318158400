"""``dia2-jax warmup``: compile what a stream runs before anybody waits for it."""

from __future__ import annotations

import time
from typing import Any

import click

from dia2_jax.cli.options import model_options, sampling_options, take_model, take_settings
from dia2_jax.cli.prompts import Prompts, voice_options
from dia2_jax.cli.terminal import note, talk_options


@click.command(short_help="Compile ahead, so that the next start is quick.")
@model_options
@click.option(
    "--chunk-frames",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Frames of audio in a chunk, as `stream` will be given them.",
)
@sampling_options
@voice_options
@talk_options
def warmup(chunk_frames: int, **options: Any) -> None:
    """Compile the programs that `stream` runs with the same options, and keep them on disk.

    They are kept in ~/.cache/dia2-jax/xla, or where DIA2_JAX_CACHE says, under a key that JAX makes
    of the program and all that it depends on: the model's shape, not its weights; --dtype;
    whether there is guidance (--cfg-scale 1 is none); the largest of the top-k settings;
    --chunk-frames; the length of the voices; the versions of JAX; the processor. Whatever of these
    changes is compiled once more, and nothing that is old is ever used. Beside them lie the kernels
    in C of the package. They need a processor with AVX-512 and VNNI, and a C compiler; without
    either, or with DIA2_JAX_KERNELS=off, XLA computes the same, more slowly.

    \b
      dia2-jax warmup -m DIR --dtype int8
    """
    options.pop("seed")
    given, prompts = take_settings(options), Prompts(options)
    model, names = take_model(options)
    settings = given.over(model.defaults)
    voices = prompts.prepare(model)
    note("compiling")
    start = time.perf_counter()
    model.warm_up(settings, voices=voices, chunk_frames=chunk_frames)
    note(f"{names['model']} ({names['dtype']}): ready in {time.perf_counter() - start:.1f} s")
    from dia2_jax.nn.kernels import kernels_here

    note(f"kernels in C: {kernels_here().reason}")
