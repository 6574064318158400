"""The codec in training: its weights as flat dicts, and one differentiable pass."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dia2_jax import checkpoint, hub
from dia2_jax.config import MimiConfig, config_to_dict, load_mimi_config
from dia2_jax.convert import mimi_hf
from dia2_jax.convert.load import export_params
from dia2_jax.convert.models import abstract_mimi, load_mimi, read_mimi_config
from dia2_jax.errors import ConfigError
from dia2_jax.mimi.codec import Mimi
from dia2_jax.mimi.resample import KERNEL, STRIDE
from dia2_jax.nn.kernels import FLOAT32_PRODUCT
from dia2_jax.typing import Array, ArrayLike, Float, Int
from train.codec_training.config import CodebookConfig, CodecModelConfig
from train.codec_training.quantizer import (
    EMBED_SUM,
    INITIALIZED,
    USAGE,
    Assignments,
    RowChoices,
    quantize,
    row_choices,
)
from train.shapes import read_shape_file

#: What transformers wants to know besides the config's own fields.
_BOOKKEEPING = {"model_type": "mimi", "architectures": ["MimiModel"]}
_PREPROCESSOR = "preprocessor_config.json"


class Heard(NamedTuple):
    """One pass through the codec.

    Attributes:
      wave: ``[B, W]``, the reconstruction.
      commitment: a scalar loss.
      semantic: ``[B, T, D]``, features of the semantic codebooks.
      assignments: what the batch says about the codebooks.
    """

    wave: Float[Array, "B W"]
    commitment: Float[Array, ""]
    semantic: Float[Array, "B T D"]
    assignments: Assignments


class Generator:
    """A codec's structure; its weights are arguments.

    Attributes:
      config: the codec's.
      params: abstract parameters by path that gradients may train.
      codebooks: abstract arrays of the codebooks by path.
    """

    def __init__(self, config: MimiConfig, *, remat: bool = False) -> None:
        self.config, self._remat = config, remat
        self._graph, abstract = abstract_mimi(config)
        leaves, self._treedef = checkpoint.flatten_tree(abstract)
        shapes = {p: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for p, leaf in leaves.items()}
        self.codebooks = {p: leaf for p, leaf in shapes.items() if is_codebook(p)}
        self.params = {p: leaf for p, leaf in shapes.items() if not is_codebook(p)}

    def mimi(self, params: Mapping[str, Any], codebooks: Mapping[str, Any]) -> Mimi:
        """The module with these weights; paths that are not its own are ignored."""
        wanted = (*self.params, *self.codebooks)
        every = {**params, **codebooks}
        named = {path: every[path] for path in wanted}
        return nnx.merge(self._graph, checkpoint.unflatten_tree(self._treedef, named))

    def __call__(
        self,
        params: Mapping[str, Array],
        codebooks: Mapping[str, Array],
        wave: Float[Array, "B W"],
        choices: RowChoices,
        predicted: Int[Array, "B T C"] | None = None,
    ) -> Heard:
        """Encode, quantise with straight-through gradients, decode.

        Args:
          params, codebooks: weights.
          wave: what is heard.
          choices: of the rows.
          predicted: codes for the rows of which ``choices`` says that they are heard through them.
        """

        def encode(params: Mapping[str, Array], wave: Array) -> Array:
            return self.mimi(params, codebooks).encode_latents(wave)

        def decode(params: Mapping[str, Array], features: Array) -> Array:
            return self.mimi(params, codebooks).decode_latents(features)

        if self._remat:
            encode, decode = jax.checkpoint(encode), jax.checkpoint(decode)
        own = {path: params[path] for path in self.params}
        mimi = self.mimi(own, codebooks)
        result = quantize(mimi.quantizer, encode(own, wave), choices)
        features = result.features
        if predicted is not None:
            given = mimi.quantizer.decode(predicted.transpose(0, 2, 1))
            features = jnp.where(choices.predicted[:, None, None], given, features)
        heard = decode(own, features)
        return Heard(heard, result.commitment, result.semantic, result.assignments)

    def export(
        self, params: Mapping[str, ArrayLike], codebooks: Mapping[str, ArrayLike], folder: Path
    ) -> None:
        """Write a folder in the published Hugging Face layout, whole or not at all.

        An older folder is replaced. Every installation of this package, ``dia2-jax convert`` and
        ``transformers.MimiModel`` read it.
        """
        every = {**params, **codebooks}
        named = {path: np.asarray(every[path]) for path in (*self.params, *self.codebooks)}
        tree = checkpoint.unflatten_tree(self._treedef, named)
        with checkpoint.staged_folder(folder) as staged:
            export_params(tree, mimi_hf.make_table(self.config), staged / hub.WEIGHTS)
            raw = {**_BOOKKEEPING, **config_to_dict(self.config)}
            _write_json(staged / hub.CONFIG, raw)
            _write_json(
                staged / _PREPROCESSOR,
                {
                    "feature_extractor_type": "EncodecFeatureExtractor",
                    "feature_size": 1,
                    "padding_side": "right",
                    "padding_value": 0.0,
                    "return_attention_mask": True,
                    "sampling_rate": self.config.sampling_rate,
                },
            )


def is_codebook(path: str) -> bool:
    """Whether a path belongs to a codebook, which gradients do not move."""
    return path.rsplit(".", 1)[-1] in (EMBED_SUM, USAGE, INITIALIZED)


def read_shape(source: CodecModelConfig) -> MimiConfig:
    """The Mimi config that a training configuration names.

    Raises:
      ConfigError, HubError: what is missing, malformed, or differs between shape and weights.
    """
    found = None
    if source.initial is not None:
        found = read_mimi_config(hub.resolve_mimi(source.initial).config)
    if source.shape is None:
        assert found is not None
        return found
    config = read_shape_file(Path(source.shape), load_mimi_config, "model.shape")
    derived = ("frame_rate", "head_dim", "codebook_dim", "bookkeeping")
    names = [f.name for f in dataclasses.fields(MimiConfig) if f.name not in derived]
    differ = [n for n in names if found and getattr(config, n) != getattr(found, n)]
    if differ:
        raise ConfigError(
            f"model.initial: {source.initial} differs from model.shape in {', '.join(differ)}; "
            "leave model.shape out to take the shape of the weights"
        )
    return config


def load_weights(source: str) -> dict[str, Array]:
    """All weights of a published codec as a flat dict.

    Raises:
      CheckpointError, ConfigError, HubError: it cannot be read.
    """
    mimi, _, _ = load_mimi(hub.resolve_mimi(source))
    return dict(checkpoint.flatten_tree(nnx.state(mimi))[0])


def random_params(generator: Generator, seed: int) -> dict[str, np.ndarray]:
    """Initial values, each a function of the seed and the parameter's own path.

    Convolutions normal of variance 2 / fan-in, linear maps of 1 / fan-in, norms 1, biases 0, layer
    scales as the config says. Drawn by numpy: compiling the draws of a few hundred shapes would
    take most of a minute.
    """
    config, result = generator.config, {}
    for path, leaf in generator.params.items():
        random = np.random.default_rng([seed, zlib.crc32(path.encode())])
        name = path.rsplit(".", 1)[-1]
        if len(leaf.shape) == 1:
            value = {"bias": 0.0, "scale": config.layer_scale_initial_scale}.get(name, 1.0)
            result[path] = np.full(leaf.shape, value, np.float32)
            continue
        fan_in = int(np.prod(leaf.shape[1:]))
        if len(leaf.shape) == 4:  # transposed: [R, F, M, D]
            fan_in = leaf.shape[2] * leaf.shape[3]
        if path == "upsample.weight":  # grouped and transposed: [D, F / G, K]
            fan_in = leaf.shape[0] // config.upsample_groups * KERNEL // STRIDE
        variance = (1 if len(leaf.shape) == 2 else 2) / fan_in
        noise = random.standard_normal(leaf.shape, np.float32)
        result[path] = noise * np.float32(variance**0.5)
    return result


def random_codebooks(generator: Generator, seed: int) -> dict[str, np.ndarray]:
    """Normal entries of usage 1, where nothing better is known yet."""
    result = {}
    for path, leaf in generator.codebooks.items():
        random = np.random.default_rng([seed, zlib.crc32(path.encode())])
        if path.endswith(EMBED_SUM):
            result[path] = random.standard_normal(leaf.shape, np.float32)
        else:
            result[path] = np.ones(leaf.shape, np.float32)
    return result


def forward_flops(generator: Generator, samples: int) -> float:
    """Operations of the products and convolutions of one pass over one row of `samples` samples."""
    shape = jax.ShapeDtypeStruct((1, samples), np.float32)
    choices = jax.eval_shape(lambda: row_choices(jax.random.key(0), 1, 1, CodebookConfig()))
    traced = jax.make_jaxpr(generator)(generator.params, generator.codebooks, shape, choices)
    return _flops(traced.jaxpr)


def _flops(jaxpr: Any) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            inner = np.prod([left[axis] for axis in contracted], dtype=float)
            total += 2 * inner * float(np.prod(equation.outvars[0].aval.shape, dtype=float))
        elif equation.params.get("target_name") == FLOAT32_PRODUCT:
            inner = equation.invars[0].aval.shape[-1]
            total += 2 * inner * float(np.prod(equation.outvars[0].aval.shape, dtype=float))
        elif equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
            inner = np.prod(kernel, dtype=float) / outputs
            total += 2 * inner * float(np.prod(equation.outvars[0].aval.shape, dtype=float))
        for value in equation.params.values():
            inner_jaxpr = getattr(value, "jaxpr", value)
            if hasattr(inner_jaxpr, "eqns"):
                total += _flops(inner_jaxpr)
    return total


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
