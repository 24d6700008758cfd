"""Compile the C files at first use, keep it in the user's cache, check it against the definitions, and call it.

It reads weights as the checkpoint stores them, so nothing is packed, copied or saved. Its threads are those of torch:
the library is linked to no OpenMP, and takes the one that torch has loaded.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from .. import reference

_FILES = ("products.c", "many_rows.c", "many_rows_512.c", "between.c", "steps.c")
SOURCES = tuple(Path(__file__).with_name(name) for name in _FILES)
_HEADER = Path(__file__).with_name("common.h")
KINDS_OF_TENSOR = (torch.Tensor, nn.Parameter)
KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-fopenmp", "-mavx2", "-mfma", "-mf16c")
_VNNI_FLAGS = (*_FLAGS, "-DVNNI", "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512vnni")
_AMX_FLAGS = (*_VNNI_FLAGS, "-DAMX", "-mamx-tile", "-mamx-int8")
AVX2, VNNI, AMX = "AVX2", "AVX-512 VNNI", "AVX-512 VNNI and AMX"
_VNNI_NEEDS = {"avx512vl", "avx512bw", "avx512_vnni"}
# The fastest first: name, compiler's flags, what Linux must list.
_VARIANTS = (
    (AMX, _AMX_FLAGS, _VNNI_NEEDS | {"amx_tile", "amx_int8"}),
    (VNNI, _VNNI_FLAGS, _VNNI_NEEDS),
    (AVX2, _FLAGS, set()),
)
_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
# The C files have the meaning of each argument.
_ARGUMENTS = {
    "integer_product": [_POINTER, _POINTER, _INT, _POINTER, _POINTER, *[_LONG] * 5, _INT, _INT, _INT],
    "many_rows_product": [_POINTER, _POINTER, _INT, _POINTER, _POINTER, *[_LONG] * 5, _INT, _INT, _INT],
    "many_rows_512_product": [_POINTER, _POINTER, _INT, _POINTER, _POINTER, *[_LONG] * 5, *[_INT] * 5],
    "request_amx": [],
    "float_product": [_POINTER, _INT, _POINTER, _POINTER, _LONG, _LONG, _LONG, _INT],
    "gelu": [_POINTER, _INT, _POINTER, _LONG, _INT],
    "finish": [_POINTER, _POINTER, _INT, _POINTER, _INT, _FLOAT, _POINTER, _INT, _LONG, _LONG, _INT],
    "rotary": [_POINTER, _INT, *[_POINTER] * 4, *[_LONG] * 7, _INT],
    "attention": [*[_POINTER] * 3, _INT, _POINTER, _INT, _POINTER, _POINTER, *[_LONG] * 5, _FLOAT, _INT],
    "step_attention": [_POINTER, _INT, *[_POINTER] * 14, _FLOAT, _INT],
    "rotate_append": [_POINTER, _INT, *[_POINTER] * 8, *[_LONG] * 6, _INT],
    "gumbel": [_POINTER, _POINTER, _LONG, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32, _INT],
    "unpack": [_POINTER, _POINTER, _INT, _POINTER, _LONG, _LONG, _LONG, _INT, _INT],
}


class Kernel(NamedTuple):
    """The loaded library: ``instructions`` says for which CPU it was compiled, ``compiler`` by what.

    ``rejected`` says why a faster variant, for which the CPU has the instructions, does not serve.
    """

    library: ctypes.CDLL
    instructions: str
    compiler: str
    rejected: str = ""

    def __str__(self) -> str:
        """Return what ``status()`` says of it."""
        return f"{self.instructions}, compiled by {self.compiler}{self.rejected}"


@functools.cache
def load() -> Kernel | str:
    """Return the kernel, compiled if the cache does not have it, or one clause that says why there is none."""
    capability = torch.backends.cpu.get_cpu_capability()
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        return f"the C kernel is for Linux on x86-64, not {platform.system()} on {platform.machine()}"
    if not capability.startswith(("AVX2", "AVX512")):
        return f"the C kernel needs AVX2, and torch uses {capability}"
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", ""), "gcc", "cc", "clang"))), None)
    if compiler is None:
        return "the C kernel needs a C compiler and none is on the PATH; install gcc"
    flags, rejected = _cpu_flags() if capability.startswith("AVX512") else set(), ""
    for instructions, options, needs in _VARIANTS:
        if needs <= flags:
            found = _variant(compiler, instructions, options)
            if isinstance(found, Kernel):
                return found._replace(rejected=rejected)
            rejected += f"; not {instructions}: {found}"
    return found


def _variant(compiler: str, instructions: str, options: tuple[str, ...]) -> Kernel | str:
    """Return the kernel with these instructions, or one clause that says why there is none."""
    try:
        library = _library(compiler, options)
    # Path.home() has a RuntimeError for a user without one.
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        lines = str(getattr(error, "stderr", None) or error).strip().splitlines() or [type(error).__name__]
        return f"the C kernel could not be made: {lines[0][:200]}"
    if instructions == AMX and library.request_amx():
        return "Linux does not let this process use it"
    kernel = Kernel(library, instructions, Path(compiler).name)
    wrong = _trial(kernel)
    return kernel if wrong is None else f"the C kernel is wrong on this machine: {wrong}"


def is_traced() -> bool:
    """Tell whether a tracer watches, which sees nothing of what the kernel does."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def may_read(*tensors: torch.Tensor) -> bool:
    """Tell whether code that reads addresses may take these: real tensors of this device that are contiguous."""
    for tensor in tensors:
        if type(tensor) not in KINDS_OF_TENSOR or not tensor.is_cpu or not tensor.is_contiguous():
            return False
    return True


