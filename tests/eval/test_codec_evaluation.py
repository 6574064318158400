"""`eval.codec`, and the metrics that compare a codec's output with what it was given."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from dia2_jax.audio import read_audio, write_wav
from dia2_jax.mimi.runtime import StreamingDecoder, StreamingEncoder
from eval import codec
from eval.scoring.fidelity import Fidelity, Perceived, si_sdr
from eval.scoring.metric import Options, Unavailable
from eval.scoring.prompts import Prompt
from eval.scoring.summary import summarise
from eval.scoring.takes import Take

ROOT = Path(__file__).parent.parent
TINY = ROOT / "golden" / "parity" / "mimi"
SPEECH = read_audio(ROOT / "golden" / "speech" / "river.mp3")[: 3 * 24_000]


def take(wave: np.ndarray, original: np.ndarray | None = SPEECH) -> Take:
    return Take("codebooks-8", Prompt("s", "a", "line", "[S1] x"), wave, 24_000, original=original)


# -------------------------------------------------------------------------------------- the metrics


def test_what_comes_out_as_it_went_in_is_perfect() -> None:
    metric = Fidelity.open(Options())
    assert metric.score(take(SPEECH)) == {"mel_distance": 0.0, "si_sdr": 100.0}
    assert metric.score(take(SPEECH, None)) is None


def test_the_mel_distance_of_a_gain_is_its_logarithm() -> None:
    """All bands of steady noise lie above the floor under the logarithm."""
    noise = 0.1 * np.random.default_rng(0).standard_normal(5 * 24_000).astype(np.float32)
    found = Fidelity.open(Options()).score(take(noise / 2, noise))
    assert found is not None and found["mel_distance"] == pytest.approx(np.log(2), abs=1e-4)
    # Shorter than a window: filled up with silence, which is alike.
    short = noise[:24_000]
    found = Fidelity.open(Options()).score(take(short / 2, short))
    assert found is not None and found["mel_distance"] == pytest.approx(np.log(2) / 2, abs=0.02)


def test_the_mel_distance_needs_librosa(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("librosa", "librosa.filters"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(Unavailable, match=r'needs librosa .*pip install "dia2-jax\[eval\]"'):
        Fidelity.open(Options())


@pytest.mark.parametrize("decibels", [0, 10, 30])
def test_si_sdr_is_the_ratio_of_what_was_mixed(decibels: int) -> None:
    rng = np.random.default_rng(1)
    noise = rng.standard_normal(len(SPEECH))
    noise -= (noise @ SPEECH) / (SPEECH @ SPEECH) * SPEECH  # at right angles to the speech
    noise *= np.linalg.norm(SPEECH) / np.linalg.norm(noise) * 10 ** (-decibels / 20)
    assert si_sdr(SPEECH + noise, SPEECH) == pytest.approx(decibels, abs=1e-3)


@given(gain=st.floats(0.01, 100))
def test_si_sdr_hears_no_gain(gain: float) -> None:
    rng = np.random.default_rng(2)
    original = rng.standard_normal(1000)
    heard = original + 0.1 * rng.standard_normal(1000)
    assert si_sdr(gain * heard, original) == pytest.approx(si_sdr(heard, original), abs=1e-6)


def test_silence_has_a_number_or_none() -> None:
    silence = np.zeros_like(SPEECH)
    assert si_sdr(SPEECH, silence) == -100
    assert si_sdr(silence, SPEECH) == pytest.approx(0)  # nothing of either
    metric = Perceived(lambda a, b: 1.0, lambda a, b: 1.0, {})
    assert metric.score(take(silence)) is None and metric.score(take(SPEECH, silence)) is None


def test_listening_models_get_original_and_output_at_their_rate() -> None:
    given_to: list[tuple[int, int]] = []

    def opinion(original: np.ndarray, heard: np.ndarray) -> None:
        given_to.append((len(original), len(heard)))
        assert np.abs(original).max() == pytest.approx(2 * np.abs(heard).max(), rel=1e-5)

    metric = Perceived(opinion, lambda a, b: 0.123456, {})
    assert metric.score(take(SPEECH / 2)) == {"pesq": None, "stoi": 0.12346, "not_measured": True}
    assert given_to == [(3 * 16_000, 3 * 16_000)]


def test_pesq_and_stoi_are_told_which_is_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    """As their packages take them: pesq(fs, ref, deg, mode), stoi(clean, processed, fs)."""
    told: dict[str, Any] = {}

    def pesq(fs: int, ref: np.ndarray, deg: np.ndarray, mode: str, on_error: Any) -> float:
        told["pesq"] = (fs, np.abs(ref).max(), np.abs(deg).max(), mode)
        return 3.0

    def stoi(clean: np.ndarray, processed: np.ndarray, fs: int) -> float:
        told["stoi"] = (fs, np.abs(clean).max(), np.abs(processed).max())
        return 0.5

    errors = SimpleNamespace(RETURN_VALUES=1)
    monkeypatch.setitem(sys.modules, "pesq", SimpleNamespace(pesq=pesq, PesqError=errors))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "pystoi", SimpleNamespace(stoi=stoi))  # type: ignore[arg-type]
    found = Perceived.open(Options()).score(take(SPEECH / 2))
    assert found == {"pesq": 3.0, "stoi": 0.5, "not_measured": False}
    rate, original, heard, mode = told["pesq"]
    assert (rate, mode) == (16_000, "wb") and told["stoi"] == (rate, original, heard)
    assert original == pytest.approx(2 * heard, rel=1e-5)


def test_too_little_speech_for_stoi_is_left_out_and_counted() -> None:
    """pystoi says 0.00001 of it, which would pull down the mean of the others."""
    pytest.importorskip("pystoi", reason="runs with the extra fidelity")
    pytest.importorskip("pesq", reason="runs with the extra fidelity")
    metric = Perceived.open(Options())
    short = SPEECH[12_000:19_200]
    rows = [
        {
            "set": "s", "id": str(len(wave)), "kind": "line", "source": "codebooks-8", "seed": None,
            "scores": {"perceived": metric.score(take(0.9 * wave, wave))},
        }
        for wave in (SPEECH, short)
    ]  # fmt: skip
    assert rows[1]["scores"]["perceived"]["stoi"] is None  # type: ignore[index]
    figures = summarise(rows, [metric])["figures"]["codebooks-8"]["all"]["perceived"]
    assert figures["stoi"]["value"] > 0.99 and figures["stoi"]["takes"] == 1
    assert figures["not_measured"]["value"] == 50 and figures["not_measured"]["takes"] == 2


# -------------------------------------------------------------------------------------- the program


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    write_wav(tmp_path / "river.wav", SPEECH)
    row = {"id": "river", "kind": "line", "script": "[S1] The river.", "reference": "river.wav"}
    file = tmp_path / "mine.jsonl"
    other = {"id": "text", "kind": "line", "script": "[S1] No sound."}
    file.write_text(json.dumps(row) + "\n" + json.dumps(other) + "\n")
    return file


def run(*arguments: object, metrics: str = "fidelity,signal") -> Result:
    return CliRunner().invoke(codec.main, ["-q", "--metrics", metrics, *map(str, arguments)])


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    lines = (folder / "utterances.jsonl").read_text().splitlines()
    return {row["source"]: row for row in map(json.loads, lines)}


class Counted:
    """Samples and frames that are pushed through both ends of a stream at a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.encoded: list[int] = []
        self.decoded: list[int] = []
        encode, decode = StreamingEncoder.push, StreamingDecoder.push

        def encoding(encoder: StreamingEncoder, wave: Any) -> Any:
            self.encoded.append(np.shape(wave)[-1])
            return encode(encoder, wave)

        def decoding(decoder: StreamingDecoder, codes: Any) -> Any:
            self.decoded.append(np.shape(codes)[-1])
            return decode(decoder, codes)

        monkeypatch.setattr(StreamingEncoder, "push", encoding)
        monkeypatch.setattr(StreamingDecoder, "push", decoding)


