"""What every test runs under: the CPU, full fp32 precision, no network, no caches outside."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import tempfile
import zlib
from pathlib import Path
from typing import Any

# Read by jax and huggingface_hub when they are imported, and inherited by the processes that
# tests start. A test that is about the compilation cache turns it on in a folder of its own.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
os.environ["HF_HUB_OFFLINE"] = "1"
# The kernels in C are compiled once for all processes of a run, which this one starts.
if "DIA2_JAX_TESTS_CACHE" not in os.environ:
    os.environ["DIA2_JAX_TESTS_CACHE"] = tempfile.mkdtemp(prefix="dia2-jax-tests-")
    atexit.register(shutil.rmtree, os.environ["DIA2_JAX_TESTS_CACHE"], ignore_errors=True)
os.environ["DIA2_JAX_CACHE"] = os.environ["DIA2_JAX_TESTS_CACHE"]

# Tests compile far more than they compute: XLA's quick code generation takes a third of the time
# for the same arithmetic. CI runs the tests of recorded numbers again with the code that users get.
if os.environ.get("DIA2_JAX_TESTS_OPTIMIZED") != "1":
    os.environ["XLA_FLAGS"] = (
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
        "--xla_cpu_use_fusion_emitters=false"
    )

# numba's cache mixes up the functions of two processes that fill it at the same time, and what is
# then loaded ends the process: librosa's functions are compiled by each process for itself.
os.environ["NUMBA_CACHE_DIR"] = tempfile.mkdtemp(prefix="numba-")

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, settings

atexit.register(shutil.rmtree, os.environ["NUMBA_CACHE_DIR"], ignore_errors=True)

# A shell starts what it puts into the background with Ctrl-C ignored; tests are about it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# One fixed set of examples, so a red run is red again; HYPOTHESIS_PROFILE=search looks further.
settings.register_profile(
    "house",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=16,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "search", settings.get_profile("house"), derandomize=False, max_examples=500, print_blob=True
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "house"))

ROOT = Path(__file__).parent.parent


def _random_weights(abstract: Any, seed: str) -> Any:
    """Weights that keep activations near 1; numpy, because initialising modules takes a minute."""
    from dia2_jax.checkpoint import flatten_tree, unflatten_tree

    named, treedef = flatten_tree(abstract)
    filled = {}
    for name, leaf in named.items():
        rng = np.random.default_rng(zlib.crc32(f"{seed} {name}".encode()))
        noise = rng.standard_normal(leaf.shape, np.float32)
        if leaf.ndim == 1:
            filled[name] = 0.02 * noise + (0 if name.endswith("bias") else 1)
        elif "embed" in name:
            filled[name] = noise
        else:
            filled[name] = noise / np.sqrt(np.prod(leaf.shape[1:]), dtype=np.float32)
    return unflatten_tree(treedef, filled)


def write_tiny_model(folder: Path, *, seed: str = "a", **runtime: int) -> Path:
    """A random checkpoint of configs/tiny.yaml in the published layout, codec and tokenizer too.

    ``runtime`` replaces fields of the config's runtime, such as ``max_context_steps``.
    """
    from dia2_jax.config import config_to_dict, load_dia2_config, load_mimi_config
    from dia2_jax.convert import dia2, mimi_hf
    from dia2_jax.convert.load import export_params
    from dia2_jax.convert.models import abstract_dia2, abstract_mimi

    raw = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
    raw["runtime"].update(runtime)
    model = load_dia2_config(raw)
    codec = load_mimi_config(yaml.safe_load((ROOT / "configs" / "mimi_tiny.yaml").read_text()))
    (folder / "mimi").mkdir(parents=True)
    parts = (
        (folder, model, abstract_dia2, dia2.TABLE),
        (folder / "mimi", codec, abstract_mimi, mimi_hf.make_table(codec)),
    )
    for place, config, abstract, table in parts:
        weights = _random_weights(abstract(config)[1], seed)
        export_params(weights, table, place / "model.safetensors")
        (place / "config.json").write_text(json.dumps(config_to_dict(config)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((ROOT / "tests/golden/text/a" / name).read_bytes())
    return folder


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint; do not write into it."""
    return write_tiny_model(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as `train.package` writes it for the package; do not write into it."""
    from dia2_jax.generation.defaults import write_defaults
    from dia2_jax.generation.settings import GenerationConfig, SamplingConfig
    from train.package import package_model

    folder = tmp_path_factory.mktemp("packaged")
    settings = GenerationConfig(
        audio=SamplingConfig(0.4, 9), cfg_scale=1.0, initial_padding=1, max_padding=3
    )
    write_defaults(folder / "settings.json", settings)
    package_model(ROOT / "tests/golden/parity", folder / "model", defaults=folder / "settings.json")
    return folder / "model"


@pytest.fixture
def nano(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, as the model that the package holds."""
    from dia2_jax import hub

    monkeypatch.setattr(hub, "nano_folder", lambda: packaged)
    return packaged


@pytest.fixture(scope="session")
def tiny_model(tiny_model_folder: Path) -> Any:
    """The same, loaded. Its programs compile once for all tests that share settings."""
    from dia2_jax import Dia2

    return Dia2.from_pretrained(tiny_model_folder)
