"""Train a Dia2 model from random weights, or go on training one in full.

python -m train.pretrain configs/pretrain_tiny.yaml data.train=DATA run.folder=RUN
"""

from __future__ import annotations

from typing import Any

import click

from train.command import Program, finish, run_options
from train.config import read_config
from train.dia2_config import Dia2TrainingConfig
from train.distributed import distributed_option, join


def plan_option(command: Any) -> Any:
    """``--plan-xla``, which the command gets as ``plan_xla`` for :func:`run`."""
    return click.option(
        "--plan-xla",
        is_flag=True,
        help="As --plan, and compile the step for XLA's own memory analysis: takes minutes for a "
        "billion parameters, loads none of them.",
    )(command)


def run(
    name: str,
    config: Dia2TrainingConfig,
    *,
    plan: bool,
    plan_xla: bool,
    distributed: str | None,
    **start: bool,
) -> None:
    """What `train.pretrain` and `train.finetune` do once their configuration is read."""
    join(distributed)
    # JAX and everything on it is imported once the processes know each other.
    from dia2_jax.compilation_cache import enable_compilation_cache
    from train.dia2_task import Dia2Task
    from train.loop import train
    from train.plan import print_plan

    enable_compilation_cache()
    task = Dia2Task(config, name)
    print_plan(task, xla=plan_xla)
    if not (plan or plan_xla):
        finish(train(task, config, **start))


@click.command(cls=Program)
@run_options
@plan_option
@distributed_option
def main(config_path: str, overrides: tuple[str, ...], **options: Any) -> None:
    """Train the decoder and depformer that CONFIG (a YAML file) describes.

    NAME=VALUE changes a value of it: run.steps=1000, data.train=DATA, mesh.fsdp=4.
    """
    run("pretrain", read_config(Dia2TrainingConfig, config_path, overrides), **options)


if __name__ == "__main__":
    main()
