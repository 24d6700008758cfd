"""Checks of kernels in Triton's interpreter, on a CPU.

The interpreter is chosen by an environment variable when the kernels are imported, so the checks run in one process of
their own, for which the test file is started as a program.

A case is (check, dtype or None, arguments): the function ``check_<check>`` is called with a device, the dtype and the
arguments. Texts among them may name a dtype or spell a configuration, such as "Gemv(2, 64, 1)".
"""

import json
import os
import subprocess
import sys
import time
import traceback
from types import ModuleType
from typing import Any

import torch

Case = tuple[str, str | None, list]
HALF, SINGLE = "float16", "float32"


def name_of(case: Case) -> str:
    return "-".join(str(part) for part in case)


def run_in_a_process(file: str) -> dict[str, str | None]:
    """Run the test ``file``, which must call ``run_and_print``, and map each case's name to None or the traceback."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, file], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def run_and_print(cases: list[Case], *modules: ModuleType) -> None:
    """Run every case and print the results; ``modules`` hold the checks and the kinds of configurations."""
    results = {}
    for case in cases:
        check, dtype, arguments = case
        torch.manual_seed(0)
        start = time.perf_counter()
        function = _find(f"check_{check}", modules)
        values = [_value(argument, modules) for argument in ([] if dtype is None else [dtype]) + arguments]
        try:
            function("cpu", *values)
            results[name_of(case)] = None
        except Exception:
            results[name_of(case)] = traceback.format_exc()
        print(f"{time.perf_counter() - start:6.2f} s  {name_of(case)}", file=sys.stderr)
    print(json.dumps(results))


def _find(name: str, modules: tuple[ModuleType, ...]) -> Any:
    return next(getattr(module, name) for module in modules if hasattr(module, name))


def _value(argument: Any, modules: tuple[ModuleType, ...]) -> Any:
    if argument in (HALF, SINGLE, "bfloat16"):
        return getattr(torch, argument)
    if isinstance(argument, str) and "(" in argument:
        kind, numbers = argument.rstrip(")").split("(")
        return _find(kind, modules)(*json.loads(f"[{numbers}]"))
    return argument
