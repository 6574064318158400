"""What watches a run: progress, ``log.jsonl``, the curves, samples as WAV, Weights & Biases.

The loop hands every hook the metrics of a step, or samples; a hook never changes the run. They live
in the first process only.
"""

from __future__ import annotations

import json
import netrc
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol
from urllib.parse import urlparse

from dia2_jax.audio import write_wav
from dia2_jax.errors import ConfigError
from train.command import note, warn
from train.config import TrainingConfig, WandbConfig, config_to_dict
from train.curves import draw_curves
from train.processes import is_leader
from train.run_folder import RunFolder, write_text
from train.task import Sample

Values = Mapping[str, float]

#: Seconds between two drawings of the curves, each of which takes about half of one.
_REDRAW = 60.0
#: Losses that the progress line shows.
_SHOWN = 4


class Hook(Protocol):
    """One watcher of a run."""

    def metrics(self, step: int, values: Values) -> None:
        """Metrics after ``step`` steps; several calls may come for one step."""
        ...

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Audio that the weights after ``step`` steps make."""
        ...

    def close(self, failed: bool) -> None:
        """The run is over, ``failed`` if by an error."""
        ...


class Hooks:
    """All hooks of a run.

    Args:
      config: of the program; ``run.hooks`` says which there are.
      folder: of the run.
      start: steps done before; the log is cut there, since what follows is done again.
      task: the name of the task, for titles.
    """

    def __init__(self, config: TrainingConfig, folder: RunFolder, *, start: int, task: str) -> None:
        self._hooks: list[Hook] = []
        if not is_leader():
            return
        chosen = config.run.hooks
        earlier = read_log(folder.log, start)
        if chosen.jsonl:
            self._hooks.append(JsonLines(folder.log, earlier))
        if chosen.progress:
            self._hooks.append(Progress(start, config.run.steps, task))
        if chosen.curve:
            self._hooks.append(Curves(folder.curve, earlier, f"{task}: {config.run.folder}"))
        self._hooks.append(SampleFiles(folder.samples))
        if chosen.wandb.mode != "disabled":
            self._hooks.append(
                WeightsAndBiases(chosen.wandb, folder.path, config_to_dict(config), task)
            )

    def metrics(self, step: int, values: Values) -> None:
        """Hand metrics to every hook."""
        for hook in self._hooks:
            hook.metrics(step, values)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Hand samples to every hook."""
        for hook in self._hooks:
            hook.samples(step, samples)

    def __enter__(self) -> Hooks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with ExitStack() as stack:  # Each is closed, also where another one fails.
            for hook in self._hooks:
                stack.callback(hook.close, error is not None)


class JsonLines:
    """``log.jsonl``: a line of JSON for each step that is logged, and for each validation."""

    def __init__(self, path: Path, earlier: Sequence[Mapping[str, Any]]) -> None:
        write_text(path, "".join(json.dumps(line) + "\n" for line in earlier))
        self._file = path.open("a", encoding="utf-8")

    def metrics(self, step: int, values: Values) -> None:
        line = {"step": step, "time": round(time.time(), 3), **values}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Their files are their log."""

    def close(self, failed: bool) -> None:
        self._file.close()


class Progress:
    """A bar on a terminal, lines elsewhere: losses, frames/s, hours of audio, share of the peak."""

    def __init__(self, start: int, steps: int, task: str) -> None:
        from tqdm import tqdm

        self._steps = steps
        self._bar: Any = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                initial=start, total=steps, desc=task, unit=" steps", dynamic_ncols=True
            )

    def metrics(self, step: int, values: Values) -> None:
        text = describe(values)
        if self._bar is None:
            note(f"step {step}/{self._steps}: {text}")
        elif "audio_hours" in values:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
        else:
            with self._bar.external_write_mode(sys.stderr):
                note(f"step {step}: {text}")

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Nothing to see."""

    def close(self, failed: bool) -> None:
        if self._bar is not None:
            self._bar.close()


