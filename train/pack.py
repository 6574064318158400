"""Make one small file of a prepared data set, to keep or to share: codes and words, no audio.

python -m train.pack data/anna data/anna-packed
"""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from dia2_jax.checkpoint import staged_folder
from dia2_jax.errors import DataError
from train.command import EXPORT_EPILOG, Program, note
from train.recordings import MANIFEST, PACKED, Recordings

#: Columns that only the machine which made the data set could use.
_DROPPED = ("source",)
_CARD = "README.md"


def pack(data: Path, out: Path, *, limit: float | None = None) -> int:
    """Write a prepared data set as parquet: about 9 bits a code of 512, where Arrow has 16.

    Training reads the result like the data set itself, and a run goes on from one to the other.

    Args:
      data: what `train.prepare` wrote.
      out: a folder that is not there yet; it appears whole or not at all.
      limit: of all files, in millions of bytes.

    Returns:
      Bytes of all files.

    Raises:
      DataError: no data set, something at `out`, or more than the limit.
    """
    import pyarrow.parquet as pq

    recordings = Recordings(data)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: is there already; name another folder, or remove it")
    table = recordings.table().drop_columns(list(_DROPPED))
    # What `datasets` wrote about its columns names the one that was dropped.
    table = table.replace_schema_metadata(None)
    with staged_folder(out) as staged:
        # Codes are few different numbers, which a dictionary stores in as few bits as they need.
        pq.write_table(table, staged / PACKED, compression="zstd", compression_level=19)
        shutil.copyfile(data / MANIFEST, staged / MANIFEST)
        if (data / _CARD).is_file():
            shutil.copyfile(data / _CARD, staged / _CARD)
        size = sum(path.stat().st_size for path in staged.iterdir())
        if limit is not None and size > limit * 1e6:
            raise DataError(f"{out}: {size / 1e6:.2f} MB, the limit is {limit:g} MB (--limit)")
    return size


@click.command(cls=Program, epilog=EXPORT_EPILOG)
@click.argument("data", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--limit",
    type=click.FloatRange(min=0, min_open=True),
    metavar="MB",
    help="Write nothing if it becomes larger.",
)
def main(data: Path, out: Path, limit: float | None) -> None:
    """Pack the data set DATA, which train.prepare wrote, into the folder OUT.

    OUT holds data.parquet (codes, words with times, scripts), the settings they were made with,
    and the data card. Training takes it in place of DATA.
    """
    size = pack(data, out, limit=limit)
    note(f"{out}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
