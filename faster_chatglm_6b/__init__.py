"""One line above unchanged Hugging Face code: ChatGLM-6B loads on today's transformers and runs no code from the hub.

    import faster_chatglm_6b
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("THUDM/chatglm-6b", trust_remote_code=True)
    model = AutoModel.from_pretrained("THUDM/chatglm-6b", trust_remote_code=True)

The import, which may stand before or after the others, does this and no more:

1. ``backend.py`` chooses the framework that will run the model (``FASTER_CHATGLM_6B_BACKEND=auto|torch|oneflow``).
   If that is OneFlow, ``oneflow_compat`` lets ``import torch`` mean OneFlow, and the import must stand first;
2. ``hook.py`` has transformers resolve the classes of a ChatGLM-6B checkpoint to those of this package. ChatGLM2,
   ChatGLM3 and GLM-4 checkpoints, and all other models, are not touched. A checkpoint that looks like ChatGLM-6B and is
   not recognised is left to its own code with a warning; ``FASTER_CHATGLM_6B_STRICT=1`` or ``enable(strict=True)``
   refuses all that call themselves ChatGLM and are not ChatGLM-6B.

It loads neither torch nor transformers, and OneFlow only if that may run the model. ``disable()`` undoes it,
``status()`` tells what it did, and with ``FASTER_CHATGLM_6B_DISABLE=1`` nothing is ever installed.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from . import backend, hook, report

__version__ = "0.1.0"
# The commit of THUDM/chatglm-6b whose behaviour is matched. Public programs name it as their snapshot of that
# repository. The reference vectors were made from the repository's state of September 2023; that this commit is
# that state could not be checked without the hub.
revision = "8b7d33596d18c5e83e2da052d05ca4db02e60620"

__all__ = ["__version__", "disable", "disabled", "enable", "revision", "status"]

_DISABLE_VARIABLE = "FASTER_CHATGLM_6B_DISABLE"
_STRICT_VARIABLE = "FASTER_CHATGLM_6B_STRICT"


def enable(strict: bool | None = None) -> None:
    """Serve ChatGLM-6B checkpoints from now on; the import does it. Do nothing with ``FASTER_CHATGLM_6B_DISABLE=1``.

    Args:
        strict: refuse, with a ValueError, a checkpoint that calls itself ChatGLM (by its model_type or the names of its
            classes) and is not recognised as ChatGLM-6B. Otherwise it is left to its own code, which
            ``trust_remote_code=True`` would run. None: as it was, at first as ``FASTER_CHATGLM_6B_STRICT`` says.
    """
    if not _is_switched_off_by_environment():
        backend.activate()
        hook.install(hook.is_strict() if strict is None else bool(strict))


def disable() -> None:
    """Restore transformers, and torch if OneFlow stands in for it. Models that are loaded stay as they are."""
    hook.uninstall()
    backend.deactivate()


@contextmanager
def disabled() -> Iterator[None]:
    """Run the body of ``with disabled():`` with transformers as it was, in all threads, and enable again afterwards."""
    was_enabled = hook.is_installed()
    disable()
    try:
        yield
    finally:
        if was_enabled:
            enable()


def status() -> report.Status:
    """Tell what was chosen, patched and served so far, and why; printing the result gives a readable report."""
    state = report.report(
        __version__, revision, hook.is_installed(), _switch(), backend.current(), hook.patched_names()
    )
    return state._replace(strict=hook.is_installed() and hook.is_strict())


def _is_switched_off_by_environment() -> bool:
    return _is_set(_DISABLE_VARIABLE)


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").strip().lower() not in ("", "0", "false", "no", "off")


def _switch() -> str:
    if hook.is_installed():
        return "enabled, strict: other checkpoints named ChatGLM are refused" if hook.is_strict() else "enabled"
    if _is_switched_off_by_environment():
        return f"off, {_DISABLE_VARIABLE}={os.environ[_DISABLE_VARIABLE]} is set"
    return "off, disable() was called"


backend.use(backend.choose_backend())
enable(strict=_is_set(_STRICT_VARIABLE) or hook.is_strict())
