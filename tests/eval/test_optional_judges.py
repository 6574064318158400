"""UTMOS and WavLM, which bring torch: what is done with their answers, and without them.

Their packages are not among those of the tests: stand-ins take their place at the door. Where
transformers is installed, WavLM is run for real, tiny and random.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dia2_jax.audio import write_wav
from eval.scoring.metric import Options, Unavailable
from eval.scoring.prompts import Prompt, PromptVoice
from eval.scoring.registry import open_metrics
from eval.scoring.scripts import SpokenWord
from eval.scoring.speakers import Speakers
from eval.scoring.takes import Take
from eval.scoring.utmos import Utmos
from eval.scoring.voice_embeddings import RESEMBLYZER, open_embedder

RATE = 24_000


def tone(seconds: float, pitch: float) -> np.ndarray:
    time = np.arange(round(seconds * RATE)) / RATE
    return (0.3 * np.sin(2 * np.pi * pitch * time)).astype(np.float32)


def make_take(wave: np.ndarray, **more: Any) -> Take:
    return Take("generated", Prompt("s", "a", "line", "[S1] x [S2] y", **more), wave, RATE)


class _Tensor(np.ndarray):
    """An array where torch has a tensor."""

    def numpy(self) -> np.ndarray:
        return np.asarray(self)


def tensor(values: Any) -> _Tensor:
    return np.asarray(values, np.float32).view(_Tensor)


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A stand-in of torch, whose files are lists of names."""
    module: Any = types.ModuleType("torch")
    module.from_numpy = tensor
    module.device = module.inference_mode = lambda *_: contextlib.nullcontext()
    module.load = lambda path, map_location, weights_only: dict.fromkeys(
        Path(path).read_text().split()
    )
    monkeypatch.setitem(sys.modules, "torch", module)
    return module


# -------------------------------------------------------------------------------------------- UTMOS


@pytest.fixture
def utmos_pytorch(monkeypatch: pytest.MonkeyPatch, torch: types.ModuleType) -> None:
    """A stand-in that likes quiet speech."""

    class Model:
        def state_dict(self) -> dict[str, None]:
            return {"body": None, "head": None}

    class Score:
        def __init__(self, path: str) -> None:
            self.path = path

        def score(self, wave: np.ndarray) -> np.ndarray:
            assert wave.shape == (16_000,)
            return np.array([5 - 4 * float(np.abs(wave).max())], np.float32)

    def download() -> str:
        logging.getLogger("huggingface_hub.utils").warning("Retrying in 1s")
        raise OSError("no network")

    package: Any = types.ModuleType("utmos_pytorch")
    package.UTMOSScoreTorch = Score
    network: Any = types.ModuleType("utmos_pytorch.utmos_torch")
    network.UTMOSModel = Model
    files: Any = types.ModuleType("utmos_pytorch.utils")
    files.download_utmos_ckpt = download
    for module in (package, network, files):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_utmos_hears_16_khz_and_has_no_opinion_of_silence(
    tmp_path: Path, utmos_pytorch: None
) -> None:
    (tmp_path / "weights.pt").write_text("body head")
    metric = Utmos.open(Options(utmos=tmp_path / "weights.pt"))
    assert len(metric.identity()["sha256"]) == 64
    scores = metric.score(make_take(tone(1.0, 200)))
    assert scores is not None and scores["mos"] == pytest.approx(5 - 4 * 0.3, abs=0.02)
    assert metric.score(make_take(np.zeros(RATE, np.float32))) is None


def test_utmos_without_its_weights_says_how_to_get_them(
    tmp_path: Path, utmos_pytorch: None, caplog: pytest.LogCaptureFixture
) -> None:
    def said(file: Path | None) -> str:
        with pytest.raises(Unavailable) as error:
            Utmos.open(Options(utmos=file))
        return str(error.value)

    (tmp_path / "half.pt").write_text("body")
    assert "half.pt: lacks 1 of UTMOS's weights, the first head; `--utmos FILE`" in said(
        tmp_path / "half.pt"
    )
    assert "(FileNotFoundError" in said(tmp_path / "none.pt")
    assert "(OSError: no network); `--utmos FILE` takes" in said(None)
    assert caplog.records == []  # nor anything of its own


# -------------------------------------------------------------------------------------------- WavLM


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch, torch: types.ModuleType) -> None:
    """A stand-in whose model hears pitch, and lacks its head if its name says so."""

    class Extractor:
        @classmethod
        def from_pretrained(cls, name: str) -> Extractor:
            if name == "nowhere":
                raise OSError("no such folder\nnor repository")
            return cls()

        def __call__(self, wave: np.ndarray, **options: Any) -> dict[str, Any]:
            assert options == {"sampling_rate": 16_000, "return_tensors": "pt"}
            return {"input_values": tensor(wave)[None]}

    class Model:
        @classmethod
        def from_pretrained(cls, name: str, output_loading_info: bool) -> Any:
            lacking = {"projector.weight", "objective.weight"} if name == "headless" else set()
            return cls(), {"missing_keys": lacking}

        def eval(self) -> None: ...

        def __call__(self, input_values: np.ndarray) -> Any:
            spectrum = np.abs(np.fft.rfft(input_values[0]))
            pitch = float(np.argmax(spectrum)) * 16_000 / input_values.shape[1]
            angle = np.pi / 2 * (pitch > 150)
            return types.SimpleNamespace(embeddings=tensor([[np.cos(angle), np.sin(angle)]]))

    module: Any = types.ModuleType("transformers")
    module.AutoFeatureExtractor, module.WavLMForXVector = Extractor, Model
    monkeypatch.setitem(sys.modules, "transformers", module)


