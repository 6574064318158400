"""The parity program on a small golden folder, and on copies of it that something is wrong with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from eval.parity import check_folder, main, table
from eval.parity_checks import Checks, Item, difference, mismatches, snr
from eval.parity_folder import Golden
from eval.parity_network import filtered_difference

FOLDER = Path(__file__).parents[1] / "golden" / "parity"
FORMS = ("whole", "step by step")
EXPECTED = {
    *(f"text: {part}" for part in ("constants", "strings", "scripts")),
    *(f"text: traces, {form}" for form in ("specification", "arrays")),
    *(f"network: {name}, {form}" for name in ("hidden", "action", "cb0") for form in FORMS),
    *(f"network: depformer, {form}" for form in ("whole", "stage by stage")),
    *(f"guidance: scale{scale}_k{k}" for scale in (1.5, 6.0) for k in (0, 4, 50)),
    *(f"codec: decode{form}" for form in ("", " in one pass", " streamed")),
    *(f"codec: encode{form}" for form in ("", " streamed", " ragged", " ragged, as a row")),
    *(f"codec: {part}" for part in ("latents", "frame rate")),
    *(
        f"generation {name}: {part}"
        for name in ("greedy", "voices")
        for part in (
            "machine", "network, whole", "depformer, whole", "tokens", "network", "draws",
            "delayed", "aligned", "words",
        )
    ),
    "generation greedy: picks",
    "generation greedy: waveform",
    "generation voices: plan",
    *(f"conversion: {part}{way}" for part in ("model", "mimi") for way in ("", ", by Orbax")),
}  # fmt: skip
ABSENT = {"codec: roundtrip", "generation voices: waveform"}


@pytest.fixture(scope="module")
def golden() -> Golden:
    """The folder as it is; its compiled programs serve the copies with the same weights."""
    return Golden(FOLDER)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER, tmp_path / "golden"))


def by_name(checks: Checks) -> dict[str, Item]:
    names = [item.name for item in checks.items]
    assert len(names) == len(set(names))
    return {item.name: item for item in checks.items}


def missed(checks: Checks) -> set[str]:
    return {item.name for item in checks.items if item.status == "MISS"}


def check_copy(copy: Path, part: str, golden: Golden) -> Checks:
    """A part of a copy that has the weights of the original."""
    other = Golden(copy)
    for compiled in ("programs", "whole_decoder", "whole_depformer", "codec"):
        vars(other)[compiled] = getattr(golden, compiled)
    return check_folder(other, (part,))


def edit_json(copy: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads((copy / "golden.json").read_text())
    edit(document)
    (copy / "golden.json").write_text(json.dumps(document))


def edit_arrays(copy: Path, name: str, edit: Callable[[dict[str, np.ndarray]], Any]) -> None:
    with np.load(copy / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    edit(arrays)
    np.savez(copy / f"{name}.npz", **arrays)


# ------------------------------------------------------------------------------------ a good folder


def test_everything_is_checked_and_passes(golden: Golden) -> None:
    checks = check_folder(golden)
    items = by_name(checks)
    assert set(items) == EXPECTED | ABSENT
    assert {name for name, item in items.items() if item.status == "absent"} == ABSENT
    assert {items[name].status for name in EXPECTED} <= {"pass", "tie"}
    assert checks.passed
    # The near-tie that the folder was made with is seen, and is a difference only by chance.
    assert items["generation greedy: picks"].numbers["smallest_gap"] < 1e-4
    assert items["generation greedy: waveform"].error > 100
    assert items["conversion: model"].numbers["same_file"] is True
    nonzero = ("network: hidden, whole", "codec: latents", "generation voices: draws")
    assert all(0 < items[name].error <= items[name].bar for name in nonzero)


# ------------------------------------------------------------------------------------ bad folders


def test_a_changed_weight_misses_the_network_alone(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["transformer.layers.0.mlp.wo.weight"][3, 4] += 0.05
    save_file(weights, copy / "model.safetensors")
    checks = check_folder(Golden(copy), ("network",))
    decoder = {f"network: {name}, {form}" for name in ("hidden", "action", "cb0") for form in FORMS}
    assert missed(checks) == decoder and not checks.passed
    assert all(1e-4 < item.error < 1 for item in checks.items if item.name in decoder)


def test_a_changed_token_misses_both_machines(copy: Path, golden: Golden) -> None:
    def edit(document: dict[str, Any]) -> None:
        document["text"]["traces"][1]["main"][5] += 1
        document["text"]["strings"][0]["ids"].append(9)

    edit_json(copy, edit)
    checks = check_copy(copy, "text", golden)
    machines = {f"text: traces, {form}" for form in ("specification", "arrays")}
    assert missed(checks) == {"text: strings", *machines}
    assert by_name(checks)["text: traces, arrays"].error == 1
    assert "trace 1 main" in by_name(checks)["text: traces, arrays"].detail


def test_changed_codes_and_samples_miss_the_codec(copy: Path, golden: Golden) -> None:
    def edit(arrays: dict[str, np.ndarray]) -> None:
        arrays["encoded"][1, 7] ^= 1
        arrays["latents"][0, 0] += 2e-4
        arrays["decoded"][-1] = np.nan
        arrays["phase"] = np.zeros(3)

    edit_arrays(copy, "codec", edit)
    checks = check_copy(copy, "codec", golden)
    items = by_name(checks)
    encoded = {f"codec: encode{form}" for form in ("", " streamed")}
    decoded = {f"codec: decode{form}" for form in ("", " in one pass", " streamed")}
    assert missed(checks) == {"codec: latents", *encoded, *decoded}
    assert items["codec: encode"].error == 1 and "[1, 7]" in items["codec: encode"].detail
    assert items["codec: phase"].status == "unread"


def test_a_changed_survivor_misses_guidance(copy: Path, golden: Golden) -> None:
    def edit(arrays: dict[str, np.ndarray]) -> None:
        worst = np.nanargmin(np.where(np.isinf(arrays["scale6.0_k4"]), np.nan, 0))
        arrays["scale6.0_k4"].reshape(-1)[worst] = -np.inf

    edit_arrays(copy, "guidance", edit)
    assert missed(check_copy(copy, "guidance", golden)) == {"guidance: scale6.0_k4"}


Edit = tuple[str, Callable[[dict[str, np.ndarray]], Any], set[str]]
ARRAY_EDITS: dict[str, Edit] = {
    "hidden": ("voices", lambda a: a["step_hidden"].__iadd__(3e-4), {"network", "network, whole"}),
    "position": ("voices", lambda a: a["step_pos"].__iadd__(1), {"tokens", "network, whole"}),
    "codes": ("voices", lambda a: a["aligned"][0].__ixor__(1), {"aligned"}),
    "delayed": ("voices", lambda a: a["delayed"][0].__ixor__(1), {"delayed"}),
    "sound": ("greedy", lambda a: a["waveform"].__iadd__(1e-4), {"waveform"}),
    # Draw 6 is codebook 1 of step 1: a distribution of its own, out of a whole run.
    "distribution": (
        "voices",
        lambda a: a["draw_logits"][6, :8].__iadd__(3e-3),
        {"draws", "depformer, whole"},
    ),
    "order": ("voices", lambda a: a["draw_kind"].__ixor__(1), {""}),
}


@pytest.mark.parametrize("name", ARRAY_EDITS)
def test_a_changed_array_misses_its_items(name: str, copy: Path, golden: Golden) -> None:
    generation, edit, expected = ARRAY_EDITS[name]
    edit_arrays(copy, f"generate_{generation}", edit)
    checks = check_copy(copy, "generation", golden)
    title = f"generation {generation}"
    assert missed(checks) >= {f"{title}: {part}" if part else title for part in expected}
    # The other run is as good as before.
    assert all(item.startswith(title) for item in missed(checks))
    assert any(item.status == "pass" and title not in item.name for item in checks.items)


def test_changed_words_miss_plan_machine_and_words(copy: Path, golden: Golden) -> None:
    def edit(document: dict[str, Any]) -> None:
        greedy, voices = (document["generations"][name] for name in ("greedy", "voices"))
        greedy["timestamps"][2][1] += 0.08
        voices["prefix"]["new_word_steps"][1] += 1
        voices["end_step"] -= 1
        del voices["crop"]

    edit_json(copy, edit)
    checks = check_copy(copy, "generation", golden)
    parts = {"generation greedy: words"}
    parts |= {f"generation voices: {part}" for part in ("plan", "machine", "words")}
    assert missed(checks) == parts
    items = by_name(checks)
    assert "timestamps" in items["generation greedy: words"].detail
    assert items["generation voices: crop"].status == "absent"


# --------------------------------------------------------------------------------------------- ties


def test_a_near_tie_is_reported_and_passes(copy: Path, golden: Golden) -> None:
    """The last draw takes the other of two entries 2e-5 apart, as another machine might."""

    def edit(arrays: dict[str, np.ndarray]) -> None:
        assert arrays["draw_pick"][-1] == 5
        arrays["draw_pick"][-1] = arrays["delayed"][-1, -1] = 0

    edit_arrays(copy, "generate_greedy", edit)
    checks = check_copy(copy, "generation", golden)
    assert checks.passed, missed(checks)
    picks = by_name(checks)["generation greedy: picks"]
    assert picks.status == "tie" and picks.numbers["ties"] == 1 and picks.error == 0
    assert "step 48, codebook 2: 5 for 0" in picks.detail
    assert by_name(checks)["generation greedy: delayed"].status == "pass"


def test_another_pick_is_no_tie(copy: Path, golden: Golden) -> None:
    def edit(arrays: dict[str, np.ndarray]) -> None:
        arrays["draw_pick"][-1] = arrays["delayed"][-1, -1] = 3

    edit_arrays(copy, "generate_greedy", edit)
    checks = check_copy(copy, "generation", golden)
    assert missed(checks) == {"generation greedy: picks"}
    assert "drew 5, golden 3" in by_name(checks)["generation greedy: picks"].detail


def test_ties_at_the_cut_of_the_filter() -> None:
    ranked = np.array([5.0, 4.0, 3.0, 2.99995, 1.0])
    logits = np.array([1.0, 2.0, 3.0, 4.0, 5.0], np.float32)
    third, fourth, last = (
        np.where(np.isin(np.arange(5), kept), logits, -np.inf)
        for kept in ((0, 1, 2), (0, 1, 3), (0, 1, 4))
    )
    assert filtered_difference(third, third, ranked, 3) == (0.0, False)
    assert filtered_difference(third, fourth, ranked, 3) == (0.0, True)
    assert filtered_difference(third, last, ranked, 3) == (np.inf, False)
    # One entry apart is no tie; neither is anything without the other row.
    assert filtered_difference(third, fourth, ranked + np.array([0, 0, 1e-4, 0, 0]), 3)[0] == np.inf
    assert filtered_difference(third, fourth, None, 3)[0] == np.inf
    assert filtered_difference(third, fourth, ranked, 2)[0] == np.inf
    assert filtered_difference(third + 1e-3, third, ranked, 3)[0] == pytest.approx(1e-3, rel=1e-3)
    assert filtered_difference(third * np.nan, third, ranked, 3)[0] == np.inf


def test_errors_that_are_no_numbers_are_beyond_every_bar() -> None:
    assert difference([1.0, np.nan], [1.0, np.nan])[0] == np.inf
    assert difference([1.0, -np.inf], [1.0, -np.inf])[0] == 0
    assert difference([[1.0]], [1.0])[0] == np.inf
    assert difference([], [])[0] == np.inf and mismatches([], [])[0] == np.inf
    assert mismatches([1, 2, 3], [1, 5, 4]) == (2, "first at [1]: 2, golden 5")
    wave = np.sin(np.arange(100.0))
    assert snr(wave * 1.001, wave) == pytest.approx(60)
    assert snr(wave[:-1], wave) == -np.inf and np.isnan(snr(wave * np.nan, wave))
    checks = Checks()
    checks.at_most("nan", float("nan"), 1.0)
    checks.decibels("nan dB", float("nan"))
    assert missed(checks) == {"nan", "nan dB"}


# -------------------------------------------------------------------------- damage, and the program


def test_a_damaged_file_is_a_miss_and_the_rest_is_checked(copy: Path, golden: Golden) -> None:
    (copy / "generate_greedy.npz").write_bytes(b"PK\x03\x04 cut short")
    (copy / "generate_other.npz").write_bytes((copy / "generate_voices.npz").read_bytes())
    checks = check_copy(copy, "generation", golden)
    assert missed(checks) == {"generation greedy", "generation other"}
    assert "BadZipFile" in by_name(checks)["generation greedy"].detail
    assert "no settings" in by_name(checks)["generation other"].detail
    assert by_name(checks)["generation voices: words"].status == "pass"


def test_damaged_weights_and_a_missing_codec(copy: Path) -> None:
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[:-100])
    shutil.rmtree(copy / "mimi")
    (copy / "guidance.npz").unlink()
    checks = check_folder(Golden(copy), ("conversion", "codec", "guidance"))
    items = by_name(checks)
    assert items["conversion: model"].detail.startswith("CheckpointError")
    assert items["conversion: mimi"].status == items["guidance"].status == "absent"
    assert "holds no mimi folder" in items["codec: decode"].detail
    assert "conversion: model" in missed(checks) and "codec: decode" in missed(checks)


def test_nothing_compared_is_no_pass(copy: Path) -> None:
    (copy / "guidance.npz").unlink()
    assert not check_folder(Golden(copy), ("guidance",)).passed


def test_program(copy: Path, tmp_path: Path) -> None:
    """Table, JSON, exit status, for a good and a bad folder."""
    edit_arrays(copy, "guidance", lambda arrays: arrays["scale1.5_k0"].__iadd__(1))
    report = tmp_path / "report.json"
    run = CliRunner().invoke(main, [str(FOLDER), "--only", "guidance", "--json", str(report)])
    assert run.exit_code == 0, run.output
    assert "guidance: scale1.5_k4  " in run.stdout and "passed: 6 pass" in run.stdout
    assert "\x1b" not in run.output and run.stderr == ""
    document = json.loads(report.read_text())
    assert document["passed"] and document["parts"] == ["guidance"]
    assert {item["status"] for item in document["folders"][0]["items"]} == {"pass"}

    parts = ["--only", "conversion", "--only", "guidance"]
    run = CliRunner().invoke(main, [str(copy), str(FOLDER), *parts, "--json", "-"])
    assert run.exit_code == 1
    document = json.loads(run.stdout)
    assert [folder["passed"] for folder in document["folders"]] == [False, True]
    [miss] = [i for i in document["folders"][0]["items"] if i["status"] == "MISS"]
    assert miss["name"] == "guidance: scale1.5_k0" and miss["error"] == pytest.approx(1)


def test_json_holds_no_infinity() -> None:
    checks = Checks()
    checks.close("shape", np.zeros(2), np.zeros(3))
    assert json.loads(json.dumps(checks.items[0].to_json(), allow_nan=False))["error"] == "inf"
    assert "MISS" in table(checks.items)[1] and "golden [3]" in table(checks.items)[1]


@pytest.mark.parametrize(
    "lost", ["golden.json", "config.json", "tokenizer.json", "model.safetensors"]
)
def test_a_folder_that_is_not_golden_is_a_usage_error(lost: str, copy: Path) -> None:
    (copy / lost).unlink()
    run = CliRunner().invoke(main, [str(copy)])
    assert run.exit_code == 2
    assert f"not a golden folder: {lost} is missing" in run.stderr


def test_usage_errors(tmp_path: Path) -> None:
    run = CliRunner().invoke(main, [str(tmp_path / "nowhere")])
    assert run.exit_code == 2 and "nowhere: no such folder" in run.stderr
    assert CliRunner().invoke(main, []).exit_code == 2
    assert CliRunner().invoke(main, [str(FOLDER), "--only", "all"]).exit_code == 2
