"""Have prompts read by the synthesiser of a corpus: what a voice trained on it could at best say.

    python -m eval.read_aloud configs/nano/corpus.yaml eval/prompts/everyday.jsonl READINGS
    python -m eval.naturalness nano --prompts READINGS/everyday.jsonl --out DIR

The second command then scores the readings and their codec resynthesis beside the model's takes,
and the takes' lengths against the readings'.
"""

from __future__ import annotations

import json
import re
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from eval.needed import needed_from

with needed_from("corpus,train"):
    from dia2_jax.audio import write_wav
    from dia2_jax.checkpoint import staged_folder
    from dia2_jax.errors import DataError
    from eval.scoring.prompts import read_set, rows_of
    from train.command import EXPORT_EPILOG, Program
    from train.config import read_config
    from train.corpus_making.assembly import Unclear, record
    from train.corpus_making.cleaning import split_sentences
    from train.corpus_making.config import CorpusConfig
    from train.corpus_making.pools import Turn
    from train.corpus_making.scripts import Item
    from train.corpus_making.shards import word_rows
    from train.corpus_making.workers import make_voice

_TURN = re.compile(r"\[S([12])\]([^\[]*)")


@dataclass(frozen=True)
class Totals:
    """What was read: the new set, how many prompts, their seconds, the ids that could not be."""

    file: Path
    read: int
    seconds: float
    left: tuple[str, ...]


def read_aloud(
    config: CorpusConfig,
    prompts: Path,
    out: Path,
    *,
    report: Callable[[int], None] = lambda count: None,
) -> Totals:
    """Write a prompt set again, with a recording of every prompt and the times of its words.

    Ids stay, and with them the seeds of takes. A prompt whose words are not found in what the
    synthesiser says (it reads signs and digits its own way) is kept without a recording.

    Args:
      config: of the corpus; its voice, pauses and seed are used.
      prompts: a set as ``eval/prompts/README.md`` tells it, in JSON Lines, or the name of one.
      out: a folder that is not there yet; it appears whole or not at all, and holds a file of the
        same name as `prompts`, and the recordings (16-bit WAV).
      report: told the number of prompts done.

    Raises:
      DataError: no such set, a row that cannot be used, or something at `out`.
      Dia2Error: the synthesiser is not installed.
    """
    found = read_set(str(prompts))
    if found.path.suffix == ".lst":
        raise DataError(f"{prompts}: a list has no room for words; write its rows as JSON Lines")
    rows = [(row, _turns(row["script"], f"{prompts}: {row['id']}")) for row in rows_of(found)]
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: is there already; name another folder, or remove it")
    voice = make_voice(config)
    left: list[str] = []
    seconds = 0.0
    with staged_folder(out) as staged:
        (staged / "audio").mkdir()
        lines = []
        for index, (row, turns) in enumerate(rows):
            # Of the id, so that a prompt is read alike in any set.
            place = [config.seed, 2, zlib.crc32(row["id"].encode())]
            rng = np.random.default_rng(np.random.SeedSequence(place))
            try:
                (recording,) = record(Item(index, "prompt", turns), voice, config, rng)
            except Unclear:
                left.append(row["id"])
            else:
                name = f"audio/{index:04d}.wav"
                write_wav(staged / name, recording.wave, config.sample_rate)
                row = row | {"reference": name, "words": word_rows(recording)}
                seconds += len(recording.wave) / config.sample_rate
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
            report(index + 1)
        (staged / found.path.name).write_text("".join(lines), encoding="utf-8")
    return Totals(out / found.path.name, len(rows) - len(left), seconds, tuple(left))


def _turns(script: str, where: str) -> tuple[Turn, ...]:
    spoken = _TURN.findall(script)
    rest = _TURN.sub("", script).strip()
    if rest or not spoken or not all(text.strip() for _, text in spoken):
        raise DataError(
            f"{where}: a script must be turns that begin with [S1] or [S2], and no other tags; "
            f"got {script[:80]!r}"
        )
    return tuple(Turn(int(number), tuple(split_sentences(text))) for number, text in spoken)


@click.command(cls=Program, epilog=EXPORT_EPILOG)
@click.argument("config_path", metavar="CONFIG", type=click.Path())
@click.argument("prompts", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("overrides", metavar="[NAME=VALUE ...]", nargs=-1)
@click.option("--quiet", "-q", is_flag=True, help="No progress; errors and the result only.")
def main(
    config_path: str, prompts: Path, out: Path, overrides: tuple[str, ...], quiet: bool
) -> None:
    """Read PROMPTS with the voices of the corpus CONFIG; write them, with the readings, to OUT."""
    from tqdm import tqdm

    config = read_config(CorpusConfig, config_path, overrides)
    shown = not quiet and sys.stderr.isatty()
    with tqdm(unit=" prompts", disable=not shown, leave=False) as bar:

        def report(count: int) -> None:
            bar.update(count - bar.n)

        totals = read_aloud(config, prompts, out, report=report)
    click.echo(f"{totals.file}: {totals.read} readings, {totals.seconds:.0f} s")
    if totals.left:
        click.echo(f"without a reading, words not found in it: {', '.join(totals.left)}")


if __name__ == "__main__":
    main(prog_name="python -m eval.read_aloud")