def describe(values: Values) -> str:
    """Metrics in words: losses, speed, audio heard, share of the peak."""
    losses = [name for name in values if "loss" in name]
    parts = [f"{name} {values[name]:.4g}" for name in losses[:_SHOWN]]
    for name, form in (
        ("frames_per_second", "{:.0f} frames/s"),
        ("audio_hours", "{:.2f} h"),
        ("peak_share", "{:.0%} of peak"),
    ):
        if name in values:
            parts.append(form.format(values[name]))
    return ", ".join(parts) or ", ".join(f"{name} {value:.4g}" for name, value in values.items())


class Curves:
    """``curve.png``, drawn at most once a minute and at the end."""

    def __init__(self, path: Path, earlier: Sequence[Mapping[str, Any]], title: str) -> None:
        self._path, self._title = path, title
        self._history: dict[str, list[tuple[int, float]]] = {}
        for line in earlier:
            self._add(line["step"], line)
        self._drawn = time.monotonic()

    def _add(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if name not in ("step", "time"):
                self._history.setdefault(name, []).append((step, value))

    def metrics(self, step: int, values: Values) -> None:
        self._add(step, values)
        if time.monotonic() - self._drawn > _REDRAW:
            self._draw()

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Nothing to draw."""

    def close(self, failed: bool) -> None:
        self._draw()

    def _draw(self) -> None:
        draw_curves(self._history, self._path, title=self._title)
        self._drawn = time.monotonic()


class SampleFiles:
    """``samples/<step>/NAME.wav`` with what was to be said in ``NAME.txt``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def metrics(self, step: int, values: Values) -> None:
        """They are no audio."""

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        for sample in samples:
            path = self._folder / str(step) / f"{_file_name(sample.name)}.wav"
            write_wav(path, sample.waveform, sample.sample_rate)
            if sample.text:
                write_text(path.with_suffix(".txt"), sample.text + "\n")

    def close(self, failed: bool) -> None:
        """Files are complete when they are written."""


class WeightsAndBiases:
    """A run of Weights & Biases, whose own files lie in the run folder.

    A resumed run goes on under its old id.
    """

    def __init__(
        self, chosen: WandbConfig, folder: Path, config: dict[str, Any], task: str
    ) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                "run.hooks.wandb: wandb is not installed; pip install wandb, or set mode: disabled"
            ) from None
        mode = chosen.mode
        if mode == "online" and not _has_key():
            warn(
                "wandb: no API key, so the run is logged offline; `wandb sync` uploads it later "
                "(log in with `wandb login`)"
            )
            mode = "offline"
        identity = folder / "wandb" / "id"
        if not identity.exists():
            identity.parent.mkdir(exist_ok=True)
            write_text(identity, secrets.token_hex(4))
        self._wandb: Any = wandb
        try:
            self._run: Any = wandb.init(
                mode=mode,
                project=chosen.project,
                name=chosen.name or folder.name,
                job_type=task,
                id=identity.read_text(encoding="utf-8"),
                resume="allow" if mode == "online" else None,
                dir=str(folder),
                config=config,
            )
        except Exception as error:  # No network, a wrong key, a project of somebody else.
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(
                f"run.hooks.wandb: the run cannot be logged there ({reason}); set mode: offline"
            ) from error

    def metrics(self, step: int, values: Values) -> None:
        self._run.log(dict(values), step=step)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        audio = {
            f"samples/{sample.name}": self._wandb.Audio(
                sample.waveform, sample_rate=sample.sample_rate, caption=sample.text
            )
            for sample in samples
        }
        self._run.log(audio, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def read_log(path: Path, until: int) -> list[dict[str, Any]]:
    """Lines of a ``log.jsonl`` up to a step; a last line that was cut off is left out."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return [line for line in _complete(text) if line["step"] <= until]


def _complete(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and isinstance(found.get("step"), int):
            yield found


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name).lstrip(".") or "sample"


def _has_key() -> bool:
    """Whether wandb will find an API key where it looks for one without asking."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
