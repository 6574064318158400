"""The training form of the split residual quantiser.

Inference (:mod:`dia2_jax.mimi.rvq`) looks up the nearest entry. Training passes gradients straight
through that choice, pulls features towards the entries (commitment), and lets the entries follow
the features as running means, without gradients (van den Oord et al., 2017, appendix A.1; the
residual form as in Zeghidour et al., 2021). A row may be heard through fewer codebooks, or not
quantised at all (Défossez et al., 2024).

Codebooks are the flat part ``{path: array}`` of the codec's state that gradients do not move.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from dia2_jax.mimi.rvq import ResidualQuantizer, SplitQuantizer
from dia2_jax.typing import Array, Bool, Float, Int
from train.codec_training.config import CodebookConfig

#: Names of a codebook's three arrays below its path.
EMBED_SUM, USAGE, INITIALIZED = "embed_sum", "cluster_usage", "initialized"

Codebooks = dict[str, Array]


@struct.dataclass
class Assignments:
    """What the vectors of a batch say about the codebooks; C codebooks, N vectors.

    Attributes:
      codes: ``[C, N]``, the nearest entry of each vector.
      residuals: ``[C, N, D]``, what each codebook was asked to quantise; no gradient.
    """

    codes: Int[Array, "C N"]
    residuals: Float[Array, "C N D"]


class Quantized(NamedTuple):
    """Result of :func:`quantize`.

    Attributes:
      features: ``[B, T, D]``, what the decoder hears.
      semantic: ``[B, T, D]``, the semantic codebooks' sum before its output projection, in the
        quantiser's inner width; gradients pass straight through.
      commitment: mean square distance of what each codebook was given to its entry, averaged over
        codebooks; a row counts only for the codebooks it is heard through.
      assignments: of all codebooks, for :func:`update_codebooks`.
    """

    features: Float[Array, "B T D"]
    semantic: Float[Array, "B T D"]
    commitment: Float[Array, ""]
    assignments: Assignments


class RowChoices(NamedTuple):
    """Random decisions of each row.

    Attributes:
      active: number of codebooks, 1 ... C, that the row is heard through.
      quantized: False where the row bypasses the codebooks.
      predicted: True where the decoder hears the predicted codes of the row, all of them.
    """

    active: Int[Array, " B"]
    quantized: Bool[Array, " B"]
    predicted: Bool[Array, " B"]


def codebook_paths(codebooks: Codebooks) -> list[str]:
    """Paths of the codebooks, semantic ones first, in coding order."""
    stem = "." + EMBED_SUM
    found = [path.removesuffix(stem) for path in codebooks if path.endswith(stem)]

    def order(path: str) -> tuple[bool, int]:
        return ("acoustic" in path, int(path.rsplit(".", 1)[1]))

    return sorted(found, key=order)


def row_choices(key: Array, rows: int, codebooks: int, config: CodebookConfig) -> RowChoices:
    """Draw every row's choices from ``fold_in(key, row)``, whatever the batch is split into."""

    def draw(row: Array) -> tuple[Array, Array, Array]:
        own = jax.random.fold_in(key, row)
        dropped, count, skipped = jax.random.split(own, 3)
        predict = jax.random.uniform(jax.random.fold_in(own, 3)) < config.predicted
        some = jax.random.randint(count, (), 1, codebooks + 1)
        drop = jax.random.uniform(dropped) < config.dropout
        skip = jax.random.uniform(skipped) < config.unquantized
        return jnp.where(drop, some, codebooks), ~skip, predict

    return RowChoices(*jax.vmap(draw)(jnp.arange(rows)))


def quantize(quantizer: SplitQuantizer, x: Float[Array, "B T D"], choices: RowChoices) -> Quantized:
    """Quantise features so that gradients pass.

    With every codebook active, ``features`` equals ``quantizer.decode(quantizer.encode(x))``.
    """
    split = len(quantizer.semantic.codebooks)
    semantic, first, low = _residual(quantizer.semantic, x, choices, 0)
    acoustic, second, high = _residual(quantizer.acoustic, x, choices, split)
    features = _project_out(quantizer.semantic, semantic.heard)
    features = features + _project_out(quantizer.acoustic, acoustic.heard)
    joined = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)
    commitment = jnp.concatenate([low, high]).mean()
    return Quantized(features, semantic.through, commitment, joined)


