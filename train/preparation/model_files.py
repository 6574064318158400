"""What preparation needs of a model: its tokenizer, its codec, and how its frames are counted."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from dia2_jax import hub
from dia2_jax.checkpoint import flatten_tree
from dia2_jax.config import Dia2Config, load_dia2_config
from dia2_jax.convert.models import load_mimi
from dia2_jax.data import Pace
from dia2_jax.errors import ConfigError
from dia2_jax.mimi.runtime import Codec
from dia2_jax.text.tokenizer import Tokenizer
from dia2_jax.voice import codec_fingerprint
from train.shapes import read_shape_file


@dataclass(frozen=True)
class SpeechModel:
    """A model as far as its data depend on it.

    Attributes:
      codec: makes the codes.
      tokenizer: makes the tokens, on which the pace depends.
      codebooks: how many the model reads.
      pace: how its word machine walks.
      settings: what identifies all of this, as JSON values.
    """

    codec: Codec
    tokenizer: Tokenizer
    codebooks: int
    pace: Pace
    settings: dict[str, Any]


def load_speech_model(
    model: str,
    *,
    tokenizer: str | None,
    mimi: str | None,
    word_step_offset: int,
    initial_padding: int,
    max_padding: int,
) -> SpeechModel:
    """Load tokenizer and codec of a model; its own weights are not needed.

    Args:
      model: a folder in the published layout (with or without weights), a hub repository, or a
        config file (JSON or YAML), which needs the two others.
      tokenizer: a ``tokenizer.json`` or a folder with one, if not the model's.
      mimi: a codec, if not the model's.
      word_step_offset, initial_padding, max_padding: of :class:`~dia2_jax.data.Pace`.

    Raises:
      HubError, ConfigError, CheckpointError: a file is missing or cannot be used.
    """
    config, tokenizer_file, mimi_files = _find(model, tokenizer, mimi)
    data = config.data
    words = Tokenizer.from_file(tokenizer_file, data)
    codec = Codec(load_mimi(mimi_files)[0])
    if codec.codebooks < data.codebooks:
        raise ConfigError(
            f"{model}: reads {data.codebooks} codebooks, its codec {mimi_files.weights} has "
            f"{codec.codebooks}; name the codec that belongs to it with --mimi"
        )
    size = codec.mimi.codebook_size
    if size > data.depth_vocab_size:
        raise ConfigError(
            f"{model}: knows audio codes below {data.depth_vocab_size}, its codec "
            f"{mimi_files.weights} makes codes up to {size - 1}; name the codec that belongs to it "
            "with --mimi"
        )
    pace = Pace(
        frame_rate=codec.sample_rate / codec.samples_per_frame,
        word_step_offset=word_step_offset,
        initial_padding=initial_padding,
        max_padding=max_padding,
        delay_spread=max(data.delay_pattern) - min(data.delay_pattern),
    )
    settings = {
        "codec": {"sha256": _codec_hash(codec), "fingerprint": codec_fingerprint(codec)},
        "codebooks": data.codebooks,
        "codebook_size": size,
        "sample_rate": codec.sample_rate,
        "frame_rate": pace.frame_rate,
        "word_step_offset": word_step_offset,
        "initial_padding": initial_padding,
        "max_padding": max_padding,
        "delay_spread": pace.delay_spread,
        "tokenizer_sha256": hashlib.sha256(tokenizer_file.read_bytes()).hexdigest(),
    }
    return SpeechModel(codec, words, data.codebooks, pace, settings)


def _find(
    model: str, tokenizer: str | None, mimi: str | None
) -> tuple[Dia2Config, Path, hub.MimiFiles]:
    path = Path(model).expanduser()
    if path.is_file():
        if tokenizer is None or mimi is None:
            missing = "--tokenizer" if tokenizer is None else "--mimi"
            raise ConfigError(f"{model}: a config alone names no {missing[2:]}: give {missing} too")
        return (
            read_shape_file(path, load_dia2_config, "--model"),
            _tokenizer_file(tokenizer),
            hub.resolve_mimi(mimi),
        )
    if path.is_dir() and hub.find_weights(path) is None and (path / hub.CONFIG).is_file():
        # A model that is still to be trained.
        own = path / "mimi"
        if mimi is None and not hub.holds_codec(own):
            raise ConfigError(f"{own}: there is no codec in the model's folder: give --mimi")
        codec = hub.resolve_mimi(own if mimi is None else mimi)
        return load_dia2_config(path / hub.CONFIG), _tokenizer_file(tokenizer or model), codec
    files = hub.resolve(model, mimi=mimi)
    chosen = files.tokenizer if tokenizer is None else _tokenizer_file(tokenizer)
    return load_dia2_config(files.config), chosen, files.mimi


def _tokenizer_file(name: str) -> Path:
    path = Path(name).expanduser()
    return path / hub.TOKENIZER if path.is_dir() else path


def _codec_hash(codec: Codec) -> str:
    """Of all weights by name, so that it is the same for every layout of their file."""
    named, _ = flatten_tree(nnx.state(codec.mimi))
    digest = hashlib.sha256()
    for name in sorted(named):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(named[name]).tobytes())
    return digest.hexdigest()
