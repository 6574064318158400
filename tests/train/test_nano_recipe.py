"""The recipe of nano, command by command as its README says, on seconds of speech."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from corpus_files import write_files

from dia2_jax.audio import read_audio
from dia2_jax.cli import main as dia2_jax

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "configs" / "nano" / "README.md"

#: Shapes so small that compiling is most of the work, by file.
SHAPES = {
    "mimi.yaml": {
        "num_filters": 2,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "head_dim": 8,
        "intermediate_size": 32,
        "upsample_groups": 32,
    },
    "dia2.yaml": {
        "n_layer": 2,
        "n_embd": 64,
        "n_hidden": 64,
        "gqa_head_dim": 16,
    },
}

#: What makes it seconds instead of hours, by program.
SMALLER = {
    "train.corpus": [
        "size={hours: 0.01, validation: [2, 1], test: [3, 1], shard: 4}",
        "text={sources: [{kind: lines, share: 0.6, path: lines.txt},"
        " {kind: grammar, share: 0.4, path: grammar.yaml}],"
        " words: {frequencies: words.txt, target: 50, trusted: 1000, wordnet: null}}",
        "voice.kind=tones",
        "voice.workers=1",
        "tokenizer.items=50",
        "tokenizer.entries=320",
    ],
    "train.codec": [
        "run.steps=30",
        "optimizer.schedule.warmup_steps=5",
        "run.evaluate_every=0",
        "run.sample_every=0",
        "data.recordings=6",
        "data.rows=2",
        "codebooks.kmeans_rows=48",
        "codebooks.kmeans_iterations=2",
        "evaluation.windows=2",
        "evaluation.rows=2",
        "evaluation.samples=1",
    ],
    "dia2-jax": ["--quiet"],
    "train.prepare": ["--quiet"],
    "train.pack": [],
    "train.pretrain": [
        "run.steps=120",
        "run.evaluate_every=20",
        "run.sample_every=0",
        "data.rows=2",
        "data.max_steps=48",
        "data.buckets=[]",
        "optimizer.schedule.warmup_steps=10",
    ],
    "train.predict_codes": [],
    "train.package": [],
    "eval.read_aloud": ["voice.kind=tones", "--quiet"],
    # Those that need nothing which may or may not be installed.
    "eval.naturalness": ["--limit", "2", "--metrics", "stopping,dialogue,speed"],
}


def commands() -> list[list[str]]:
    """The programs that the recipe starts, with their arguments."""
    blocks = re.findall(r"```bash\n(.*?)```", RECIPE.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    wanted = [line for line in lines if line.startswith(("python -m ", "dia2-jax "))]
    return [shlex.split(line.removeprefix("python -m ")) for line in wanted]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with nano's configurations, its shapes made small, and a small text."""
    write_files(tmp_path)
    configs = tmp_path / "configs" / "nano"
    shutil.copytree(
        ROOT / "configs" / "nano", configs, ignore=shutil.ignore_patterns("tokens", "record")
    )
    for name, fields in SHAPES.items():
        text = (configs / name).read_text(encoding="utf-8")
        for field, value in fields.items():
            text, count = re.subn(rf"(?m)^( *{field}:) \d+", rf"\1 {value}", text)
            assert count > 0, field
        (configs / name).write_text(text, encoding="utf-8")
    prompts = (ROOT / "eval" / "prompts" / "everyday.jsonl").read_text(encoding="utf-8")
    (tmp_path / "eval" / "prompts").mkdir(parents=True)
    (tmp_path / "eval" / "prompts" / "everyday.jsonl").write_text(
        "".join(prompts.splitlines(keepends=True)[:3]), encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_recipe_makes_a_model_that_speaks(workplace: Path) -> None:
    programs = commands()
    assert [name for name, *_ in programs] == [
        "train.corpus",
        "train.codec",
        "train.codec",
        "dia2-jax",
        "train.prepare",
        "train.prepare",
        "train.pack",
        "train.pack",
        "train.pretrain",
        "train.predict_codes",
        "train.codec",
        "train.package",
        "eval.read_aloud",
        "eval.naturalness",
        "eval.naturalness",
    ]
    for name, *arguments in programs:
        arguments = ["shipped" if a in ("dia2_jax/nano", "nano") else a for a in arguments]
        program = dia2_jax if name == "dia2-jax" else importlib.import_module(name).main
        result = CliRunner().invoke(program, [*arguments, *SMALLER[name]])
        assert result.exit_code == 0, (name, arguments, result.output, result.exception)

    losses = [
        json.loads(line) for line in (workplace / "runs/nano/log.jsonl").read_text().splitlines()
    ]
    validation = [row["validation/loss"] for row in losses if "validation/loss" in row]
    # Three items are soon learnt by heart, and then speech not heard before is predicted worse.
    assert len(validation) == 6 and min(validation[1:]) < validation[0] - 0.1
    files = {str(p.relative_to("shipped")) for p in Path("shipped").rglob("*") if p.is_file()}
    assert {"model.safetensors", "mimi/model.safetensors", "README.md"} <= files

    script = "[S1] Hello there. [S2] Hi!"
    result = CliRunner().invoke(
        dia2_jax, ["generate", script, "-m", "shipped", "-o", "a.wav", "--json", "a.json"]
    )
    assert result.exit_code == 0, result.output
    assert len(read_audio(workplace / "a.wav", 24_000)) > 0
    assert json.loads((workplace / "a.json").read_text())["settings"]["max_padding"] == 10
