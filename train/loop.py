"""The training loop that every task shares: set-up, restore, ``for step``, hooks.

A run is a function of (config, seed, step): what is restored is the state and the number of steps,
and the batches go on from there.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from dia2_jax.errors import ConfigError
from train.checkpoints import Checkpoints
from train.command import note
from train.config import TrainingConfig, config_to_dict
from train.finite import FiniteWatch, require_finite
from train.hooks import Hooks
from train.interrupt import Interrupt
from train.meter import Meter
from train.peak import measure_peak
from train.processes import is_leader
from train.run_folder import RunFolder, open_run_folder, refuse_other_task, write_versions
from train.task import Task


@dataclass(frozen=True)
class Outcome:
    """How a run ended: steps done in all, the signal that stopped it (0: none), its folder."""

    step: int
    signal: int
    folder: RunFolder


def train(
    task: Task,
    config: TrainingConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    force_config: bool = False,
) -> Outcome:
    """Train a task until ``config.run.steps`` steps are done or a signal comes.

    In several processes each calls it, with the same arguments and a folder that all of them see.

    Args:
      task: what is trained.
      config: the program's configuration, of which ``run`` is read here and all of it is kept.
      resume: go on from the newest checkpoint, or start where there is none.
      overwrite: delete the run that the folder holds.
      force_config: resume although the configuration, the model or the data changed.

    Raises:
      ConfigError: the folder, the configuration or the data do not allow it.
      CheckpointError: no checkpoint is good, or one cannot be written.
      NonFiniteError: a metric or a weight is NaN or infinite; that state is not saved.
    """
    run = config.run
    opened = open_run_folder(config, resume=resume, overwrite=overwrite, force_config=force_config)
    with ExitStack() as stack:
        folder = stack.enter_context(opened)
        peak = measure_peak()
        interrupt = stack.enter_context(Interrupt(run.save_minutes))
        checkpoints = stack.enter_context(
            Checkpoints(folder.checkpoints, keep=run.keep, best=run.best)
        )

        # Restore, or begin.
        restored = checkpoints.restore(task.abstract_state())
        if restored is None:
            state, start, totals = task.initial_state(), 0, {}
        else:
            if not force_config:
                refuse_other_task(restored.metadata["task"], task.metadata(), folder)
            state, start, totals = restored.state, restored.step, restored.metadata["totals"]
        kept = {"task_name": task.name, "task": task.metadata(), "config": config_to_dict(config)}
        if is_leader():
            write_versions(folder, step=start, peak=peak)
            if resume:
                note(f"{folder.path}: going on after {start} of {run.steps} steps")
        hooks = stack.enter_context(Hooks(config, folder, start=start, task=task.name))
        watch, meter = FiniteWatch(), Meter(peak, totals)
        batches = task.batches(start)
        stack.callback(getattr(batches, "close", lambda: None))

        done = start
        for step in range(start, run.steps):
            with meter.data():
                batch = _next(batches, step)
            meter.count(task.work(batch))
            state, metrics = task.train_step(state, batch)
            done = step + 1
            watch.add(done, metrics)
            interrupt.poll()
            if step == start:
                seconds = meter.skip_compilation(metrics)
                with meter.aside(metrics):
                    hooks.metrics(done, {"first_step_seconds": seconds})

            last = done == run.steps
            if last or done % run.log_every == 0:
                values = watch.read(metrics)
                speeds = meter.read()
                with meter.aside(metrics):
                    hooks.metrics(done, values | speeds)
            held_out: dict[str, float] = {}
            if _due(done, run.evaluate_every, last) and not interrupt.signal:
                with meter.aside(metrics):
                    watch.check()
                    held_out = {name: float(x) for name, x in task.evaluate(state).items()}
                    require_finite(done, held_out)
                    hooks.metrics(done, held_out)
            save = interrupt.save or interrupt.signal or checkpoints.improves(held_out)
            if save or last or _due(done, run.save_every, last):
                with meter.aside(metrics):
                    watch.check()
                    checkpoints.save(done, state, kept | {"totals": meter.totals}, held_out)
                    interrupt.saved()
            # Behind the save: samples take long, and where they fail no step is lost.
            if _due(done, run.sample_every, last) and not interrupt.signal:
                with meter.aside(metrics):
                    hooks.samples(done, task.samples(state, done))
            if interrupt.signal:
                break

        # The checkpoint is complete before the weights go out, or the process does.
        checkpoints.close()
        if done >= run.steps:
            task.export(state, folder.export)
    return Outcome(done, interrupt.signal, folder)


def _due(done: int, every: int, last: bool) -> bool:
    """Whether something with an interval is due; 0 means never, and the last step is always."""
    return every > 0 and (last or done % every == 0)


def _next(batches: Any, step: int) -> Any:
    try:
        return next(batches)
    except StopIteration:
        raise ConfigError(
            f"the data ended after {step} batches; a task's batches go on without end"
        ) from None
