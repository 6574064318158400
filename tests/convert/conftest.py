"""Small random checkpoints in the published layouts.

Names and shapes come from golden checkpoints (``layouts.json``), not from the tables under
test: a table that invents or drops a name fails.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

LAYOUTS = json.loads((Path(__file__).parent.parent / "golden" / "layouts.json").read_text())
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def make_tensors(layout: str, dtype: str = "F32") -> dict[str, np.ndarray]:
    """Random values for every tensor of a layout. Few bits, so that float16 holds them too."""
    tensors = {}
    for name, shape in LAYOUTS[layout]["tensors"].items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        tensors[name] = rng.standard_normal(shape, np.float32).astype(DTYPES[dtype])
    return tensors


def write_checkpoint(folder: Path, layout: str, dtype: str = "F32") -> Path:
    """A folder with config.json and a model.safetensors written by the reference library."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LAYOUTS[layout]["config"], indent=1))
    metadata = LAYOUTS[layout]["metadata"]
    safetensors.numpy.save_file(make_tensors(layout, dtype), folder / "model.safetensors", metadata)
    return folder


@pytest.fixture
def checkpoint_folder(tmp_path):
    """Builds checkpoint folders: ``checkpoint_folder("dia2-a", "BF16")``."""

    def build(layout: str, dtype: str = "F32", name: str = "source") -> Path:
        return write_checkpoint(tmp_path / name, layout, dtype)

    return build
