"""Parity of the network and of guidance: what goes in and comes out, without any sampling."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dia2_jax.generation.sampling import guide
from eval.parity_checks import NETWORK_BAR, TIE, Checks
from eval.parity_folder import Golden

_DECODER = ("hidden", "action", "cb0")
_DEPFORMER = ("dep_in", "dep_main", "dep_second", "dep_logits")
_FILTER = re.compile(r"scale(\d+(?:\.\d+)?)_k(\d+)")


def check_network(golden: Golden, checks: Checks) -> None:
    """``network.npz``: decoder and depformer, teacher-forced."""
    arrays = golden.arrays("network")
    if arrays is None:
        checks.absent("network", "no network.npz")
        return
    for name in sorted(set(arrays) - {"tokens", *_DECODER, *_DEPFORMER}):
        checks.unread(f"network: {name}", "unknown array")
    held = [name for name in _DECODER if name in arrays]
    for form, run in (("whole", _decoder_whole), ("step by step", _decoder_steps)):
        for name in _DECODER:
            if name not in arrays or "tokens" not in arrays:
                checks.absent(f"network: {name}, {form}", "no such array")
        if not held or "tokens" not in arrays:
            continue
        with checks.guard(f"network: decoder, {form}"):
            ours = run(golden, arrays["tokens"])
            for name in held:
                checks.close(f"network: {name}, {form}", ours[name], arrays[name])
    for form, stages in (("whole", _depformer_whole), ("stage by stage", _depformer_stages)):
        missing = [name for name in ("hidden", *_DEPFORMER) if name not in arrays]
        if missing:
            checks.absent(f"network: depformer, {form}", f"no {', '.join(missing)}")
            continue
        with checks.guard(f"network: depformer, {form}"):
            checks.close(
                f"network: depformer, {form}", stages(golden, arrays), arrays["dep_logits"]
            )


def _decoder_whole(golden: Golden, tokens: np.ndarray) -> dict[str, np.ndarray]:
    positions = np.tile(np.arange(tokens.shape[2]), (len(tokens), 1))
    out = golden.whole_decoder(golden.programs.params, tokens, positions)
    return {name: np.asarray(getattr(out, name)).swapaxes(0, 1) for name in _DECODER}


def _decoder_steps(golden: Golden, tokens: np.ndarray) -> dict[str, np.ndarray]:
    programs = golden.programs
    batch, _, steps = tokens.shape

    def run(params, column, position, cache):
        transformer = nnx.merge(programs.graph, params).transformer
        return transformer.step(column, position, position, cache)

    step = jax.jit(run)
    cache = programs.model().transformer.init_cache(batch, steps)
    outputs = []
    for t in range(steps):
        position = jnp.full(batch, t, jnp.int32)
        out, cache = step(programs.params, jnp.asarray(tokens[:, :, t]), position, cache)
        outputs.append(jax.device_get(out))
    return {name: np.stack([getattr(out, name) for out in outputs]) for name in _DECODER}


def _frames(arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    """Codes in, hidden, main and second text of all frames and rows as one batch."""
    steps, stages, batch = arrays["dep_in"].shape
    return (
        arrays["dep_in"].transpose(0, 2, 1).reshape(steps * batch, stages),
        arrays["hidden"].reshape(steps * batch, -1),
        arrays["dep_main"].reshape(-1),
        arrays["dep_second"].reshape(-1),
    )


def _like_recorded(logits: np.ndarray, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """``[T B, stage, V]`` as ``[T, stage, B, V]``."""
    steps, stages, batch = arrays["dep_in"].shape
    return logits.reshape(steps, batch, stages, -1).transpose(0, 2, 1, 3)


def _depformer_whole(golden: Golden, arrays: dict[str, np.ndarray]) -> np.ndarray:
    logits = golden.whole_depformer(golden.programs.params, *_frames(arrays))
    return _like_recorded(np.asarray(logits), arrays)


def _depformer_stages(golden: Golden, arrays: dict[str, np.ndarray]) -> np.ndarray:
    programs = golden.programs
    codes, hidden, main, second = _frames(arrays)

    @functools.partial(jax.jit, static_argnames="weight_set")
    def run(params, stage, previous, hidden, main, second, cache, *, weight_set):
        depformer = nnx.merge(programs.graph, params).depformer
        conditions, text = depformer.conditions(hidden), depformer.text(main, second)
        return depformer.step(stage, weight_set, previous, conditions, text, cache)

    cache = programs.model().depformer.init_cache(len(hidden))
    logits = []
    for stage, weight_set in enumerate(golden.config.schedule):
        out, cache = run(
            programs.params,
            jnp.int32(stage),
            jnp.asarray(codes[:, stage]),
            hidden,
            main,
            second,
            cache,
            weight_set=weight_set,
        )
        logits.append(np.asarray(out))
    return _like_recorded(np.stack(logits, axis=1), arrays)


def check_guidance(golden: Golden, checks: Checks) -> None:
    """``guidance.npz``: which candidates survive, for every recorded scale and filter size."""
    arrays = golden.arrays("guidance")
    if arrays is None:
        checks.absent("guidance", "no guidance.npz")
        return
    settings = {name: found for name in arrays if (found := _FILTER.fullmatch(name))}
    for name in sorted(set(arrays) - set(settings) - {"logits"}):
        checks.unread(f"guidance: {name}", "unknown array")
    if "logits" not in arrays or not settings:
        checks.absent("guidance", "no logits, or no scaleS_kK")
        return
    pairs = arrays["logits"].reshape(len(arrays["logits"]), 2, -1)
    for name, found in sorted(settings.items()):
        with checks.guard(f"guidance: {name}"):
            _check_filter(checks, name, pairs, arrays[name], float(found[1]), int(found[2]))


def _check_filter(
    checks: Checks, name: str, pairs: np.ndarray, recorded: np.ndarray, scale: float, size: int
) -> None:
    rows, _, vocabulary = pairs.shape
    recorded = recorded.reshape(rows, vocabulary)
    worst, ties, detail = 0.0, 0, ""
    # Sorting all entries, and no more than are asked for, as a generation does.
    for bound in (0, 1 << (max(size, 1) - 1).bit_length()):
        ours = np.asarray(
            guide(
                jnp.asarray(pairs[:, 0]),
                jnp.asarray(pairs[:, 1]),
                jnp.full(rows, scale, jnp.float32),
                jnp.full(rows, size, jnp.int32),
                bound,
            )
        )
        for row in range(rows):
            error, tie = filtered_difference(
                ours[row], recorded[row], guided(pairs[row, 0], pairs[row, 1], scale), size
            )
            ties += tie
            if error > worst:
                worst, detail = error, f"in row {row}"
    checks.at_most(f"guidance: {name}", worst, NETWORK_BAR, detail=detail, ties=ties)


def guided(conditional: np.ndarray, unconditional: np.ndarray, scale: float) -> np.ndarray:
    """The logits by which guidance ranks candidates, in float64."""
    low = np.asarray(unconditional, np.float64)
    return low + scale * (np.asarray(conditional, np.float64) - low)


def filtered_difference(
    ours: np.ndarray, recorded: np.ndarray, ranked_by: np.ndarray | None, size: int
) -> tuple[float, bool]:
    """Largest difference of two filtered rows of logits, and whether it leaves out a tie.

    Entries that survive in one row only are an infinite difference, unless all of them lie
    within ``TIE`` of the entries on either side of the filter's cut in ``ranked_by``.
    """
    if ours.shape != recorded.shape:
        return np.inf, False
    odd = np.isneginf(ours) != np.isneginf(recorded)
    tie = False
    if odd.any():
        tie = ranked_by is not None and near_cut(ranked_by, size)[odd].all()
        if not tie:
            return np.inf, False
    both = ~odd & ~np.isneginf(ours)
    if not both.any():
        return np.inf, tie
    with np.errstate(invalid="ignore", over="ignore"):
        gap = np.abs(ours[both].astype(np.float64) - recorded[both].astype(np.float64))
    return float(np.where(np.isnan(gap), np.inf, gap).max()), bool(tie)


def near_cut(ranked_by: np.ndarray, size: int) -> np.ndarray:
    """Which entries take part in a tie at the filter's cut."""
    if not 0 < size < len(ranked_by):
        return np.zeros(len(ranked_by), bool)
    best = np.sort(ranked_by)[::-1]
    inside, outside = best[size - 1], best[size]
    if inside - outside > TIE:
        return np.zeros(len(ranked_by), bool)
    return (np.abs(ranked_by - inside) <= TIE) | (np.abs(ranked_by - outside) <= TIE)
