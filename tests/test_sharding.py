"""Logical axes: the table of parameters is total, the rules split what divides, and once."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import yaml
from jax.sharding import PartitionSpec

from dia2_jax import sharding
from dia2_jax.checkpoint import flatten_tree
from dia2_jax.config import load_dia2_config
from dia2_jax.convert.models import abstract_dia2
from dia2_jax.errors import ConfigError
from dia2_jax.sharding import DIA2_AXES, MESH_AXES, parameter_axes, spec

CONFIGS = Path(__file__).parents[1] / "configs"


def mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Any:
    """Sizes are all that `spec` reads, so no test needs devices."""
    return SimpleNamespace(shape=dict(zip(MESH_AXES, (data, fsdp, tensor), strict=True)))


def parameters(name: str) -> dict[str, Any]:
    config = load_dia2_config(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()))
    return flatten_tree(abstract_dia2(config)[1])[0]


# ------------------------------------------------------------------------------------ parameters


def expected(path: str, shape: tuple[int, ...]) -> str:
    """What each kind of parameter is split by, from its place in the module tree."""
    half, *parts = path.removesuffix(".weight").split(".")
    last = parts[-2] if parts[-1].isdigit() else parts[-1]
    if last.endswith("norm"):
        return "."
    if last in ("audio_embeds", "embedding", "logits", "cb0_head"):
        return "V D"
    if last == "action_head":
        return ". D"
    if "text_embed" in parts:
        return "D ."
    return {
        "q_proj": "N D",
        "k_proj": "K D",
        "v_proj": "K D",
        "o_proj": "D N",
        "in_proj": "N D",
        "out_proj": "D N",
        "wi": "F D",
        "wo": "D F",
        "depformer_in": "N D",
    }[last]


@pytest.mark.parametrize("name", ["tiny", "dia2_1b", "dia2_2b"])
def test_every_parameter_has_the_axes_of_its_kind(name) -> None:
    named = parameters(name)
    assert len(named) > 70
    for path, leaf in named.items():
        assert parameter_axes(path, leaf.ndim) == expected(path, leaf.shape), path


def test_every_row_of_the_table_names_a_parameter() -> None:
    named = parameters("tiny")
    for pattern, _ in DIA2_AXES:
        assert any(fnmatchcase(path, pattern) for path in named), pattern


def test_the_published_shapes_are_split_where_it_counts() -> None:
    """On 2 x 2 x 2 nearly all of the 1B model's weights fall into four parts."""
    named = parameters("dia2_1b")
    eight = mesh(2, 2, 2)
    split = sum(
        leaf.size
        for path, leaf in named.items()
        if sum(
            part is not None for part in spec(parameter_axes(path, leaf.ndim), leaf.shape, eight)
        )
        == 2
    )
    assert split / sum(leaf.size for leaf in named.values()) > 0.95


@pytest.mark.parametrize("path", ["transformer.layers.0.attn.q_proj.bias", "codec.weight", ""])
def test_a_parameter_without_a_row_is_an_error_that_names_it(path) -> None:
    with pytest.raises(ConfigError, match="no logical axes for parameter " + path):
        parameter_axes(path, 1)


def test_a_parameter_of_another_rank_than_its_row_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"cb0_head.weight has 3 axes, its row .* 'V D'"):
        parameter_axes("transformer.cb0_head.weight", 3)


# ----------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize(
    ("axes", "shape", "sizes", "parts"),
    [
        ("V D", (66, 32), (1, 1, 1), (None, None)),
        ("V D", (66, 32), (2, 2, 2), ("tensor", "fsdp")),
        ("V D", (66, 32), (1, 8, 1), (None, "fsdp")),
        # 67 entries do not divide by 2, 30 not by 8: they stay whole.
        ("V D", (67, 32), (2, 2, 2), (None, "fsdp")),
        ("N D", (32, 30), (1, 8, 1), (None, None)),
        # Rows go over both axes, or over data alone where they do not divide by both.
        ("B .", (8, 3), (2, 2, 2), (("data", "fsdp"), None)),
        ("B .", (6, 3), (2, 4, 1), ("data", None)),
        ("B .", (3, 3), (2, 4, 1), (None, None)),
        # An axis of the mesh splits one axis of a tensor: the first that asks for it.
        ("B T D", (8, 5, 32), (2, 2, 1), (("data", "fsdp"), None, None)),
        ("B T D", (6, 5, 32), (2, 4, 1), ("data", None, "fsdp")),
        ("N K", (8, 8), (1, 1, 2), ("tensor", None)),
        ("N K", (9, 8), (1, 1, 2), (None, "tensor")),
        (". .", (8, 8), (2, 2, 2), (None, None)),
    ],
)
def test_spec(axes, shape, sizes, parts) -> None:
    wanted = [(part,) if isinstance(part, str) else part for part in parts]
    assert spec(axes, shape, mesh(*sizes)) == PartitionSpec(*wanted)


