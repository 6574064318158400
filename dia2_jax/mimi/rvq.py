"""Split residual vector quantiser: features to codes and back (Défossez et al., 2024).

The first codebooks (one in the published codec) quantise the features on their own and carry
meaning; the others quantise the same features residually, one after another. Every codebook
entry is the mean of what was assigned to it, kept as the published running sums.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from dia2_jax.config import MimiConfig
from dia2_jax.nn.conv import CausalConv1d
from dia2_jax.nn.linear import project
from dia2_jax.typing import Array, Float, Int

#: Floor of the usage count in ``embed_sum / cluster_usage``.
USAGE_EPSILON = 1e-5


class CodebookVariable(nnx.Variable):
    """Statistics of a codebook: part of the checkpoint, not trained by gradients."""


class Codebook(nnx.Module):
    """V entries of width D, kept as sums and counts.

    Attributes:
      embed_sum: ``[V, D]``, sum of the vectors assigned to each entry.
      cluster_usage: ``[V]``, how many they were.
      initialized: ``[1]``, carried for export.
    """

    def __init__(self, entries: int, width: int, *, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        initial = rngs.params.normal((entries, width), param_dtype)
        self.embed_sum = CodebookVariable(initial)
        self.cluster_usage = CodebookVariable(jnp.ones((entries,), param_dtype))
        self.initialized = CodebookVariable(jnp.ones((1,), param_dtype))

    def _usage(self) -> Float[Array, " V"]:
        return jnp.maximum(self.cluster_usage[...], USAGE_EPSILON)

    def decode(self, codes: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        """The entries of ``codes``."""
        # Divided after the look-up: the table itself is never built.
        rows = self.embed_sum[...].at[codes].get(mode="clip")
        return rows / self._usage().at[codes].get(mode="clip")[..., None]

    def half_norms(self) -> Float[Array, " V"]:
        """Half the squared length of every entry."""
        entries = self.embed_sum[...] / self._usage()[:, None]
        return 0.5 * jnp.sum(jnp.square(entries), axis=-1)

    def encode(self, x: Float[Array, "B T D"], half_norms: Float[Array, " V"]) -> Int[Array, "B T"]:
        """The nearest entry of every vector, the first of equals.

        ``argmin |x - e|^2 = argmin |e|^2 / 2 - x . e``.
        """
        products = project(x, self.embed_sum[...])
        return jnp.argmin(half_norms - products / self._usage(), axis=-1).astype(jnp.int32)


class ResidualQuantizer(nnx.Module):
    """Codebooks that each quantise what the ones before left over."""

    def __init__(
        self, config: MimiConfig, codebooks: int, *, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        inner, outer = config.vector_quantization_hidden_dimension, config.hidden_size

        def pointwise(inputs: int, outputs: int) -> CausalConv1d | None:
            """Published as a convolution of kernel 1, and only where the widths differ."""
            if inner == outer:
                return None
            return CausalConv1d(
                inputs, outputs, 1, use_bias=False, param_dtype=param_dtype, rngs=rngs
            )

        self.input_proj = pointwise(outer, inner)
        self.output_proj = pointwise(inner, outer)
        self.codebooks = nnx.List(
            Codebook(config.codebook_size, inner, param_dtype=param_dtype, rngs=rngs)
            for _ in range(codebooks)
        )

    def half_norms(self) -> tuple[Float[Array, " V"], ...]:
        """:meth:`Codebook.half_norms` of every codebook."""
        return tuple(codebook.half_norms() for codebook in self.codebooks)

    def encode(
        self, x: Float[Array, "B T D"], half_norms: tuple[Array, ...], codebooks: int
    ) -> Int[Array, "B C T"]:
        """Codes of the first ``codebooks`` codebooks."""
        residual = x if self.input_proj is None else self.input_proj(x)
        codes = []
        for codebook, norms in list(zip(self.codebooks, half_norms, strict=True))[:codebooks]:
            codes.append(codebook.encode(residual, norms))
            residual = residual - codebook.decode(codes[-1])
        return jnp.stack(codes, axis=1)

    def decode(self, codes: Int[Array, "B C T"]) -> Float[Array, "B T D"]:
        """Sum of the entries, back in the width of the features; C may fall short."""
        total = self.codebooks[0].decode(codes[:, 0])
        for index in range(1, codes.shape[1]):
            total = total + self.codebooks[index].decode(codes[:, index])
        return total if self.output_proj is None else self.output_proj(total)


class SplitQuantizer(nnx.Module):
    """Semantic codebooks beside acoustic ones; their codes are stacked in that order."""

    def __init__(
        self, config: MimiConfig, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        semantic = config.num_semantic_quantizers
        acoustic = config.num_quantizers - semantic
        self.semantic = ResidualQuantizer(config, semantic, param_dtype=param_dtype, rngs=rngs)
        self.acoustic = ResidualQuantizer(config, acoustic, param_dtype=param_dtype, rngs=rngs)

    @property
    def codebooks(self) -> int:
        """Number of codebooks C."""
        return len(self.semantic.codebooks) + len(self.acoustic.codebooks)

    def half_norms(self) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """What :meth:`encode` needs of the codebooks; compute it once for many frames."""
        return self.semantic.half_norms(), self.acoustic.half_norms()

    def encode(
        self,
        x: Float[Array, "B T D"],
        half_norms: tuple[tuple[Array, ...], tuple[Array, ...]] | None = None,
        codebooks: int | None = None,
    ) -> Int[Array, "B C T"]:
        """Codes of the first ``codebooks`` codebooks (all of them by default), int32."""
        semantic, acoustic = self.half_norms() if half_norms is None else half_norms
        count = self.codebooks if codebooks is None else codebooks
        split = len(self.semantic.codebooks)
        codes = self.semantic.encode(x, semantic, min(count, split))
        if count <= split:
            return codes
        rest = self.acoustic.encode(x, acoustic, count - split)
        return jnp.concatenate([codes, rest], axis=1)

    def decode(self, codes: Int[Array, "B C T"]) -> Float[Array, "B T D"]:
        """Features of the first C codebooks' codes, any 1 <= C."""
        split = len(self.semantic.codebooks)
        x = self.semantic.decode(codes[:, :split])
        if codes.shape[1] > split:
            x = x + self.acoustic.decode(codes[:, split:])
        return x