def test_wavlm_tells_swapped_speakers(tmp_path: Path, transformers: None) -> None:
    metric = Speakers.open(Options(speaker_model=str(tmp_path)))
    write_wav(tmp_path / "low.wav", tone(2.0, 100))
    voices = {"[S1]": PromptVoice(tmp_path / "low.wav")}
    words = (SpokenWord("x", "[S1]", 0.0), SpokenWord("y", "[S2]", 2.0))

    def voice(*pitches: float) -> tuple[float, float]:
        wave = np.concatenate([tone(2.0, pitch) for pitch in pitches])
        prompt = Prompt("s", "a", "line", "[S1] x [S2] y", voices=voices)
        scores = metric.score(Take("generated", prompt, wave, RATE, words))
        row = {"set": "s", "id": "a", "source": "generated", "scores": {"speakers": scores}}
        (related,) = Speakers.relate([row])
        return related["voice"], related["between"]

    assert voice(100, 200) == pytest.approx((1.0, 0.0))
    assert voice(200, 100) == pytest.approx((0.0, 0.0))
    assert voice(100, 100) == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("headless", "'headless' lacks 2 weights of a WavLM .*, the first objective.weight; `--sp"),
        ("nowhere", "'nowhere' cannot be loaded .OSError: no such folder nor repository.; `--sp"),
    ],
)
def test_what_is_no_speaker_verification_is_refused(
    transformers: None, name: str, message: str
) -> None:
    lines: list[str] = []
    assert open_metrics(Options(speaker_model=name), lines.append, ["speakers"]) == []
    (line,) = lines
    assert "\n" not in line
    assert re.search(message, line), line


def test_the_embedders_do_not_mix(tmp_path: Path, transformers: None) -> None:
    identities = [
        Speakers.open(Options(speaker_model=str(tmp_path / name))).identity() for name in "ab"
    ]
    assert identities[0]["model"] == "a" != identities[1]["model"]
    assert "transformers" in identities[0]


def test_a_real_wavlm_tells_voices_apart_by_weights_that_are_there(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="runs with the extra wavlm")
    whole = pytest.importorskip("transformers", reason="runs with the extra wavlm")
    config = whole.WavLMConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        conv_dim=(8,) * 7, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
        tdnn_dim=(8,) * 5, xvector_output_dim=4,
    )  # fmt: skip
    whole.WavLMForXVector(config).save_pretrained(tmp_path / "whole")
    whole.WavLMModel(config).save_pretrained(tmp_path / "headless")
    for name in ("whole", "headless"):
        whole.Wav2Vec2FeatureExtractor().save_pretrained(tmp_path / name)
    embed, identity = open_embedder(str(tmp_path / "whole"))
    low, high = embed(tone(1.5, 100), RATE), embed(tone(1.5, 300), RATE)
    assert low.shape == (4,) and np.array_equal(low, embed(tone(1.5, 100), RATE))
    assert not np.allclose(low, high, rtol=1e-3, atol=0)
    assert len(identity["sha256"]) == 64
    with pytest.raises(Unavailable, match="lacks .* weights of a WavLM for speaker verification"):
        open_embedder(str(tmp_path / "headless"))


# ------------------------------------------------------------------------------------- Resemblyzer


def test_resemblyzer_hears_16_khz_even_where_its_detector_hears_no_voice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As 16 kHz, audio of 24 kHz would be slower and lower: another voice."""

    class Encoder:
        def __init__(self, device: str, verbose: bool) -> None: ...

        def embed_utterance(self, wave: np.ndarray) -> np.ndarray:
            spectrum = np.abs(np.fft.rfft(wave))
            return np.array([len(wave), np.argmax(spectrum) * 16_000 / len(wave)])

    package: Any = types.ModuleType("resemblyzer")
    package.VoiceEncoder = Encoder
    package.preprocess_wav = lambda wave, source_sr: wave[:0]
    monkeypatch.setitem(sys.modules, "resemblyzer", package)
    embed, _ = open_embedder(RESEMBLYZER)
    length, pitch = embed(tone(1.5, 200), RATE)
    assert length == 1.5 * 16_000 and pitch == pytest.approx(200, abs=1)


# ------------------------------------------------------------------------------------ without them


@pytest.mark.parametrize(
    ("package", "metric", "model", "extra"),
    [
        ("utmos_pytorch", "utmos", RESEMBLYZER, "utmos"),
        ("transformers", "speakers", "some/wavlm", "wavlm"),
        ("torch", "speakers", "some/wavlm", "wavlm"),
    ],
)
def test_without_a_package_one_line_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
    torch: types.ModuleType,
    package: str,
    metric: str,
    model: str,
    extra: str,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    lines: list[str] = []
    found = open_metrics(Options(speaker_model=model), lines.append, ["stopping", metric])
    assert [each.name for each in found] == ["stopping"]
    (line,) = lines
    assert line.startswith(f"{metric} is left out: needs ") and "\n" not in line
    assert f'pip install "dia2-jax[{extra}]"' in line
