"""Products of a few rows, attention over a cache, and all layers of a step: in C, for AVX-512 with
VNNI.

That is what a frame spends its time on, and XLA's CPU backend does not do it at the pace at which
memory or caches are read (`eval/SPEED.md`): least so with int8 weights, whose products are made for
processors with AMX. The C files beside this one are compiled where they run, by the machine's own
compiler at the first use, so that the package is the same for every platform; the result is kept
beside the programs that XLA compiles. Without a compiler, or on another processor, XLA
computes the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from dia2_jax.compilation_cache import cache_folder
from dia2_jax.nn.platform import on_cpu
from dia2_jax.typing import Array, Float, Int

#: Set to "off" to leave everything to XLA, for example to compare the two.
KERNELS_VARIABLE = "DIA2_JAX_KERNELS"

_FOLDER = Path(__file__).parent
_SOURCES = ("float32.c", "int8.c")
_HEADERS = ("shared.h", "attention.h", "layer.h", "stack.h")
#: What the kernels are called in a program.
FLOAT32_PRODUCT = "dia2_jax_float32_product"
FLOAT32_ATTENTION = "dia2_jax_float32_attention"
INT8_PRODUCT = "dia2_jax_int8_product"
INT8_ATTENTION = "dia2_jax_int8_attention"
FLOAT32_LAYERS = "dia2_jax_float32_layers"
INT8_LAYERS = "dia2_jax_int8_layers"
_TARGETS = (
    FLOAT32_PRODUCT, FLOAT32_ATTENTION, FLOAT32_LAYERS, INT8_PRODUCT, INT8_ATTENTION, INT8_LAYERS,
)  # fmt: skip

#: Up to this many rows a float32 kernel keeps up with XLA: both guidance rows of four sessions.
FLOAT32_ROWS = 8

_INSTRUCTIONS = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni")
_FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=off", "-fPIC", "-shared", *_INSTRUCTIONS)
_NEEDED = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"}
_COMPILERS = ("cc", "gcc", "clang")
_COMPILE_SECONDS = 60
_ONE_AT_A_TIME = threading.Lock()


class _NotCompiled(OSError):
    """There is no compiler, or it failed; the message is one for a user."""


@dataclass(frozen=True)
class Kernels:
    """Which kernels a process has.

    Attributes:
      float32: those of float32 weights and caches.
      int8: those of int8.
      reason: in words, why there are these and no others.
    """

    float32: bool
    int8: bool
    reason: str


def kernels() -> Kernels:
    """Compiles and registers the kernels, or says why there are none; once in a process."""
    with _ONE_AT_A_TIME:  # two threads would register two libraries under the same names
        return _find()


@functools.cache
def _find() -> Kernels:
    if os.environ.get(KERNELS_VARIABLE, "").lower() == "off":
        return Kernels(False, False, f"none: {KERNELS_VARIABLE} is off")
    flags = _processor_flags()
    if missing := sorted(_NEEDED - flags):
        return Kernels(False, False, f"none: this processor has no {', '.join(missing)}")
    try:
        library = _library()
    except OSError as error:
        return Kernels(False, False, f"none: {error}")
    for target in _TARGETS:
        handler = jax.ffi.pycapsule(getattr(library, target))
        jax.ffi.register_ffi_target(target, handler, platform="cpu")
    if "amx_int8" in flags:
        return Kernels(True, False, "float32; int8 is left to AMX, which XLA uses")
    return Kernels(True, True, "float32 and int8")


def kernels_here() -> Kernels:
    """Those that a program is to call which is traced now."""
    if not on_cpu():
        return Kernels(False, False, "none: this process does not compute on a CPU")
    if jax.device_count() > 1:
        # XLA splits an operation of its own over them; for these it would gather the operands.
        return Kernels(False, False, "none: there are several devices")
    return kernels()


def use_float32() -> bool:
    """Whether a program that is traced now is to call the float32 kernels."""
    return kernels_here().float32


def use_int8() -> bool:
    """Whether a program that is traced now is to call the int8 kernels."""
    return kernels_here().int8


def product_float32(x: Float[Array, "B D"], weight: Float[Array, "F D"]) -> Float[Array, "B F"]:
    """``x @ weight.T`` in float32. Only where :func:`use_float32` says so."""
    return _call(FLOAT32_PRODUCT, (x.shape[0], weight.shape[0]), x, weight)


def attention_float32(
    query: Float[Array, "B K G H"],
    keys: Float[Array, "B L K H S"],
    values: Float[Array, "B L K S H"],
    layer: int | Int[Array, ""],
    length: Int[Array, " B"],
) -> Float[Array, "B K G H"]:
    """Attention over the first ``length[b]`` slots of a layer. Only where :func:`use_float32`."""
    return _attend(FLOAT32_ATTENTION, query, (keys, values), layer, length)


def product_int8(
    x: Float[Array, "B D"], weight: Int[Array, "F D"], scale: Float[Array, " F"]
) -> Float[Array, "B F"]:
    """``x @ (scale[:, None] * weight).T`` with ``x`` rounded to two digits by row, in float32.

    Only where :func:`use_int8` says so. A row that is not finite gives NaN.
    """
    return _call(INT8_PRODUCT, (x.shape[0], weight.shape[0]), x, weight, scale)


def attention_int8(
    query: Float[Array, "B K G H"],
    keys: Int[Array, "B L K S H"],
    key_scale: Float[Array, "B L K S"],
    values: Int[Array, "B L K S H"],
    value_scale: Float[Array, "B L K S"],
    layer: int | Int[Array, ""],
    length: Int[Array, " B"],
) -> Float[Array, "B K G H"]:
    """Attention over the first ``length[b]`` slots of a layer. Only where :func:`use_int8`.

    Queries are rounded to two digits; the weights of values stay in float32.
    """
    held = (keys, key_scale, values, value_scale)
    return _attend(INT8_ATTENTION, query, held, layer, length)


def _attend(
    target: str,
    query: Array,
    held: tuple[Array, ...],
    layer: int | Int[Array, ""],
    length: Int[Array, " B"],
) -> Array:
    place = (jnp.asarray(layer, jnp.int32), length.astype(jnp.int32))
    return _call(target, query.shape, query.astype(jnp.float32), *held, *place)


def _call(target: str, shape: tuple[int, ...], *operands: Array) -> Array:
    result = jax.ShapeDtypeStruct(shape, jnp.float32)
    called: Array = jax.ffi.ffi_call(target, result, vmap_method="sequential")(*operands)
    return called


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
    """The kernels as a shared library, compiled if it is not kept.

    Raises:
      OSError: it could not be compiled, or not be loaded.
    """
    interface = Path(jax.ffi.include_dir())
    files = [_FOLDER / name for name in (*_SOURCES, *_HEADERS)]
    files.append(interface / "xla" / "ffi" / "api" / "c_api.h")
    content = b"".join(file.read_bytes() for file in files) + " ".join(_FLAGS).encode()
    name = f"kernels-{hashlib.sha256(content).hexdigest()[:16]}.so"
    try:
        if (folder := cache_folder()) is not None:
            return _kept(interface, folder.absolute() / name)
    except _NotCompiled:
        raise
    except (OSError, RuntimeError):
        pass  # no home, a folder that cannot be written to, or out of which nothing may be run
    with tempfile.TemporaryDirectory() as temporary:
        _compile(interface, Path(temporary) / name)
        return ctypes.CDLL(str(Path(temporary) / name))  # needs its file no longer


def _kept(interface: Path, file: Path) -> ctypes.CDLL:
    """The library in a file, which is made if it is not there, and made anew if it is damaged."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists():
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(file))
    _compile(interface, file)
    return ctypes.CDLL(str(file))


