"""The codec's task: exact resume, what trains and what does not, export, streams, its configs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny_codec import raw_config, tiny_shape

from dia2_jax import checkpoint, hub
from dia2_jax.audio import read_audio
from dia2_jax.config import load_mimi_config
from dia2_jax.config.reading import validate
from dia2_jax.convert.models import load_mimi
from dia2_jax.errors import ConfigError
from dia2_jax.mimi.runtime import Codec, StreamingDecoder
from train.codec_training.config import CodecConfig
from train.codec_training.generator import forward_flops, read_shape
from train.codec_training.quantizer import row_choices
from train.codec_training.task import CodecTask
from train.config import read_config

ROOT = Path(__file__).parents[2]

#: Everything on at once: all losses, discriminator every second step, balancer, targets.
FULL: dict[str, Any] = {
    "run": {"steps": 50},
    "losses": {
        "stft": 0.5,
        "waveform": 0.5,
        "adversarial": 1.0,
        "feature_matching": 1.0,
        "semantic": 1.0,
    },
    "balancer": {"decay": 0.9},
    "discriminator": {"windows": [32], "filters": 2, "start": 0, "period": 2},
    "semantic": {"kind": "histogram", "targets": "data", "width": 3},
}


def make(folder: Path, **changes: Any) -> CodecTask:
    return CodecTask(validate(CodecConfig, raw_config(folder, **changes), "test"))


def steps(task: CodecTask, state: Any, count: int) -> tuple[Any, dict[str, float]]:
    batches = task.batches(int(state["step"]))
    metrics: Any = {}
    for _ in range(count):
        state, metrics = task.train_step(state, next(batches))
    return state, {name: float(value) for name, value in metrics.items()}


def numpy_of(tree: Any) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in checkpoint.flatten_tree(tree)[0].items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Audio with targets beside it."""
    folder = tmp_path_factory.mktemp("codec")
    raw_config(folder)
    for path in sorted((folder / "audio").glob("*.wav")):
        frames = -(-len(read_audio(path, 800)) // 8)
        shares = np.random.default_rng(frames).uniform(0, 1, (frames, 3))
        np.save(path.with_suffix(".targets.npy"), shares.astype(np.float32))
    return folder


@pytest.fixture(scope="module")
def full(folder: Path) -> tuple[CodecTask, dict[str, np.ndarray], Any, dict[str, float]]:
    """The task with everything on, its first state, the one after four steps, and its metrics."""
    task = make(folder, **FULL)
    state = task.initial_state()
    first = numpy_of(state)
    state, metrics = steps(task, state, 4)
    return task, first, state, metrics


def test_four_steps_are_two_a_restore_and_two(full: Any, folder: Path, tmp_path: Path) -> None:
    task, first, state, metrics = full
    half, _ = steps(task, task.initial_state(), 2)
    checkpoint.save(tmp_path / "half", half, {})
    restored, _ = checkpoint.restore(tmp_path / "half", task.abstract_state())
    resumed, again = steps(task, restored, 2)
    assert again == metrics
    ours, theirs = numpy_of(state), numpy_of(resumed)
    assert ours.keys() == theirs.keys() == first.keys()
    for path, value in ours.items():
        np.testing.assert_array_equal(value, theirs[path], err_msg=path)
    assert ours["step"] == 4


def test_every_part_moves_and_every_loss_is_reported(full: Any) -> None:
    _, first, state, metrics = full
    after = numpy_of(state)
    still = {path for path in after if (after[path] == first[path]).all()}
    # Only what k-means marked as initialised, and the untrained distance.
    assert all(p.endswith(("initialized", "untrained_distance")) for p in still), still
    losses = {name.removeprefix("loss/") for name in metrics if name.startswith("loss/")}
    assert losses == {
        "mel", "stft", "waveform", "adversarial", "feature_matching", "commitment", "semantic",
        "discriminator",
    }  # fmt: skip
    assert all(np.isfinite(value) for value in metrics.values())


def test_the_discriminator_is_updated_every_period(full: Any) -> None:
    task = full[0]
    state = task.initial_state()
    judges = [numpy_of(state["discriminator"])]
    for _ in range(3):
        state, _ = steps(task, state, 1)
        judges.append(numpy_of(state["discriminator"]))
    moved = [
        any((before[path] != after[path]).any() for path in before)
        for before, after in itertools.pairwise(judges)
    ]
    assert moved == [True, False, True]


def test_the_discriminator_waits_for_its_step(folder: Path) -> None:
    late = {**FULL, "discriminator": {**FULL["discriminator"], "start": 2}}
    task = make(folder, **late)
    # Which of the two programs a step runs, without compiling either.
    task._steps = {heard: lambda *_, heard=heard: heard for heard in (False, True)}
    batches = task.batches(0)
    assert [task.train_step({}, next(batches)) for _ in range(4)] == [False, False, True, True]


def test_export_loads_to_the_same_codes_audio_and_streams(full: Any, tmp_path: Path) -> None:
    task, _, state, _ = full
    task.export(state, tmp_path / "export")
    mimi, config, _ = load_mimi(hub.resolve_mimi(tmp_path / "export"))
    assert config.num_quantizers == 3 and config.bookkeeping["model_type"] == "mimi"
    codec = Codec(mimi)
    wave = task.held_out[:2]
    params, codebooks = task.weights(state)
    codes, heard = jax.jit(
        lambda p, c, w: (m := task.generator.mimi(p, c), x := m.encode(w), m.decode(x))[1:]
    )(params, codebooks, wave)
    np.testing.assert_array_equal(codec.encode(wave), codes)
    whole = codec.decode(np.asarray(codes))
    np.testing.assert_allclose(whole, heard, atol=1e-5)
    stream = StreamingDecoder(codec, batch=2)
    pieces = [stream.push(np.asarray(codes)[:, :, t : t + n]) for t, n in ((0, 1), (1, 9), (10, 6))]
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, atol=1e-5)
    # The average of the weights goes out, and the codebooks as they are.
    exported = numpy_of(params)
    np.testing.assert_array_equal(
        exported["encoder.first.weight"], state["ema"]["encoder.first.weight"]
    )
    assert not any(path.startswith("semantic_head") for path in params)


