"""Speech in, the same speech out: prepare, pretrain, export, generate.

A tiny model learns half a minute of speech by heart. Generating the scripts that preparation wrote
out, breaks included, must then give the very codes that training saw, position by position: the
frames of training are those of generation.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import yaml

from dia2_jax import Dia2, GenerationConfig, SamplingConfig
from train.recordings import Recordings

ROOT = Path(__file__).parents[2]
SPEECH = ROOT / "tests" / "golden" / "speech"
STEPS = 220


def run(*command: str | Path) -> str:
    """A program of this project, as a user would start it."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE with the published ids, made from the words themselves: one or two tokens a
    word, so that the machine keeps up with the speech."""
    folder.mkdir()
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<0>", "<1>", "<new>", "<pad>", "<4>", "<5>", "<6>", "<zero>", "[S1]", "[S2]"]
    texts = [path.read_text() for path in sorted(SPEECH.glob("*.txt"))]
    words = [word for text in texts for word in text.split() if word not in ("[S1]", "[S2]")]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, min_frequency=1, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator([word for w in words for word in (w, f" {w}")], trainer)
    backend.save(str(folder / "tokenizer.json"))


def write_shape(path: Path) -> None:
    """configs/tiny.yaml, a little wider, with delays that let the text come first."""
    raw = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
    raw["data"]["delay_pattern"] = [6, *[8] * 7]
    raw["model"]["decoder"].update(n_embd=64, n_hidden=128)
    raw["runtime"]["max_context_steps"] = 200
    path.write_text(yaml.safe_dump(raw))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """A folder with everything up to the export."""
    place = tmp_path_factory.mktemp("overfit")
    mimi = tiny_model_folder / "mimi"
    write_tokenizer(place / "tokenizer")
    write_shape(place / "model.yaml")
    model = ["--model", place / "model.yaml", "--tokenizer", place / "tokenizer", "--mimi", mimi]
    run("train.prepare", SPEECH, place / "data", *model, "--aligner", "data", "-q")
    config: dict[str, Any] = {
        "model": {
            "config": str(place / "model.yaml"),
            "tokenizer": str(place / "tokenizer"),
            "codec": str(mimi),
        },
        "data": {"train": str(place / "data"), "rows": 5, "max_steps": 112},
        "loss": {"first_codebook_multiplier": 2.0},
        "optimizer": {
            "learning_rate": 3e-3,
            "weight_decay": 0.0,
            "schedule": {"kind": "cosine", "warmup_steps": 20},
        },
        "run": {
            "folder": str(place / "run"),
            "steps": STEPS,
            "log_every": STEPS,
            "hooks": {"progress": False, "curve": False},
        },
    }
    (place / "config.yaml").write_text(yaml.safe_dump(config))
    run("train.pretrain", place / "config.yaml")
    return place


def test_every_action_and_code_is_learned(place: Path) -> None:
    last = json.loads((place / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == STEPS
    assert last["accuracy/action"] == 1.0
    assert last["accuracy/word"] == 1.0
    for group in ("0", "1_3", "4_7"):
        assert last[f"accuracy/code_{group}"] >= 0.995


def test_greedy_generation_gives_the_training_codes_back(place: Path) -> None:
    recordings = Recordings(place / "data")
    scripts = recordings.scripts(len(recordings))
    assert len(scripts) == 5
    assert any("<break" in script.split(maxsplit=2)[2] for script in scripts)
    greedy = SamplingConfig(0.0, 0)
    settings = GenerationConfig(text=greedy, audio=greedy, cfg_scale=1.0)
    engine = Dia2.from_pretrained(place / "run" / "export")
    for index, result in enumerate(engine.generate(scripts, settings)):
        codes = recordings[index].codes
        frames = min(codes.shape[1], result.codes.shape[1])
        assert not result.truncated
        assert abs(codes.shape[1] - result.codes.shape[1]) <= 3, scripts[index]
        assert (codes[:, :frames] == result.codes[:, :frames]).mean() >= 0.95, scripts[index]


def test_the_command_line_speaks_the_export(place: Path) -> None:
    recordings = Recordings(place / "data")
    script = place / "script.txt"
    script.write_text(recordings.scripts(1)[0])
    greedy = ["--text-temperature", "0", "--audio-temperature", "0", "--cfg-scale", "1"]
    target = ["-o", place / "a.wav", "--codes", place / "a.npz"]
    run("dia2_jax", "generate", script, "-m", place / "run" / "export", *greedy, *target)
    with np.load(place / "a.npz") as file:
        codes = file["codes"]
    wanted = recordings[0].codes[:, : codes.shape[1]]
    assert (codes == wanted).mean() >= 0.95
