"""Reading a golden folder: what a random checkpoint is, and what was computed from it.

Parts are read when they are asked for, so that one damaged file spoils its own items only.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from dia2_jax import hub
from dia2_jax.config import Dia2Config, MimiConfig, load_dia2_config, load_mimi_config
from dia2_jax.convert.load import SourceInfo
from dia2_jax.convert.models import load_dia2, load_mimi
from dia2_jax.errors import Dia2Error, HubError
from dia2_jax.generation.step import Programs
from dia2_jax.mimi.codec import Mimi
from dia2_jax.mimi.runtime import Codec
from dia2_jax.model.decoder import DecoderOutput
from dia2_jax.model.dia2 import Dia2Model
from dia2_jax.text.tokenizer import Tokenizer
from dia2_jax.typing import Array

GOLDEN = "golden.json"
_GENERATION = "generate_"


class NotGolden(Dia2Error):
    """A folder that lacks what every golden folder holds; the message names it."""


class Golden:
    """A golden folder.

    Attributes:
      folder: where it is.
    """

    def __init__(self, folder: str | Path) -> None:
        """
        Raises:
          NotGolden: no such folder, or one without a file that every golden folder holds.
        """
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise NotGolden(f"{folder}: no such folder")
        for name in (GOLDEN, hub.CONFIG, hub.TOKENIZER):
            if not (self.folder / name).is_file():
                raise NotGolden(f"{folder}: not a golden folder: {name} is missing")
        if hub.find_weights(self.folder) is None:
            raise NotGolden(f"{folder}: not a golden folder: {hub.WEIGHTS} is missing")

    @functools.cached_property
    def document(self) -> dict[str, Any]:
        """``golden.json``."""
        content = json.loads((self.folder / GOLDEN).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"{GOLDEN} is not a JSON object")
        return content

    @property
    def text(self) -> dict[str, Any]:
        """``golden.json``'s text part; empty where there is none."""
        text: dict[str, Any] = self.document.get("text", {})
        return text

    @property
    def frame_rate(self) -> float:
        """Code frames per second: recorded, or else the codec's, as upstream takes it."""
        recorded = self.text.get("frame_rate")
        if recorded is not None:
            return float(recorded)
        codec = self.folder / "mimi"
        return load_mimi_config(codec).frames_per_second if codec.is_dir() else 12.5

    def generation_names(self) -> list[str]:
        """Names of all recorded generations, by their settings or by their arrays."""
        files = self.folder.glob(f"{_GENERATION}*.npz")
        names = {path.stem.removeprefix(_GENERATION) for path in files}
        with contextlib.suppress(ValueError):  # reported by whoever needs the settings
            names |= set(self.document.get("generations", {}))
        return sorted(names)

    def generation(self, name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Settings and arrays of a recorded generation.

        Raises:
          ValueError: one of the two is missing.
        """
        settings = self.document.get("generations", {}).get(name)
        if settings is None:
            raise ValueError(f"{GOLDEN} holds no settings of generation {name!r}")
        arrays = self.arrays(f"{_GENERATION}{name}")
        if arrays is None:
            raise ValueError(f"{_GENERATION}{name}.npz is missing")
        return settings, arrays

    def arrays(self, name: str) -> dict[str, np.ndarray] | None:
        """Every array of ``NAME.npz``; None where there is no such file."""
        path = self.folder / f"{name}.npz"
        if not path.is_file():
            return None
        # Opened here, because numpy leaves a file that is no archive open.
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}

    @functools.cached_property
    def config(self) -> Dia2Config:
        return load_dia2_config(self.folder / hub.CONFIG)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_folder(self.folder, self.config.data)

    @property
    def weights(self) -> Path:
        """The model's weights."""
        found = hub.find_weights(self.folder)
        assert found is not None, "checked when the folder was opened"
        return found

    @functools.cached_property
    def model(self) -> tuple[Dia2Model, SourceInfo]:
        """The network in fp32, and what its file said beyond the values."""
        return load_dia2(self.config, self.weights)

    @functools.cached_property
    def programs(self) -> Programs:
        """The network's compiled steps, shared by all generations."""
        return Programs(self.model[0])

    @functools.cached_property
    def whole_decoder(self) -> Callable[..., DecoderOutput]:
        """(params, tokens [B, 2 + C, T], positions [B, T]) to outputs of whole sequences."""
        graph = self.programs.graph

        def run(params: Any, tokens: Array, positions: Array) -> DecoderOutput:
            return nnx.merge(graph, params).transformer(tokens, positions)

        return jax.jit(run)

    @functools.cached_property
    def whole_depformer(self) -> Callable[..., Array]:
        """(params, codes [B, C - 1], hidden, main, second) to logits of all stages at once."""
        graph = self.programs.graph

        def run(params: Any, codes: Array, hidden: Array, main: Array, second: Array) -> Array:
            return nnx.merge(graph, params).depformer(codes, hidden, (main, second))

        return jax.jit(run)

    @property
    def mimi_folder(self) -> Path | None:
        """The folder of the codec, if there is one."""
        folder = self.folder / "mimi"
        return folder if folder.is_dir() else None

    @functools.cached_property
    def mimi(self) -> tuple[Mimi, MimiConfig, SourceInfo, hub.MimiFiles]:
        """The codec in fp32, its config, what its file said beyond the values, and its files.

        Raises:
          HubError: the folder holds no codec.
        """
        if self.mimi_folder is None:
            raise HubError(f"{self.folder} holds no mimi folder")
        files = hub.resolve_mimi(self.mimi_folder)
        return *load_mimi(files), files

    @functools.cached_property
    def codec(self) -> Codec:
        return Codec(self.mimi[0])