def _compile(interface: Path, target: Path) -> None:
    """Two processes may do this at once: each writes a file of its own, and one of them stays.

    Raises:
      _NotCompiled: see there.
      OSError: the target's folder cannot be written to.
    """
    try:
        chosen = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise _NotCompiled(f"CC is no command: {error}") from None
    chosen = chosen or [name for name in _COMPILERS if shutil.which(name)][:1]
    if not chosen:
        raise _NotCompiled(f"no C compiler found (of {', '.join(_COMPILERS)}; CC names another)")
    sources = [str(_FOLDER / name) for name in _SOURCES]
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        made = Path(temporary) / target.name
        command = [*chosen, *_FLAGS, f"-I{interface}", *sources, "-o", str(made)]
        try:
            subprocess.run(
                command,
                check=True,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_COMPILE_SECONDS,
            )
        except FileNotFoundError:
            raise _NotCompiled(f"the C compiler {chosen[0]!r} of CC is not there") from None
        except OSError as error:
            raise _NotCompiled(f"{chosen[0]!r} cannot be run: {error.strerror}") from None
        except subprocess.CalledProcessError as error:
            told = error.stderr.strip().splitlines() or ["without a word"]
            raise _NotCompiled(f"{chosen[0]!r} could not compile them: {told[0]}") from None
        except subprocess.TimeoutExpired:
            raise _NotCompiled(f"{chosen[0]!r} took longer than {_COMPILE_SECONDS} s") from None
        made.replace(target)
