"""The gradient of a step: which losses a waveform has, weighed against each other, and carried
back to the parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dia2_jax.typing import Array, Float
from train.codec_training import losses
from train.codec_training.balancer import Balance, balance
from train.codec_training.config import WAVEFORM_LOSSES, CodecConfig
from train.codec_training.discriminator import (
    Discriminator,
    abstract_discriminator,
    adversarial_loss,
    discriminator_loss,
    feature_matching_loss,
)
from train.codec_training.generator import Generator, Heard
from train.codec_training.quantizer import RowChoices
from train.codec_training.semantic import semantic_loss

Params = dict[str, Array]
WaveformLosses = Callable[[Array], dict[str, Array]]


class Slope(NamedTuple):
    """Result of :meth:`Objective.gradients`.

    Attributes:
      gradients: of the trainable parameters.
      heard: the pass through the codec.
      values: every loss by name, unweighted.
      balance: the balancer's new state; None without one.
    """

    gradients: Params
    heard: Heard
    values: dict[str, Array]
    balance: Balance | None


class Objective:
    """What is minimised, for one configuration and codec."""

    def __init__(self, config: CodecConfig, generator: Generator) -> None:
        self.config, self.generator = config, generator
        weights = {name: getattr(config.losses, name) for name in WAVEFORM_LOSSES}
        #: Weights of the waveform's losses that are on.
        self.weights: dict[str, float] = {n: weight for n, weight in weights.items() if weight > 0}
        #: The discriminator of given weights, and their shapes.
        self.discriminator: Callable[[Mapping[str, Any]], Discriminator]
        self.judge: dict[str, jax.ShapeDtypeStruct] = {}
        if config.discriminator is not None:
            self.discriminator, self.judge = abstract_discriminator(config.discriminator)

    def gradients(
        self,
        params: Params,
        frozen: Params,
        codebooks: Params,
        batch: Mapping[str, Array],
        choices: RowChoices,
        state: Balance | None,
        judge: Params | None,
    ) -> Slope:
        """Losses and their gradient for a batch.

        The waveform's losses are differentiated with respect to the waveform one by one, summed
        there (by the balancer, or with their weights), and go back through the codec together.

        Args:
          params: trainable parameters.
          frozen: the others.
          codebooks: as they are before this batch.
          batch: ``wave`` and perhaps ``targets`` (or predicted codes) and ``real``.
          choices: of the rows.
          state: of the balancer; None without one.
          judge: the discriminator's weights; None while it is not heard.
        """
        target = batch["wave"]
        predicted = None
        if self.config.codebooks.predicted:
            predicted = batch["targets"].astype(jnp.int32)
            whole = batch["real"].all(axis=1)
            choices = choices._replace(predicted=choices.predicted & whole)

        def forward(params: Params) -> tuple[tuple[Array, Array, Array], Heard]:
            every = {**params, **frozen}
            heard = self.generator(every, codebooks, target, choices, predicted)
            semantic = jnp.zeros(())
            if self.config.semantic is not None:
                semantic = semantic_loss(
                    every,
                    heard.semantic,
                    batch["targets"],
                    batch["real"],
                    self.config.semantic.kind,
                )
            return (heard.wave, heard.commitment, semantic), heard

        (wave, commitment, semantic), pullback, heard = jax.vjp(forward, params, has_aux=True)
        values: dict[str, Array] = {}
        slopes: dict[str, Array] = {}
        for part in self._parts(target, judge):
            found, back = jax.vjp(part, wave)
            for name in found:
                one = {key: jnp.ones_like(v) * (key == name) for key, v in found.items()}
                slopes[name] = back(one)[0]
            values |= found
        if state is None:
            total = sum(self.weights[name] * slope for name, slope in slopes.items())
        else:
            assert self.config.balancer is not None
            total, state = balance(slopes, self.weights, state, self.config.balancer.decay)
        weights = self.config.losses
        (gradients,) = pullback(
            (total, jnp.float32(weights.commitment), jnp.float32(weights.semantic))
        )
        values["commitment"] = commitment
        if self.config.semantic is not None:
            values["semantic"] = semantic
        return Slope(gradients, heard, values, state)

    def _parts(self, target: Float[Array, "B W"], judge: Params | None) -> list[WaveformLosses]:
        """The waveform's losses, together where they share work."""
        settings, weights = self.config.losses, self.weights
        rate = self.generator.config.sampling_rate
        parts: list[WaveformLosses] = []
        if "mel" in weights:
            shape = (rate, settings.mel_windows, settings.mel_bands)
            parts.append(lambda wave: {"mel": losses.mel_loss(wave, target, *shape)})
        if "stft" in weights:
            windows = settings.stft_windows
            parts.append(lambda wave: {"stft": losses.stft_loss(wave, target, windows)})
        if "waveform" in weights:
            parts.append(lambda wave: {"waveform": losses.waveform_loss(wave, target)})
        if judge is not None:
            network = self.discriminator(judge)
            _, real = network(target)

            def heard(wave: Array) -> dict[str, Array]:
                logits, features = network(wave)
                both = {
                    "adversarial": adversarial_loss(logits),
                    "feature_matching": feature_matching_loss(real, features),
                }
                return {name: value for name, value in both.items() if name in weights}

            parts.append(heard)
        return parts

    def judge_loss(
        self, judge: Params, wave: Float[Array, "B W"], target: Float[Array, "B W"]
    ) -> Float[Array, ""]:
        """The discriminator's own loss."""
        network = self.discriminator(judge)
        return discriminator_loss(network(target)[0], network(wave)[0])
