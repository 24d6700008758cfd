"""Compile kernels for a GPU that is absent, exactly as the launching functions would."""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction, KernelParam

from faster_chatglm_6b.ops.triton import configs

SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
# Most programs along each axis of a grid.
GRID = (2**31 - 1, 65535, 65535)
_TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Launch:
    """One kernel with everything that decides its machine code."""

    kernel: JITFunction
    signature: tuple[tuple[str, str | tuple], ...]
    constants: tuple[tuple[tuple[int, ...], object], ...]
    aligned: tuple[tuple[int, ...], ...]
    options: tuple[tuple[str, object], ...]

    def named_constants(self) -> dict[str, object]:
        """Return the constants by the kernel's names for them."""
        return {self.kernel.arg_names[path[0]]: value for path, value in self.constants if len(path) == 1}

    def __str__(self) -> str:
        return f"{self.kernel.__name__} {dict(self.signature)} {self.named_constants()} {dict(self.options)}"


@dataclass(frozen=True)
class Resources:
    """The resources of a kernel: bytes of shared memory, registers per thread, bytes of stack, which holds spills."""

    shared: int
    registers: int
    stack: int


def _describe(kernel: JITFunction, arguments: tuple, keywords: dict) -> Launch:
    names = kernel.arg_names
    given = dict(zip(names, arguments, strict=False))
    options = {}
    for key, value in keywords.items():
        (given if key in names else options)[key] = value
    constants, aligned = [], []

    def kind(value: object, path: tuple[int, ...], parameter: KernelParam) -> str | tuple:
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and isinstance(value, int) and value == 1):
            constants.append((path, value))
            return "constexpr"
        if isinstance(value, TensorDescriptor):
            element = _TYPES[value.base.dtype][1:]
            return f"tensordesc<{element}[{', '.join(map(str, value.block_shape))}],{value.layout!r}>"
        if isinstance(value, torch.Tensor):
            aligned.append(path)
            return _TYPES[value.dtype]
        if isinstance(value, tuple):
            return type(value)(*(kind(part, (*path, i), parameter) for i, part in enumerate(value)))
        if isinstance(value, float):
            return "fp32"
        if specialised and value % 16 == 0:
            aligned.append(path)
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    signature = tuple((p.name, kind(given[p.name], (index,), p)) for index, p in enumerate(kernel.params))
    return Launch(kernel, signature, tuple(constants), tuple(aligned), tuple(sorted(options.items())))


@contextmanager
def recorded(capability: int) -> Iterator[list[Launch]]:
    """Record kernels inside instead of launching them, as on a GPU of ``capability`` (such as 90).

    A grid that CUDA would refuse raises ``AssertionError``.
    """
    launches: list[Launch] = []

    def run(self: JITFunction, *arguments: object, grid: tuple[int, ...], warmup: bool, **keywords: object) -> None:
        assert all(size <= limit for size, limit in zip(grid, GRID, strict=False)), f"{self.__name__} {grid}"
        launches.append(_describe(self, arguments, keywords))

    original = JITFunction.run, configs.capability
    JITFunction.run = run
    configs.capability = lambda device: divmod(capability, 10)
    try:
        yield launches
    finally:
        JITFunction.run, configs.capability = original


def record(capability: int, call: Callable[[], object]) -> list[Launch]:
    """Return the launches that ``call`` makes on a GPU of ``capability``."""
    with recorded(capability) as launches:
        call()
    return launches


def compiled(launch: Launch, capability: int) -> CompiledKernel:
    """Compile the launch's kernel for ``capability``, with the code of every stage."""
    source = (GluonASTSource if launch.kernel.is_gluon() else ASTSource)(
        fn=launch.kernel,
        signature=dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={path: [["tt.divisibility", 16]] for path in launch.aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))


def _dump(kernel: CompiledKernel, what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([_CUOBJDUMP, what, file.name], capture_output=True, text=True, check=True).stdout


def machine_code(kernel: CompiledKernel) -> str:
    """Return the kernel's instructions."""
    return _dump(kernel, "--dump-sass")


def compile_launch(launch: Launch, capability: int) -> Resources:
    """Return the resources that the launch's machine code for ``capability`` takes."""
    kernel = compiled(launch, capability)
    usage = _dump(kernel, "--dump-resource-usage")
    registers, stack, static = map(int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage).groups())
    return Resources(kernel.metadata.shared + static, registers, stack)


def place_of_wait(text: str) -> int:
    """Find the wait for the previous kernel in a kernel's code; Triton 3.9 has its own word for it in its IR."""
    return re.search(r"griddepcontrol\.wait|tt\.grid_dependency_wait", text).start()


def check_start_of_the_next(launch: Launch, holds_back: bool) -> None:
    """Check that the kernel starts the next one after its own wait if ``holds_back``, otherwise before it."""
    ptx = compiled(launch, 90).asm["ptx"]
    wait, start = (ptx.index(f"griddepcontrol.{word}") for word in ("wait", "launch_dependents"))
    assert (start > wait) == holds_back, ptx
