"""Items spoken by several processes at once, and handed back in their order.

An item depends on the seed, its place and its text alone, so the number of processes changes
nothing but the time.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import connection

import numpy as np

from dia2_jax.typing import Float
from train.corpus_making.assembly import Recording, Unclear, phoneme_targets, record
from train.corpus_making.config import CorpusConfig
from train.corpus_making.scripts import SPLITS, Item, Split
from train.corpus_making.speech import Synthesiser

#: Recordings of an item and the phoneme targets of each; None where words were not found in the
#: phonemes.
Spoken = tuple[tuple[Recording, ...], Float[np.ndarray, "T P"]] | None

#: Speaks items of a split, in order.
Speak = Callable[[Split, Iterable[Item]], Iterator[tuple[Item, Spoken]]]


def make_voice(config: CorpusConfig) -> Synthesiser:
    """The synthesiser of a configuration.

    Raises:
      Dia2Error: its packages are not installed.
    """
    if config.voice.kind == "tones":
        from train.corpus_making.tones import ToneSynthesiser

        return ToneSynthesiser(config.voice)
    from train.corpus_making.piper import PiperSynthesiser

    return PiperSynthesiser(config.voice)


@contextmanager
def speakers(config: CorpusConfig, voice: Synthesiser) -> Iterator[Speak]:
    """``config.voice.workers`` processes that speak, for the length of the block.

    Args:
      voice: used here, where one worker is asked for; others make their own.
    """
    if config.voice.workers == 1:
        yield lambda split, items: ((item, _speak(config, voice, split, item)) for item in items)
        return
    # Spawned: a fork of a process with threads (onnxruntime has some) may hang.
    with ProcessPoolExecutor(
        config.voice.workers, multiprocessing.get_context("spawn"), _start
    ) as pool:

        def speak(split: Split, items: Iterable[Item]) -> Iterator[tuple[Item, Spoken]]:
            batch = list(items)
            return zip(batch, pool.map(partial(_speak_here, config, split), batch), strict=True)

        try:
            yield speak
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start() -> None:
    """Begins a worker: Ctrl-C is its parent's to handle, and it does not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


#: A worker makes its voice with its first item.
_own_voice = functools.lru_cache(maxsize=1)(make_voice)


def _speak_here(config: CorpusConfig, split: Split, item: Item) -> Spoken:
    return _speak(config, _own_voice(config), split, item)


def _speak(config: CorpusConfig, voice: Synthesiser, split: Split, item: Item) -> Spoken:
    place = (SPLITS.index(split), item.index)
    rng = np.random.default_rng(np.random.SeedSequence([config.seed, 1, *place]))
    try:
        exchange = config.voice.exchange and split == "train"
        spoken = record(item, voice, config, rng, exchange=exchange)
    except Unclear:
        return None
    return spoken, phoneme_targets(spoken[0], config)
