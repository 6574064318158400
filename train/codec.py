"""Train the Mimi codec on a folder of audio, from random weights or a published codec.

python -m train.codec configs/codec_tiny.yaml data.train=[SPEECH] run.folder=RUN
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from train.codec_training.config import CodecConfig
from train.command import Program, finish, note, run_options
from train.config import read_config
from train.distributed import distributed_option, join

if TYPE_CHECKING:
    from train.codec_training.task import CodecTask


@click.command(cls=Program)
@run_options
@distributed_option
def main(
    config_path: str,
    overrides: tuple[str, ...],
    plan: bool,
    distributed: str | None,
    **start: bool,
) -> None:
    """Train the codec that CONFIG (a YAML file) describes.

    NAME=VALUE changes a value of it: run.steps=1000, data.train=[SPEECH], model.initial=CODEC.
    The run folder's export is a codec in the published layout.
    """
    config = read_config(CodecConfig, config_path, overrides)
    join(distributed)
    # JAX and everything on it is imported once the processes know each other.
    from dia2_jax.compilation_cache import enable_compilation_cache
    from train.codec_training.task import CodecTask
    from train.loop import train
    from train.processes import is_leader

    enable_compilation_cache()
    task = CodecTask(config)
    if is_leader():
        for line in describe(task):
            note(line)
    if not plan:
        finish(train(task, config, **start))


def describe(task: CodecTask) -> list[str]:
    """What a run holds and does, computed before anything is compiled."""
    import math

    import jax

    def size(tree: Any) -> int:
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    data, mimi = task.config.data, task.mimi
    state = task.abstract_state()
    params = sum(math.prod(leaf.shape) for leaf in task.trainable.values())
    batch = {"wave": jax.ShapeDtypeStruct((data.rows, data.frames * mimi.samples_per_frame), "f4")}
    work = task.work(batch)
    hours = [corpus.starts[-1] / mimi.sampling_rate / 3600 for corpus in (
        task.corpora.train, task.corpora.validation)]  # fmt: skip
    bits = mimi.frames_per_second * mimi.num_quantizers * math.log2(mimi.codebook_size)
    held = size(state) + size(task.trainable)
    return [
        f"codec: {params:,} trained parameters; {mimi.num_quantizers} codebooks of "
        f"{mimi.codebook_size} at {mimi.frames_per_second:g} frames a second, {bits:,.0f} bit/s",
        f"memory of each device: {held / 1e6:,.0f} MB of weights, moments and gradients, and the "
        f"activations of {math.ceil(data.rows / task.mesh.size)} windows of "
        f"{data.frames / mimi.frames_per_second:.2f} s",
        f"step: {work['flops'] / 1e9:,.1f} GFLOP of the codec alone, {work['audio_seconds']:.1f} s "
        "of audio",
        f"data: {hours[0]:.2f} h to train on, {hours[1]:.2f} h held out",
    ]


if __name__ == "__main__":
    main()