def test_a_run_scores_every_number_of_codebooks_and_the_stream(
    tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, counted = tmp_path / "run", Counted(monkeypatch)
    result = run(TINY, "-p", prompts, "-o", out, "--codebooks", "1,3")
    assert result.exit_code == 0, result.output
    rows = rows_of(out)
    names = ["recording", "codebooks-1", "codebooks-3", "codebooks-3-streamed"]
    assert list(rows) == names
    # The stream alone goes frame by frame: 3 s in pieces of 80 ms, the last one half of that.
    assert set(counted.encoded[:-1]) == {64} and len(counted.encoded) == 38
    assert sum(counted.decoded) == 38 and max(counted.decoded) == 1
    assert "fidelity" not in rows["recording"]["scores"]
    for name in names[1:]:
        assert rows[name]["seconds"] == 3.0
        rate = soundfile.info(out / rows[name]["audio"]).samplerate
        wave = read_audio(out / rows[name]["audio"], rate)
        score = rows[name]["scores"]["fidelity"]
        original = read_audio(prompts.parent / "river.wav", rate)
        assert score["si_sdr"] == pytest.approx(si_sdr(wave, original), abs=1e-2)
        assert score["mel_distance"] > 0.1  # random weights
    # Fewer codebooks say something else.
    one, three = (read_audio(out / rows[name]["audio"]) for name in names[1:3])
    assert np.abs(one - three).max() > 1e-3
    whole, streamed = rows["codebooks-3"], rows["codebooks-3-streamed"]
    assert streamed["scores"]["fidelity"]["mel_distance"] == pytest.approx(
        whole["scores"]["fidelity"]["mel_distance"], abs=1e-3
    )
    assert streamed["difference"]["codes"] == 0 and streamed["difference"]["wave"] < 1e-5
    assert np.array(whole["codes"]).shape == (3, 38) and "codes" not in rows["codebooks-1"]

    usage = json.loads((out / "codebooks.json").read_text())
    codes = np.array(whole["codes"])
    entries = json.loads((TINY / "config.json").read_text())["codebook_size"]
    used = [round(entries * one["used"]) for one in usage]
    assert used == [len(set(row)) for row in codes.tolist()]
    assert all(1 <= one["perplexity"] <= 38 for one in usage)
    text = (out / "report.md").read_text()
    assert text.startswith(f"# Codec {TINY}\n") and "0 codes differ" in text
    header = "| figure | unit | better | recording | codebooks-1 | codebooks-3 |"
    assert header in text and "| 2 | " in text
    whole_page = (out / "report.html").read_text()
    assert "codebooks-3-streamed" in whole_page
    assert "<th>entries used, %</th>" in whole_page and "0 codes differ" in whole_page
    assert "<h3>mine/river (codebooks-3)</h3>" in whole_page  # all of them are heard, not one

    # What was scored is not scored again; other numbers of codebooks are another run.
    before = (out / "utterances.jsonl").read_bytes()
    assert run(TINY, "-p", prompts, "-o", out, "--codebooks", "3,1").exit_code == 0
    assert (out / "utterances.jsonl").read_bytes() == before
    # Another metric is added to what is there, whose audio is not written again.
    written = {file: file.stat().st_mtime_ns for file in out.rglob("*.wav")}
    arguments = (TINY, "-p", prompts, "-o", out, "--codebooks", "1,3")
    assert run(*arguments, metrics="fidelity,signal,stopping").exit_code == 0
    added = rows_of(out)
    for name in names:
        scores = added[name]["scores"]
        assert scores.pop("stopping")["silent"] is False and scores == rows[name]["scores"]
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*.wav")} == written
    other = run(TINY, "-p", prompts, "-o", out, "--codebooks", "2")
    assert other.exit_code == 2 and "codebooks was [1, 3], now [2]" in other.stderr


def test_usage_is_entropy() -> None:
    rows = [{"codes": [[0, 1, 2, 3], [5, 5, 5, 5]]}, {"codes": [[0, 1, 2, 3], [5, 5, 5, 5]]}, {}]
    even, single = codec.codebook_usage(rows, 8)
    assert even == {
        "used": 0.5,
        "perplexity": pytest.approx(4),
        "bits": pytest.approx(2),
    }
    assert single == {"used": 1 / 8, "perplexity": 1.0, "bits": 0.0}
    assert codec.codebook_usage([{}], 8) == []


@pytest.mark.parametrize(("most", "counts"), [(1, [1]), (8, [1, 2, 4, 8]), (9, [1, 2, 4, 8, 9])])
def test_powers_of_two_and_all_are_the_default(most: int, counts: list[int]) -> None:
    assert codec._counts(None, most) == counts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no folder nowhere"),
        ([TINY, "--codebooks", "99"], "--codebooks 99: the codec has 1 to"),
        ([TINY, "--codebooks", "two"], "whole numbers"),
        ([TINY, "-p", "lines"], "has no recordings"),
    ],
)
def test_bad_input_is_one_message_and_leaves_no_folder(
    tmp_path: Path, prompts: Path, arguments: list[object], message: str
) -> None:
    given_prompts = [] if "-p" in arguments else ["-p", prompts]
    result = run(*arguments, *given_prompts, "-o", tmp_path / "run")
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert not (tmp_path / "run").exists()