def block_of(columns: int, bits: int) -> int | None:
    """Return the block of columns that share a scale of x, for groups of ``columns``; None if no product serves it."""
    blocks = (256, 64) if bits == 4 else (256, 16)
    return next((block for block in blocks if columns % block == 0), None)


def block_of_many_rows(columns: int, step: int = 8) -> int | None:
    """Return what ``block_of`` does, for ``many_rows_product``; many_rows_512.c has blocks in steps of 64."""
    return next((block for block in range(256, 0, -step) if columns % block == 0), None)


def multiplies_bytes(kernel: Kernel, columns: int) -> bool:
    """Tell whether many_rows_512.c serves ``many_rows_product`` for groups of ``columns``, which is faster."""
    return kernel.instructions != AVX2 and columns % 64 == 0


def integer_product(
    kernel: Kernel,
    x: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bits: int,
    group: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return float32 [rows, out] of a few rows of x [rows, in] and an integer weight, all contiguous and on the CPU.

    Args:
        x: a float dtype. w: int8 [out, in * bits / 8]. w_scale: [out, in / group], of a dtype in ``KINDS``.
        group: columns that share a scale, of which ``block_of`` knows a block; all columns for whole rows.
        out: what is filled and returned.

    Raises:
        MemoryError: there is no memory for x in fixed point.
    """
    return _integer_product(kernel.library.integer_product, x, w, w_scale, bits, group, block_of(group, bits), out)


def many_rows_product(
    kernel: Kernel,
    x: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bits: int,
    group: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return what ``integer_product`` does, faster for many rows and for ``block_of_many_rows``."""
    if multiplies_bytes(kernel, group):
        function, rest = kernel.library.many_rows_512_product, (KINDS[x.dtype], kernel.instructions == AMX)
        return _integer_product(function, x, w, w_scale, bits, group, block_of_many_rows(group, 64), out, rest)
    block = block_of_many_rows(group)
    return _integer_product(kernel.library.many_rows_product, x, w, w_scale, bits, group, block, out)


def _integer_product(
    function: Callable,
    x: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bits: int,
    group: int,
    block: int,
    out: torch.Tensor | None,
    rest: tuple[int, ...] = (),
) -> torch.Tensor:
    # Half precision is coarser than fixed point without the last digit.
    (rows, columns), precise = x.shape, x.dtype == torch.float32
    # A function that takes more reads x in its own dtype.
    x = x if rest else x.float()
    # Not torch's defaults, which the user may set: the kernel writes float32 into this process' memory.
    out = torch.empty(rows, w.shape[0], dtype=torch.float32, device="cpu") if out is None else out
    failed = function(
        w.data_ptr(),
        w_scale.data_ptr(),
        KINDS[w_scale.dtype],
        x.data_ptr(),
        out.data_ptr(),
        rows,
        w.shape[0],
        columns,
        group,
        block,
        bits,
        precise,
        torch.get_num_threads(),
        *rest,
    )
    if failed:
        raise MemoryError(f"There is no memory for {rows} rows of {columns} numbers in fixed point; use fewer rows.")
    return out


def float_product(kernel: Kernel, x: torch.Tensor, w: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return float32 [rows, out] of x [rows, in] and w [out, in] of a dtype in ``KINDS``, both contiguous."""
    (rows, columns), x = x.shape, x.float()
    # Not torch's defaults, which the user may set: the kernel writes float32 into this process' memory.
    out = torch.empty(rows, w.shape[0], dtype=torch.float32, device="cpu") if out is None else out
    kernel.library.float_product(
        w.data_ptr(),
        KINDS[w.dtype],
        x.data_ptr(),
        out.data_ptr(),
        rows,
        w.shape[0],
        columns,
        torch.get_num_threads(),
    )
    return out


def unpack(
    kernel: Kernel, w: torch.Tensor, w_scale: torch.Tensor | None, bits: int, group: int, out: torch.Tensor
) -> torch.Tensor:
    """Fill ``out`` [rows, in] from integers [rows, in * bits / 8]: float32 values, or bfloat16 integers without scales.

    Args:
        w_scale: [rows, in / group] of a dtype in ``KINDS``, or None.
        group: columns that share a scale; even for 4 bits.
    """
    kernel.library.unpack(
        w.data_ptr(),
        None if w_scale is None else w_scale.data_ptr(),
        0 if w_scale is None else KINDS[w_scale.dtype],
        out.data_ptr(),
        *out.shape,
        group,
        bits,
        torch.get_num_threads(),
    )
    return out


def _cpu_flags() -> set[str]:
    """Return what Linux says the CPU has, nothing where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return set()
    return set(next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), "").split())


