"""Execute the notebooks: ``python -m notebooks.run`` renews the outputs of all of them in place.

``--check`` executes and writes nothing, as CI does. Either way an error in a cell, a word on
standard error (a warning, mostly), or more than three minutes for a notebook fails. What differs
from run to run without meaning anything (times of execution, the kernel's version) is not kept.

The minutes are those of a machine with nothing else to do: the time on the clock counts by the
share of the processors that other programs left.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import click
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellControlSignal, DeadKernelError

from eval.command import Finite
from eval.latency_machine import OtherWork

FOLDER = Path(__file__).parent

#: What is kept of a notebook's metadata.
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}

#: Seconds that one cell may take, whatever else the machine does.
_TIMEOUT = 600
#: Seconds that one notebook may take on two cores that nobody else uses.
LIMIT = 180.0


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a fresh kernel, started in the notebook's folder.

    Raises:
      CellControlSignal: a cell fails, or takes too long.
      DeadKernelError: the kernel ended.
      ClickException: a cell writes to standard error.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=_TIMEOUT,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    manager = client.create_kernel_manager()
    with tempfile.TemporaryDirectory() as folder:
        # Sockets in a folder of their own, so that nothing listens on a port.
        manager.transport, manager.ip = "ipc", f"{folder}/kernel"
        client.execute()
    for number, cell in enumerate(notebook.cells):
        cell.metadata = nbformat.NotebookNode()
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and output.name == "stderr":
                raise click.ClickException(f"{path.name}, cell {number}: {output.text.strip()}")
    notebook.metadata = nbformat.from_dict(METADATA)
    return notebook


def counted(seconds: float, others: float) -> float:
    """Seconds that a notebook would have taken alone, as nearly as one can tell.

    Args:
      seconds: on the clock.
      others: share of all processors that other programs used meanwhile, 0 to 1. A notebook does
        not use every core all the time, so what others took need not have been missing: on a busy
        machine this is on the side of the notebook.
    """
    return seconds * (1 - others)


@click.command(help=__doc__)
@click.argument("names", nargs=-1, metavar="[NAME ...]")
@click.option("--check", is_flag=True, help="Execute, but leave the files as they are.")
@click.option(
    "--limit",
    type=Finite(min=1),
    default=LIMIT,
    show_default=True,
    metavar="SECONDS",
    help="What a notebook may take; more for a machine of fewer or slower cores.",
)
def main(names: tuple[str, ...], check: bool, limit: float) -> None:
    """Execute notebooks by name or number (``03``); all by default."""
    paths = sorted(FOLDER.glob("*.ipynb"))
    chosen = [p for p in paths if not names or any(p.name.startswith(name) for name in names)]
    for name in names:
        if not any(path.name.startswith(name) for path in paths):
            known = ", ".join(path.stem for path in paths)
            raise click.UsageError(f"no notebook {name!r}; there are {known}")
    # Notebooks need nothing from a hub; what one would ask for is then missing at once.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    slow = []
    for path in chosen:
        begun, others = time.perf_counter(), OtherWork()
        try:
            notebook = execute(path)
        except (CellControlSignal, DeadKernelError) as error:
            raise click.ClickException(f"{path.name}: {error}") from None
        if not check:
            nbformat.write(notebook, path)
        seconds, share = time.perf_counter() - begun, others.share()
        click.echo(f"{path.name}: {seconds:.0f} s, other programs took {share:.0%} meanwhile")
        if counted(seconds, share) > limit:
            slow.append(f"{path.name} took {counted(seconds, share):.0f} s")
    if slow:
        raise click.ClickException(
            f"{', '.join(slow)} (what other programs took left out), where {limit:.0f} s are "
            "allowed: have it do less, or on a slower machine say --limit SECONDS"
        )


if __name__ == "__main__":
    main(prog_name="python -m notebooks.run")
