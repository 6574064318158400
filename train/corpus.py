"""``python -m train.corpus``: a corpus of synthetic speech, from text in packages to recordings.

    python -m train.corpus configs/nano/corpus.yaml CORPUS size.hours=12

The stages are in `train.corpus_making`; here are the options and what the user reads.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from train.command import Program, note
from train.config import read_config
from train.corpus_making.config import CorpusConfig
from train.corpus_making.program import Progress, make_corpus

EPILOG = """\b
OUT becomes
  train.jsonl, validation.jsonl, test.jsonl   manifests for train.prepare and train.codec
  validation.txt, test.txt                    what is held out, a script a line
  tokenizer/                                  a byte-level BPE of the text
  shards/                                     recordings, with words and phonemes in manifests
  README.md, corpus.json                      data card; what it was made of

\b
A stopped program, however it ended, goes on where it was: run the same command again. A longer
corpus begins with a shorter one: only size.hours may differ, and size.first_shard, which leaves
out the beginning.

\b
Exit status:
  0    done
  2    the configuration, a source, a package or the folder cannot be used: the message says why
  130  interrupted (Ctrl-C)
"""


@click.command(cls=Program, epilog=EPILOG)
@click.argument("config_path", metavar="CONFIG", type=click.Path())
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("overrides", metavar="[NAME=VALUE ...]", nargs=-1)
@click.option("--text-only", is_flag=True, help="Only held-out texts and tokenizer, no speech.")
@click.option("--quiet", "-q", is_flag=True, help="No progress; errors and the result only.")
def main(
    config_path: str, out: Path, overrides: tuple[str, ...], text_only: bool, quiet: bool
) -> None:
    """Make the corpus that CONFIG describes in the folder OUT."""
    from tqdm import tqdm

    config = read_config(CorpusConfig, config_path, overrides)
    shown = not quiet and sys.stderr.isatty()
    with tqdm(total=config.size.hours, unit=" h", disable=not shown, leave=False) as bar:

        def report(progress: Progress) -> None:
            bar.set_postfix(split=progress.split, speed=f"{progress.speed:.1f}x", refresh=False)
            if progress.split == "train":
                bar.update(progress.hours - bar.n)

        def tell(text: str) -> None:
            if not shown and not quiet:
                note(text)

        totals = make_corpus(config, out, text_only=text_only, report=report, note=tell)
    for split, counts in totals.items():
        skipped = sum(counts.skipped.values())
        click.echo(
            f"{out}: {split}: {counts.kept} recordings, {counts.seconds / 3600:.3f} h, "
            f"{counts.words} words" + (f"; left out {skipped}" if skipped else "")
        )


if __name__ == "__main__":
    main(prog_name="python -m train.corpus")