def cache_folder() -> Path:
    """Return where compiled kernels are kept, made if it is not there.

    Raises:
        OSError: it cannot be made, or others may write there and so choose what this process runs.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "faster_chatglm_6b"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"others may write to {folder}; name your own folder in XDG_CACHE_HOME")
    return folder


def _library(compiler: str, flags: tuple[str, ...]) -> ctypes.CDLL:
    """Load the compiled library. Its name tells source, compiler and flags apart."""
    parts = [*(source.read_text(encoding="utf-8") for source in (*SOURCES, _HEADER)), compiler, *flags]
    path = cache_folder() / f"products-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:24]}.so"
    if path.exists():
        try:
            return _open(path)
        except OSError:
            # Damaged, or of a machine with other libraries that shares this folder.
            path.unlink(missing_ok=True)
    _compile(compiler, flags, path)
    return _open(path)


def _compile(compiler: str, flags: tuple[str, ...], path: Path) -> None:
    """Compile the library to ``path``, where it appears as a whole."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        compiled, linked = [f"{folder}/{source.stem}.o" for source in SOURCES], f"{folder}/products.so"
        commands = [[*flags, "-c", str(source), "-o", file] for source, file in zip(SOURCES, compiled, strict=True)]
        for command in (*commands, ["-shared", *compiled, "-o", linked, "-lm"]):
            subprocess.run([compiler, *command], check=True, capture_output=True, text=True, timeout=300)
        os.replace(linked, path)


def _open(path: Path) -> ctypes.CDLL:
    """Load the library after torch's OpenMP, whose threads it shares."""
    lines = Path("/proc/self/maps").read_text(errors="replace").splitlines()
    files = {line.split(maxsplit=5)[-1] for line in lines}
    loaded = sorted(file for file in files if Path(file).name.startswith(("libgomp", "libomp", "libiomp")))
    for openmp in loaded or ["libgomp.so.1"]:
        ctypes.CDLL(openmp, mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(path))
    for name, arguments in _ARGUMENTS.items():
        # many_rows_512.c is empty for AVX2.
        if hasattr(library, name):
            getattr(library, name).argtypes = arguments
    for name in ("float_product", "unpack", "finish", "gelu", "rotate_append", "gumbel"):
        getattr(library, name).restype = None
    return library


def _trial(kernel: Kernel) -> str | None:
    """Compare small products with the definitions in float64; return what differs, or None."""
    generator = torch.Generator("cpu").manual_seed(0)
    make = functools.partial(torch.randn, generator=generator, dtype=torch.float32, device="cpu")
    columns, out, rows = 512, 7, 7
    # Numbers that bfloat16 holds exactly.
    x = (make(rows, columns) + 1).bfloat16().float()
    checks: dict[str, tuple[Callable[[], torch.Tensor], torch.Tensor]] = {}
    for bits in (4, 8):
        size = out, columns * bits // 8
        w = torch.randint(-128, 128, size, dtype=torch.int8, generator=generator, device="cpu")
        for group in (512, 128, 64, 32):
            scale = make(out, columns // group).half()
            exact = reference.fused_linear_with_groupwise_quantized_weight(
                x.double(), w, scale.double(), num_bits=bits, group_size=group
            )
            for dtype in (torch.float32, torch.bfloat16):
                for product in (integer_product, many_rows_product) if group >= 64 else (many_rows_product,):
                    call = functools.partial(product, kernel, x.to(dtype), w, scale, bits, group)
                    checks[f"{product.__name__}, int{bits} in groups of {group}, {dtype}"] = (call, exact)
    for dtype in KINDS:
        w = make(out, columns + 3).to(dtype)
        wide = torch.cat((x, x[:, :3]), dim=1)
        checks[str(dtype)] = (functools.partial(float_product, kernel, wide, w), wide.double() @ w.double().T)
    return what_differs(checks)


def what_differs(checks: dict[str, tuple[Callable[[], torch.Tensor], torch.Tensor]]) -> str | None:
    """Call each function and say which does not give what stands beside it, or None."""
    for name, (call, exact) in checks.items():
        error = float((call().double() - exact).norm() / exact.norm())
        # A NaN is wrong too.
        if not error < 3e-4:
            return f"{name} differs from the definition by {error:.1e}"
    return None
