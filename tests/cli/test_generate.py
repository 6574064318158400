"""``dia2-jax generate``: what it writes, and how each option reaches the model."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import threading
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import soundfile

from dia2_jax import Dia2, GenerationConfig, SamplingConfig, Turn, Voice
from dia2_jax.audio import to_pcm16
from dia2_jax.cli.files import write_atomically
from dia2_jax.text.timing import WordTime

SCRIPT = "[S1] Hello there. [S2] Hi!"


@pytest.fixture
def generate(command: Any, tiny_model_folder: Path) -> Any:
    def run(*arguments: object, output: str = "out.wav", **options: Any) -> Any:
        return command("generate", *arguments, "-m", tiny_model_folder, "-o", output, **options)

    run.loaded = command.loaded  # type: ignore[attr-defined]
    return run


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the command asks the model for; the model itself does not run."""
    calls: list[dict[str, Any]] = []

    def generate(self: Dia2, script: str, config: Any, **options: Any) -> Any:
        from dia2_jax.engine import Result

        options.pop("progress")
        calls.append({"script": script, "config": config, **options})
        silence = np.zeros(1920, np.float32)
        return Result(np.zeros((8, 1), np.int32), silence, 24_000, [("Hm", 0.0)], False)

    monkeypatch.setattr(Dia2, "generate", generate)
    return calls


# ----------------------------------------------------------------------------------- what it writes


def test_writes_the_wav_and_its_json(generate: Any, tiny_model: Dia2) -> None:
    run = generate(SCRIPT, "--seed", 3, "--json", "out.json")
    assert (run.exit_code, run.stdout, run.stderr) == (0, "", "")
    result = tiny_model.generate(SCRIPT, seed=3)
    pcm, rate = soundfile.read("out.wav", dtype="int16")
    assert rate == 24_000 and pcm.tobytes() == to_pcm16(result.waveform)
    report = json.loads(Path("out.json").read_text())
    assert report["words"] == [
        {"text": text, "start": pytest.approx(start)} for text, start in result.words
    ]
    assert report["codes_shape"] == list(result.codes.shape)
    assert report["seconds"] == pytest.approx(len(result.waveform) / 24_000)
    assert (report["sample_rate"], report["frame_rate"]) == (24_000, 12.5)
    assert (report["seed"], report["truncated"]) == (3, False)
    assert report["settings"] == dataclasses.asdict(GenerationConfig())
    assert sorted(path.name for path in Path().iterdir()) == ["out.json", "out.wav"]


def test_data_alone_goes_to_standard_output(generate: Any, asked: list[Any]) -> None:
    run = generate(SCRIPT, "--json", "-")
    assert json.loads(run.stdout)["words"] == [{"text": "Hm", "start": 0.0}] and run.stderr == ""
    run = generate(SCRIPT, output="-")
    assert soundfile.read(io.BytesIO(run.stdout_bytes))[0].shape == (1920,)
    run = generate(SCRIPT, "--json", "-", output="-")
    assert run.exit_code == 2 and "cannot both go to standard output" in run.stderr
    run = generate(SCRIPT, "--json", "./out.wav", output="out.wav")
    assert run.exit_code == 2 and "cannot both go to 'out.wav': name two files" in run.stderr


