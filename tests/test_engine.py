"""The engine: one call from a checkpoint and a script to speech, and every refusal on the way."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dia2_jax import Dia2, GenerationConfig, SamplingConfig, Turn, Voice
from dia2_jax.compilation_cache import enable_compilation_cache
from dia2_jax.convert.api import convert
from dia2_jax.engine import Result
from dia2_jax.errors import CheckpointError, ConfigError, HubError, PrefixError, ScriptError
from dia2_jax.text.timing import WordTime

SCRIPT = "[S1] Well, hello there! [S2] Fine, and you?"
LONGEST_DELAY = 4


def noise(seconds: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (0.1 * rng.standard_normal(round(24_000 * seconds))).astype(np.float32)


@pytest.fixture(scope="module")
def voices(tiny_model: Dia2) -> tuple[Voice, Voice]:
    first = [WordTime("This", 0.2, 0.5), WordTime("is", 0.6, 0.8), WordTime("Anna.", 0.9, 1.5)]
    second = [WordTime("Ben", 0.3, 0.7), WordTime("here.", 0.9, 1.3)]
    return (
        tiny_model.prepare_voice(noise(2.0, 1), words=first),
        tiny_model.prepare_voice(noise(1.6, 2), words=second),
    )


def assert_same(one: Result, other: Result) -> None:
    np.testing.assert_array_equal(one.codes, other.codes)
    np.testing.assert_allclose(one.waveform, other.waveform, atol=1e-5)
    assert (one.words, one.truncated) == (other.words, other.truncated)


# ----------------------------------------------------------------------------------------- speaking


def test_a_result_is_whole(tiny_model: Dia2) -> None:
    frames: list[int] = []
    result = tiny_model.generate(SCRIPT, seed=3, progress=frames.append)
    count = result.codes.shape[1]
    assert result.codes.dtype == np.int32 and result.codes.shape[0] == 8
    assert result.codes.min() >= 0 and result.codes.max() < 64  # never bos or pad
    assert result.waveform.dtype == np.float32 and result.waveform.shape == (1920 * count,)
    assert np.abs(result.waveform).max() <= 1 and result.waveform.std() > 0.01
    assert result.sample_rate == tiny_model.sample_rate == 24_000
    assert tiny_model.frame_rate == 12.5
    decoded = tiny_model.codec.decode(result.codes[None])[0]
    np.testing.assert_array_equal(result.waveform, np.clip(decoded, -1, 1))
    assert [text for text, _ in result.words] == [
        "Well,",
        "hello",
        "there!",
        "Fine,",
        "and",
        "you?",
    ]
    times = [seconds for _, seconds in result.words]
    assert times == sorted(times) and times[0] == 2 / 12.5 and times[-1] < count / 12.5
    assert not result.truncated
    # Frame f is complete when the longest delay behind it was computed.
    assert frames == list(range(1, count + LONGEST_DELAY))


def test_the_same_seed_speaks_the_same(tiny_model: Dia2) -> None:
    one, two, other = (tiny_model.generate(SCRIPT, seed=seed) for seed in (5, 5, 6))
    assert one.codes.tobytes() == two.codes.tobytes()
    assert one.waveform.tobytes() == two.waveform.tobytes()
    assert one.codes.shape != other.codes.shape or (one.codes != other.codes).any()


def test_newlines_are_white_space_within_a_script(tiny_model: Dia2) -> None:
    spread = SCRIPT.replace(" [S2]", "\n\n[S2]\n")
    assert_same(tiny_model.generate(spread, seed=1), tiny_model.generate(SCRIPT, seed=1))


def test_every_script_of_a_batch_is_what_it_is_alone(
    tiny_model: Dia2, voices: tuple[Voice, Voice]
) -> None:
    scripts = ["[S1] One word more.", SCRIPT, "[S2] Hm, (laughs) no! [S1] Oh yes."]
    configs = [
        GenerationConfig(audio=SamplingConfig(0.7, 20)),
        GenerationConfig(cfg_scale=4.0, cfg_filter_k=12, initial_padding=5),
        GenerationConfig(text=SamplingConfig(0.0, 50), audio=SamplingConfig(0.0, 50)),
    ]
    prompts: list[Any] = [None, list(voices), {1: voices[1]}]
    together = tiny_model.generate(scripts, configs, voices=prompts, seed=[4, 5, 6])
    for index, one in enumerate(together):
        alone = tiny_model.generate(
            scripts[index], configs[index], voices=prompts[index], seed=4 + index
        )
        assert_same(one, alone)
    assert tiny_model.generate([]) == []


def test_settings_reach_the_model(tiny_model: Dia2) -> None:
    later = tiny_model.generate(SCRIPT, GenerationConfig(initial_padding=9), seed=1)
    assert later.words[0] == ("Well,", 9 / 12.5)
    greedy = GenerationConfig(text=SamplingConfig(0.0, 50), audio=SamplingConfig(0.0, 50))
    one, two = (tiny_model.generate(SCRIPT, greedy, seed=seed) for seed in (1, 2))
    np.testing.assert_array_equal(one.codes, two.codes)


def test_bfloat16_speaks(tiny_model_folder: Path) -> None:
    model = Dia2.from_pretrained(tiny_model_folder, dtype="bfloat16")
    result = model.generate("[S1] Hello there.")
    assert [text for text, _ in result.words] == ["Hello", "there."]
    assert result.codes.max() < 64 and result.waveform.dtype == np.float32
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model._programs.params)} == {"bfloat16"}


def test_int8_speaks_the_same_however_text_and_weights_arrive(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    model = Dia2.from_pretrained(tiny_model_folder, dtype="int8")
    result = model.generate(SCRIPT, seed=3)
    assert [text for text, _ in result.words][0] == "Well," and result.codes.max() < 64
    chunks = list(model.stream([SCRIPT[:9], SCRIPT[9:23], SCRIPT[23:]], seed=3, chunk_frames=4))
    np.testing.assert_array_equal(np.concatenate([c.codes for c in chunks], axis=1), result.codes)
    # Saved, it is found to be int8.
    convert(tiny_model_folder, tmp_path / "saved", dtype="int8")
    saved = Dia2.from_pretrained(tmp_path / "saved")
    assert (saved.dtype, model.dtype) == ("int8", "int8")
    leaves = (jax.tree.leaves(one._programs.params) for one in (model, saved))
    for held, stored in zip(*leaves, strict=True):
        np.testing.assert_array_equal(held, stored)
    with pytest.raises(CheckpointError, match="holds int8 weights"):
        Dia2.from_pretrained(tmp_path / "saved", dtype="float32")


def test_after_a_warm_up_nothing_is_left_to_compile(
    tiny_model: Dia2, voices: tuple[Voice, Voice]
) -> None:
    compiled: list[str] = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    tiny_model.warm_up(voices=voices[0], chunk_frames=5)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        chunks = list(tiny_model.stream(SCRIPT, voices=voices[0], chunk_frames=5))
        assert len(chunks) > 2 and compiled == []
        jax.jit(lambda x: x + 1)(0)
        assert compiled != []  # the listener does hear
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


# ----------------------------------------------------------------------------------------- prefixes


def test_a_prefix_is_heard_but_not_spoken_again(
    tiny_model: Dia2, voices: tuple[Voice, Voice]
) -> None:
    alone = tiny_model.generate(SCRIPT, seed=2)
    led = tiny_model.generate(SCRIPT, seed=2, voices=voices)
    assert [text for text, _ in led.words] == [text for text, _ in alone.words]
    frames = min(led.codes.shape[1], alone.codes.shape[1])
    assert (led.codes[:, :frames] != alone.codes[:, :frames]).mean() > 0.5


@pytest.mark.parametrize("plan", ["exact", "upstream"])
def test_the_prefix_is_kept_on_request(
    tiny_model: Dia2, voices: tuple[Voice, Voice], plan: Any
) -> None:
    cut = tiny_model.generate(SCRIPT, GenerationConfig(prefix_plan=plan), seed=2, voices=voices)
    kept = tiny_model.generate(
        SCRIPT, GenerationConfig(prefix_plan=plan, include_prefix=True), seed=2, voices=voices
    )
    given = np.concatenate([voice.codes for voice in voices], axis=1)
    sure = given.shape[1] - LONGEST_DELAY  # behind it the delayed codes are generated
    np.testing.assert_array_equal(kept.codes[:, :sure], given[:, :sure])
    skipped = kept.codes.shape[1] - cut.codes.shape[1]
    assert sure <= skipped <= given.shape[1]
    np.testing.assert_array_equal(kept.codes[:, skipped:], cut.codes)
    heard = tiny_model.codec.decode(given[None, :, :sure])[0]
    np.testing.assert_allclose(kept.waveform[: heard.size], np.clip(heard, -1, 1), atol=1e-4)
    said = [text for text, _ in kept.words]
    assert said[-6:] == [text for text, _ in cut.words][-6:]
    if plan == "exact":
        assert said == ["This", "is", "Anna.", "Ben", "here."] + [text for text, _ in cut.words]


def test_a_conversation_is_context_for_the_next_turn(
    tiny_model: Dia2, voices: tuple[Voice, Voice]
) -> None:
    talk = [Turn(2, voices[1]), Turn(1, voices[0]), Turn(2, voices[1])]
    kept = tiny_model.generate(
        "[S1] And so on.", GenerationConfig(include_prefix=True), voices=talk, seed=1
    )
    order = ["Ben", "here.", "This", "is", "Anna.", "Ben", "here.", "And", "so", "on."]
    assert [text for text, _ in kept.words] == order
    given = np.concatenate([turn.voice.codes for turn in talk], axis=1)
    sure = given.shape[1] - LONGEST_DELAY
    np.testing.assert_array_equal(kept.codes[:, :sure], given[:, :sure])


def test_prefixes_that_cannot_be_used(tiny_model: Dia2, voices: tuple[Voice, Voice]) -> None:
    anna, ben = voices
    with pytest.raises(PrefixError, match="only speaker 2.*add one for speaker 1"):
        tiny_model.generate(SCRIPT, voices=[None, ben])
    with pytest.raises(PrefixError, match="only speaker 2"):
        tiny_model.generate(SCRIPT, voices=[Turn(2, ben)])
    with pytest.raises(PrefixError, match=r"speakers are the numbers 1 and 2, got \[1, 3\]"):
        tiny_model.generate(SCRIPT, voices={1: anna, 3: ben})
    with pytest.raises(PrefixError, match="speaker 3: Dia2 has speakers 1 and 2"):
        tiny_model.generate(SCRIPT, voices=[Turn(1, anna), Turn(3, ben)])
    with pytest.raises(PrefixError, match="voice of speaker 1 is 'a.wav'.*model.prepare_voice"):
        tiny_model.generate(SCRIPT, voices={1: "a.wav"})
    with pytest.raises(PrefixError, match=r"275 frames \(22\.0 s\).*context is 256.*shorten"):
        tiny_model.generate(SCRIPT, voices=[Turn(1, anna)] * 11)
    hasty = dataclasses.replace(anna, words=anna.words * 9)
    hasty = dataclasses.replace(
        hasty, words=tuple(WordTime(w.text, i / 20, i / 20) for i, w in enumerate(hasty.words))
    )
    with pytest.raises(PrefixError, match="27 words.*check that the words belong to this audio"):
        tiny_model.generate(SCRIPT, voices=hasty)
    narrow = dataclasses.replace(anna, codes=anna.codes[:4])
    with pytest.raises(PrefixError, match=r"shape \(4, 25\), the model reads \[8, frames\]"):
        tiny_model.generate(SCRIPT, voices=narrow)


# ---------------------------------------------------------------------------------- wrong arguments


def test_scripts_that_cannot_be_spoken(tiny_model: Dia2) -> None:
    for empty in ("", " \n\t", "[S1]", "[S1] [S2] "):
        with pytest.raises(ScriptError, match="the script is empty: give it at least one word"):
            tiny_model.generate(empty)
    with pytest.raises(ScriptError, match=r"no speakable word.*'\.\.\. <break> -'\): give it at"):
        tiny_model.generate('[S1] ... <break time="1s"/> -')
    with pytest.raises(ScriptError, match="script 1 of the batch: the script is empty"):
        tiny_model.generate(["[S1] Hello.", " "])
    with pytest.raises(ScriptError, match="empty"):
        list(tiny_model.stream(iter([])))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"script": b"Hello"}, "script: must be a string, or a list"),
        ({"script": ["Hello", None]}, "script: must be a string, or a list"),
        ({"seed": -1}, r"seed: must be a whole number from 0 to 2\*\*32 - 1, got -1"),
        ({"seed": 2**32}, "seed: must be a whole number"),
        ({"seed": True}, "seed: must be a whole number"),
        ({"seed": 1.5}, "seed: must be a whole number from 0 .* got 1.5"),
        ({"seed": [1, 2]}, "seed: 2 values for 1 scripts"),
        ({"config": {"cfg_scale": 2.0}}, "config: must be a GenerationConfig"),
        ({"config": [GenerationConfig()] * 3}, "config: 3 values for 1 scripts"),
        ({"voices": [[None], [None]]}, "voices: 2 values for 1 scripts"),
    ],
)
def test_arguments_are_named(tiny_model: Dia2, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_model.generate(**{"script": SCRIPT, **arguments})


def test_a_stream_refuses_wrong_arguments_at_once(tiny_model: Dia2) -> None:
    with pytest.raises(ConfigError, match="chunk_frames: must be a whole number >= 1, got 0"):
        tiny_model.stream(SCRIPT, chunk_frames=0)
    with pytest.raises(ConfigError, match="chunk_frames"):
        tiny_model.session(chunk_frames=0)


# ------------------------------------------------------------------------------------------ loading


def test_what_cannot_be_loaded(tiny_model_folder: Path, tmp_path: Path) -> None:
    for dtype in ("float16", "fast", 7):
        with pytest.raises(ConfigError, match="'float32' or 'bfloat16' or 'int8', got"):
            Dia2.from_pretrained(tiny_model_folder, dtype=dtype)
    with pytest.raises(HubError, match="there is no folder .*nowhere.*hub repository"):
        Dia2.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(HubError, match=r"config\.json is missing"):
        Dia2.from_pretrained(tmp_path)
    with pytest.raises(HubError, match=r"HF_HUB_OFFLINE.*\n.*\n  hf download nari-labs/Dia2-1B"):
        Dia2.from_pretrained("nari-labs/Dia2-1B")
    with pytest.raises(HubError, match="there is no folder"):
        Dia2.from_pretrained(tiny_model_folder, mimi=tmp_path / "nowhere")


def test_the_codec_must_be_the_model_s(tiny_model: Dia2) -> None:
    def with_codec(**changes: int) -> None:
        Dia2(
            tiny_model.config,
            None,  # type: ignore[arg-type]  # not reached
            tiny_model.tokenizer,
            dataclasses.replace(tiny_model.mimi_config, **changes),
            tiny_model.codec.mimi,
        )

    with pytest.raises(CheckpointError, match="predicts 8 codebooks but the codec has 4.*belongs"):
        with_codec(num_quantizers=4)
    with pytest.raises(CheckpointError, match="codes up to 63 .* have 32 entries.*belongs"):
        with_codec(codebook_size=32)


def test_where_compiled_programs_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def chosen(**environment: str) -> str | None:
        for name in ("DIA2_JAX_CACHE", "XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        try:
            enable_compilation_cache()
            return jax.config.values["jax_compilation_cache_dir"]
        finally:
            jax.config.update("jax_compilation_cache_dir", None)

    home = str(tmp_path)
    jax.config.update("jax_compilation_cache_dir", None)
    assert chosen(DIA2_JAX_CACHE="off", HOME=home) is None
    assert chosen(HOME=home) == f"{home}/.cache/dia2-jax/xla"
    assert chosen(XDG_CACHE_HOME=f"{home}/xdg", HOME=home) == f"{home}/xdg/dia2-jax/xla"
    assert chosen(DIA2_JAX_CACHE=f"{home}/own", HOME=home) == f"{home}/own"
    jax.config.update("jax_compilation_cache_dir", f"{home}/theirs")
    assert chosen(HOME=home) == f"{home}/theirs"
