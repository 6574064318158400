"""Files on the command line: the script to read, places to write to, codes, JSON.

Results appear under their name whole or not at all.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from dia2_jax.errors import AudioError, ScriptError

if TYPE_CHECKING:
    import numpy as np

    from dia2_jax.typing import Float, Int

#: Files that exist. click says which is missing.
EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)

#: One word with the look of a file: "talk.txt", "./talk", "a/b.txt".
_LIKE_A_PATH = re.compile(r"[.~]?[^\s\[(]*/\S*|[^\s\[(]+\.(txt|md|json|text|script)", re.IGNORECASE)


class OutputPath(click.ParamType):
    """A file to be written, refused before any work is done if it cannot be.

    Args:
      suffixes: those that are understood; any, if none are given.
      stdout: "-" is standard output.
    """

    name = "file"

    def __init__(self, *suffixes: str, stdout: bool = False) -> None:
        self._suffixes, self._stdout = suffixes, stdout

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = os.fspath(value)
        if text == "-":
            if not self._stdout:
                self.fail("standard output is not possible here, name a file", param, ctx)
            return text
        path = Path(text)
        if path.is_dir():
            self.fail(f"{text!r} is a folder, name a file in it", param, ctx)
        if self._suffixes and path.suffix.lower() not in self._suffixes:
            wanted = " or ".join(self._suffixes)
            self.fail(f"{text!r} must end in {wanted}", param, ctx)
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            self.fail(f"{text!r} cannot be written: no access to {str(folder)!r}", param, ctx)
        return text


def text_or_file(value: str) -> str:
    """The text, or what the file says whose path it is.

    Raises:
      ScriptError: the file is not UTF-8 text.
    """
    if os.path.isfile(value):
        return _decoded(Path(value).read_bytes(), value)
    if _LIKE_A_PATH.fullmatch(value):
        raise click.UsageError(
            f"there is no file {value!r}. Check the path; if it is the text itself, begin it with "
            f"a speaker: {'[S1] ' + value!r}"
        )
    return value


def read_script(value: str | None) -> str:
    """A script from an argument: text, the path of a file, or "-" for standard input.

    Raises:
      ScriptError: not UTF-8 text.
    """
    if value is None or value == "-":
        source = sys.stdin.buffer
        if value is None and source.isatty():
            raise click.UsageError("give the text, a file with it, or - to read standard input")
        return _decoded(source.read(), "standard input")
    return text_or_file(value)


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ScriptError(
            f"{where}: not UTF-8 text (byte 0x{content[error.start]:02x} at position "
            f"{error.start}); save it as UTF-8"
        ) from None


def _is_special(path: Path) -> bool:
    """A pipe or device, which is written to and must not be replaced by a file."""
    return path.exists() and not path.is_file()


def write_atomically(target: str | Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Give ``write`` a binary file that takes its name when it is complete."""
    if _is_special(Path(target)):
        with open(target, "wb") as special:
            write(special)
        return
    path = Path(os.path.realpath(target))  # a link stays a link
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with temporary.open("xb") as file:
            write(file)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_audio(target: str, wave: Float[np.ndarray, " W"], sample_rate: int) -> None:
    """A whole WAV to a file, a pipe or device, or standard output ("-")."""
    from dia2_jax.audio import WavWriter, write_wav

    if target == "-" or _is_special(Path(target)):
        with WavWriter(target, sample_rate) as out:
            out.write(wave)
    else:
        write_wav(os.path.realpath(target), wave, sample_rate)


def write_json(target: str | None, content: dict[str, Any]) -> None:
    """JSON to a file, to standard output ("-"), or nowhere (None)."""
    if target is None:
        return
    text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
    if target == "-":
        sys.stdout.buffer.write(text.encode())
        sys.stdout.buffer.flush()
    else:
        write_atomically(target, lambda file: file.write(text.encode()))


def refuse_terminal(what: str) -> None:
    """Sound bytes would garble a terminal."""
    if sys.stdout.isatty():
        raise click.UsageError(
            f"standard output is a terminal: pipe {what} into a player, or name a file with -o"
        )


def refuse_one_target(output: str | None, json_target: str | None) -> None:
    """Audio and JSON in one stream or file are neither."""
    if output is None or json_target is None:
        return
    if output == json_target == "-":
        raise click.UsageError("audio and JSON cannot both go to standard output")
    same = os.path.realpath(output) == os.path.realpath(json_target)
    if same and "-" not in (output, json_target) and not _is_special(Path(output)):
        raise click.UsageError(f"audio and JSON cannot both go to {output!r}: name two files")


def save_codes(
    path: str, codes: Int[np.ndarray, "C T"], *, sample_rate: int, samples: int, codec: str
) -> None:
    """Codes ``[C, T]`` as .npz or .safetensors, with what decoding and checking need."""
    import numpy as np

    codes = np.ascontiguousarray(codes, np.int32)
    if path.lower().endswith(".npz"):
        fields = {"codes": codes, "sample_rate": sample_rate, "samples": samples, "codec": codec}
        write_atomically(path, lambda file: np.savez_compressed(file, **fields))  # type: ignore[arg-type]
        return
    from dia2_jax.convert.safetensors_io import TensorSpec, write_safetensors

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    metadata = {"sample_rate": str(sample_rate), "samples": str(samples), "codec": codec}
    spec = TensorSpec(dtype=codes.dtype, shape=codes.shape)
    write_safetensors(path, {"codes": spec}, lambda name: codes, metadata)


def load_codes(path: Path) -> tuple[Int[np.ndarray, "C T"], str | None]:
    """Codes ``[C, T]`` of :func:`save_codes` or of a voice file, and the codec's fingerprint.

    Raises:
      AudioError: the file holds no codes.
    """
    import zipfile

    import numpy as np

    from dia2_jax.convert.safetensors_io import open_safetensors
    from dia2_jax.errors import CheckpointError

    try:
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as content:
                codes = content["codes"]
                codec = str(content["codec"]) if "codec" in content else None
        else:
            source = open_safetensors(path)
            codes = np.array(source.read("codes"))
            codec = (source.metadata or {}).get("codec")
    except (CheckpointError, KeyError, OSError, ValueError, zipfile.BadZipFile) as error:
        raise AudioError(
            f"{path}: not a file of codes ({error}); `dia2-jax encode` writes .npz and .safetensors"
        ) from None
    if codes.ndim != 2 or codes.size == 0 or not np.issubdtype(codes.dtype, np.integer):
        raise AudioError(
            f"{path}: codes must be whole numbers [codebooks, frames], these are {codes.dtype} "
            f"{list(codes.shape)}"
        )
    return codes, codec
