"""LoRA (Hu et al. 2021): low-rank adapters beside frozen ``[out, in]`` weights.

The effective weight of a target is ``W + scaling * B @ A`` with ``A: [rank, in]`` and
``B: [out, rank]``. B starts at zero, so untrained adapters change nothing. Adapters are a flat
dict like any parameters: a target ``x.q_proj.weight`` has ``x.q_proj.lora_a`` and
``x.q_proj.lora_b``.

There are two ways to run a model with adapters, equal to float32 rounding:

- :func:`attach` puts the low-rank path beside each target's matmul. The gradient of W is never
  formed: the backward pass does two thirds of a full step's work and nothing of W's size is
  allocated. This is the way to train.
- :func:`apply` forms the effective weights once a step. It needs no module, only flat dicts, and
  runs the very arithmetic of the merged model; it costs a copy of every target during the step
  and again as much for its gradient, and computes W's whole gradient.

Memory at the 2B shape (1.92 billion parameters, 1.53 billion of them in the default targets): the
frozen weights take 7.7 GB in float32, 3.8 GB in bfloat16. An adapter parameter takes 16 bytes
(master, two moments, gradient), so rank 128 trains 154 million of them in 2.5 GB and saves a file
of 0.61 GB; rank 16 trains 19 million in 0.31 GB and saves 77 MB. Full fine-tuning holds 31 GB.
:func:`apply` adds 6.1 GB (float32) of effective weights, and up to as much for their gradients.

There is no dropout: :func:`apply` could not have it, and the relatives' recipes train without.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pydantic.dataclasses import dataclass

from dia2_jax.checkpoint import flatten_tree
from dia2_jax.config.reading import STRICT, require, require_positive, validate
from dia2_jax.convert.safetensors_io import SafetensorsFile, TensorSpec, write_safetensors
from dia2_jax.errors import CheckpointError, ConfigError
from dia2_jax.nn.linear import Linear, exact, fan_in_init, project
from dia2_jax.typing import Array, ArrayLike, Float
from train.trainable import is_projection, matches, select

Params = dict[str, Array]
_A, _B, _WEIGHT = ".lora_a", ".lora_b", ".weight"
_FORMAT = "dia2-jax-lora-1"
_LISTED = 8

#: Logical axes of adapters (see ``dia2_jax.sharding``).
AXES = (("*.lora_a", ". D"), ("*.lora_b", "N ."))


@dataclass(frozen=True, config=STRICT)
class LoraConfig:
    """Adapters of a run.

    Attributes:
      rank: of the update.
      scaling: factor of ``B @ A`` as it is (not divided by the rank).
      targets: patterns of the weights that get adapters.
    """

    rank: int = 128
    scaling: float = 2.0
    targets: tuple[str, ...] = (
        "transformer.layers.*.attn.*_proj.weight",
        "transformer.layers.*.mlp.*.weight",
        "depformer.layers.*.self_attention.*_proj.*.weight",
        "depformer.layers.*.mlp.*.weight",
    )

    def __post_init__(self) -> None:
        require_positive(self, "rank", "scaling")
        require(len(self.targets) > 0, "targets", "names no weight")


def target_paths(params: Mapping[str, Any], config: LoraConfig) -> list[str]:
    """Paths of the weights that get adapters.

    Raises:
      ConfigError: a pattern matches nothing, or matches what is no matrix of a Linear (norms,
        embedding tables, convolutions); names them.
    """
    paths = select(params, config.targets, "lora.targets")
    wrong = [path for path in paths if not is_projection(path, params[path].shape)]
    if wrong:
        raise ConfigError(
            f"lora.targets: {len(wrong)} matched parameters are not 2-D weights of a Linear: "
            f"{_few(wrong)}; narrow the patterns"
        )
    return paths


def init_adapters(params: Mapping[str, Any], config: LoraConfig, key: Array) -> Params:
    """Fresh float32 adapters: A random (variance 1 / in), B zero.

    Each A is a function of the key and its own path, so another choice of targets changes none.

    Args:
      params: flat dict of parameters; only shapes are read.
      config: of the adapters.
      key: a typed random key.

    Raises:
      ConfigError: see :func:`target_paths`.
    """
    adapters: Params = {}
    for path in target_paths(params, config):
        outputs, inputs = params[path].shape
        stem = path.removesuffix(_WEIGHT)
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        adapters[stem + _A] = fan_in_init(own, (config.rank, inputs), jnp.float32)
        adapters[stem + _B] = jnp.zeros((outputs, config.rank), jnp.float32)
    return adapters


def apply(params: Mapping[str, Array], adapters: Mapping[str, Array], scaling: float) -> Params:
    """All parameters, with the effective weights ``W + scaling * B @ A`` at the targets.

    Effective weights are float32 also where W is bfloat16 (rounding them would lose small
    updates); a cast to the compute dtype that follows in the same jit fuses with the sum.
    Differentiable in the adapters. See the module for memory.
    """
    effective = dict(params)
    for stem in _stems(adapters):
        low, high = adapters[stem + _A], adapters[stem + _B]
        delta = jnp.matmul(high, low, precision=exact(low.dtype))
        weight = params[stem + _WEIGHT]
        effective[stem + _WEIGHT] = weight.astype(jnp.float32) + scaling * delta
    return effective


class LoraLinear(nnx.Module):
    """A Linear and the low-rank path beside it; see :func:`attach`."""

    def __init__(self, base: Linear, rank: int, scaling: float) -> None:
        outputs, inputs = base.weight.shape
        self.weight, self.bias = base.weight, base.bias
        self.lora_a = nnx.Param(jax.ShapeDtypeStruct((rank, inputs), jnp.float32))
        self.lora_b = nnx.Param(jax.ShapeDtypeStruct((outputs, rank), jnp.float32))
        self.scaling = scaling

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        y = project(x, self.weight[...])
        low = project(x, self.lora_a[...])
        y = y + self.scaling * project(low, self.lora_b[...])
        return y if self.bias is None else y + self.bias[...].astype(jnp.float32)


def attach(graphdef: nnx.GraphDef[Any], abstract: Any, config: LoraConfig) -> tuple[Any, Any]:
    """Structure and abstract parameters of a model whose targets carry adapters.

    Args:
      graphdef: of the model, as ``abstract_dia2(config)`` returns it.
      abstract: its abstract parameters.
      config: of the adapters.

    Returns:
      The new graph definition and abstract parameters. By dotted name the latter are the model's
      own and the adapters', so ``unflatten_tree`` fills them from ``{**params, **adapters}``.

    Raises:
      ConfigError: see :func:`target_paths`.
    """
    model = nnx.merge(graphdef, abstract)
    for path in target_paths(flatten_tree(abstract)[0], config):
        *parents, name = path.removesuffix(_WEIGHT).split(".")
        owner: Any = model
        for part in parents:
            owner = _child(owner, part)
        adapted = LoraLinear(_child(owner, name), config.rank, config.scaling)
        if isinstance(owner, nnx.List):
            owner[int(name)] = adapted
        else:
            setattr(owner, name, adapted)
    return nnx.split(model)


def merge(params: Mapping[str, Array], adapters: Mapping[str, Array], config: LoraConfig) -> Params:
    """All parameters with the adapters folded in, for export; float32 at the targets.

    A weight that its adapter does not change keeps its bits. Takes one copy of the targets. Where
    the run held its weights in bfloat16, pass the published float32 ones: they lose nothing then.

    Raises:
      CheckpointError: adapters that do not fit `params`; lists every problem.
    """
    check_adapters(adapters, params, config, "merge")
    changed = apply(params, adapters, config.scaling)
    for stem in _stems(adapters):
        path = stem + _WEIGHT
        # Only where the sum differs: adding zero would turn -0.0 into 0.0.
        weight = params[path].astype(jnp.float32)
        changed[path] = jnp.where(changed[path] == weight, weight, changed[path])
    return changed


def check_adapters(
    adapters: Mapping[str, Any], params: Mapping[str, Any], config: LoraConfig, where: str
) -> None:
    """Refuse adapters that are not those of `config` on a model with `params`.

    Raises:
      CheckpointError: `where`, and every problem: names without a partner or a target, wrong
        shapes, targets without adapters.
    """
    problems = []
    for name, leaf in adapters.items():
        stem, suffix = name[: -len(_A)], name[-len(_A) :]
        path = stem + _WEIGHT
        if suffix not in (_A, _B):
            problems.append(f"{name} is no adapter (its name ends neither in {_A} nor in {_B})")
            continue
        partner = stem + (_B if suffix == _A else _A)
        if partner not in adapters:
            problems.append(f"{name} has no {partner}")
        if path not in params:
            problems.append(f"{name}: the model has no {path}")
        elif not is_projection(path, params[path].shape):
            problems.append(f"{name}: {path} is not the 2-D weight of a Linear")
        else:
            outputs, inputs = params[path].shape
            wanted = (config.rank, inputs) if suffix == _A else (outputs, config.rank)
            if tuple(leaf.shape) != wanted:
                problems.append(f"{name} is {list(leaf.shape)}, must be {list(wanted)}")
    covered = {name[: -len(_A)] + _WEIGHT for name in adapters}
    for path in params:
        if matches(path, config.targets) and path not in covered:
            problems.append(f"{path} is a target without adapters")
    if problems:
        raise CheckpointError(
            f"{where}: the adapters do not fit the model ({len(problems)} problems): "
            + "; ".join(problems)
        )


def save_adapters(
    path: str | Path,
    adapters: Mapping[str, ArrayLike],
    config: LoraConfig,
    metadata: Mapping[str, Any],
) -> None:
    """Write adapters alone as one safetensors file, whole or not at all.

    The settings and the JSON document `metadata` (base checkpoint, run, step) go into the file's
    header. Arrays of several hosts must have been gathered.

    Raises:
      CheckpointError: nothing to save, or metadata that is not JSON.
    """
    path = Path(path)
    if not adapters:
        raise CheckpointError(f"{path}: there are no adapters to save")
    try:
        header = {
            "format": _FORMAT,
            "lora": json.dumps(dataclasses.asdict(config)),
            "metadata": json.dumps(dict(metadata)),
        }
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the metadata is not JSON ({error})") from None
    specs = {
        name: TensorSpec(tuple(adapters[name].shape), np.dtype(adapters[name].dtype))
        for name in sorted(adapters)
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, specs, lambda name: np.asarray(adapters[name]), header)


def load_adapters(
    path: str | Path, params: Mapping[str, Any] | None = None
) -> tuple[dict[str, np.ndarray], LoraConfig, dict[str, Any]]:
    """Adapters, their settings and the metadata of a file that :func:`save_adapters` wrote.

    Args:
      path: the file.
      params: of the model that the adapters are for (only shapes are read); None skips the check.

    Raises:
      CheckpointError: an unreadable file, one of another kind, or adapters that do not fit
        `params`; lists every problem.
      ConfigError: its settings are malformed.
    """
    file = SafetensorsFile(path)
    header = dict(file.metadata or {})
    if header.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path}: not adapters of this project (format {header.get('format')!r}, expected "
            f"{_FORMAT!r}); pass the file that a LoRA run saved"
        )
    try:
        settings, metadata = json.loads(header["lora"]), json.loads(header["metadata"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: its metadata is damaged ({error!r})") from None
    config = validate(LoraConfig, settings, f"{path}: lora")
    adapters = {name: np.array(file.read(name)) for name in file.specs}
    if params is not None:
        check_adapters(adapters, params, config, str(path))
    return adapters, config, metadata


def _child(module: Any, name: str) -> Any:
    return module[int(name)] if isinstance(module, nnx.List) else getattr(module, name)


def _stems(adapters: Mapping[str, Any]) -> list[str]:
    return [name.removesuffix(_A) for name in adapters if name.endswith(_A)]


def _few(names: list[str]) -> str:
    more = f", … and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
