"""Options that several commands share, and what they turn into: a model, settings."""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dia2_jax.cli.startup import Startup
from dia2_jax.cli.terminal import note
from dia2_jax.generation.settings import GenerationConfig
from dia2_jax.hub import NANO

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


def default_of_model(library: object) -> str:
    """What help says of a setting that a model may have a default of its own for."""
    return f"the model's, else {library}"


MODEL = click.option(
    "--model",
    "-m",
    metavar="DIR|REPO|nano",
    show_default=NANO,
    help="Checkpoint: a folder in the published layout (or one that `convert` wrote), a hub "
    "repository such as nari-labs/Dia2-1B, or nano, the small model that is installed with this "
    "program (./nano is a folder).",
)
MIMI = click.option(
    "--mimi", metavar="DIR|REPO|nano", help="The codec, if not the one that the checkpoint names."
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
            type=click.Choice(["float32", "bfloat16", "int8"]),
            show_default="float32, or int8 where the checkpoint holds that",
            help="Of weights and activations; bfloat16 is for accelerators, int8 for CPUs: "
            "faster, and not the same speech.",
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
            show_default=default_of_model(_DEFAULTS.text.temperature),
            help="Of the choice when the next word starts; 0 takes the likeliest.",
        ),
        click.option(
            "--text-top-k",
            type=click.IntRange(min=0),
            show_default=default_of_model(_DEFAULTS.text.top_k),
            help="Candidates of that choice; 0 for all.",
        ),
        click.option(
            "--audio-temperature",
            type=Finite(min=0),
            show_default=default_of_model(_DEFAULTS.audio.temperature),
            help="Of the choice of audio codes; 0 takes the likeliest.",
        ),
        click.option(
            "--audio-top-k",
            type=click.IntRange(min=0),
            show_default=default_of_model(_DEFAULTS.audio.top_k),
            help="Candidates of that choice; 0 for all.",
        ),
        click.option(
            "--cfg-scale",
            type=Finite(min=0, min_open=True),
            show_default=default_of_model(_DEFAULTS.cfg_scale),
            help="Classifier-free guidance; 1 turns it off, which halves the work.",
        ),
        click.option(
            "--cfg-filter-k",
            type=click.IntRange(min=0),
            show_default=default_of_model(_DEFAULTS.cfg_filter_k),
            help="Candidates that guidance keeps; 0 for all.",
        ),
        click.option(
            "--initial-padding",
            type=click.IntRange(min=0),
            show_default=default_of_model(_DEFAULTS.initial_padding),
            help="Frames (80 ms) before the first word may start.",
        ),
        click.option(
            "--max-padding",
            type=click.IntRange(min=1),
            show_default=default_of_model(_DEFAULTS.max_padding),
            help="Frames without a word after which the next one starts on its own, and frames "
            "after the last.",
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
    "cfg_scale", "cfg_filter_k", "initial_padding", "max_padding", "prefix_plan", "include_prefix",
)  # fmt: skip
_SAMPLING = ("temperature", "top_k")


@dataclass(frozen=True)
class Settings:
    """The settings that a user gave; the rest are the model's.

    Attributes:
      whole: fields of ``GenerationConfig``.
      parts: fields of ``SamplingConfig``, for ``text`` and ``audio``.
    """

    whole: dict[str, Any]
    parts: dict[str, dict[str, Any]]

    def over(self, defaults: GenerationConfig) -> GenerationConfig:
        """The settings to use with a model of these defaults."""
        parts = {
            name: dataclasses.replace(getattr(defaults, name), **given)
            for name, given in self.parts.items()
        }
        return dataclasses.replace(defaults, **parts, **self.whole)


def take_settings(options: dict[str, Any]) -> Settings:
    """What was given of :data:`sampling_options`, taken out of ``options``."""

    def given(names: dict[str, str]) -> dict[str, Any]:
        values = {field: options.pop(option) for field, option in names.items()}
        return {field: value for field, value in values.items() if value is not None}

    parts = {
        name: given({field: f"{name}_{field}" for field in _SAMPLING}) for name in ("text", "audio")
    }
    return Settings(given({name: name for name in _SETTINGS}), parts)


def take_model(
    options: dict[str, Any], startup: Startup | None = None
) -> tuple[Dia2, dict[str, Any]]:
    """Load the model of :data:`model_options`, taken out of ``options``; and how it was named.

    ``startup`` is told what passed: the command's own start, imports, weights.
    """
    names = {name: options.pop(name) for name in ("model", "mimi", "revision", "dtype")}
    note(f"loading {names['model'] or NANO}")
    startup = startup or Startup(wanted=False)
    startup.passed("Python, options")
    # Thousands of objects are made that all stay: looking among them for garbage takes a twentieth
    # of the time, and as much again whenever programs are traced.
    gc.disable()
    try:
        from dia2_jax.engine import Dia2
    finally:
        gc.freeze()
        gc.enable()

    startup.passed("imports")
    startup.watch_compiler()
    model = Dia2.from_pretrained(
        names["model"], dtype=names["dtype"], mimi=names["mimi"], revision=names["revision"]
    )
    startup.passed("weights")
    return model, {**names, "model": names["model"] or NANO}
