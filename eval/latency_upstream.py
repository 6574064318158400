"""Their side of the measurements: PyTorch code of an upstream checkout, and transformers' Mimi.

torch is imported here only, and only when a comparison is asked for. Both run eagerly on the CPU
in fp32, with as many threads as there are cores, under ``torch.inference_mode``.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from eval.latency_machine import cores, memory, versions
from eval.latency_process import MeasurementError


def require(*modules: str) -> None:
    """Say which of the modules that a comparison needs are missing, before anything is measured.

    Raises:
      MeasurementError: naming them, and how to get them.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise MeasurementError(
            f"--against needs {' and '.join(missing)}, which this environment lacks: install "
            "PyTorch's CPU build, then `pip install 'dia2-jax[parity]'` (and what the upstream "
            "checkout imports besides)"
        )


def check_checkout(path: str) -> Path:
    """The folder of an upstream checkout, whose code can be imported here.

    Raises:
      MeasurementError: it is none, or torch or what else its code imports is missing.
    """
    root = Path(path)
    if not (root / "dia2" / "runtime" / "generator.py").is_file():
        raise MeasurementError(
            f"--against {path}: no checkout of nari-labs/dia2 (it has no "
            "dia2/runtime/generator.py); clone it and name its folder"
        )
    require("torch")
    # In a process of its own: what it imports must not be in one that measures.
    program = "import sys; sys.path.insert(0, sys.argv[1]); import dia2.runtime.generator"
    tried = subprocess.run(
        [sys.executable, "-c", program, str(root)], capture_output=True, text=True
    )
    if tried.returncode:
        said = tried.stderr.strip().splitlines()[-1:] or ["no message"]
        raise MeasurementError(
            f"--against {path}: cannot be imported ({said[0]}): install what it needs into this "
            "environment"
        )
    return root


class _Enough(Exception):
    """Ends upstream's loop after the frames that were asked for."""


class Upstream:
    """A model of upstream's code with random weights, driven by upstream's own generation loop.

    The loop runs unmodified: embedding, decoder, guidance, sampling, word machine and all
    depformer stages of both guidance rows. A frame's time is the time between two entries into the
    network, noted by the function that the runtime is given as its decoder step.

    Args:
      checkout: folder of the checkout.
      config: a ``config.json`` of the published form.
    """

    def __init__(self, checkout: str, config: str) -> None:
        import torch

        torch.set_num_threads(cores())
        torch.manual_seed(0)
        sys.path.insert(0, checkout)
        self._loop = importlib.import_module("dia2.runtime.generator")
        context = importlib.import_module("dia2.runtime.context")
        machine = importlib.import_module("dia2.runtime.state_machine")
        network = importlib.import_module("dia2.core.model")
        precision = importlib.import_module("dia2.core.precision")
        settings = importlib.import_module("dia2.generation")
        reader = importlib.import_module("dia2.config")
        device = torch.device("cpu")
        self._config = reader.load_config(config)
        data = self._config.data
        kind = precision.resolve_precision("float32", device)
        model = network.Dia2Model(self._config, kind, device).eval()
        self._entry = machine.Entry
        self._settings = settings.GenerationConfig()
        ids = machine.TokenIds(
            card=data.text_vocab_size,
            new_word=data.text_new_word_token_id,
            pad=data.text_pad_token_id,
            bos=1,
            zero=data.text_zero_token_id,
            spk1=data.text_new_word_token_id,
            spk2=data.text_new_word_token_id,
            audio_pad=data.audio_pad_token_id,
            audio_bos=data.audio_bos_token_id,
        )
        special = {ids.new_word, ids.pad, ids.bos, ids.zero}
        self._word = next(i for i in range(data.text_vocab_size) if i not in special)
        self._marks: list[float] = []
        self._limit = 0
        self._decoder_step = model.transformer.forward_step
        self._runtime = context.RuntimeContext(
            config=self._config,
            model=model,
            precision=kind,
            tokenizer=None,
            mimi=None,
            device=device,
            machine=machine.StateMachine(
                token_ids=ids, second_stream_ahead=data.second_stream_ahead, max_padding=6
            ),
            transformer_step=self._step,
            depformer_step=model.depformer.forward_step,
            constants=ids,
            audio_delays=list(data.delay_pattern),
            audio_delay_tensor=torch.tensor(data.delay_pattern, device=device),
            frame_rate=12.5,
        )
        self._state = self._loop.build_initial_state(self._runtime)
        self._state.audio_buf.fill_(0)  # as if every step before a position had been computed
        self._position = 0

    def _step(self, *arguments: Any) -> Any:
        self._marks.append(time.perf_counter())
        if len(self._marks) > self._limit:
            raise _Enough
        return self._decoder_step(*arguments)

    def seek(self, position: int) -> None:
        """What is timed next starts at this position."""
        self._position = position

    def frames(self, count: int) -> list[float]:
        """Milliseconds of each of ``count`` frames from the position on."""
        context = self._config.runtime.max_context_steps
        # The frame after the last one is entered, then left.
        start = max(min(self._position, context - count - 1), 0)
        for slot in self._state.decode.transformer.slots:
            slot.length.fill_(start)
        entries = [self._entry([self._word], "word")] * context
        self._marks, self._limit = [], count
        try:
            self._loop.run_generation_loop(
                self._runtime,
                state=self._runtime.machine.new_state(entries),
                generation=self._state,
                config=self._settings,
                start_step=start,
            )
        except _Enough:
            return [float(ms) for ms in np.diff(self._marks) * 1e3]
        raise MeasurementError(f"upstream's loop ended before {count} frames from step {start}")

    def memory(self) -> dict[str, float | None]:
        """Memory of this process."""
        return memory()

    def about(self) -> dict[str, Any]:
        """Versions that the numbers depend on."""
        return _about()


