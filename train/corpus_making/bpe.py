"""The tokenizer of a small model: byte-level BPE in the published layout.

Ids 0 … 7 are as published (1 begins, 2 new word, 3 pad, 7 zero), the speaker tags are added
tokens behind the vocabulary. Words reach a tokenizer one by one, without the space before them,
so it learns from single words; the space behind a speaker tag belongs to the tag, so that a word
is the same tokens wherever it stands.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from dia2_jax.text.tokenizer import SPEAKER_TAGS
from train.corpus_making.config import TokenizerConfig

_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|new_word|>", "<|pad|>", "<|unused_4|>", "<|unused_5|>",
    "<|unused_6|>", "<|zero|>",
)  # fmt: skip
_SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|endoftext|>",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "clean_up_tokenization_spaces": False,
    "model_max_length": 8192,
}


def train_tokenizer(words: Iterable[str], config: TokenizerConfig) -> tokenizers.Tokenizer:
    """A tokenizer of ``config.entries`` entries at most; the same words give the same one."""
    tokenizer = Tokenizer(models.BPE())
    if config.lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.entries - len(SPEAKER_TAGS),
        special_tokens=list(_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(words, trainer)
    tokenizer.add_tokens(
        [AddedToken(tag, normalized=False, rstrip=True, special=False) for tag in SPEAKER_TAGS]
    )
    return tokenizer


def write_tokenizer(tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    """``tokenizer.json`` and ``tokenizer_config.json``, the former last and at once."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = json.dumps(_SETTINGS, indent=1) + "\n"
    (folder / "tokenizer_config.json").write_text(settings, encoding="utf-8")
    staged = folder / ".tokenizer.json.partial"
    tokenizer.save(str(staged), pretty=False)
    os.replace(staged, folder / "tokenizer.json")
