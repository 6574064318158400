"""A corpus from its configuration: text, tokenizer, then shard after shard of speech."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

from train.config import config_to_dict
from train.corpus_making.bpe import train_tokenizer, write_tokenizer
from train.corpus_making.card import corpus_card
from train.corpus_making.config import CorpusConfig
from train.corpus_making.lexicon import load_lexicon
from train.corpus_making.scripts import SPLITS, Item, Split, Writer
from train.corpus_making.shards import CorpusFolder, Counts, open_folder
from train.corpus_making.speech import Synthesiser
from train.corpus_making.workers import Speak, make_voice, speakers

_FORMAT = 1


@dataclass(frozen=True)
class Progress:
    """After each item: the split, hours so far and to be, and seconds of speech a second."""

    split: Split
    hours: float
    of: float
    speed: float


Report = Callable[[Progress], None]


def make_corpus(
    config: CorpusConfig,
    out: Path,
    *,
    text_only: bool = False,
    report: Report = lambda progress: None,
    note: Callable[[str], None] = lambda text: None,
) -> dict[Split, Counts]:
    """Makes what of the corpus in `out` is not there yet.

    Args:
      config: see `CorpusConfig`.
      out: its folder; what is finished in it stays.
      text_only: make the tokenizer and the held-out texts, and no speech.
      report: told of progress, often.
      note: told, in a line, of what begins and what is finished.

    Returns:
      counts of each split.

    Raises:
      DataError, Dia2Error: see `open_folder`, `make_voice` and `Writer`.
    """
    voice = make_voice(config)
    with open_folder(out, _identity(config, voice)) as folder:
        note("reading the sources")
        writer = Writer(config, load_lexicon(config.text.words))
        for split in ("validation", "test"):
            scripts = "".join(f"{item.script}\n" for item in writer.held_out(split))
            folder.write_text(f"{split}.txt", scripts)
        if not (out / "tokenizer" / "tokenizer.json").is_file():
            note("training the tokenizer")
            words = _words(islice(writer.train(), config.tokenizer.items))
            write_tokenizer(train_tokenizer(words, config.tokenizer), out / "tokenizer")
        if text_only:
            return {}
        totals: dict[Split, Counts] = {}
        with speakers(config, voice) as speak:
            for split in SPLITS:
                totals[split] = _make_split(split, config, writer, speak, folder, report, note)
                card = corpus_card(config, writer, voice.settings(), totals)
                folder.write_text("README.md", card)
        return totals


def _make_split(
    split: Split,
    config: CorpusConfig,
    writer: Writer,
    speak: Speak,
    folder: CorpusFolder,
    report: Report,
    note: Callable[[str], None],
) -> Counts:
    items: Iterator[Item] = writer.train() if split == "train" else iter(writer.held_out(split))
    goal = config.size.hours if split == "train" else 0.0
    total = Counts()
    began, made = time.monotonic(), 0.0
    for number in count():
        if split == "train" and total.seconds >= 3600 * goal:
            break
        batch = list(islice(items, config.size.shard))
        if not batch:
            break
        if split == "train" and number < config.size.first_shard:
            continue
        done = folder.read_counts(split, number)
        if done is None:
            with folder.new_shard(split, number) as shard:
                for item, spoken in speak(split, batch):
                    if spoken is None:
                        shard.skip("words not found in the phonemes")
                        continue
                    recordings, targets = spoken
                    shard.keep(item, recordings, targets, config.sample_rate)
                    made += sum(len(one.wave) for one in recordings) / config.sample_rate
                    hours = (total.seconds + shard.counts.seconds) / 3600
                    speed = made / max(time.monotonic() - began, 1e-9)
                    report(Progress(split, hours, goal, speed))
                done = shard.counts
            folder.write_manifest(split)
            speed = made / max(time.monotonic() - began, 1e-9)
            hours = (total.seconds + done.seconds) / 3600
            note(f"{split} shard {number}: {hours:.3f} h so far, {speed:.2f} x real time")
        total.add(done)
    # Where a run ended between a shard and its manifest.
    folder.write_manifest(split)
    return total


def _words(items: Iterator[Item]) -> Iterator[str]:
    for item in items:
        for turn in item.turns:
            yield from turn.text.split()


def _identity(config: CorpusConfig, voice: Synthesiser) -> dict[str, Any]:
    """What decides every recording: neither which of them are made nor how fast."""
    content = config_to_dict(config)
    for name in ("hours", "first_shard"):
        content["size"].pop(name)
    # onnxruntime 1.32 gave the same bits with one thread and two.
    content["voice"].pop("threads")
    content["voice"].pop("workers")
    return {"format": _FORMAT, "synthesiser": voice.settings()} | content
