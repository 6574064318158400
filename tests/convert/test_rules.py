"""The table engine: patterns and their inverses, plans, and one error that lists everything."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dia2_jax.convert import rules
from dia2_jax.convert.rules import Rule, Table, Transform
from dia2_jax.errors import CheckpointError


class Halves(Transform):
    """One published tensor is two of ours, stacked along the first axis."""

    def to_ours(self, arrays):
        return np.split(arrays[0], 2)

    def to_published(self, arrays):
        return [np.concatenate(arrays)]

    def shapes_to_ours(self, shapes):
        if shapes[0][0] % 2:
            raise ValueError(f"has an odd number of rows ({shapes[0][0]})")
        return [(shapes[0][0] // 2, *shapes[0][1:])] * 2

    def shapes_to_published(self, shapes):
        return [(shapes[0][0] * 2, *shapes[0][1:])]


class Stacked(Transform):
    """Two published tensors are one of ours."""

    def to_ours(self, arrays):
        return [np.stack(arrays)]

    def to_published(self, arrays):
        return list(arrays[0])

    def shapes_to_ours(self, shapes):
        return [(2, *shapes[0])]

    def shapes_to_published(self, shapes):
        return [shapes[0][1:]] * 2


TABLE = Table(
    "toy",
    [
        Rule("{side:enc|dec}.layer_{i}.w", "{side:enc|dec}.layers.{i}.weight"),
        Rule("fused.{i}", ("split.{i}.a", "split.{i}.b"), Halves(), aliases=("old_fused.{i}",)),
        Rule(("pair.{i}.real", "pair.{i}.imag"), "pairs.{i}", Stacked()),
        Rule("conv.{i}", "kernels.{i}", rules.Transpose((2, 1, 0))),
    ],
)
SOURCES = {
    "enc.layer_0.w": (2, 3),
    "dec.layer_10.w": (4,),
    "fused.3": (6, 5),
    "pair.1.imag": (7,),
    "pair.1.real": (7,),
    "conv.0": (3, 4, 5),
}
TARGETS = {
    "enc.layers.0.weight": (2, 3),
    "dec.layers.10.weight": (4,),
    "split.3.a": (3, 5),
    "split.3.b": (3, 5),
    "pairs.1": (2, 7),
    "kernels.0": (5, 4, 3),
}


def test_plan_covers_renames_splits_merges_and_transposes():
    steps = TABLE.plan_load(SOURCES, TARGETS)
    assert sorted(name for step in steps for name in step.published) == sorted(SOURCES)
    assert sorted(name for step in steps for name in step.ours) == sorted(TARGETS)
    assert steps[0].published == ("enc.layer_0.w",)


def test_export_plan_is_the_inverse_of_the_load_plan():
    steps, shapes = TABLE.plan_export(TARGETS)
    assert shapes == SOURCES
    rng = np.random.default_rng(0)
    published = {name: rng.standard_normal(shape) for name, shape in SOURCES.items()}
    ours = {}
    for step in TABLE.plan_load(SOURCES, TARGETS):
        arrays = step.transform.to_ours([published[name] for name in step.published])
        ours.update(zip(step.ours, arrays, strict=True))
    assert {name: array.shape for name, array in ours.items()} == TARGETS
    for step in steps:
        back = step.transform.to_published([ours[name] for name in step.ours])
        for name, array in zip(step.published, back, strict=True):
            np.testing.assert_array_equal(array, published[name])


def test_alias_is_read_and_written_back_in_its_spelling():
    sources = {**SOURCES, "old_fused.3": SOURCES["fused.3"]}
    del sources["fused.3"]
    assert TABLE.plan_load(sources, TARGETS)
    assert TABLE.plan_export(TARGETS, spelled=sources)[1] == sources
    assert TABLE.plan_export(TARGETS)[1] == SOURCES


def test_one_error_lists_all_three_kinds():
    sources = {**SOURCES, "stray": (1,), "enc.layer_0.w": (3, 2), "fused.4": (5, 5)}
    del sources["pair.1.real"]
    with pytest.raises(CheckpointError) as caught:
        TABLE.plan_load(sources, {**TARGETS, "enc.layers.7.weight": (1,)}, "some.safetensors")
    message = str(caught.value)
    assert message.startswith("some.safetensors: the weights do not fit:")
    assert "2 tensors with no place in this toy model:\n    stray\n    fused.4\n" in message
    assert "pair.1.real (belongs to pair.1.imag)\n    enc.layers.7.weight\n" in message
    assert "enc.layer_0.w is [3, 2], the model wants enc.layers.0.weight [2, 3]" in message
    assert "config.json" in message.splitlines()[-1]


def test_impossible_shape_says_why():
    with pytest.raises(CheckpointError, match=r"fused\.3 has an odd number of rows \(5\)"):
        TABLE.plan_load({**SOURCES, "fused.3": (5, 5)}, TARGETS)
    with pytest.raises(CheckpointError, match=r"conv\.0 has 2 axes, not 3"):
        TABLE.plan_load({**SOURCES, "conv.0": (5, 5)}, TARGETS)


def test_two_spellings_of_one_tensor_are_refused():
    with pytest.raises(CheckpointError, match=r"old_fused\.3 \(a second source of split\.3\.a"):
        TABLE.plan_load({**SOURCES, "old_fused.3": (6, 5)}, TARGETS)


def test_every_tensor_is_listed_with_a_count():
    targets = {**TARGETS, **{f"enc.layers.{i}.weight": (1,) for i in range(1, 31)}}
    with pytest.raises(CheckpointError) as caught:
        TABLE.plan_load(SOURCES, targets)
    assert "30 wanted by this toy model and missing" in str(caught.value)
    assert all(f"enc.layers.{i}.weight" in str(caught.value) for i in range(1, 31))


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        (["x.0", "y.0"], "None of its names is of the toy layout"),
        (["x.0", "y.0", "fused.3"], "Most of its names are not of the toy layout"),
    ],
)
def test_hint_recognises_a_foreign_file(names, hint):
    with pytest.raises(CheckpointError, match=hint):
        TABLE.plan_load({name: (6, 5) for name in names}, TARGETS)


def test_export_lists_parameters_the_layout_lacks():
    targets = {**TARGETS, "lora.a": (2, 2), "split.9.a": (3, 5)}
    with pytest.raises(CheckpointError) as caught:
        TABLE.plan_export(targets, where="out.safetensors")
    assert "1 parameters with no place in the toy layout:\n    lora.a" in str(caught.value)
    assert "split.9.b (belongs to split.9.a)" in str(caught.value)


def test_malformed_rules_and_ambiguous_tables_are_programming_errors():
    with pytest.raises(ValueError, match="differ in their placeholders"):
        Rule("a.{i}", "b")
    with pytest.raises(ValueError, match="differ in their placeholders"):
        Rule("a.{i:x|y}", "b.{i}")
    with pytest.raises(ValueError, match="another number of names"):
        Rule("a", "b", aliases=[("c", "d")])
    with pytest.raises(ValueError, match="names on both sides"):
        Rule("a", ())
    table = Table("bad", [Rule("a.{i}", "b.{i}"), Rule("a.{i:1|2}", "c.{i:1|2}")])
    with pytest.raises(ValueError, match="ambiguous about a.1"):
        table.plan_load({"a.1": (1,)}, {"b.1": (1,)})


LITERAL = st.text("ab_.*+()[", max_size=4)
HOLE = st.one_of(
    st.builds("{{{}}}".format, st.sampled_from("ijk")),
    st.builds("{{{}:x|yy|zz1}}".format, st.sampled_from("pqr")),
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(LITERAL, HOLE), min_size=1, max_size=3),
    LITERAL,
    st.dictionaries(st.sampled_from("ijk"), st.integers(0, 10**4)),
    st.sampled_from(["x", "yy", "zz1"]),
)
def test_pattern_matching_inverts_filling(parts, tail, numbers, word):
    # A separator between placeholders keeps the pattern itself unambiguous.
    pattern = "".join(f"{literal}/{hole}/" for literal, hole in parts) + tail
    binding = {hole: str(numbers.get(hole, 0)) for hole in "ijk"} | {hole: word for hole in "pqr"}
    name = rules.fill_pattern(pattern, binding)
    match = rules.compile_pattern(pattern).fullmatch(name)
    assert match is not None
    assert all(binding[hole] == value for hole, value in match.groupdict().items())
    assert rules.fill_pattern(pattern, match.groupdict()) == name


@pytest.mark.parametrize(
    "name", ["a.01.w", "a.-1.w", "a.1.w.b", "xa.1.w", "a.x.w", "aX1.w", "a.1.w\n"]
)
def test_pattern_is_exact(name):
    assert rules.compile_pattern("a.{i}.w").fullmatch(name) is None
