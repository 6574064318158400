"""``dia2-jax encode``, ``decode``, ``voice`` and ``convert``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from safetensors.numpy import load_file

from dia2_jax import Dia2, Voice
from dia2_jax.audio import read_audio
from dia2_jax.voice import codec_fingerprint


@pytest.fixture
def mimi(tiny_model_folder: Path) -> Path:
    return tiny_model_folder / "mimi"


# -------------------------------------------------------------------------------- encode and decode


@pytest.mark.parametrize("name", ["codes.npz", "new/codes.safetensors"])
def test_encode_and_decode(
    command: Any, tiny_model: Dia2, mimi: Path, recording: Path, name: str
) -> None:
    run = command("encode", recording, name, "--mimi", mimi)
    assert (run.exit_code, run.stdout, run.stderr) == (0, "", "")
    wave = read_audio(recording)
    expected = tiny_model.codec.encode(wave[None])[0]
    content = dict(np.load(name)) if name.endswith("npz") else load_file(name)
    np.testing.assert_array_equal(content["codes"], expected)
    assert content["codes"].dtype == np.int32
    if name.endswith("npz"):
        assert (content["sample_rate"], content["samples"]) == (24_000, 48_000)
        assert content["codec"] == codec_fingerprint(tiny_model.codec)

    run = command("decode", name, "again.wav", "--mimi", mimi)
    assert (run.exit_code, run.stdout, run.stderr) == (0, "", "")
    pcm, rate = soundfile.read("again.wav", dtype="float32")
    assert rate == 24_000 and pcm.shape == (1920 * expected.shape[1],)
    whole = tiny_model.codec.decode(expected[None])[0]
    np.testing.assert_allclose(pcm, np.clip(whole, -1, 1), atol=1e-4)


def test_a_model_says_which_codec_and_how_many_codebooks(
    command: Any, tiny_model_folder: Path, mimi: Path, recording: Path
) -> None:
    assert command("encode", recording, "a.npz", "-m", tiny_model_folder).exit_code == 0
    assert command("encode", recording, "b.npz", "--mimi", mimi, "--codebooks", 3).exit_code == 0
    a, b = np.load("a.npz")["codes"], np.load("b.npz")["codes"]
    assert a.shape[0] == 8 and b.shape[0] == 3
    np.testing.assert_array_equal(a[:3], b)
    run = command("encode", recording, "c.npz", "--mimi", mimi, "--codebooks", 9)
    assert run.exit_code == 1 and "codebooks: asked for 9, this codec has 1 to 8" in run.stderr
    run = command("encode", recording, "c.npz", "--mimi", mimi, "-m", tiny_model_folder)
    assert run.exit_code == 2 and "--mimi and --model both name a codec" in run.stderr


def test_lengths_and_causality_through_files(command: Any, mimi: Path) -> None:
    wave = 0.1 * np.random.default_rng(3).standard_normal(40_000)
    changed = wave.copy()
    change = 25_000
    changed[change:] = 0
    for name, samples in (("a", wave), ("b", changed)):
        soundfile.write(f"{name}.wav", samples, 24_000)
        assert command("encode", f"{name}.wav", f"{name}.npz", "--mimi", mimi).exit_code == 0
        assert command("decode", f"{name}.npz", f"{name}2.wav", "--mimi", mimi).exit_code == 0
    codes = [np.load(f"{name}.npz")["codes"] for name in "ab"]
    frames = -(-40_000 // 1920)
    assert codes[0].shape[1] == frames
    sure = change // 1920  # frames that end before the change
    np.testing.assert_array_equal(codes[0][:, :sure], codes[1][:, :sure])
    assert (codes[0][:, sure:] != codes[1][:, sure:]).any()
    audio = [soundfile.read(f"{name}2.wav")[0] for name in "ab"]
    assert len(audio[0]) == frames * 1920
    np.testing.assert_array_equal(audio[0][: sure * 1920], audio[1][: sure * 1920])


def test_a_voice_file_can_be_heard(
    command: Any, tiny_model_folder: Path, mimi: Path, recording: Path
) -> None:
    arguments = ("voice", recording, "anna.voice", "-m", tiny_model_folder)
    assert command(*arguments, "--transcript", "Hello.").exit_code == 0
    assert command("decode", "anna.voice", "anna2.wav", "--mimi", mimi).exit_code == 0
    assert soundfile.info("anna2.wav").frames == 48_000


def test_codes_that_cannot_be_decoded(command: Any, mimi: Path, recording: Path) -> None:
    np.savez("flat.npz", codes=np.zeros(7, np.int32))
    np.savez("none.npz", other=np.zeros((8, 3), np.int32))
    np.savez("special.npz", codes=np.full((8, 3), 64))
    np.savez("foreign.npz", codes=np.zeros((8, 3), np.int32), codec="0123456789abcdef")
    np.savez("broad.npz", codes=np.zeros((9, 3), np.int32))
    Path("text.npz").write_text("no archive")
    for name, message in (
        ("flat.npz", "flat.npz: codes must be whole numbers [codebooks, frames], these are int32"),
        ("none.npz", "none.npz: not a file of codes"),
        ("text.npz", "text.npz: not a file of codes"),
        (recording, "anna.wav: not a file of codes"),
        ("special.npz", "code 64 at row 0, codebook 0, frame 0 is outside 0..63"),
        ("foreign.npz", "foreign.npz: made by another codec (0123456789abcdef; this one is"),
        ("broad.npz", "codebooks: asked for 9, this codec has 1 to 8"),
    ):
        run = command("decode", name, "out.wav", "--mimi", mimi)
        assert run.exit_code == 1 and message in run.stderr and run.stderr.count("\n") == 1
        assert not Path("out.wav").exists()
    run = command("encode", recording, "codes.bin", "--mimi", mimi)
    assert run.exit_code == 2 and "'codes.bin' must end in .npz or .safetensors" in run.stderr
    run = command("encode", recording, "codes.npz", "--mimi", "nowhere")
    assert run.exit_code == 1 and "there is no folder nowhere" in run.stderr
    run = command("encode", recording, "codes.npz")
    assert run.exit_code == 1 and "hf download kyutai/mimi config.json" in run.stderr


# -------------------------------------------------------------------------------------------- voice


def test_a_voice_is_what_the_library_prepares(
    command: Any, tiny_model: Dia2, tiny_model_folder: Path, recording: Path
) -> None:
    Path("words.json").write_text('[["Hello", [0.2, 0.6]], ["there.", [0.7, 1.2]]]')
    arguments = ("voice", recording, "new/anna.voice", "-m", tiny_model_folder)
    run = command(*arguments, "--words", "words.json")
    assert (run.exit_code, run.stdout, run.stderr) == (0, "", "")
    found = Voice.load("new/anna.voice")
    assert [(w.text, w.start, w.end) for w in found.words] == [
        ("Hello", 0.2, 0.6),
        ("there.", 0.7, 1.2),
    ]
    expected = tiny_model.prepare_voice(recording, words=found.words)
    np.testing.assert_array_equal(found.codes, expected.codes)
    assert found.codec == expected.codec

    run = command(*arguments, "--words", "words.json", "--transcript", "Hello")
    assert run.exit_code == 2 and "--words and --transcript exclude each other" in run.stderr
    Path("words.json").write_text('[["Hello", [0.6, 0.2]]]')
    run = command(*arguments, "--words", "words.json")
    assert run.exit_code == 1 and "words.json, item 0: word 'Hello' ends at 0.2 s" in run.stderr


# ------------------------------------------------------------------------------------------ convert


def test_convert_there_and_back(command: Any, tiny_model_folder: Path) -> None:
    assert command("convert", tiny_model_folder, "there", "--to", "orbax").exit_code == 0
    assert Path("there/model.orbax").is_dir() and not Path("there/model.safetensors").exists()
    run = command("convert", "there", "back")
    assert (run.exit_code, run.stdout, run.stderr) == (0, "", "")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "mimi/model.safetensors"):
        assert Path("back", name).read_bytes() == (tiny_model_folder / name).read_bytes(), name


def test_convert_a_codec_and_its_dtype(command: Any, mimi: Path) -> None:
    assert command("convert", mimi, "kyutai", "--to", "kyutai").exit_code == 0
    assert "encoder.model.0.conv.conv.weight" in load_file("kyutai/model.safetensors")
    assert json.loads(Path("kyutai/mimi_config.json").read_text())
    assert command("convert", mimi, "half", "--dtype", "float16").exit_code == 0
    names = load_file("half/model.safetensors")
    assert {array.dtype for array in names.values()} == {np.dtype(np.float16)}


def test_convert_refuses_to_overwrite_unless_forced(
    command: Any, tiny_model_folder: Path, mimi: Path
) -> None:
    Path("old").mkdir()
    Path("old/file").write_text("mine")
    run = command("convert", mimi, "old")
    assert run.exit_code == 1
    assert run.stderr.endswith("old is not empty; name another folder, or replace it with force "
                               "(--force)\n")  # fmt: skip
    assert Path("old/file").read_text() == "mine"
    assert command("convert", mimi, "old", "--force").exit_code == 0
    assert not Path("old/file").exists() and Path("old/model.safetensors").exists()
    run = command("convert", "nowhere", "new")
    assert run.exit_code == 2 and "Path 'nowhere' does not exist" in run.stderr
    run = command("convert", tiny_model_folder, "new", "--to", "hf")
    assert run.exit_code == 1 and "is a Dia2 model; 'hf' is a layout of the codec" in run.stderr
    run = command("convert", mimi, "new", "--to", "gguf")
    assert run.exit_code == 2 and "'gguf' is not one of" in run.stderr
