"""``dia2-jax stream``: text in as it arrives, audio out as it is computed, clean ends."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from dia2_jax import Dia2
from dia2_jax.audio import to_pcm16
from dia2_jax.cli.stream import Clock, Pieces
from dia2_jax.engine import Session

SCRIPT = "[S1] Well, hello there my friends! [S2] Naïve, ok?"
HEADER = 44  # bytes of a WAV before its samples


@pytest.fixture
def stream(
    command: Any, tiny_model_folder: Path, stdin_pipe: Callable[[bytes], None]
) -> Callable[..., Any]:
    def run(text: bytes, *arguments: object) -> Any:
        stdin_pipe(text)
        stdin_pipe(b"")
        return command("stream", "-m", tiny_model_folder, *arguments)

    return run


@pytest.fixture(scope="module")
def said(tiny_model: Dia2) -> np.ndarray:
    return np.concatenate([chunk.pcm for chunk in tiny_model.stream(SCRIPT, seed=2)])


def samples(raw: bytes) -> np.ndarray:
    return np.frombuffer(raw, "<i2")


# ---------------------------------------------------------------------------------- in this process


def test_nothing_needs_to_be_said(
    command: Any, tiny_model: Dia2, stdin_pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No model, no options: text on standard input to nano's voice on standard output."""
    asked: list[str | None] = []

    def from_pretrained(name: str | None, **_: Any) -> Dia2:
        asked.append(name)
        return tiny_model

    monkeypatch.setattr(Dia2, "from_pretrained", from_pretrained)
    stdin_pipe(b"Yes.")
    stdin_pipe(b"")
    run = command("stream")
    assert run.exit_code == 0 and run.stdout_bytes[:4] == b"RIFF" and asked == [None]


def test_wav_to_standard_output(stream: Any, said: np.ndarray) -> None:
    run = stream(SCRIPT.encode(), "--seed", 2)
    assert run.exit_code == 0, run.stderr
    assert run.stdout_bytes[:4] == b"RIFF" and run.stdout_bytes[HEADER:] == to_pcm16(said)
    pcm, rate = soundfile.read(io.BytesIO(run.stdout_bytes), dtype="int16")
    assert rate == 24_000 and len(pcm) == len(said)
    assert run.stderr.startswith("first audio ") and run.stderr.count("\n") == 1
    assert "s after the first byte of text, " in run.stderr
    assert "s after the words needed to begin" in run.stderr


def test_raw_samples_to_standard_output(stream: Any, said: np.ndarray) -> None:
    run = stream(SCRIPT.encode(), "--seed", 2, "--raw", "--quiet")
    assert run.stdout_bytes == to_pcm16(said) and run.stderr == ""


