"""Codes as a model predicts them, for its codec's decoder to be trained on.

python -m train.predict_codes MODEL DATA MANIFEST OUT

A model never predicts quite the codes of a recording. A decoder that has heard its predictions
beside the recordings that they stand for makes speech of them all the same (as vocoders are tuned
on the spectrograms that their acoustic model predicts, Shen et al. 2018). Every frame is drawn with
the recording's own codes before it, so that it stays in time with the recording.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dia2_jax import checkpoint, hub
from dia2_jax.compilation_cache import enable_compilation_cache
from dia2_jax.config import Dia2Config, load_dia2_config
from dia2_jax.convert.models import load_dia2
from dia2_jax.data import PlannedRow, Row
from dia2_jax.data.batch import Slot
from dia2_jax.errors import ConfigError, DataError
from dia2_jax.generation.defaults import read_defaults
from dia2_jax.generation.sampling import draw
from dia2_jax.generation.settings import SamplingConfig
from dia2_jax.model.dia2 import Dia2Model
from dia2_jax.text.tokenizer import Tokenizer
from dia2_jax.typing import Array, Int
from train.command import EXPORT_EPILOG, Program, note
from train.recordings import Recordings, RowBuilder

#: Rows of a batch, and the multiple that their length is padded to: few shapes are compiled.
_ROWS, _LENGTH = 16, 32


def predict(
    model: Dia2Model,
    tokens: Int[Array, "B S L"],
    spoken: Int[Array, "B 2 L"],
    sampling: SamplingConfig,
    key: Array,
) -> Int[Array, "B C L"]:
    """Columns of the delayed grid, each drawn after the true ones before it.

    Args:
      tokens, spoken: of rows (see ``dia2_jax.data.frames.Row``).
      sampling: of the audio; guidance is not applied.
      key: of all draws.
    """
    rows, _, steps = tokens.shape
    vocabulary = model.config.data.depth_vocab_size
    out = model.transformer(tokens)
    hidden = out.hidden.reshape(rows * steps, -1)
    main, second = spoken.transpose(1, 0, 2).reshape(2, rows * steps)
    count = rows * steps
    temperature = jnp.full(count, sampling.temperature, jnp.float32)
    ranks = jnp.full(count, sampling.top_k, jnp.int32)

    def drawn(logits: Array, book: int) -> Array:
        keys = jax.random.split(jax.random.fold_in(key, book), count)
        return draw(logits, temperature, ranks, keys, sampling.top_k)

    stages = model.config.data.codebooks - 1
    codes = jnp.zeros((count, stages + 1), jnp.int32)
    codes = codes.at[:, 0].set(drawn(out.cb0.reshape(count, -1)[:, :vocabulary], 0))
    for stage in range(stages):
        logits = model.depformer(codes[:, :-1], hidden, (main, second))[:, stage]
        codes = codes.at[:, stage + 1].set(drawn(logits, stage + 1))
    return codes.reshape(rows, steps, -1).transpose(0, 2, 1)


def undelayed(
    grid: Int[np.ndarray, "C L"], row: Row, codes: Int[np.ndarray, "C T"], delays: Sequence[int]
) -> Int[np.ndarray, "T C"]:
    """Predicted codes by frame; those of the recording where the row does not reach."""
    result = codes.T.astype(np.int32)
    for book, delay in enumerate(delays):
        steps = np.flatnonzero(row.known[book])
        result[steps + 1 - delay, book] = grid[book, steps]
    return result


def predicted(
    model: Dia2Model,
    builder: RowBuilder,
    chosen: Sequence[int],
    sampling: SamplingConfig,
    seed: int,
) -> Iterator[tuple[int, Int[np.ndarray, "T C"]]]:
    """Recordings (by index) and their predicted codes, longest last."""
    config, recordings = builder.config, builder.recordings
    graph, params = nnx.split(model)
    run = jax.jit(
        lambda params, tokens, spoken, key: predict(
            nnx.merge(graph, params), tokens, spoken, sampling, key
        )
    )
    context = config.runtime.max_context_steps
    order = sorted(chosen, key=lambda index: recordings.frames[index])
    for number, start in enumerate(range(0, len(order), _ROWS)):
        part = order[start : start + _ROWS]
        rows = [builder.row(PlannedRow(Slot(i, 0, 1, context), 0.0), context) for i in part]
        length = -(-max(row.steps for row in rows) // _LENGTH) * _LENGTH
        tokens, spoken = _padded(rows, length, config, builder.tokenizer)
        key = jax.random.fold_in(jax.random.key(seed), number)
        grid = np.asarray(run(params, tokens, spoken, key))
        for index, row, codes in zip(part, rows, grid, strict=False):
            yield (
                index,
                undelayed(codes, row, recordings[index].codes, config.data.delay_pattern),
            )


def _padded(
    rows: Sequence[Row], length: int, config: Dia2Config, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.full((_ROWS, config.data.channels, length), config.data.audio_pad, np.int32)
    tokens[:, :2] = tokenizer.ids.pad
    spoken = np.full((_ROWS, 2, length), tokenizer.ids.pad, np.int32)
    for index, row in enumerate(rows):
        tokens[index, :, : row.steps] = row.tokens
        spoken[index, :, : row.steps] = row.spoken
    return tokens, spoken


def _audio_files(manifest: Path) -> dict[str, Path]:
    """Audio by id, of a manifest that `train.corpus` wrote (or any with id and path)."""
    try:
        lines = manifest.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
        return {row["id"]: manifest.parent / row["path"] for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f'{manifest}: expected JSON lines with an "id" and a "path" ({error!r})'
        ) from None


@click.command(cls=Program, epilog=EXPORT_EPILOG)
@click.argument("model", metavar="MODEL")
@click.argument("data", type=click.Path(path_type=Path))
@click.argument("manifest", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--limit", type=click.IntRange(min=1), metavar="N", help="Of recordings; the first ones."
)
@click.option("--seed", default=0, show_default=True, help="Of the draws.")
def main(model: str, data: Path, manifest: Path, out: Path, limit: int | None, seed: int) -> None:
    """Have MODEL predict the codes of the recordings of DATA, and write them to the folder OUT.

    DATA is what `train.prepare` made of MANIFEST, which names the audio. OUT/train.jsonl is a
    source for `train.codec` with codebooks.predicted. Codes are drawn with the model's own audio
    settings, without guidance.
    """
    if out.exists():
        raise ConfigError(f"{out}: exists; choose another folder")
    enable_compilation_cache()
    files = hub.resolve(model)
    config = load_dia2_config(files.config)
    tokenizer = Tokenizer.from_file(files.tokenizer, config.data)
    recordings = Recordings(data)
    audio = _audio_files(manifest)
    ids, seconds = (recordings.table().column(name).to_pylist() for name in ("id", "duration"))
    chosen = [index for index, name in enumerate(ids) if name in audio][:limit]
    if not chosen:
        raise DataError(f"{manifest}: names none of the recordings of {data}")
    sampling = read_defaults(files.generation).audio
    dia2, _ = load_dia2(config, files.weights)
    builder = RowBuilder(recordings, tokenizer, config)
    lines: list[dict[str, Any]] = []
    with checkpoint.staged_folder(out) as staged:
        (staged / "codes").mkdir()
        for index, codes in predicted(dia2, builder, chosen, sampling, seed):
            heard = math.ceil(seconds[index] * recordings.pace.frame_rate)  # not silence added
            name = f"codes/{ids[index]}.npy"
            np.save(staged / name, codes[:heard].astype(np.float32))
            path = os.path.relpath(audio[ids[index]], out)
            lines.append({"id": ids[index], "path": path, "targets": name})
            if len(lines) % 500 == 0:
                note(f"{len(lines)} of {len(chosen)} recordings")
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (staged / "train.jsonl").write_text(text, encoding="utf-8")
    note(f"{out}: codes of {len(lines)} recordings")


if __name__ == "__main__":
    main()