def test_evaluation_reports_what_is_promised(full: Any) -> None:
    task, _, state, _ = full
    values = task.evaluate(state)
    assert values == task.evaluate(state)
    names = {name.removeprefix("validation/") for name in values}
    per_book = {f"{kind}/{index}" for kind in ("perplexity", "usage") for index in range(3)}
    plain = {"mel_distance", "mel_share", "si_sdr", "streaming_difference", "perplexity", "usage"}
    assert names == plain | per_book
    assert values["validation/streaming_difference"] < 1e-4
    assert 1 <= values["validation/perplexity/2"] <= 8
    untrained = values["validation/mel_distance"] / values["validation/mel_share"]
    assert untrained == pytest.approx(float(state["untrained_distance"]), rel=1e-5)
    samples = task.samples(state, 4)
    assert [sample.name for sample in samples] == [
        "0_original", "0_codec", "2_original", "2_codec",
    ]  # fmt: skip
    np.testing.assert_array_equal(samples[2].waveform, task.held_out[2])
    assert samples[3].waveform.shape == (128,) and samples[3].sample_rate == 800


def test_training_a_while_brings_the_waveform_nearer(full: Any) -> None:
    task = full[0]
    state, _ = steps(task, task.initial_state(), 50)
    values = task.evaluate(state)
    assert values["validation/mel_share"] < 0.8
    assert values["validation/streaming_difference"] < 1e-4


def test_a_published_codec_is_polished_with_encoder_and_codebooks_frozen(
    full: Any, folder: Path, tmp_path: Path
) -> None:
    task, _, state, _ = full
    task.export(state, tmp_path / "codec")
    frozen = ["encoder*", "downsample*", "quantizer*"]
    changes = {
        "model": {"shape": None, "initial": str(tmp_path / "codec"), "frozen": frozen},
        "codebooks": {"frozen": True},
    }
    polish = make(folder, **changes)
    start = polish.initial_state()
    assert "codebooks" not in start
    assert {path.split(".")[0] for path in start["params"]} == {
        "upsample", "decoder_transformer", "decoder",
    }  # fmt: skip
    before = numpy_of(polish.weights(start)[0])
    np.testing.assert_array_equal(
        before["decoder.first.weight"], state["ema"]["decoder.first.weight"]
    )
    after_state, metrics = steps(polish, start, 1)
    assert set(metrics) == {"loss/mel", "loss/commitment", "gradient_norm", "learning_rate"}
    # As after a restore, which brings what trains alone.
    fresh = make(folder, **changes)
    params, codebooks = fresh.weights(after_state)
    after = numpy_of(params)
    for path, value in before.items():
        moved = (after[path] != value).any()
        assert moved == (path in after_state["params"]), path
    for path, value in task.weights(state)[1].items():
        np.testing.assert_array_equal(codebooks[path], value)


