"""All that touches transformers from outside: the classes of a ChatGLM-6B checkpoint resolve to ours.

transformers looks up every class of a checkpoint's own code with ``get_class_from_dynamic_module``, which other
modules bind by name. An import hook wraps it right after its module was executed, so that every later import binds the
wrapper. If that module is loaded already, all modules that hold the function are found by identity. Both ways end the
same, whatever was imported first. The wrapper answers for ChatGLM-6B checkpoints, which it knows by their JSON files,
and hands on all others.

AutoModel, AutoModelForCausalLM and AutoModelForSeq2SeqLM also learn our configuration *class*. The model type "chatglm"
is never registered: ChatGLM2 and ChatGLM3 share it.
"""

import importlib
import logging
import sys
import threading
from collections.abc import Callable, Mapping
from functools import wraps
from types import ModuleType
from typing import Any

from . import backend, recognition, report, versions
from .hub_modules import HubModuleFinder

logger = logging.getLogger("faster_chatglm_6b")

_TARGET = "transformers.dynamic_module_utils"
_FUNCTION = "get_class_from_dynamic_module"
_AUTO_MODELS = ("AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
# Marks, not isinstance: a wrapper or finder that an earlier import of this file left is of another class than ours.
_ORIGINAL_MARK = "__faster_chatglm_6b_original__"
_FINDER_MARK = "__faster_chatglm_6b_finder__"

_lock = threading.RLock()


class _State:
    """State of the hook.

    Attributes:
        installed: look-ups are answered.
        strict: what calls itself ChatGLM and is not served is refused.
        upstreams: hub ids that the auto_maps of served checkpoints point to.
    """

    def __init__(self) -> None:
        self.installed = False
        self.strict = False
        self.upstreams: set[str] = set()


# importlib.reload executes this file again in the same namespace: what is known stays, nothing is installed twice.
_state: _State = globals().get("_state") or _State()


def install(strict: bool = False) -> None:
    """Redirect the classes of ChatGLM-6B checkpoints to ours from now on. Installing twice is installing once.

    Args:
        strict: refuse what calls itself ChatGLM and is not served, instead of leaving it to its own code.
    """
    with _lock:
        _state.installed, _state.strict = True, strict
        _remove_finders()
        sys.meta_path.insert(0, _Finder())
        sys.meta_path.append(_HubModules())
    _wait_for_import_in_progress()
    with _lock:
        if _state.installed and hasattr(sys.modules.get(_TARGET), _FUNCTION):
            _patch(sys.modules[_TARGET])
    if _our_module("modeling_chatglm") in sys.modules:
        _register_models()


def uninstall() -> None:
    """Restore transformers as it was: the function wherever it is held, the import path, the model mappings."""
    with _lock:
        _state.installed = False
        _remove_finders()
        for module in _holders():
            held = vars(module)[_FUNCTION]
            vars(module)[_FUNCTION] = getattr(held, _ORIGINAL_MARK, held)
        _unregister_models()


def is_installed() -> bool:
    """Return whether the classes of ChatGLM-6B checkpoints resolve to ours."""
    return _state.installed


def is_strict() -> bool:
    """Return whether what calls itself ChatGLM and is not served is refused, while ``is_installed()``."""
    return _state.strict


def patched_names() -> tuple[str, ...]:
    """List what is changed in transformers now, one readable line each."""
    with _lock:
        if not _state.installed:
            return ()
        held = sorted(
            f"{module.__name__}.{_FUNCTION}"
            for module in _holders()
            if hasattr(vars(module)[_FUNCTION], _ORIGINAL_MARK)
        )
        registered = sorted(f"{auto_class} knows {config.__name__}" for auto_class, _, config in _registered_models())
        return tuple(held + registered) or (f"nothing yet, an import hook waits for {_TARGET}",)


class _Finder:
    """Meta-path finder that has ``transformers.dynamic_module_utils`` patched right after it was executed."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> Any:
        if fullname != _TARGET:
            return None
        for finder in list(sys.meta_path):
            if hasattr(finder, _FINDER_MARK) or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _PatchingLoader(spec.loader)
                return spec
        return None


setattr(_Finder, _FINDER_MARK, True)


class _PatchingLoader:
    """The module's own loader, plus the patch. It leaves no trace: inspect and pickle see the module's own."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: Any) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        with _lock:
            if _state.installed and hasattr(module, _FUNCTION):
                _patch(module)


class _HubModules(HubModuleFinder):
    """The finder, marked as ours."""


setattr(_HubModules, _FINDER_MARK, True)


def _remove_finders() -> None:
    for finder in sys.meta_path:
        if hasattr(finder, _FINDER_MARK) and hasattr(finder, "forget"):
            finder.forget()
    sys.meta_path[:] = [finder for finder in sys.meta_path if not hasattr(finder, _FINDER_MARK)]


def _wait_for_import_in_progress() -> None:
    """Wait for another thread that is executing the module right now, without our import hook.

    This happens outside the lock: that thread may be about to take it.
    """
    spec = getattr(sys.modules.get(_TARGET), "__spec__", None)
    if getattr(spec, "_initializing", False):
        importlib.import_module(_TARGET)


def _holders() -> list[ModuleType]:
    """List the loaded modules that bind the function by name, wrapped or not."""
    target = sys.modules.get(_TARGET)
    if target is None:
        return []
    # vars, never getattr: asking a lazy module for a name imports things.
    current = vars(target).get(_FUNCTION)
    original = getattr(current, _ORIGINAL_MARK, current)
    holders = []
    for module in list(sys.modules.values()):
        held = getattr(module, "__dict__", {}).get(_FUNCTION) if isinstance(module, ModuleType) else None
        if held is not None and getattr(held, _ORIGINAL_MARK, held) is original:
            holders.append(module)
    return holders


def _patch(target: ModuleType) -> None:
    """Bind one new wrapper in every module that holds the function or an older wrapper of it."""
    current = vars(target)[_FUNCTION]
    wrapper = _wrap(getattr(current, _ORIGINAL_MARK, current))
    for module in _holders():
        vars(module)[_FUNCTION] = wrapper


def _wrap(original: Callable[..., type]) -> Callable[..., type]:
    from inspect import signature  # transformers has loaded it by now; at our import, it would take time

    parameters = signature(original)

    @wraps(original)
    def get_class_from_dynamic_module(*args: Any, **kwargs: Any) -> type:
        if _state.installed:
            try:
                arguments = parameters.bind(*args, **kwargs).arguments
            except TypeError:
                return original(*args, **kwargs)  # which raises it, in its own words
            local_class = _local_class({**arguments, **arguments.get("kwargs", {})})
            if local_class is not None:
                return local_class
        return original(*args, **kwargs)

    setattr(get_class_from_dynamic_module, _ORIGINAL_MARK, original)
    return get_class_from_dynamic_module


def _local_class(arguments: Mapping[str, Any]) -> type | None:
    """Return our class for one look-up of transformers, or None if the checkpoint is not ChatGLM-6B.

    Raises:
        ImportError: it is ChatGLM-6B, and the installed transformers or torch is too old for us.
        ValueError: it is ChatGLM-6B, and we do not have the class; or it only calls itself so, and that is refused.
    """
    # transformers <= 4.27 gives the class name alone, later ones "module.Name" or "owner/repository--module.Name"
    reference = arguments.get("class_reference") or arguments.get("class_name")
    checkpoint = arguments.get("pretrained_model_name_or_path")
    if not isinstance(reference, str) or checkpoint is None:
        return None
    checkpoint, name = str(checkpoint), recognition.class_name(reference)
    if name not in recognition.LOCAL_CLASSES:
        _refuse_foreign_class(checkpoint, name, arguments)
        return None
    if not _is_ours(checkpoint, arguments):
        return None

    backend.require_transformers()
    if name != "ChatGLMTokenizer":
        # Without any torch, the configuration still loads, as it does in transformers.
        if name != "ChatGLMConfig" or versions.installed_version("torch") is not None:
            backend.require_torch()
            _register_models()
    local_class = getattr(importlib.import_module(_our_module(recognition.LOCAL_CLASSES[name])), name)
    if "--" in reference:
        _state.upstreams.add(reference.split("--")[0])
    kind = {"ChatGLMConfig": "config", "ChatGLMTokenizer": "tokenizer"}.get(name)
    if kind is not None:  # models are noted by their from_pretrained: transformers 5 does not ask here for them
        report.record_served(kind, checkpoint)
    logger.info("%s: %s is ours, the checkpoint's own code is not run", checkpoint, name)
    return local_class


def _is_ours(checkpoint: str, arguments: Mapping[str, Any]) -> bool:
    verdict = recognition.judge_checkpoint(checkpoint, arguments)
    if verdict is None:
        # AutoModel.from_config asks with the repository that auto_map names, whose config.json need not be reachable.
        if checkpoint in _state.upstreams:
            return True
        verdict = recognition.UNREADABLE
    _leave_to_its_own_code(checkpoint, verdict)
    return verdict.is_served


def _leave_to_its_own_code(checkpoint: str, verdict: recognition.Verdict) -> None:
    """Log that a checkpoint is not served, as a warning if it looks like ChatGLM-6B.

    Raises:
        ValueError: it calls itself ChatGLM, and such checkpoints are refused.
    """
    if verdict.is_served or not (verdict.reason or verdict.is_named):
        return
    if _state.strict and verdict.is_named:
        raise ValueError(
            f"{checkpoint} calls itself ChatGLM and is not taken for ChatGLM-6B ({verdict.reason}), and its own code "
            "is refused by FASTER_CHATGLM_6B_STRICT=1 or enable(strict=True); correct the file if it is ChatGLM-6B, or "
            "load it inside `with faster_chatglm_6b.disabled():` if you trust its code."
        )
    if not report.record_passed_through(checkpoint, verdict.reason):
        return
    if verdict.looks_like_ours:
        logger.warning(
            "%s: looks like ChatGLM-6B and is not served, its own code runs: %s. Correct the file if it is ChatGLM-6B; "
            "FASTER_CHATGLM_6B_STRICT=1 refuses such checkpoints.", checkpoint, verdict.reason,
        )  # fmt: skip
    else:
        logger.info("%s: left to the checkpoint's own code, %s", checkpoint, verdict.reason)


def _refuse_foreign_class(checkpoint: str, name: str, arguments: Mapping[str, Any]) -> None:
    """Raise ValueError if ``checkpoint`` is ChatGLM-6B: its code is not run, and we have no class of that ``name``."""
    try:
        # No network: most of these look-ups are for models that are no business of ours.
        verdict = recognition.judge_checkpoint(checkpoint, {**arguments, "local_files_only": True})
    except Exception:
        logger.debug("%s: its JSON files could not be judged", checkpoint, exc_info=True)
        verdict = None
    if verdict is None:
        if "chatglm" not in name.lower():
            return
        verdict = recognition.UNREADABLE
    _leave_to_its_own_code(checkpoint, verdict)
    if verdict.is_served:
        raise ValueError(
            f"{checkpoint} is a ChatGLM-6B checkpoint, whose own code is not run, and its class {name} is not one of "
            f"{', '.join(recognition.LOCAL_CLASSES)}; "
            "load it inside `with faster_chatglm_6b.disabled():` to run its own code."
        )


def _our_module(name: str) -> str:
    return f"{__package__}.{name}"


def _register_models() -> None:
    """Teach the Auto classes our configuration class: ChatGLM-6B's auto_map has no entry for AutoModelForCausalLM."""
    modeling_auto = importlib.import_module("transformers.models.auto.modeling_auto")
    config_class = importlib.import_module(_our_module("configuration_chatglm")).ChatGLMConfig
    model_class = importlib.import_module(_our_module("modeling_chatglm")).ChatGLMForConditionalGeneration
    with _lock:
        if _state.installed:
            for auto_class in _AUTO_MODELS:
                getattr(modeling_auto, auto_class)._model_mapping._extra_content[config_class] = model_class


def _unregister_models() -> None:
    for _, mapping, config_class in _registered_models():
        del mapping._extra_content[config_class]


def _registered_models() -> list[tuple[str, Any, type]]:
    """List (Auto class, its mapping, configuration class) of every entry that leads to our model.

    transformers 4 adds its own entries when a model is loaded with a configuration object of remote code.
    """
    modeling_auto = sys.modules.get("transformers.models.auto.modeling_auto")
    found = []
    for name, auto_class in vars(modeling_auto).items() if modeling_auto else ():
        mapping = vars(auto_class).get("_model_mapping") if isinstance(auto_class, type) else None
        for config_class, model_class in list(getattr(mapping, "_extra_content", {}).items()):
            if getattr(model_class, "__module__", "").startswith(f"{__package__}."):
                found.append((name, mapping, config_class))
    return found