def test_an_existing_file_is_replaced_but_never_by_half_of_one(
    generate: Any, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("out.wav").write_bytes(b"old")
    assert generate(SCRIPT).exit_code == 0
    assert soundfile.info("out.wav").frames == 1920
    Path("out.wav").write_bytes(b"old")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    assert generate(SCRIPT).exit_code == 130
    assert Path("out.wav").read_bytes() == b"old"
    assert [path.name for path in Path().iterdir()] == ["out.wav"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "codes.npz"
    target.write_bytes(b"old")

    def fails(file: IO[bytes]) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(target, fails)
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]
    write_atomically(target, lambda file: file.write(b"new"))
    assert target.read_bytes() == b"new" and list(tmp_path.iterdir()) == [target]


def test_links_and_pipes_are_written_to_not_replaced(generate: Any, asked: list[Any]) -> None:
    Path("link.wav").symlink_to("real.wav")
    assert generate(SCRIPT, output="link.wav").exit_code == 0
    assert Path("link.wav").is_symlink() and soundfile.info("real.wav").frames == 1920
    os.mkfifo("pipe")
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(Path("pipe").read_bytes()))
    reader.start()
    assert generate(SCRIPT, output="pipe").exit_code == 0
    reader.join(10)
    assert Path("pipe").is_fifo() and soundfile.info(io.BytesIO(found[0])).frames == 1920
    run = generate(SCRIPT, "--json", "/dev/full")
    assert run.exit_code == 1 and run.stderr == "dia2-jax: error: No space left on device\n"


def test_a_truncated_take_is_written_and_has_its_own_status(generate: Any) -> None:
    run = generate("[S1] " + "so it goes on, " * 100, "--json", "out.json")
    assert run.exit_code == 3
    assert run.stderr == (
        "dia2-jax: warning: truncated: the model's context of 256 frames ended before the text "
        "did; split the script\n"
    )
    report = json.loads(Path("out.json").read_text())
    assert report["truncated"] and report["codes_shape"] == [8, 253]
    assert soundfile.info("out.wav").frames == 253 * 1920


# --------------------------------------------------------------------------------------- the script


def test_text_file_or_standard_input(generate: Any, asked: list[Any]) -> None:
    Path("talk.txt").write_bytes("\ufeff[S1] Naïve.\n[S2] Yes.\n".encode())
    Path("yes").write_text("[S1] From a file.")
    for arguments, stdin, script in (
        (["[S1] Hello."], None, "[S1] Hello."),
        (["hello"], None, "hello"),
        (["(laughs)"], None, "(laughs)"),
        (["and/or not"], None, "and/or not"),
        (["talk.txt"], None, "[S1] Naïve.\n[S2] Yes.\n"),
        (["yes"], None, "[S1] From a file."),
        (["-"], "[S1] Piped.", "[S1] Piped."),
        ([], "[S2] Piped.", "[S2] Piped."),
        (["x" * 5000 + " y"], None, "x" * 5000 + " y"),
    ):
        run = generate(*arguments, stdin=stdin)
        assert run.exit_code == 0, run.stderr
        assert asked[-1]["script"] == script


@pytest.mark.parametrize("name", ["tlak.txt", "./talk", "scripts/one", "/nowhere/none.md"])
def test_a_misspelt_file_is_not_spoken(generate: Any, asked: list[Any], name: str) -> None:
    run = generate(name)
    assert run.exit_code == 2 and f"there is no file '{name}'" in run.stderr and asked == []


def test_scripts_that_cannot_be_spoken(generate: Any) -> None:
    run = generate("", "--model", "never loaded")
    assert (run.exit_code, run.stderr) == (
        1,
        "dia2-jax: error: the script is empty: give it at least one word to speak\n",
    )
    run = generate("[S1] ... !")
    assert run.exit_code == 1 and "error: the script has no speakable word" in run.stderr
    Path("talk.txt").write_bytes(b"[S1] na\xefve")
    run = generate("talk.txt")
    assert run.exit_code == 1 and run.stderr == (
        "dia2-jax: error: talk.txt: not UTF-8 text (byte 0xef at position 7); save it as UTF-8\n"
    )
    assert not Path("out.wav").exists()


# ------------------------------------------------------------------------------- model and settings


def test_defaults_are_the_library_s(generate: Any, asked: list[Any]) -> None:
    assert generate(SCRIPT).exit_code == 0
    assert asked == [{"script": SCRIPT, "config": GenerationConfig(), "voices": None, "seed": 0}]
    assert generate.loaded == [{"dtype": None, "mimi": None, "revision": None}]


