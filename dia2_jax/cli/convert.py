"""``dia2-jax convert``: a checkpoint in another form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dia2_jax.cli.terminal import note, talk_options


@click.command(no_args_is_help=True, short_help="Write a checkpoint in another form.")
@click.argument("source", type=click.Path(exists=True, path_type=Path), metavar="SRC")
@click.argument("destination", type=click.Path(path_type=Path), metavar="DST")
@click.option(
    "--to",
    type=click.Choice(["published", "orbax", "kyutai", "hf"]),
    default="published",
    show_default=True,
    help="published: safetensors as published. orbax: JAX's checkpoint format. kyutai, hf: the "
    "two layouts of the codec.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16", "int8"]),
    help="Store the weights in this type instead of the source's. int8, of a Dia2 folder: a "
    "quarter of most of them, from which nothing leads back.",
)
@click.option("--force", is_flag=True, help="Replace what DST holds.")
@talk_options
def convert(source: Path, destination: Path, to: Any, dtype: str | None, force: bool) -> None:
    """Convert a Dia2 folder, or a codec (folder or safetensors file), to another form.

    There and back gives the same bytes, unless --dtype rounded them. DST is a new folder, which
    appears whole or not at all.
    """
    import jax.numpy as jnp

    from dia2_jax.convert import api

    done = api.convert(
        source, destination, to, None if dtype is None else jnp.dtype(dtype), force=force
    )
    note(f"{destination}: {done.kind}, {done.tensors} tensors, {done.layout} as {done.form}")