def test_a_row_is_heard_through_the_codes_that_were_predicted_for_it(
    full: Any, folder: Path, tmp_path: Path
) -> None:
    task, _, state, _ = full
    task.export(state, tmp_path / "codec")
    shape = task.mimi
    random = np.random.default_rng(0)
    lines = []
    for path in sorted((folder / "audio").glob("*.wav")):
        frames = -(-len(read_audio(path, shape.sampling_rate)) // shape.samples_per_frame)
        codes = random.integers(0, shape.codebook_size, (frames, shape.num_quantizers))
        np.save(tmp_path / f"{path.stem}.npy", codes.astype(np.float32))
        lines.append(json.dumps({"path": str(path), "targets": f"{path.stem}.npy"}))
    (tmp_path / "predicted.jsonl").write_text("\n".join(lines))
    changes = {
        "model": {"shape": None, "initial": str(tmp_path / "codec"), "frozen": ["encoder*"]},
        "codebooks": {"frozen": True, "predicted": 1.0},
        "data": {"train": [str(tmp_path / "predicted.jsonl")]},
    }
    tune = make(folder, **changes)
    batch = next(tune.batches(0))
    codes = batch["targets"].astype(np.int32).transpose(0, 2, 1)
    assert batch["real"].all()  # windows begin at frames, and every frame has codes

    params, codebooks = tune.weights(tune.initial_state())
    every = row_choices(jax.random.key(0), len(codes), shape.num_quantizers, tune.config.codebooks)
    heard = tune.generator(params, codebooks, batch["wave"], every, codes.transpose(0, 2, 1))
    wanted = tune.generator.mimi(params, codebooks).decode(codes)
    np.testing.assert_allclose(heard.wave, wanted, atol=1e-5)
    own = tune.generator(params, codebooks, batch["wave"], every)
    assert np.abs(np.asarray(own.wave - heard.wave)).max() > 1e-3
    _, metrics = steps(tune, tune.initial_state(), 1)
    assert np.isfinite(metrics["loss/mel"])


@pytest.mark.parametrize("name", ["codec_tiny", "codec_mimi"])
def test_config_files_are_whole(name: str) -> None:
    config = read_config(CodecConfig, ROOT / "configs" / f"{name}.yaml")
    assert config.model.shape is not None
    shape = load_mimi_config(_yaml(ROOT / config.model.shape))
    assert shape.sampling_rate == 24_000
    text = (ROOT / "configs" / f"{name}.yaml").read_text()
    assert f"python -m train.codec configs/{name}.yaml" in text


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    return dict(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": {"adversarial": 1.0}}, "discriminator: goes with losses.adversarial"),
        ({"semantic": {"kind": "cosine"}}, "semantic: goes with a weight losses.semantic"),
        ({"codebooks": {"frozen": True}}, "codebooks.frozen: random codebooks"),
        ({"codebooks": {"predicted": 0.5}}, "codebooks.predicted: codes name entries"),
        ({"mesh": {"fsdp": 2}}, "mesh: a codec is small"),
        ({"losses": {"mel": 0.0}}, "mel, stft and waveform are all 0"),
        ({"losses": {"mel_bands": [8, 6]}}, "mel_bands: needs one number for each"),
        ({"codebooks": {"dropuot": 0.1}}, r"unknown key 'codebooks.dropuot' \(did you mean"),
    ],
)
def test_settings_that_contradict_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(CodecConfig, raw_config(tmp_path, **changes), "test")


def test_shapes_that_do_not_fit_are_refused(full: Any, folder: Path, tmp_path: Path) -> None:
    full[0].export(full[2], tmp_path / "codec")
    shape = tmp_path / "other.json"
    shape.write_text('{"num_filters": 4}')
    with pytest.raises(ConfigError, match="differs from model.shape in .*num_filters"):
        make(folder, model={"shape": str(shape), "initial": str(tmp_path / "codec")})
    with pytest.raises(ConfigError, match="random weights would stay random"):
        make(folder, model={"frozen": ["encoder*"]})
    with pytest.raises(ConfigError, match="model.shape: .*missing.yaml"):
        read_shape(validate(CodecConfig, raw_config(
            tmp_path / "codec", model={"shape": "missing.yaml"}), "test").model)  # fmt: skip


def test_flops_count_the_products(full: Any) -> None:
    task = full[0]
    one, two = (forward_flops(task.generator, 8 * frames) for frames in (4, 8))
    assert tiny_shape().num_filters == 2
    # The first convolution alone: 3 taps, 1 in, 2 out, at every sample.
    assert one > 2 * 3 * 2 * 32
    # Linear in time, but for attention.
    assert 1.9 < two / one < 2.3
    work = task.work(next(task.batches(0)))
    assert work["frames"] == 48 and work["audio_seconds"] == pytest.approx(0.48)