class _Branch(NamedTuple):
    through: Float[Array, "B T D"]  # all codebooks, straight-through
    heard: Float[Array, "B T D"]  # what the row's choices let pass


def _residual(
    branch: ResidualQuantizer, x: Float[Array, "B T D"], choices: RowChoices, offset: int
) -> tuple[_Branch, Assignments, Float[Array, " C"]]:
    """One branch; ``offset`` codebooks are counted before its first."""
    x = x if branch.input_proj is None else branch.input_proj(x)
    batch, steps, width = x.shape
    residual = x
    total = jnp.zeros_like(x)  # of the codebooks that the row is heard through
    everything = jnp.zeros_like(x)
    codes, residuals, losses = [], [], []
    for index, codebook in enumerate(branch.codebooks):
        chosen = lax.stop_gradient(codebook.encode(residual, codebook.half_norms()))
        entries = lax.stop_gradient(codebook.decode(chosen))
        active = (offset + index < choices.active)[:, None, None]
        losses.append(jnp.mean(jnp.where(active, jnp.square(residual - entries), 0.0)))
        codes.append(chosen.reshape(-1))
        residuals.append(lax.stop_gradient(residual).reshape(batch * steps, width))
        residual = residual - entries
        total = total + jnp.where(active, entries, 0.0)
        everything = everything + entries
    through = x + lax.stop_gradient(everything - x)
    # A branch without an active codebook is silent, as in a decode of fewer codebooks.
    any_active = (offset < choices.active)[:, None, None]
    heard = jnp.where(any_active, x + lax.stop_gradient(total - x), 0.0)
    heard = jnp.where(choices.quantized[:, None, None], heard, x)
    return (
        _Branch(through, heard),
        Assignments(jnp.stack(codes), jnp.stack(residuals)),
        jnp.stack(losses),
    )