def test_axes_and_shape_must_be_of_one_rank() -> None:
    with pytest.raises(ValueError, match="'V D' for a tensor of shape"):
        spec("V D", (3,), mesh())


# ------------------------------------------------------------------------------------------ mesh


def test_the_rest_of_the_devices_go_where_minus_one_stands() -> None:
    devices = jax.devices()[:1] * 8
    assert dict(sharding.make_mesh(devices=devices).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    made = sharding.make_mesh(2, -1, 2, devices=devices)
    assert dict(made.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert made.axis_names == MESH_AXES


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 1, 1), r"wants 3 devices, there are 8: change mesh.data"),
        ((-1, 3, 1), r"wants 3 devices, there are 8"),
        ((2, 2, 4), r"wants 16 devices, there are 8"),
        ((-1, -1, 1), "at most one is -1"),
        ((0, 8, 1), "sizes are positive"),
        ((-2, 2, 2), "sizes are positive"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        sharding.make_mesh(*sizes, devices=jax.devices()[:1] * 8)


def test_rows_that_do_not_divide_over_the_mesh_are_refused() -> None:
    sharding.check_rows(8, mesh(2, 4, 3))
    with pytest.raises(
        ConfigError, match="6 rows .* make data.rows / microbatches a multiple of 8"
    ):
        sharding.check_rows(6, mesh(2, 4, 3))


@dataclass(frozen=True)
class Host:
    """A device as far as a mesh looks at it."""

    id: int
    process_index: int
    platform: str = "cpu"


@pytest.mark.parametrize(
    ("sizes", "processes", "rows"),
    [
        ((8, 1, 1), [0] * 8, range(8)),
        ((8, 1, 1), [0] * 4 + [1] * 4, range(4)),
        ((2, 2, 2), [1] * 4 + [0] * 4, range(4, 8)),
        # Both hosts hold every row where only the weights are split between them.
        ((1, 1, 8), [0] * 4 + [1] * 4, range(8)),
        ((2, 1, 4), [1, 1, 0, 0, 2, 2, 3, 3], range(4)),
    ],
)
def test_a_host_reads_the_rows_that_its_devices_hold(sizes, processes, rows) -> None:
    devices = [Host(index, process) for index, process in enumerate(processes)]
    assert sharding.host_rows(sharding.make_mesh(*sizes, devices=devices), 8) == rows


def test_rows_that_are_not_neighbours_are_refused() -> None:
    devices = [Host(index, index % 2) for index in range(4)]
    with pytest.raises(ConfigError, match="process 0 rows that are not neighbours"):
        sharding.host_rows(sharding.make_mesh(devices=devices), 8)


# ----------------------------------------------------------------------------------- activations


def primitives(function: Any) -> list[str]:
    return [str(eq.primitive) for eq in jax.make_jaxpr(function)(jnp.zeros((8, 4))).eqns]


def test_constrain_does_nothing_unless_a_mesh_of_several_devices_is_bound() -> None:
    def free(x: Any) -> Any:
        return sharding.constrain(x, "B D")

    def one(x: Any) -> Any:
        with sharding.bound(sharding.make_mesh(devices=jax.devices()[:1])):
            return sharding.constrain(x, "B D")

    x = jnp.zeros((8, 4))
    assert free(x) is x
    assert primitives(free) == primitives(one) == []


def test_a_binding_ends_with_its_block() -> None:
    mesh_of_one = sharding.make_mesh(devices=jax.devices()[:1])
    with sharding.bound(mesh_of_one), pytest.raises(RuntimeError), sharding.bound(None):
        raise RuntimeError
    x = jnp.zeros((8, 4))
    assert sharding.constrain(x, "not even axes") is x
