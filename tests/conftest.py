"""What every test runs under: the CPU, full fp32 precision, no network, no caches outside."""

from __future__ import annotations

import os

# Read by jax and huggingface_hub when they are imported, and inherited by the processes that
# tests start. A test that is about the compilation cache turns it on in a folder of its own.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
os.environ["HF_HUB_OFFLINE"] = "1"

from hypothesis import HealthCheck, settings

# One fixed set of examples, so a red run is red again; HYPOTHESIS_PROFILE=search looks further.
settings.register_profile(
    "house",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "search", settings.get_profile("house"), derandomize=False, max_examples=500, print_blob=True
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "house"))
