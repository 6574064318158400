"""int8 products and attention in C, where XLA's do not keep up with memory.

XLA's products of a few rows by int8 weights are made for processors with AMX. On one that has
AVX-512 VNNI and no AMX they take several times what reading the weights takes (`eval/SPEED.md`);
`int8_kernel.c` does not. It is compiled where it runs, by the machine's own C compiler in about a
second, so that the package is the same for every platform; the result is kept beside the programs
that XLA compiles. Without a compiler, or on another processor, XLA computes the same.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from dia2_jax.compilation_cache import cache_folder
from dia2_jax.nn.platform import on_cpu
from dia2_jax.typing import Array, Float, Int

#: Set to "off" to leave everything to XLA, for example to compare the two.
KERNEL_VARIABLE = "DIA2_JAX_INT8_KERNEL"

_SOURCE = Path(__file__).with_suffix(".c")
_TARGETS = ("dia2_jax_int8_product", "dia2_jax_int8_attention")
_FLAGS = (
    "-std=gnu11 -O3 -ffp-contract=off -fPIC -shared "
    "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni"
).split()
_NEEDED = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"}
_COMPILERS = ("cc", "gcc", "clang")
_COMPILE_SECONDS = 60


@dataclass(frozen=True)
class Kernel:
    """Whether what is written in C is used, and in words why it is or is not."""

    used: bool
    reason: str


@functools.cache
def kernel() -> Kernel:
    """Compiles and registers what is in C, or says why XLA computes it; once in a process."""
    if os.environ.get(KERNEL_VARIABLE, "").lower() == "off":
        return Kernel(False, f"{KERNEL_VARIABLE} is off")
    flags = _processor_flags()
    if "amx_int8" in flags:
        return Kernel(False, "this processor has AMX, for which XLA's product is as fast")
    if missing := sorted(_NEEDED - flags):
        return Kernel(False, f"this processor has no {', '.join(missing)}")
    try:
        library = _library()
    except OSError as error:
        return Kernel(False, str(error))
    for target in _TARGETS:
        handler = jax.ffi.pycapsule(getattr(library, target))
        jax.ffi.register_ffi_target(target, handler, platform="cpu")
    return Kernel(True, "compiled for this processor")


def use_kernel() -> bool:
    """Whether a program that is traced now is to call what is in C."""
    return on_cpu() and kernel().used


def multiply(
    x: Float[Array, "B D"], weight: Int[Array, "F D"], scale: Float[Array, " F"]
) -> Float[Array, "B F"]:
    """``x @ (scale[:, None] * weight).T`` with ``x`` rounded to two digits by row, in float32.

    Only where :func:`use_kernel` says so. A row that is not finite gives NaN.
    """
    y = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), jnp.float32)
    product: Array = jax.ffi.ffi_call(_TARGETS[0], y, vmap_method="sequential")(x, weight, scale)
    return product


def attend_int8(
    query: Float[Array, "B K G H"],
    keys: Int[Array, "B L K S H"],
    key_scale: Float[Array, "B L K S"],
    values: Int[Array, "B L K S H"],
    value_scale: Float[Array, "B L K S"],
    layer: Int[Array, ""],
    length: Int[Array, " B"],
) -> Float[Array, "B K G H"]:
    """Attention over the first ``length[b]`` slots of a layer, in float32.

    Only where :func:`use_kernel` says so. Queries are rounded to two digits; weights stay
    in float32.
    """
    y = jax.ShapeDtypeStruct(query.shape, jnp.float32)
    attend = jax.ffi.ffi_call(_TARGETS[1], y, vmap_method="sequential")
    out: Array = attend(query, keys, key_scale, values, value_scale, layer, length)
    return out


def _processor_flags() -> set[str]:
    """What the processor can do, in Linux's words; nothing where they are not to be had."""
    if platform.machine() != "x86_64":
        return set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return set(line.split())
    except OSError:
        pass
    return set()


def _library() -> ctypes.CDLL:
    """This source as a shared library, compiled if it is not kept.

    Raises:
      OSError: there is no compiler, or it failed; the message is one for a user.
    """
    headers = Path(jax.ffi.include_dir())
    content = _SOURCE.read_bytes() + (headers / "xla/ffi/api/c_api.h").read_bytes()
    key = hashlib.sha256(content + " ".join(_FLAGS).encode()).hexdigest()[:16]
    name, folder = f"int8_kernel-{key}.so", cache_folder()
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / name).exists():
                _compile(headers, folder / name)
            return ctypes.CDLL(str(folder / name))
        except PermissionError:
            pass  # a home that cannot be written to
    with tempfile.TemporaryDirectory() as temporary:
        _compile(headers, Path(temporary) / name)
        return ctypes.CDLL(str(Path(temporary) / name))  # needs its file no longer


def _compile(headers: Path, target: Path) -> None:
    """Two processes may do this at once: each writes a file of its own, and one of them stays."""
    chosen = os.environ.get("CC") or next(filter(shutil.which, _COMPILERS), None)
    if chosen is None:
        raise OSError(f"no C compiler found (of {', '.join(_COMPILERS)}; CC names another)")
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        made = Path(temporary) / target.name
        command = [*chosen.split(), *_FLAGS, f"-I{headers}", str(_SOURCE), "-o", str(made)]
        try:
            subprocess.run(
                command, check=True, capture_output=True, text=True, timeout=_COMPILE_SECONDS
            )
        except subprocess.CalledProcessError as error:
            told = error.stderr.strip().splitlines() or ["without a word"]
            raise OSError(f"`{chosen}` could not compile {_SOURCE.name}: {told[0]}") from None
        except subprocess.TimeoutExpired:
            raise OSError(f"`{chosen}` took longer than {_COMPILE_SECONDS} s") from None
        made.replace(target)
