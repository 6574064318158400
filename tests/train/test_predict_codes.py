"""Codes as a model predicts them (train.predict_codes)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from small_data import write_recordings

from dia2_jax.generation.defaults import write_defaults
from dia2_jax.generation.settings import GenerationConfig, SamplingConfig
from tests.conftest import write_tiny_model
from train.predict_codes import main
from train.recordings import Recordings


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predicted")
    write_tiny_model(folder / "model", max_context_steps=64)
    settings = GenerationConfig(audio=SamplingConfig(0.5, 8))
    write_defaults(folder / "model/dia2_generation.json", settings)
    write_recordings(folder / "data", count=4, codebooks=8)
    rows = [{"id": f"r{index}", "path": f"audio/r{index}.flac"} for index in (0, 1, 2)]
    rows.append({"id": "another", "path": "another.flac"})
    (folder / "manifest.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def predict(folder: Path, out: Path, *options: object) -> dict[str, np.ndarray]:
    done = run(folder / "model", folder / "data", folder / "manifest.jsonl", out, *options)
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    for row in rows:
        assert (out / row["path"]).resolve() == folder / "audio" / f"{row['id']}.flac"
    return {row["id"]: np.load(out / row["targets"]) for row in rows}


def test_it_writes_a_source_for_the_codec(prepared: Path, tmp_path: Path) -> None:
    codes = predict(prepared, tmp_path / "a")
    recordings = Recordings(prepared / "data")
    assert set(codes) == {"r0", "r1", "r2"}  # what the manifest names and the data set holds
    seconds = recordings.table().column("duration").to_pylist()
    delay = 2  # the least delayed codebook has no column before this step
    for index, (_, found) in enumerate(sorted(codes.items())):
        true = recordings[index].codes.T
        assert found.shape == (math.ceil(seconds[index] * 12.5), 8)
        assert ((found >= 0) & (found < 64) & (found == found.round())).all()
        # A random model draws at random: 8 of 64 entries and never the recording's own code twice.
        same = (found == true[: len(found)]).mean()
        assert same < 0.3 + delay / len(found)


def test_draws_are_of_the_seed(prepared: Path, tmp_path: Path) -> None:
    first = predict(prepared, tmp_path / "a", "--limit", 2)
    again = predict(prepared, tmp_path / "b", "--limit", 2)
    other = predict(prepared, tmp_path / "c", "--limit", 2, "--seed", 1)
    assert set(first) == {"r0", "r1"}
    for name, codes in first.items():
        np.testing.assert_array_equal(codes, again[name])
        assert (codes != other[name]).any()


def test_bad_input_is_named_and_leaves_nothing(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text('{"id": "none", "path": "none.wav"}\n')
    (tmp_path / "broken.jsonl").write_text("{")
    for manifest, message in (("empty", "names none of the recordings"), ("broken", "JSON lines")):
        done = run(
            prepared / "model", prepared / "data", tmp_path / f"{manifest}.jsonl", tmp_path / "out"
        )
        assert done.exit_code == 2 and message in done.output
        assert not (tmp_path / "out").exists()
