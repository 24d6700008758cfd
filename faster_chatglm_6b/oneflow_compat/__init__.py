"""Make ``import torch`` mean OneFlow, with OneFlow's own mock of torch and what that lacks.

PyPI's OneFlow 0.9.0 has an early mock; builds of 2023 and 1.0 have a fuller one. Each piece here is applied only if the
installed OneFlow lacks it:

- ``libraries`` loads the CUDA libraries that pip installed.
- ``mock`` mends the mock's import machinery.
- ``distribution`` answers for torch's metadata.
- ``polyfills`` adds missing functions.
- ``torch_files`` and ``safetensors_files`` read and write checkpoints without torch.
"""

import os
import sys
from collections.abc import Callable
from types import ModuleType

# OneFlow's C++ and its nn.Linear and nn.Embedding read these: fused linear layers, and no random initialisation of
# weights that a checkpoint overwrites. The last one keeps warnings about a missing CUDA driver off the terminal.
ENVIRONMENT = {
    "ONEFLOW_KERNEL_ENABLE_FUSED_LINEAR": "1",
    "ONEFLOW_LINEAR_EMBEDDING_SKIP_INIT": "1",
    "GLOG_minloglevel": "2",
}

# Only builds since April 2023 have these, and they make OneFlow worth choosing.
FUSED_OPERATORS = (
    "fused_apply_rotary_emb",
    "fused_attention_concat_past_key_value",
    "fused_multi_head_attention_inference_v2",
    "fused_linear_with_groupwise_quantized_weight",
    "skip_layer_norm",
)
# Major compute capabilities of OneFlow's attention. Never call it on another GPU: it ends the process with a fatal log
# message.
ATTENTION_CAPABILITIES = (7, 8)

_undo: list[Callable[[], None]] = []


def prepare_oneflow() -> ModuleType:
    """Import OneFlow after setting its environment variables (the user's own values stay) and loading its libraries.

    Raises:
        ImportError: OneFlow is not installed or cannot be loaded.
    """
    if "oneflow" not in sys.modules:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from .libraries import preload_cuda_libraries

        preload_cuda_libraries()
    import oneflow

    return oneflow


def enable() -> None:
    """Make ``import torch`` mean OneFlow from now on. Enabling twice is enabling once.

    Raises:
        ImportError: OneFlow cannot be loaded.
    """
    if _undo:
        return
    oneflow = prepare_oneflow()
    from . import distribution, mock, polyfills, safetensors_files, torch_files

    polyfills.apply(oneflow)
    _undo.append(distribution.answer_for_torch())
    _undo.append(mock.enable(oneflow))
    _undo.append(torch_files.install(oneflow))
    _undo.append(safetensors_files.install())


def disable() -> None:
    """Make ``import torch`` mean PyTorch again, if it is installed. Models that were loaded keep working."""
    while _undo:
        _undo.pop()()


def is_enabled() -> bool:
    """Tell whether ``import torch`` means OneFlow because of ``enable``."""
    return bool(_undo)


def why_not_fused() -> str | None:
    """Load OneFlow and say why its fused operators cannot run on this machine; None if they can."""
    try:
        oneflow = prepare_oneflow()
    except Exception as error:
        return f"OneFlow cannot be loaded ({error})"
    if not oneflow.cuda.is_available():
        return "OneFlow finds no GPU"
    missing = [name for name in FUSED_OPERATORS if not hasattr(oneflow._C, name)]
    if missing:
        return f"OneFlow {oneflow.__version__} lacks {missing[0]}"
    major, minor = oneflow.cuda.get_device_capability()
    if major not in ATTENTION_CAPABILITIES:
        return f"OneFlow's attention does not run on compute capability {major}.{minor}"
    return None


def is_oneflow(module: ModuleType | None) -> bool:
    """Tell whether a module that is known as "torch" is really OneFlow."""
    return getattr(module, "__name__", "").split(".")[0] == "oneflow"
