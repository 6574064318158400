"""Audio of codec training: sources, the cache, the split, and windows by (seed, step)."""

from __future__ import annotations

import json
import time
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
from tiny_codec import RATE, raw_config, tiny_shape, write_recordings

from dia2_jax.audio import read_audio
from dia2_jax.config.reading import validate
from dia2_jax.errors import DataError
from train.codec_training.config import CodecConfig
from train.codec_training.corpora import open_corpora
from train.codec_training.sources import (
    Corpus,
    Recording,
    list_recordings,
    open_corpus,
    split_recordings,
)
from train.codec_training.windows import WindowSource, fixed_windows
from train.recordings import read_batches

FRAME = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recordings(tmp_path_factory.mktemp("audio"))


@pytest.fixture(scope="module")
def corpus(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    cache = tmp_path_factory.mktemp("cache")
    return open_corpus(list_recordings([str(folder)]), cache, RATE, FRAME)


def source(corpus: Corpus, **changes: object) -> WindowSource:
    settings = {"frames": 10, "samples_per_frame": FRAME, "rows": 4, "seed": 1, **changes}
    return WindowSource(corpus, **settings)  # type: ignore[arg-type]


def test_the_cache_holds_the_samples_and_is_read_again(folder: Path, tmp_path: Path) -> None:
    recordings = list_recordings([str(folder)])
    assert [recording.name for recording in recordings] == [f"{i}.wav" for i in range(6)]
    done: list[int] = []
    first = open_corpus(recordings, tmp_path, RATE, FRAME, progress=lambda n, of: done.append(n))
    assert done == [1, 2, 3, 4, 5, 6]
    for index, recording in enumerate(recordings):
        wave = read_audio(folder / recording.name, RATE)
        assert len(wave) == first.lengths[index]
        # Written as 16-bit WAV, so int16 holds it exactly.
        np.testing.assert_array_equal(first.window(index, 0, len(wave)), wave)
    again = open_corpus(recordings, tmp_path, RATE, FRAME, progress=lambda n, of: done.append(n))
    assert len(done) == 6 and again.fingerprint == first.fingerprint
    np.testing.assert_array_equal(again.samples, first.samples)
    other = open_corpus(recordings[1:], tmp_path, 2 * RATE, FRAME)
    assert other.fingerprint != first.fingerprint
    assert abs(int(other.lengths[0]) - 2 * int(first.lengths[1])) <= 1
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        c.fingerprint[:16] for c in (first, other)
    )


def test_a_changed_recording_is_decoded_again(tmp_path: Path) -> None:
    folder = write_recordings(tmp_path / "audio", count=2)
    before = open_corpus(list_recordings([str(folder)]), tmp_path / "cache", RATE, FRAME)
    (folder / "0.wav").write_bytes((folder / "1.wav").read_bytes())
    after = open_corpus(list_recordings([str(folder)]), tmp_path / "cache", RATE, FRAME)
    assert after.lengths[0] == before.lengths[1] != before.lengths[0]


def test_what_cannot_be_read_is_left_out_and_named(tmp_path: Path) -> None:
    folder = write_recordings(tmp_path / "audio", count=2)
    (folder / "broken.wav").write_bytes(b"RIFF no more")
    corpus = open_corpus(list_recordings([str(folder)]), tmp_path / "cache", RATE, FRAME)
    assert corpus.names == ("0.wav", "1.wav")
    assert [name for name, _ in corpus.left_out] == ["broken.wav"]
    assert "cannot be read as audio" in corpus.left_out[0][1]
    alone = list_recordings([str(folder / "broken.wav")])
    with pytest.raises(DataError, match="none of 1 recordings"):
        open_corpus(alone, tmp_path / "cache", RATE, FRAME)
    with pytest.raises(DataError, match="no such source"):
        list_recordings([str(tmp_path / "missing")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no audio"):
        list_recordings([str(tmp_path / "empty")])


def test_manifests_and_data_sets_hold_the_same(folder: Path, tmp_path: Path) -> None:
    targets = np.arange(12, dtype=np.float32).reshape(6, 2) / 16
    waves = [read_audio(folder / f"{i}.wav", RATE)[: 6 * FRAME] for i in range(2)]
    from dia2_jax.audio import write_wav

    for index, wave in enumerate(waves):
        write_wav(tmp_path / f"{index}.wav", wave, RATE)
        np.save(tmp_path / f"labels{index}.npy", targets + index)
    lines = [{"path": f"{i}.wav", "targets": f"labels{i}.npy"} for i in range(2)]
    manifest = tmp_path / "all.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = {
        "id": ["a", "b"],
        "audio": [{"bytes": (tmp_path / f"{i}.wav").read_bytes(), "path": None} for i in range(2)],
        "targets": [(targets + i).tolist() for i in range(2)],
    }
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "set"))
    found = []
    for name in (manifest, tmp_path / "set"):
        corpus = open_corpus(list_recordings([str(name)]), tmp_path / "cache", RATE, FRAME)
        found.append(corpus)
        for index, wave in enumerate(waves):
            np.testing.assert_array_equal(corpus.window(index, 0, len(wave)), wave)
            labels, real = corpus.target_window(index, 4, 4)
            np.testing.assert_array_equal(labels[:2], (targets + index)[4:])
            np.testing.assert_array_equal(real, [1, 1, 0, 0])
    assert found[0].names == ("0.wav", "1.wav") and found[1].names == ("a", "b")
    np.save(tmp_path / "labels1.npy", targets[:2])
    with pytest.raises(DataError, match=r"1.wav: has 2 rows of targets for 6 code frames"):
        open_corpus(list_recordings([str(manifest)]), tmp_path / "cache", RATE, FRAME)
    manifest.write_text('{"audio": "0.wav"}\n')
    with pytest.raises(DataError, match=r"all.jsonl:1: expected a JSON object"):
        list_recordings([str(manifest)])


