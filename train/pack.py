"""Make one small file of prepared data sets, to keep or to share: codes and words, no audio.

python -m train.pack data/anna data/anna-packed
python -m train.pack data/monday data/tuesday data/week
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from dia2_jax.checkpoint import staged_folder
from dia2_jax.errors import DataError
from train.command import EXPORT_EPILOG, Program, note
from train.recordings import MANIFEST, PACKED, Recordings

#: Columns that only the machine which made the data set could use.
_DROPPED = ("source",)
_CARD = "README.md"


#: What a manifest counts; everything else but how it came about must be the same in all.
_COUNTS = ("rows", "seconds", "words", "two_speakers", "rejected")
_HISTORY = ("settings", "settings_sha256", "versions", "parts")


def pack(data: Sequence[Path], out: Path, *, limit: float | None = None) -> int:
    """Write prepared data sets as parquet: about 9 bits a code of 512, where Arrow has 16.

    Training reads the result like a data set itself, and a run goes on from one to the other.

    Args:
      data: what `train.prepare` wrote, or this did; several become one, in this order.
      out: a folder that is not there yet; it appears whole or not at all.
      limit: of all files, in millions of bytes.

    Returns:
      Bytes of all files.

    Raises:
      DataError: no data set, several that do not go together, something at `out`, or more than
        the limit.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts = [Recordings(folder) for folder in data]
    manifest = _joined(parts)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: is there already; name another folder, or remove it")
    # What `datasets` wrote about its columns names the one that is dropped.
    table = pa.concat_tables(
        part.table()
        .select([name for name in part.table().column_names if name not in _DROPPED])
        .replace_schema_metadata(None)
        for part in parts
    )
    with staged_folder(out) as staged:
        # Codes are few different numbers, which a dictionary stores in as few bits as they need.
        pq.write_table(table, staged / PACKED, compression="zstd", compression_level=19)
        (staged / MANIFEST).write_text(manifest, encoding="utf-8")
        cards = [part.folder / _CARD for part in parts if (part.folder / _CARD).is_file()]
        if cards:
            text = "\n".join(card.read_text(encoding="utf-8") for card in cards)
            (staged / _CARD).write_text(text, encoding="utf-8")
        size = sum(path.stat().st_size for path in staged.iterdir())
        if limit is not None and size > limit * 1e6:
            raise DataError(f"{out}: {size / 1e6:.2f} MB, the limit is {limit:g} MB (--limit)")
    return size


def _joined(parts: Sequence[Recordings]) -> str:
    """The manifest of all: that of the only one as it is, else sums, and each as it was."""
    if len(parts) == 1:
        return (parts[0].folder / MANIFEST).read_text(encoding="utf-8")
    first = parts[0].manifest
    for part in parts[1:]:
        for key in sorted(first.keys() | part.manifest.keys()):
            mine, other = first.get(key), part.manifest.get(key)
            if key not in (*_COUNTS, *_HISTORY) and mine != other:
                raise DataError(
                    f"{part.folder}: {key} is {other}, in {parts[0].folder} it is {mine}: prepare "
                    "both with the same tokenizer, codec and settings"
                )
    manifests = [part.manifest for part in parts]
    joined: dict[str, Any] = {k: v for k, v in first.items() if k not in _HISTORY}
    for key in set(_COUNTS) & joined.keys():
        values = [manifest[key] for manifest in manifests]
        joined[key] = (
            dict(sum(map(Counter, values), Counter())) if key == "rejected" else sum(values)
        )
    joined["parts"] = manifests
    return json.dumps(joined, indent=2) + "\n"


@click.command(cls=Program, epilog=EXPORT_EPILOG)
@click.argument("data", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--limit",
    type=click.FloatRange(min=0, min_open=True),
    metavar="MB",
    help="Write nothing if it becomes larger.",
)
def main(data: tuple[Path, ...], out: Path, limit: float | None) -> None:
    """Pack the data set DATA, which train.prepare wrote, into the folder OUT.

    OUT holds data.parquet (codes, words with times, scripts), the settings they were made with,
    and the data card. Training takes it in place of DATA. Several data sets become one, if they
    were prepared alike.
    """
    size = pack(data, out, limit=limit)
    note(f"{out}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
