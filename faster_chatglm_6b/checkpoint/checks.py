"""Look into a checkpoint's files before its weights are loaded, and see that no other files are read."""

import copy
import inspect
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from ..config_keys import own_keys
from ..configuration_chatglm import QUANTIZATION_SETTINGS, ChatGLMConfig, parameter_count
from ..disk.json_files import read_json
from .agreement import check_agreement
from .files import contents, has_meta_device
from .source import Source

# Arguments by which the weights come from somewhere else, or under other names.
_OTHER_WEIGHTS = ("state_dict", "gguf_file", "from_tf", "from_flax", "key_mapping")
# Smaller models are loaded, and their missing tensors named, whatever their files hold.
_WORTH_A_LOOK = 2**30

# Real paths of the files that this thread or task may load a model's weights from, until it has; empty: from any.
_checked: ContextVar[list[frozenset[str]]] = ContextVar("faster_chatglm_6b_checked_files")


def check_checkpoint(model_class: Any, source: Source, kwargs: dict[str, Any]) -> frozenset[str] | None:
    """Refuse a checkpoint whose files cannot be read, or do not hold the model that its config.json asks for.

    Of the weights, only the scales of quantised layers are read; no memory is taken for the model.

    Args:
        model_class: that is loaded.
        source: the files.
        kwargs: of ``from_pretrained``.

    Returns:
        the real paths of the files that were checked, for ``only_checked_files``; None if the weights come from
        elsewhere.

    Raises:
        OSError, DamagedFile, SafetensorError: a file that is missing, cut or not as its format asks.
        ValueError: files that contradict each other.
    """
    _check_generation_config(source)
    if any(kwargs.get(argument) for argument in _OTHER_WEIGHTS):
        return None
    config, stored = _configurations(model_class, source, kwargs)
    files = source.weights
    _check_bytes(config, files, source.name)
    # Without such a device, its framework maps no files into memory either: they would be read twice.
    if files and has_meta_device():
        held = contents(files, source.name)
        check_agreement(model_class, config, stored, held, source.name, bool(kwargs.get("ignore_mismatched_sizes")))
    return frozenset(map(os.path.realpath, files))


@contextmanager
def only_checked_files(paths: frozenset[str] | None) -> Iterator[None]:
    """Tell ``refuse_other_files``, around transformers' loader, which files were checked."""
    token = _checked.set([] if paths is None else [paths])
    try:
        yield
    finally:
        _checked.reset(token)


def refuse_other_files(loader: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Refuse a call of transformers' loader for files that were not checked.

    An adapter's weights, which transformers 5 loads with the same function, come after the model's.

    Args:
        loader: ``_load_pretrained_model``, whose arguments have had two names.
        args, kwargs: of the call.

    Raises:
        ValueError: one of the files was not checked.
    """
    if not _checked.get([]):
        return
    checked = _checked.get().pop()
    arguments = inspect.signature(loader).bind(*args, **kwargs).arguments
    files = arguments.get("checkpoint_files") or arguments.get("resolved_archive_file") or ()
    files = [files] if isinstance(files, str) else files
    other = sorted(str(file) for file in files if os.path.realpath(file) not in checked)
    if other:
        raise ValueError(
            f"transformers would load {other[0]}, which is none of the checkpoint's usual weight files "
            f"({', '.join(sorted(map(os.path.basename, checked))) or 'there are none'}) and was not checked; remove "
            "what names it, or give the directory that holds it."
        )


def _configurations(model_class: Any, source: Source, kwargs: dict[str, Any]) -> tuple[ChatGLMConfig, dict[str, Any]]:
    """Return the configuration of what is in the files, and the settings of config.json."""
    config = kwargs.get("config")
    given = isinstance(config, ChatGLMConfig)
    try:
        stored = source.stored
    except OSError:
        if not given:
            raise
        stored = config.to_dict()
    if given:
        config = copy.deepcopy(config)
    else:
        keys = own_keys(ChatGLMConfig)
        if not stored.get("quantization_bit"):
            keys = keys - set(QUANTIZATION_SETTINGS)
        settings = {key: kwargs[key] for key in (*keys, *ChatGLMConfig.attribute_map) if key in kwargs}
        config = source.configuration(model_class.config_class, **settings)
    if not stored.get("quantization_bit"):
        # Quantised while it is read: the files hold floats.
        config.quantization_bit, config.quantization_group_size, config.quantization_head_bits = 0, None, None
    if kwargs.get("quantization_config"):
        config.quantization_config = kwargs["quantization_config"]
    return config, stored


def _check_bytes(config: ChatGLMConfig, paths: Iterable[str], name: Any) -> None:
    """Refuse a large model that the weight files cannot hold, whatever is in them.

    A parameter takes a byte at least, half a one in 4 bits.
    """
    held = sum(map(os.path.getsize, paths))
    asked = parameter_count(config) // (2 if config.quantization_bit == 4 else 1)
    if held and asked > max(held, _WORTH_A_LOOK):
        raise ValueError(
            f"config.json of {name} asks for {parameter_count(config) / 1e9:.1f} billion parameters, but the weight "
            f"files beside it hold {held / 1e9:.3f} GB only; take both from the same checkpoint, or copy or download "
            "it again."
        )


def _check_generation_config(source: Source) -> None:
    """Refuse a generation_config.json that transformers would skip, and then generate otherwise than it says."""
    try:
        path = source.other_file("generation_config.json")
    except OSError:
        return  # no such repository, or no network: the other files say so
    if path is not None and not isinstance(read_json(path), dict):
        raise ValueError(f"{path} is no JSON object with settings; take it from the checkpoint again, or remove it.")