def test_a_recordings_side_depends_on_its_name_alone() -> None:
    def named(names: range) -> list[Recording]:
        return [Recording(f"r{n}", "", lambda rate: (np.zeros(1), None)) for n in names]

    train, held_out = split_recordings(named(range(400)), 0.1)
    assert 20 <= len(held_out) <= 60 and len(train) + len(held_out) == 400
    more, more_held_out = split_recordings(named(range(800)), 0.1)
    assert {r.name for r in held_out} < {r.name for r in more_held_out}
    assert {r.name for r in train} < {r.name for r in more}
    assert [len(side) for side in split_recordings(named(range(2)), 0.01)] == [1, 1]
    with pytest.raises(DataError, match="cannot be split"):
        split_recordings(named(range(1)), 0.5)


def test_a_source_that_grows_trains_the_same_codec(tmp_path: Path) -> None:
    raw_config(tmp_path)
    for path in sorted((tmp_path / "audio").glob("*.wav"))[4:]:
        path.unlink()
    settings = {"recordings": 2, "validation": [str(tmp_path / "audio")]}
    config = validate(CodecConfig, raw_config(tmp_path, data=settings), "test")
    before = open_corpora(config, tiny_shape()).train
    assert before.names == ("0.wav", "1.wav")
    write_recordings(tmp_path / "new", 1)
    (tmp_path / "new" / "0.wav").rename(tmp_path / "audio" / "9.wav")
    assert open_corpora(config, tiny_shape()).train.fingerprint == before.fingerprint


def test_windows_are_a_function_of_seed_step_and_row(corpus: Corpus) -> None:
    whole = source(corpus)
    half = source(corpus, mine=range(2, 4))
    for step in (0, 7):
        batch = whole[step]
        assert batch["step"] == step and batch["wave"].shape == (4, 80)
        np.testing.assert_array_equal(batch["wave"], source(corpus)[step]["wave"])
        np.testing.assert_array_equal(batch["wave"][2:], half[step]["wave"])
    assert (whole[0]["wave"] != whole[1]["wave"]).any()
    assert (whole[0]["wave"] != source(corpus, seed=2)[0]["wave"]).any()


def test_windows_come_from_everywhere_in_proportion(corpus: Corpus) -> None:
    every = source(corpus, rows=600, frames=4)
    samples = np.asarray(corpus.samples) / 32_768
    owners = np.zeros(6)
    strided = np.lib.stride_tricks.sliding_window_view(samples, 32)
    for wave in every[0]["wave"]:
        place = int(np.abs(strided - wave).max(axis=1).argmin())
        owners[np.searchsorted(corpus.starts, place, side="right") - 1] += 1
    np.testing.assert_allclose(owners / 600, corpus.lengths / corpus.lengths.sum(), atol=0.06)


def test_short_recordings_are_repeated_and_gains_stay_within_bounds(corpus: Corpus) -> None:
    length = int(corpus.lengths[0])
    wave = corpus.window(0, 0, 2 * length + 5)
    np.testing.assert_array_equal(wave[length : 2 * length], wave[:length])
    plain, loud = source(corpus)[0]["wave"], source(corpus, gain_db=(6.0, 6.0))[0]["wave"]
    np.testing.assert_allclose(loud, np.clip(plain * 10**0.3, -1, 1), rtol=1e-5)


def test_windows_with_targets_begin_at_frames(folder: Path, tmp_path: Path) -> None:
    def teacher(wave: np.ndarray) -> np.ndarray:
        # What a frame's target must be: its first sample and its place.
        frames = -(-len(wave) // FRAME)
        return np.stack([wave[::FRAME][:frames], np.arange(frames) / 8], axis=1)

    recordings = list_recordings([str(folder)])
    corpus = open_corpus(recordings, tmp_path, RATE, FRAME, teacher=teacher, teacher_name="x")
    batch = source(corpus, rows=20, with_targets=True)[3]
    assert batch["targets"].shape == (20, 10, 2) and batch["real"].min() == 1
    np.testing.assert_allclose(batch["targets"][..., 0], batch["wave"][:, ::FRAME], atol=1e-3)
    plain = open_corpus(recordings, tmp_path, RATE, FRAME)
    assert plain.targets is None
    with pytest.raises(DataError, match="semantic training needs targets"):
        source(plain, with_targets=True)


def test_reading_begins_anywhere_at_once(corpus: Corpus) -> None:
    batches = source(corpus)
    start = time.perf_counter()
    first = list(islice(read_batches(batches, 2_000_000, threads=1, prefetch=2), 3))
    assert time.perf_counter() - start < 5
    for offset, batch in enumerate(first):
        assert batch["step"] == 2_000_000 + offset
        np.testing.assert_array_equal(batch["wave"], batches[2_000_000 + offset]["wave"])


def test_evaluation_windows_are_spread_and_fixed(corpus: Corpus) -> None:
    windows = fixed_windows(corpus, count=12, frames=10, samples_per_frame=FRAME)
    assert windows.shape == (12, 80)
    again = fixed_windows(corpus, count=12, frames=10, samples_per_frame=FRAME)
    np.testing.assert_array_equal(windows, again)
    assert len({window.tobytes() for window in windows}) == 12