def test_the_model_s_own_defaults_hold_where_an_option_is_not_given(
    generate: Any, asked: list[Any], tiny_model: Dia2, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = GenerationConfig(
        text=SamplingConfig(0.1, 11),
        audio=SamplingConfig(0.2, 12),
        cfg_scale=1.0,
        cfg_filter_k=13,
        initial_padding=4,
        max_padding=9,
    )
    monkeypatch.setattr(tiny_model, "defaults", own)
    assert generate(SCRIPT, "--json", "out.json").exit_code == 0
    assert asked[-1]["config"] == own
    assert json.loads(Path("out.json").read_text())["settings"] == dataclasses.asdict(own)
    # A value that happens to be the library's own counts as given.
    given = ("--audio-temperature", 0.8, "--text-top-k", 50, "--max-padding", 6, "--cfg-scale", 2)
    assert generate(SCRIPT, *given).exit_code == 0
    assert asked[-1]["config"] == dataclasses.replace(
        own,
        text=SamplingConfig(0.1, 50),
        audio=SamplingConfig(0.8, 12),
        cfg_scale=2.0,
        max_padding=6,
    )


def test_every_setting_reaches_the_model(generate: Any, asked: list[Any]) -> None:
    run = generate(
        SCRIPT,
        *("--text-temperature", 0.1, "--text-top-k", 11, "--audio-temperature", 0.2),
        *("--audio-top-k", 12, "--cfg-scale", 3.5, "--cfg-filter-k", 13, "--initial-padding", 4),
        *("--max-padding", 15),
        *("--prefix-plan", "upstream", "--include-prefix", "--seed", 99),
        *("--dtype", "bfloat16", "--mimi", "codec", "--revision", "v1"),
    )
    assert run.exit_code == 0, run.stderr
    assert asked[0]["config"] == GenerationConfig(
        text=SamplingConfig(0.1, 11),
        audio=SamplingConfig(0.2, 12),
        cfg_scale=3.5,
        cfg_filter_k=13,
        initial_padding=4,
        max_padding=15,
        include_prefix=True,
        prefix_plan="upstream",
    )
    assert asked[0]["seed"] == 99
    assert generate.loaded == [{"dtype": "bfloat16", "mimi": "codec", "revision": "v1"}]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--text-temperature", "-1", "-1.0 is not in the range x>=0"),
        ("--audio-temperature", "nan", "'nan' is not a finite number"),
        ("--cfg-scale", "0", "0.0 is not in the range x>0"),
        ("--cfg-scale", "inf", "'inf' is not a finite number"),
        ("--audio-top-k", "1.5", "'1.5' is not a valid integer"),
        ("--max-padding", "0", "0 is not in the range x>=1"),
        ("--seed", "-1", "-1 is not in the range 0<=x<=4294967295"),
        ("--dtype", "float16", "'float16' is not one of 'float32', 'bfloat16', 'int8'"),
        ("--voice-1", "none.wav", "File 'none.wav' does not exist"),
    ],
)
def test_wrong_values_name_their_option(
    generate: Any, option: str, value: str, message: str
) -> None:
    run = generate(SCRIPT, option, value)
    assert run.exit_code == 2 and f"Invalid value for '{option}': {message}" in run.stderr


def test_places_that_cannot_be_written_are_refused_before_any_work(
    generate: Any, asked: list[Any]
) -> None:
    Path("file").write_text("")
    for place, reason in ((".", "is a folder"), ("file/out.wav", "no access to")):
        run = generate(SCRIPT, output=place)
        assert run.exit_code == 2 and reason in run.stderr
    assert asked == [] and generate.loaded == []


# ------------------------------------------------------------------------------------------- voices


