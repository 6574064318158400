"""Fine-tune a Dia2 checkpoint: in full, in part, or with LoRA adapters.

python -m train.finetune configs/finetune_lora_2b.yaml data.train=DATA run.folder=RUN
"""

from __future__ import annotations

from typing import Any

import click

from dia2_jax.errors import ConfigError
from train.command import Program, run_options
from train.config import read_config
from train.dia2_config import Dia2TrainingConfig
from train.distributed import distributed_option
from train.pretrain import plan_option, run


@click.command(cls=Program)
@run_options
@plan_option
@distributed_option
def main(config_path: str, overrides: tuple[str, ...], **options: Any) -> None:
    """Fine-tune the checkpoint that CONFIG (a YAML file) names in model.start.

    NAME=VALUE changes a value of it: model.start=nari-labs/Dia2-1B, lora.rank=32.
    """
    config = read_config(Dia2TrainingConfig, config_path, overrides)
    if config.model.start is None:
        raise ConfigError(
            f"{config_path}: model.start is null: name the checkpoint to fine-tune, or train from "
            "random weights with `python -m train.pretrain`"
        )
    run("finetune", config, **options)


if __name__ == "__main__":
    main()
