"""``train.pack``: the same data set in one small file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from small_data import write_recordings

from dia2_jax.errors import DataError
from train.pack import main
from train.recordings import Recordings


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_training_reads_the_same_from_it(tmp_path: Path) -> None:
    # Enough of them that the file's own bookkeeping, a few kB, does not decide about its size.
    data = write_recordings(tmp_path / "data", count=200)
    (data / "README.md").write_text("# Card\n")
    assert run(data, tmp_path / "packed").exit_code == 0
    names = {path.name for path in (tmp_path / "packed").iterdir()}
    assert names == {"data.parquet", "dia2_jax.json", "README.md"}
    whole, packed = Recordings(data), Recordings(tmp_path / "packed")
    # A run that began with one goes on with the other.
    assert packed.fingerprint == whole.fingerprint
    assert packed.frames == whole.frames and packed.scripts(3) == whole.scripts(3)
    for index in range(len(whole)):
        np.testing.assert_array_equal(packed[index].codes, whole[index].codes)
        assert packed[index].codes.dtype == whole[index].codes.dtype
        assert packed[index].words == whole[index].words
    before = sum(path.stat().st_size for path in data.glob("*.arrow"))
    assert (tmp_path / "packed" / "data.parquet").stat().st_size < before / 2
    assert b"r0.wav" not in (tmp_path / "packed" / "data.parquet").read_bytes()


def test_it_writes_nothing_where_it_should_not(tmp_path: Path) -> None:
    data = write_recordings(tmp_path / "data")
    out = tmp_path / "packed"
    found = run(data, out, "--limit", "0.001")
    assert found.exit_code == 2 and "the limit is 0.001 MB" in found.output and not out.exists()
    found = run(tmp_path / "nothing", out)
    assert found.exit_code == 2 and "no prepared data set" in found.output and not out.exists()
    out.mkdir()
    (out / "notes").write_text("mine")
    found = run(data, out)
    assert found.exit_code == 2 and "is there already" in found.output
    assert [path.name for path in out.iterdir()] == ["notes"]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    data = write_recordings(tmp_path / "data")
    assert run(data, tmp_path / "packed").exit_code == 0
    (tmp_path / "packed" / "data.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match="damaged"):
        Recordings(tmp_path / "packed")


def test_several_become_one(tmp_path: Path) -> None:
    parts = [write_recordings(tmp_path / f"{n}", count=3 + n, seed=n) for n in range(2)]
    assert run(*parts, tmp_path / "packed").exit_code == 0
    one, two, both = (Recordings(path) for path in (*parts, tmp_path / "packed"))
    assert both.frames == one.frames + two.frames
    np.testing.assert_array_equal(both[4].codes, two[1].codes)
    assert both[4].words == two[1].words
    assert both.manifest["parts"] == [one.manifest, two.manifest]
    # And what came of it goes on growing.
    assert run(tmp_path / "packed", parts[0], tmp_path / "more").exit_code == 0
    assert len(Recordings(tmp_path / "more")) == 10


def test_what_was_prepared_otherwise_is_not_mixed_in(tmp_path: Path) -> None:
    one, two = (write_recordings(tmp_path / name) for name in ("one", "two"))
    manifest = json.loads((two / "dia2_jax.json").read_text())
    (two / "dia2_jax.json").write_text(json.dumps(manifest | {"max_padding": 10}))
    found = run(one, two, tmp_path / "packed")
    assert found.exit_code == 2 and "max_padding is 10" in found.output
    assert not (tmp_path / "packed").exists()