@pytest.fixture
def voice(tiny_model: Dia2) -> Voice:
    wave = (0.1 * np.random.default_rng(1).standard_normal(48_000)).astype(np.float32)
    voice = tiny_model.prepare_voice(wave, words=[WordTime("Hello", 0.2, 0.6)])
    voice.save("ben.voice")
    return voice


def test_voices_are_recordings_or_prepared(
    generate: Any, asked: list[Any], recording: Path, voice: Voice
) -> None:
    words = [{"text": "Two", "start": 0.5, "end": 0.7}, {"text": "words.", "start": 1, "end": 1.2}]
    Path("words.json").write_text(json.dumps(words))
    Path("said.txt").write_text("Three words said.")
    timed = (WordTime("Two", 0.5, 0.7), WordTime("words.", 1, 1.2))
    for arguments, expected in (
        (["--voice-1", "ben.voice"], {1: voice.words}),
        (["--voice-1", recording, "--words-1", "words.json"], {1: timed}),
        (["--voice-1", recording, "--transcript-1", "Some text"], {1: ["Some", "text"]}),
        (
            ["--voice-1", recording, "--transcript-1", "said.txt", "--voice-2", "ben.voice"],
            {1: ["Three", "words", "said."], 2: voice.words},
        ),
    ):
        run = generate(SCRIPT, *arguments)
        assert run.exit_code == 0, run.stderr
        found = asked[-1]["voices"]
        assert list(found) == list(expected)
        for speaker, said in expected.items():
            kind = tuple if isinstance(said, tuple) else list
            texts = [word.text for word in found[speaker].words]
            assert (found[speaker].words if kind is tuple else texts) == said
            assert found[speaker].codes.shape == (8, 25)