class TransformersMimi:
    """transformers' Mimi with the weights of a folder in its layout."""

    def __init__(self, folder: str) -> None:
        import torch
        import transformers

        torch.set_num_threads(cores())
        transformers.utils.logging.set_verbosity_error()
        self._torch = torch
        self._model = transformers.MimiModel.from_pretrained(folder).eval()
        self._quantizers = json.loads((Path(folder) / "config.json").read_text())["num_quantizers"]

    def inputs(self, wave: np.ndarray, codes: np.ndarray) -> None:
        """What is encoded, ``[1, W]``, and decoded, ``[1, C, T]``, from now on."""
        self._wave = self._torch.from_numpy(wave)[:, None]
        self._codes = self._torch.from_numpy(codes.astype(np.int64))

    def encoded(self) -> np.ndarray:
        """``[1, C, T]`` codes of the whole waveform."""
        with self._torch.inference_mode():
            codes = self._model.encode(self._wave, num_quantizers=self._quantizers).audio_codes
        return codes.numpy()

    def decoded(self) -> np.ndarray:
        """``[1, W]`` waveform of all codes."""
        with self._torch.inference_mode():
            wave = self._model.decode(self._codes).audio_values
        return wave[:, 0].numpy()

    def encode(self, count: int) -> list[float]:
        """Milliseconds of each of ``count`` whole encodes."""
        return [_milliseconds(self.encoded) for _ in range(count)]

    def decode(self, count: int) -> list[float]:
        """Milliseconds of each of ``count`` whole decodes."""
        return [_milliseconds(self.decoded) for _ in range(count)]

    def memory(self) -> dict[str, float | None]:
        """Memory of this process."""
        return memory()

    def about(self) -> dict[str, Any]:
        """Versions that the numbers depend on."""
        return _about()


def _about() -> dict[str, Any]:
    import torch

    return {"versions": versions("torch", "transformers"), "threads": torch.get_num_threads()}


def _milliseconds(run: Any) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3
