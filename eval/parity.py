"""Parity with recorded outputs of the PyTorch implementations, item by item.

    python -m eval.parity DIR [DIR ...] [--json FILE] [--only PART]

A DIR holds a small random checkpoint in the published layout and what was computed from it. The
network and the codec must agree to 1e-4 in fp32, codes and text exactly, greedy generations
token for token, every draw of a sampled one to a total variation of 1e-4 under replay, waveforms
to 90 dB, and conversion bit for bit. Exit status: 0 all passed, 1 something missed, 2 usage.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import jax

from eval.command import OutputFile, write_json
from eval.parity_checks import Checks, Item
from eval.parity_codec import check_codec
from eval.parity_conversion import check_conversion
from eval.parity_folder import Golden
from eval.parity_generation import check_generations
from eval.parity_network import check_guidance, check_network
from eval.parity_text import check_text
from train.command import Program

PARTS: dict[str, Callable[[Golden, Checks], None]] = {
    "text": check_text,
    "network": check_network,
    "guidance": check_guidance,
    "codec": check_codec,
    "generation": check_generations,
    "conversion": check_conversion,
}


def check_folder(
    golden: Golden, parts: tuple[str, ...] = (), say: Callable[[str], None] = lambda _: None
) -> Checks:
    """Check one golden folder.

    Args:
      golden: the folder.
      parts: names of `PARTS`; all of them by default.
      say: told what is being checked.
    """
    checks = Checks(say=say)
    # Parity is of fp32; a device's faster default would be another computation.
    with jax.default_matmul_precision("highest"):
        for name, check in PARTS.items():
            if not parts or name in parts:
                with checks.guard(name):
                    check(golden, checks)
    return checks


EPILOG = """\b
Exit status:
  0    all passed
  1    something missed its bar
  2    a folder, file or option cannot be used: the message says why
"""


@click.command(cls=Program, epilog=EPILOG, help=(__doc__ or "").split("\n\n")[2])
@click.argument("folders", metavar="DIR [DIR ...]", nargs=-1, required=True)
@click.option(
    "--json",
    "destination",
    type=OutputFile(stdout=True),
    metavar="FILE",
    help="Write all numbers; - for stdout.",
)
@click.option(
    "--only", "parts", type=click.Choice(list(PARTS)), multiple=True, help="Check a part alone."
)
def main(folders: tuple[str, ...], destination: Path | str | None, parts: tuple[str, ...]) -> None:
    opened = [Golden(folder) for folder in folders]
    documents = []
    for golden in opened:
        begun = time.perf_counter()
        checks = check_folder(golden, parts, _progress(str(golden.folder)))
        _progress("")("")
        seconds = time.perf_counter() - begun
        if destination != "-":
            click.echo(f"{golden.folder}")
            click.echo("\n".join(table(checks.items)))
            click.echo(summary(checks, seconds) + "\n")
        documents.append(
            {
                "folder": str(golden.folder),
                "passed": checks.passed,
                "seconds": round(seconds, 3),
                "items": [item.to_json() for item in checks.items],
            }
        )
    passed = all(document["passed"] for document in documents)
    if destination is not None:
        write_json(
            destination, {"passed": passed, "parts": list(parts or PARTS), "folders": documents}
        )
    sys.exit(0 if passed else 1)


def table(items: list[Item]) -> list[str]:
    """One line an item: name, worst error, bar, status, and what there is to say about it."""
    rows = [
        (item.name, *_figures(item), item.status, item.detail if item.status != "pass" else "")
        for item in items
    ]
    head = ("item", "worst error", "bar", "status", "")
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(4)]
    lines = []
    for name, error, bar, status, detail in [head, *rows]:
        line = f"{name:{widths[0]}}  {error:>{widths[1]}}  {bar:>{widths[2]}}  {status:{widths[3]}}"
        lines.append(f"{line}  {detail}".rstrip())
    return lines


def summary(checks: Checks, seconds: float) -> str:
    """How many items there are of each status."""
    counts: dict[str, int] = {}
    for item in checks.items:
        counts[item.status] = counts.get(item.status, 0) + 1
    told = ", ".join(f"{count} {status}" for status, count in counts.items())
    return f"{'passed' if checks.passed else 'FAILED'}: {told} ({seconds:.0f} s)"


def _figures(item: Item) -> tuple[str, str]:
    if item.error is None or item.bar is None:
        return "", ""
    if item.unit == "dB":
        return f"{item.error:.1f} dB", f">= {item.bar:.0f} dB"
    if item.unit == "wrong":
        count = "all" if item.error == float("inf") else f"{item.error:.0f}"
        return f"{count} of {item.numbers.get('of', '?')}", "0"
    unit = "TV" if item.unit == "TV" else ""
    return f"{item.error:.1e} {unit:2}".rstrip(), f"<= {item.bar:.0e}"


def _progress(folder: str) -> Callable[[str], None]:
    """Tells a terminal what is being checked, on one line that is written over."""

    def say(name: str) -> None:
        if sys.stderr.isatty():
            click.echo(f"\r\x1b[K{folder} {name}".rstrip(" "), nl=False, err=True)

    return say


if __name__ == "__main__":
    main(prog_name="python -m eval.parity")