def test_a_recording_alone_is_transcribed(
    generate: Any, asked: list[Any], recording: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recognised(wave: np.ndarray, model: object, *, sample_rate: int) -> Any:
        assert model == "small.en"
        return [("Heard", 0.1, 0.5)]

    monkeypatch.setattr("dia2_jax.voice.transcribe", recognised)
    run = generate(SCRIPT, "--voice-1", recording, "--recognizer", "small.en")
    assert run.exit_code == 0, run.stderr
    assert asked[0]["voices"][1].words == (WordTime("Heard", 0.1, 0.5),)


def test_turns_of_a_conversation(
    generate: Any, asked: list[Any], recording: Path, voice: Voice
) -> None:
    Path("talk").mkdir()
    words = [{"text": "One", "start": 0.5, "end": 0.7}]
    Path("talk/words.json").write_text(json.dumps(words))
    turns = [
        {"speaker": 2, "audio": "../anna.wav", "transcript": "First turn."},
        {"speaker": 1, "voice": "../ben.voice"},
        {"speaker": 2, "audio": "../anna.wav", "words": words},
        {"speaker": 1, "audio": str(recording), "words": "words.json"},
    ]
    Path("talk/turns.json").write_text(json.dumps(turns))
    run = generate(SCRIPT, "--turns", "talk/turns.json")
    assert run.exit_code == 0, run.stderr
    found: list[Turn] = asked[0]["voices"]
    assert [turn.speaker for turn in found] == [2, 1, 2, 1]
    assert [[word.text for word in turn.voice.words] for turn in found] == [
        ["First", "turn."],
        ["Hello"],
        ["One"],
        ["One"],
    ]


def test_voice_options_that_do_not_go_together(
    generate: Any, asked: list[Any], recording: Path, voice: Voice
) -> None:
    Path("words.json").write_text("[]")
    for arguments, message in (
        (["--voice-2", recording], "--voice-2 without --voice-1: the model needs speaker 1"),
        (["--transcript-1", "Hm"], "--transcript-1 says what a recording holds: give --voice-1"),
        (["--words-2", "words.json"], "--words-2 says what a recording holds: give --voice-2"),
        (
            ["--voice-1", recording, "--words-1", "words.json", "--transcript-1", "Hm"],
            "--words-1 and --transcript-1 exclude each other",
        ),
        (
            ["--voice-1", "ben.voice", "--transcript-1", "Hm"],
            "ben.voice is a prepared voice, which has its words already",
        ),
        (["--voice-1", recording, "--turns", "words.json"], "--turns and --voice-1/-2 exclude"),
        (["--voice-1", recording, "--transcript-1", "hm.txt"], "there is no file 'hm.txt'"),
    ):
        run = generate(SCRIPT, *arguments)
        assert run.exit_code == 2 and message in " ".join(run.stderr.split()), run.stderr
    assert asked == [] and generate.loaded == []


def test_turns_that_cannot_be_used_name_file_and_turn(
    generate: Any, asked: list[Any], recording: Path, voice: Voice
) -> None:
    good = {"speaker": 1, "voice": "ben.voice"}
    audio = {"speaker": 1, "audio": "anna.wav"}
    for content, message in (
        ("{", "turns.json: not valid JSON"),
        ("[]", "turns.json: must hold a list of turns"),
        ([good, 5], "turns.json, turn 1: 5 is not an object with speaker, audio"),
        ([{**good, "speaker": 3}], "turn 0: speaker must be 1 or 2, got 3"),
        ([{**good, "speeker": 1}], "turn 0: unknown key 'speeker'; known: speaker"),
        ([{"speaker": 1}], 'turn 0: give either "audio", a recording, or "voice"'),
        ([{**good, "audio": "anna.wav"}], 'turn 0: give either "audio", a recording, or "voice"'),
        ([{**audio, "audio": "no.wav"}], "turn 0: there is no file no.wav"),
        ([{**audio, "voice": "anna.wav", "audio": None}], "turn 0: give either"),
        ([{"speaker": 1, "voice": "anna.wav"}], "anna.wav is not a prepared voice: give a rec"),
        ([{**good, "transcript": "Hm"}], "ben.voice is a prepared voice, which has its words"),
        ([{**audio, "transcript": 5}], "turn 0: transcript must be a text"),
        ([{**audio, "words": [], "transcript": "Hm"}], "words and transcript exclude each other"),
        ([{**audio, "words": ["Hm"]}], "turn 0: words must be a file or a list of"),
        ([{**audio, "words": [{"text": "a", "start": 3, "end": 4}]}], "'a' starts at 3 s but"),
        ([{**audio, "words": "no.json"}], "turn 0: cannot read word times from no.json"),
    ):
        text = content if isinstance(content, str) else json.dumps(content)
        Path("turns.json").write_text(text)
        run = generate(SCRIPT, "--turns", "turns.json")
        assert run.exit_code == 1 and message in run.stderr, (content, run.stderr)
        assert run.stderr.startswith("dia2-jax: error: turns.json")
    assert asked == []


def test_errors_of_voices_are_one_line(generate: Any, recording: Path, voice: Voice) -> None:
    Path("cut.voice").write_bytes(Path("ben.voice").read_bytes()[:-3])
    Path("head.voice").write_bytes(Path("ben.voice").read_bytes()[:60])
    Path("renamed.bin").write_bytes(Path("ben.voice").read_bytes()[:60])
    Path("words.json").write_text('[{"text": "late", "start": 5, "end": 6}]')
    for arguments, message in (
        (["--voice-1", "cut.voice"], "error: no voice file: cut.voice: "),
        (["--voice-1", "head.voice"], "error: no voice file: head.voice: "),
        (["--voice-1", "renamed.bin"], "error: no voice file: renamed.bin: "),
        (["--voice-1", recording, "--words-1", "words.json"], "starts at 5 s but the recording"),
        (["--voice-1", __file__, "--transcript-1", "Hm"], "cannot be read as audio"),
    ):
        run = generate(SCRIPT, *arguments)
        assert run.exit_code == 1 and message in run.stderr
        assert run.stderr.startswith("dia2-jax: error: ") and run.stderr.count("\n") == 1