def _project_out(branch: ResidualQuantizer, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return x if branch.output_proj is None else branch.output_proj(x)


def update_codebooks(
    codebooks: Codebooks, assignments: Assignments, key: Array, config: CodebookConfig
) -> tuple[Codebooks, Float[Array, " C"]]:
    """Move the running sums towards a batch, then revive entries that nothing falls to any more.

    ``usage' = decay * usage + (1 - decay) * count`` and the same for the sums, so an entry is the
    mean of what was assigned to it, recent vectors counting more. An entry whose usage is below
    ``dead_share`` of its codebook's mean usage is replaced by a vector of the batch, drawn without
    repetition, with ``revived_share`` of the mean usage behind it.

    Args:
      codebooks: flat arrays of all codebooks.
      assignments: of one batch, in the order of :func:`codebook_paths`.
      key: of this step.
      config: decay and the two shares.

    Returns:
      The new arrays, and how many entries of each codebook were replaced.
    """
    paths = codebook_paths(codebooks)

    def one(part: tuple[Array, ...]) -> tuple[Array, Array, Array]:
        codes, vectors, usage, embed_sum, index = part
        counts, sums = _totals(codes, vectors, usage.shape[0])
        usage = config.decay * usage + (1 - config.decay) * counts
        embed_sum = config.decay * embed_sum + (1 - config.decay) * sums
        return _revive(usage, embed_sum, vectors, jax.random.fold_in(key, index), config)

    # One after another, by one compiled body: the table of which vector fell where is large.
    usage, sums, replaced = lax.map(
        one,
        (
            assignments.codes,
            assignments.residuals,
            jnp.stack([codebooks[f"{path}.{USAGE}"] for path in paths]),
            jnp.stack([codebooks[f"{path}.{EMBED_SUM}"] for path in paths]),
            jnp.arange(len(paths)),
        ),
    )
    updated = dict(codebooks)
    for index, path in enumerate(paths):
        updated[f"{path}.{USAGE}"], updated[f"{path}.{EMBED_SUM}"] = usage[index], sums[index]
    return updated, replaced


def _totals(
    codes: Int[Array, " N"], vectors: Float[Array, "N D"], entries: int
) -> tuple[Float[Array, " V"], Float[Array, "V D"]]:
    """Count and sum of the vectors that fall to each entry."""
    # A product with one-hot rows: XLA's CPU backend scatters element by element, and over a
    # sharded batch this is an ordinary all-reduce.
    hot = jax.nn.one_hot(codes, entries, dtype=vectors.dtype)
    sums = jnp.einsum("NV,ND->VD", hot, vectors, precision=lax.Precision.HIGHEST)
    return hot.sum(axis=0), sums


def _revive(
    usage: Float[Array, " V"],
    embed_sum: Float[Array, "V D"],
    vectors: Float[Array, "N D"],
    key: Array,
    config: CodebookConfig,
) -> tuple[Array, Array, Array]:
    count = vectors.shape[0]
    mean = usage.mean()
    dead = usage < config.dead_share * mean
    # The k-th dead entry takes the k-th of the shuffled vectors; where they run out, it waits.
    rank = jnp.cumsum(dead) - 1
    revived = dead & (rank < count)
    shuffled = jax.random.permutation(key, count)
    fresh = vectors[shuffled[jnp.clip(rank, 0, count - 1)]]
    weight = config.revived_share * mean
    usage = jnp.where(revived, weight, usage)
    embed_sum = jnp.where(revived[:, None], weight * fresh, embed_sum)
    return usage, embed_sum, revived.sum().astype(jnp.float32)


def initialize_codebooks(
    quantizer: SplitQuantizer,
    codebooks: Codebooks,
    x: Float[Array, "N D"],
    key: Array,
    iterations: int,
) -> Codebooks:
    """Codebooks by k-means on features, each on what the ones before it leave over.

    Args:
      quantizer: for its input projections; its own codebooks are not read.
      codebooks: flat arrays, for their paths and shapes.
      x: features of at least as many frames as a codebook has entries.
      key: chooses the vectors that the means start from.
      iterations: of Lloyd's algorithm.

    Returns:
      The arrays, with the last iteration's counts (scaled to a mean of 1) as usage.
    """
    result = dict(codebooks)
    for path in codebook_paths(codebooks):
        number = int(path.rsplit(".", 1)[1])
        if number == 0:
            branch = quantizer.acoustic if "acoustic" in path else quantizer.semantic
            residual = x if branch.input_proj is None else branch.input_proj(x[None])[0]
        entries = codebooks[f"{path}.{USAGE}"].shape[0]
        key, own = jax.random.split(key)
        means, counts = kmeans(residual, entries, own, iterations)
        # A mean that lost all its vectors keeps its place and a small weight.
        usage = jnp.maximum(counts, 0.1) * (entries / residual.shape[0])
        result[f"{path}.{USAGE}"] = usage
        result[f"{path}.{EMBED_SUM}"] = means * usage[:, None]
        result[f"{path}.{INITIALIZED}"] = jnp.ones_like(codebooks[f"{path}.{INITIALIZED}"])
        residual = residual - means[nearest(residual, means)]
    return result


@functools.partial(jax.jit, static_argnames=("clusters", "iterations"))
def kmeans(
    vectors: Float[Array, "N D"], clusters: int, key: Array, iterations: int
) -> tuple[Float[Array, "V D"], Float[Array, " V"]]:
    """Means and sizes of clusters by Lloyd's algorithm, from distinct random vectors.

    A mean that nothing falls to stays where it is.
    """
    start = jax.random.permutation(key, vectors.shape[0])[:clusters]

    def refine(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        means, _ = carry
        counts, sums = _totals(nearest(vectors, means), vectors, clusters)
        moved = sums / jnp.maximum(counts, 1)[:, None]
        return jnp.where(counts[:, None] > 0, moved, means), counts

    initial = (vectors[start], jnp.ones((clusters,), vectors.dtype))
    return lax.fori_loop(0, iterations, refine, initial)


def nearest(vectors: Float[Array, "N D"], means: Float[Array, "V D"]) -> Int[Array, " N"]:
    """The nearest mean of every vector, the first of equals."""
    products = jnp.einsum("ND,VD->NV", vectors, means, precision=lax.Precision.HIGHEST)
    return jnp.argmin(0.5 * jnp.sum(jnp.square(means), axis=-1) - products, axis=-1)


def perplexity(counts: Float[Array, "C V"]) -> Float[Array, " C"]:
    """``exp(entropy)`` of how often each entry was used: V when all are used alike, 1 when one is.

    Codebooks without any count give 1.
    """
    share = counts / jnp.maximum(counts.sum(axis=-1, keepdims=True), 1)
    return jnp.exp(-jnp.sum(share * jnp.log(jnp.where(share > 0, share, 1.0)), axis=-1))
