"""Parity of conversion: published files to memory and back, also by way of Orbax, bit for bit."""

from __future__ import annotations

import filecmp
import tempfile
from pathlib import Path

from flax import nnx

from dia2_jax.convert import dia2
from dia2_jax.convert.load import SourceInfo, export_params, load_orbax, save_orbax
from dia2_jax.convert.models import mimi_layout, mimi_table
from dia2_jax.convert.rules import Table
from dia2_jax.convert.safetensors_io import open_safetensors
from eval.parity_checks import Checks
from eval.parity_folder import Golden


def check_conversion(golden: Golden, checks: Checks) -> None:
    """The model's and the codec's weights there and back."""
    with checks.guard("conversion: model"):
        model, source = golden.model
        _there_and_back(checks, "model", golden.weights, model, dia2.TABLE, source)
    if golden.mimi_folder is None:
        checks.absent("conversion: mimi", "no mimi folder")
        return
    with checks.guard("conversion: mimi"):
        mimi, config, source, files = golden.mimi
        table = mimi_table(mimi_layout(files.weights), config)
        _there_and_back(checks, "mimi", files.weights, mimi, table, source)


def _there_and_back(
    checks: Checks, name: str, published: Path, module: nnx.Module, table: Table, source: SourceInfo
) -> None:
    params = nnx.split(module)[1]
    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch) / "written.safetensors"
        with checks.guard(f"conversion: {name}"):
            export_params(params, table, written, source)
            _compare(checks, f"conversion: {name}", published, written)
        with checks.guard(f"conversion: {name}, by Orbax"):
            stored = Path(scratch) / "orbax"
            save_orbax(stored, params, source)
            restored, record = load_orbax(stored, params)
            written = Path(scratch) / "restored.safetensors"
            export_params(restored, table, written, record)
            _compare(checks, f"conversion: {name}, by Orbax", published, written)


def _compare(checks: Checks, name: str, published: Path, written: Path) -> None:
    """Tensor names, shapes, dtypes and bytes; the header may be spelled otherwise."""
    ours, golden = open_safetensors(written), open_safetensors(published)
    wrong = [
        key
        for key in {**golden.specs, **ours.specs}
        if ours.specs.get(key) != golden.specs.get(key)
        or ours.read(key).tobytes() != golden.read(key).tobytes()
    ]
    checks.at_most(
        name,
        len(wrong),
        0,
        "wrong",
        detail=f"first: {wrong[0]}" if wrong else "",
        of=len(golden.specs),
        same_file=published.is_file() and filecmp.cmp(published, written, shallow=False),
    )
