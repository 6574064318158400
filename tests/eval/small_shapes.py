"""A model that compiles in less time than tiny: two codebooks, and a codec of one layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dia2_jax.config import config_to_dict
from eval import latency_models
from eval.latency_models import Source
from eval.latency_ours import Ours


def write_shapes(folder: Path, name: str, *, delays: list[int], context: int) -> None:
    """``NAME.yaml`` and that of its codec, ``mimi_NAME.yaml``."""
    model = config_to_dict(Source.of("tiny").dia2_config())
    model["data"] |= {"channels": 4, "delay_pattern": delays}
    model["runtime"] = {"weights_schedule": [0], "max_context_steps": context}
    codec = config_to_dict(Source.of("mimi_tiny").mimi_config())
    codec |= {"upsampling_ratios": [6, 4], "sampling_rate": 600, "num_hidden_layers": 1}
    codec |= {"num_quantizers": 2}
    for shape, content in ((name, model), (f"mimi_{name}", codec)):
        (folder / f"{shape}.yaml").write_text(yaml.safe_dump(content))


def load(folder: Path, name: str) -> Ours:
    """The model of a shape in ``folder``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency_models, "CONFIGS", folder)
        ours = Ours(name)
        ours.load()
    return ours