def test_files_and_json(stream: Any, said: np.ndarray, tiny_model: Dia2) -> None:
    run = stream(SCRIPT.encode(), "--seed", 2, "-o", "new/out.wav", "--json", "-", "-q")
    assert run.exit_code == 0, run.stderr
    assert soundfile.read("new/out.wav", dtype="int16")[0].tobytes() == to_pcm16(said)
    report = json.loads(run.stdout)
    words = tiny_model.generate(SCRIPT, seed=2).words
    assert [(word["text"], word["start"]) for word in report["words"]] == [
        (text, pytest.approx(start)) for text, start in words
    ]
    assert report["finished"] and not report["truncated"]
    assert report["codes_shape"] == [8, len(said) // 1920]
    assert 0 < report["first_audio_after_look_ahead"] <= report["first_audio_after_first_byte"]
    assert report["waited_for_text_meanwhile"] >= 0


def test_raw_file(stream: Any, said: np.ndarray) -> None:
    assert stream(SCRIPT.encode(), "--seed", 2, "--raw", "-o", "out.pcm").exit_code == 0
    assert Path("out.pcm").read_bytes() == to_pcm16(said)


def test_a_start_that_fails_leaves_the_old_file(stream: Any) -> None:
    Path("out.wav").write_bytes(b"old")
    run = stream(b"  \n", "-o", "out.wav", "--json", "out.json")
    assert run.exit_code == 1
    assert run.stderr == (
        "dia2-jax: error: the script is empty: give it at least one word to speak\n"
    )
    assert Path("out.wav").read_bytes() == b"old" and not Path("out.json").exists()


def test_a_truncated_stream_has_its_status(stream: Any) -> None:
    run = stream(b"[S1] " + b"so it goes on, " * 100, "-o", "out.wav", "--chunk-frames", 8)
    assert run.exit_code == 3 and "warning: truncated: the model's context of 256" in run.stderr
    assert soundfile.info("out.wav").frames == 253 * 1920


def test_ctrl_c_keeps_what_was_said(
    stream: Any, said: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled: list[Session] = []
    cancel, step = Session.cancel, Session.step

    def interrupted(self: Session) -> bool:
        if self.frames_computed == 20:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Session, "step", interrupted)
    monkeypatch.setattr(Session, "cancel", lambda self: (cancelled.append(self), cancel(self)))
    run = stream(SCRIPT.encode(), "--seed", 2, "-o", "out.wav", "--json", "out.json")
    assert run.exit_code == 130 and run.stderr.endswith("dia2-jax: interrupted\n")
    pcm = soundfile.read("out.wav", dtype="int16")[0]
    assert 0 < len(pcm) < len(said)
    assert pcm.tobytes() == to_pcm16(said[: len(pcm)])
    report = json.loads(Path("out.json").read_text())
    assert not report["finished"] and report["codes_shape"][1] * 1920 == len(pcm)
    assert cancelled


def test_outputs_that_clash(stream: Any, command: Any) -> None:
    run = command("stream", "-m", "x", "--json", "-")
    assert run.exit_code == 2 and "cannot both go to standard output" in run.stderr
    run = command("stream", "-m", "x", "-o", "out.wav", "--chunk-frames", "0")
    assert run.exit_code == 2 and "'--chunk-frames': 0 is not in the range x>=1" in run.stderr


# -------------------------------------------------------------------------------- reading and times


def test_text_is_read_as_its_bytes_arrive(
    stdin_pipe: Callable[[bytes], None], capsys: pytest.CaptureFixture[str]
) -> None:
    pieces = Pieces()
    stdin_pipe(b"Hel")
    assert pieces.get()[1] == "Hel"  # no line end, no full buffer
    before = time.perf_counter()
    stdin_pipe("aé".encode()[:2])  # half a character
    assert pieces.get()[1] == "a"
    stdin_pipe("é".encode()[1:])
    arrived, text = pieces.get()
    assert text == "é" and before < arrived < time.perf_counter()
    stdin_pipe(b"\xff.")
    assert pieces.get()[1] == "\ufffd."
    stdin_pipe("é".encode()[:1])
    stdin_pipe(b"")
    assert pieces.get()[1] == "\ufffd"
    assert pieces.get()[1] is None
    assert capsys.readouterr().err.count("warning: the text on standard input is not all") == 1


def test_times_to_the_first_audio(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("dia2_jax.cli.stream.time.perf_counter", lambda: now[0])
    clock = Clock()
    assert clock.sentence() == "no audio was written"
    clock.read(10.0)
    clock.read(11.0)
    clock.could_begin(12.0)
    clock.could_begin(13.0)
    now[0] = 12.5
    clock.waited(12.25)
    now[0] = 14.0
    clock.wrote()
    now[0] = 20.0
    clock.wrote()
    clock.waited(15.0)
    assert clock.seconds() == {
        "first_audio_after_first_byte": 4.0,
        "first_audio_after_look_ahead": 2.0,
        "waited_for_text_meanwhile": 0.25,
    }
    assert clock.sentence() == (
        "first audio 4.00 s after the first byte of text, 2.00 s after the words needed to begin "
        "(0.25 s of that waiting for text)"
    )


# ----------------------------------------------------------------------------------- a real process


@pytest.fixture(scope="module")
def start(
    tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., subprocess.Popen[bytes]]:
    """Starts `dia2-jax stream`. Processes share a cache of compiled programs, as users' do."""
    environment = {
        **os.environ,
        "DIA2_JAX_CACHE": str(tmp_path_factory.mktemp("cache")),
        "JAX_ENABLE_COMPILATION_CACHE": "true",
    }

    # A suite that runs in the background of a shell has Ctrl-C ignored, and children inherit that.
    heed = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )

    def run(*arguments: str) -> subprocess.Popen[bytes]:
        program = [sys.executable, "-c", heed, "-m", "dia2_jax", "stream"]
        return subprocess.Popen(
            [*program, "-m", str(tiny_model_folder), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        )

    return run


def test_audio_comes_before_the_text_is_complete(
    start: Callable[..., subprocess.Popen[bytes]], said: np.ndarray
) -> None:
    with start("--raw", "--seed", "2") as process:
        assert process.stdin is not None and process.stdout is not None
        text = SCRIPT.encode()
        half = text.index(b"friends")
        for position in range(half):
            process.stdin.write(text[position : position + 1])
            process.stdin.flush()
        heard = process.stdout.read(1920 * 2)  # blocks until the first frame is there
        assert len(heard) == 1920 * 2
        for position in range(half, len(text)):  # "ï" is cut in two
            process.stdin.write(text[position : position + 1])
            process.stdin.flush()
        rest, notes = process.communicate()
    assert process.returncode == 0, notes
    # Another process, with programs compiled there: the same samples, to the last bit but one.
    found = samples(heard + rest)
    assert found.shape == said.shape
    assert np.abs(found - np.rint(said * 32768)).max() <= 1
    assert b"first audio " in notes and b"Traceback" not in notes


def test_signals_and_a_reader_that_leaves(
    start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    target = tmp_path / "out.wav"
    with start("-o", str(target)) as process:
        assert process.stdin is not None
        process.stdin.write(b"[S1] one two three four five six seven eight nine ten ")
        process.stdin.flush()
        give_up = time.monotonic() + 120
        while not (target.exists() and target.stat().st_size > HEADER + 3840):
            assert time.monotonic() < give_up and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)  # it waits for text
        process.wait(60)
        notes = process.stderr.read() if process.stderr else b""
    assert process.returncode == 130, notes
    assert b"dia2-jax: interrupted" in notes and b"Traceback" not in notes
    info = soundfile.info(target)
    assert info.frames > 0 and target.stat().st_size == HEADER + 2 * info.frames

    with start() as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"[S1] " + b"and so on " * 30)
        process.stdin.close()
        process.stdout.read(HEADER + 3840)
        process.stdout.close()
        watchdog = threading.Timer(60, process.kill)
        watchdog.start()
        notes = process.stderr.read() if process.stderr else b""
        process.wait()
        watchdog.cancel()
    assert process.returncode == 141, notes
    assert b"Traceback" not in notes and b"Exception ignored" not in notes
