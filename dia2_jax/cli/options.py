"""Options that several commands share, and what they turn into: a model, settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dia2_jax.cli.terminal import note
from dia2_jax.generation.settings import GenerationConfig, SamplingConfig

if TYPE_CHECKING:
    from dia2_jax.engine import Dia2

_Command = TypeVar("_Command", bound=Callable[..., Any])

_DEFAULTS = GenerationConfig()


def apply(options: list[Callable[[Any], Any]]) -> Callable[[_Command], _Command]:
    """One decorator of several, listed in the order in which help shows them."""

    def decorate(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


class Finite(click.FloatRange):
    """A number within a range; NaN and infinity are in none."""

    name = "number"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


def _model_needed(ctx: click.Context, param: click.Parameter, value: str | None) -> str:
    if value is None:
        raise click.UsageError(
            "--model is needed: the folder of a checkpoint in the published Dia2 layout, or a "
            "repository of the Hugging Face hub such as nari-labs/Dia2-1B. There is no default "
            "checkpoint."
        )
    return value


MODEL = click.option(
    "--model",
    "-m",
    metavar="DIR|REPO",
    callback=_model_needed,
    help="Checkpoint: a folder in the published layout (or one that `convert` wrote), or a hub "
    "repository such as nari-labs/Dia2-1B.  [required]",
)
MIMI = click.option(
    "--mimi", metavar="DIR|REPO", help="The codec, if not the one that the checkpoint names."
)
RECOGNIZER = click.option(
    "--recognizer",
    metavar="NAME|DIR",
    default="base",
    show_default=True,
    help="Whisper model for recordings without words or transcript (needs the extra `transcribe`).",
)

model_options = apply(
    [
        MODEL,
        MIMI,
        click.option("--revision", metavar="NAME", help="Branch, tag or commit of the repository."),
        click.option(
            "--dtype",
            type=click.Choice(["float32", "bfloat16"]),
            default="float32",
            show_default=True,
            help="Of weights and activations; bfloat16 is for accelerators.",
        ),
    ]
)

sampling_options = apply(
    [
        click.option(
            "--seed",
            type=click.IntRange(0, 2**32 - 1),
            default=0,
            show_default=True,
            help="The same seed, text and settings give the same speech.",
        ),
        click.option(
            "--text-temperature",
            type=Finite(min=0),
            default=_DEFAULTS.text.temperature,
            show_default=True,
            help="Of the choice when the next word starts; 0 takes the likeliest.",
        ),
        click.option(
            "--text-top-k",
            type=click.IntRange(min=0),
            default=_DEFAULTS.text.top_k,
            show_default=True,
            help="Candidates of that choice; 0 for all.",
        ),
        click.option(
            "--audio-temperature",
            type=Finite(min=0),
            default=_DEFAULTS.audio.temperature,
            show_default=True,
            help="Of the choice of audio codes; 0 takes the likeliest.",
        ),
        click.option(
            "--audio-top-k",
            type=click.IntRange(min=0),
            default=_DEFAULTS.audio.top_k,
            show_default=True,
            help="Candidates of that choice; 0 for all.",
        ),
        click.option(
            "--cfg-scale",
            type=Finite(min=0, min_open=True),
            default=_DEFAULTS.cfg_scale,
            show_default=True,
            help="Classifier-free guidance; 1 turns it off, which halves the work.",
        ),
        click.option(
            "--cfg-filter-k",
            type=click.IntRange(min=0),
            default=_DEFAULTS.cfg_filter_k,
            show_default=True,
            help="Candidates that guidance keeps; 0 for all.",
        ),
        click.option(
            "--initial-padding",
            type=click.IntRange(min=0),
            default=_DEFAULTS.initial_padding,
            show_default=True,
            help="Frames (80 ms) before the first word may start.",
        ),
        click.option(
            "--prefix-plan",
            type=click.Choice(["exact", "upstream"]),
            default=_DEFAULTS.prefix_plan,
            show_default=True,
            help="exact: nothing of the voices' words is spoken again. upstream: the original "
            "implementation's warm-up.",
        ),
        click.option(
            "--include-prefix",
            is_flag=True,
            help="Keep the voices' own audio at the start of the output.",
        ),
    ]
)

_SETTINGS = (
    "text_temperature", "text_top_k", "audio_temperature", "audio_top_k", "cfg_scale",
    "cfg_filter_k", "initial_padding", "prefix_plan", "include_prefix",
)  # fmt: skip


def take_settings(options: dict[str, Any]) -> GenerationConfig:
    """The settings of :data:`sampling_options`, taken out of ``options``."""
    value = {name: options.pop(name) for name in _SETTINGS}
    return GenerationConfig(
        text=SamplingConfig(value["text_temperature"], value["text_top_k"]),
        audio=SamplingConfig(value["audio_temperature"], value["audio_top_k"]),
        cfg_scale=value["cfg_scale"],
        cfg_filter_k=value["cfg_filter_k"],
        initial_padding=value["initial_padding"],
        prefix_plan=value["prefix_plan"],
        include_prefix=value["include_prefix"],
    )


def take_model(options: dict[str, Any]) -> tuple[Dia2, dict[str, Any]]:
    """Load the model of :data:`model_options`, taken out of ``options``; and how it was named."""
    names = {name: options.pop(name) for name in ("model", "mimi", "revision", "dtype")}
    note(f"loading {names['model']}")
    from dia2_jax.engine import Dia2

    model = Dia2.from_pretrained(
        names["model"], dtype=names["dtype"], mimi=names["mimi"], revision=names["revision"]
    )
    return model, names
