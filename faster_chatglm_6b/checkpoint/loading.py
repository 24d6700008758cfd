"""``from_pretrained``: the checkpoint's own dtype, no remote code, and an error instead of a half-loaded model."""

import inspect
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import transformers

from .. import report
from ..config_keys import check_attention, own_keys
from ..configuration_chatglm import DTYPES, ChatGLMConfig
from ..disk.json_files import each_read_once, read_json
from ..disk.replacing import saved_beside
from ..versions import is_too_old
from .checks import check_checkpoint, only_checked_files, refuse_other_files
from .errors import clear_errors
from .foreign_quantization import check_converted, prepare_foreign
from .quantized_loading import load_quantized, quantizes_while_loading
from .source import HUB_ARGUMENTS, Source, only

# transformers' name of the argument; it warns of the older one.
_DTYPE = "torch_dtype" if is_too_old(transformers.__version__, "4.56") else "dtype"

_PREFIX = "prefix_encoder."
# The Auto classes' name, among adapter_kwargs, for the directory of an adapter whose base is loaded.
_ADAPTER = "_adapter_model_path"
# Loading sets torch's default dtype, and an environment variable, for the whole process.
_lock = threading.RLock()
_block_checkpoint_code: ContextVar[bool] = ContextVar("faster_chatglm_6b_block_checkpoint_code", default=False)


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


# A child of a process in which another thread was loading would wait forever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


@contextmanager
def checkpoint_code_blocked() -> Iterator[None]:
    """Keep a checkpoint's ``custom_generate/generate.py`` from replacing ``generate`` while its model is loaded.

    transformers asks ``model.load_custom_generate`` for it at load (transformers 4 without any opt-in, for
    directories), and later if a user names a ``custom_generate`` repository. Only the first is meant here; the model
    tells them apart by ``is_checkpoint_code_blocked()``.
    """
    token = _block_checkpoint_code.set(True)
    try:
        yield
    finally:
        _block_checkpoint_code.reset(token)


def is_checkpoint_code_blocked() -> bool:
    """Return whether this thread or task is inside ``checkpoint_code_blocked()``."""
    return _block_checkpoint_code.get()


@contextmanager
def _environment_default(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ.setdefault(name, value)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)


class CheckpointMixin:
    """Overrides of ``PreTrainedModel``; stands before it among a model's bases."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Load as transformers' ``from_pretrained`` does, in the checkpoint's dtype unless the caller names another.

        With ``quantization_bit=8`` or ``4`` (and ``quantization_group_size``, ``quantization_head_bits``) a float
        checkpoint is quantised while it is read. Memory then holds the quantised model and one weight file at most.

        Raises:
            OSError: weights that are missing, truncated or corrupt.
            ValueError: weights that do not fit config.json, or a config.json that is not one of ChatGLM-6B.
        """
        given = (kwargs.pop("dtype", None), kwargs.pop("torch_dtype", None))
        kwargs[_DTYPE] = _as_dtype(next((dtype for dtype in given if dtype is not None), "auto"))
        check_attention(kwargs.get("attn_implementation"))
        config = kwargs.get("config")
        if isinstance(config, (str, os.PathLike)):
            settings = {key: kwargs.pop(key) for key in own_keys(ChatGLMConfig) if key in kwargs}
            kwargs["config"] = ChatGLMConfig.from_pretrained(config, **settings, **only(kwargs, HUB_ARGUMENTS))
        elif config is not None and not isinstance(config, ChatGLMConfig) and hasattr(config, "to_dict"):
            kwargs["config"] = ChatGLMConfig.from_dict(config.to_dict())
        # transformers 4 leaves a name there after a save, and does not read it.
        stored_dtype = getattr(kwargs.get("config"), _DTYPE, None)
        if kwargs[_DTYPE] == "auto" and isinstance(stored_dtype, str):
            kwargs[_DTYPE] = _as_dtype(stored_dtype)
        with _lock, clear_errors(pretrained_model_name_or_path), each_read_once():
            model = cls._load(pretrained_model_name_or_path, model_args, kwargs)
        report.record_served("model", str(pretrained_model_name_or_path))
        return model

    @classmethod
    def _load(cls, name: Any, model_args: tuple, kwargs: dict[str, Any]) -> Any:
        name = _base_of_adapter(name, kwargs)
        source = Source(name, kwargs)
        is_foreign = prepare_foreign(source, kwargs)
        quantizes = quantizes_while_loading(source, kwargs)
        checked = check_checkpoint(cls, source, kwargs)
        if quantizes:
            model = load_quantized(cls, source, kwargs)
            adapter = (kwargs.get("adapter_kwargs") or {}).get(_ADAPTER)
            if adapter is not None:
                model.load_adapter(str(adapter))
            return model
        wants_info = kwargs.pop("output_loading_info", False)
        # Without remote code transformers takes us for a native model and would ask the hub to convert .bin files.
        with (
            checkpoint_code_blocked(),
            only_checked_files(checked),
            _environment_default("DISABLE_SAFETENSORS_CONVERSION", "true"),
        ):
            model, info = super().from_pretrained(name, *model_args, output_loading_info=True, **kwargs)
        _check_complete(model, info, name)
        if is_foreign:
            check_converted(model, name)
        _begin_prefix(model, info, name)
        model.tie_head()
        # transformers 5 puts new parameters in the place of those that were frozen.
        model.base_model.freeze_below_prefix()
        return (model, info) if wants_info else model

    @classmethod
    def _from_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Make a model without weights as transformers does, which sets torch's default dtype too."""
        check_attention(kwargs.get("attn_implementation"))
        with _lock:
            return super()._from_config(*args, **kwargs)

    @classmethod
    def _load_pretrained_model(cls, *args: Any, **kwargs: Any) -> Any:
        """Read weights as transformers does, from the files that were checked only."""
        loader = super()._load_pretrained_model
        refuse_other_files(loader, args, kwargs)
        return loader(*args, **kwargs)

    def _load_and_finalize_distributed_pretrained_model(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse torch's distributed checkpoints, whose index is a pickle."""
        raise ValueError(
            "Distributed checkpoints (a .metadata file and *.distcp) are not loaded, as their index can hold any "
            "Python object; save the model with save_pretrained() as safetensors."
        )

    def _check_and_adjust_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> Any:
        """Refuse an attention that is a hub repository, in the last place where transformers takes its name."""
        check_attention(attn_implementation)
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Save as transformers does, and leave an earlier checkpoint there whole until the new one is.

        The new files are written into a folder of ``save_directory`` and then renamed: a full disk or Ctrl-C leaves the
        old checkpoint as it was. Shards that the new one does not have are removed.

        Raises:
            OSError, SafetensorError: the files cannot be written.
        """
        directory = os.fspath(save_directory)
        # Their places among the arguments differ by release.
        given = inspect.signature(super().save_pretrained).bind(save_directory, *args, **kwargs).arguments
        # Distributed checkpoints are written by several processes at once, into one folder.
        if os.path.isfile(directory) or given.get("distributed_checkpoint") or kwargs.get("distributed_checkpoint"):
            return super().save_pretrained(save_directory, *args, **kwargs)
        if given.get("push_to_hub"):
            kwargs.setdefault("repo_id", os.path.basename(os.path.abspath(directory)))
        with saved_beside(directory, bool(given.get("is_main_process", True))) as beside:
            return super().save_pretrained(beside, *args, **kwargs)

    def tie_head(self) -> None:
        """Share the embedding with the head if the config ties them.

        transformers 5 leaves them apart if a checkpoint holds two different tensors; in stock the embedding always
        wins.
        """
        head = self.get_output_embeddings()
        if head is not None and self.config.tie_word_embeddings:
            embedding = self.get_input_embeddings()
            head.weight = embedding.weight
            if hasattr(embedding, "weight_scale"):
                head.weight_scale = embedding.weight_scale

    def tie_weights(self, *args: Any, **kwargs: Any) -> Any:
        """Tie the head as transformers does, without a look at a head of the checkpoint that the embedding replaces.

        transformers 5 compares the two, for which both are read from the mapped file and stay in memory with it: two
        gigabytes.
        """
        missing = args[0] if args else kwargs.get("missing_keys")
        if missing is not None and self.config.tie_word_embeddings:
            tied = getattr(self, "all_tied_weights_keys", {}).items()
            missing.update(head for head, embedding in tied if embedding not in missing)
        return super().tie_weights(*args, **kwargs)

    def load_custom_generate(self, *args: Any, **kwargs: Any) -> Any:
        """Load a generate() from a repository as transformers does; one that lies in a checkpoint is never run."""
        if is_checkpoint_code_blocked():
            raise OSError(
                "A custom generate() in a ChatGLM-6B checkpoint is not run; pass custom_generate= to generate()."
            )
        return super().load_custom_generate(*args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, *args: Any, **kwargs: Any) -> None:
        """Do nothing: registering would make ``save_pretrained`` copy this package's source into checkpoints."""


def _base_of_adapter(name: Any, kwargs: dict[str, Any]) -> Any:
    """Return the checkpoint that a directory's PEFT adapter is for, and put the adapter into ``kwargs``; else ``name``.

    The Auto classes do the same. A directory that holds a model is never left for another.
    """
    path = os.path.join(name, "adapter_config.json") if isinstance(name, (str, os.PathLike)) else ""
    if not os.path.isfile(path) or os.path.isfile(os.path.join(name, "config.json")):
        return name
    settings = read_json(path)
    base = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    if not isinstance(base, str):
        raise ValueError(f"{path} names no base_model_name_or_path; load the base model, and then load_adapter().")
    kwargs["adapter_kwargs"] = {**(kwargs.get("adapter_kwargs") or {}), _ADAPTER: os.fspath(name)}
    return base


def _as_dtype(given: Any) -> Any:
    """Return the dtype of a name; "auto" and what else transformers takes stay as given.

    Raises:
        ValueError: a model cannot have this dtype.
    """
    dtype = getattr(torch, given.removeprefix("torch.")) if isinstance(given, str) and _names_dtype(given) else given
    is_other = isinstance(dtype, str) and dtype != "auto"
    if is_other or (isinstance(dtype, torch.dtype) and not dtype.is_floating_point):
        raise ValueError(
            f"dtype={given!r} was asked for, but a model has one of {', '.join(DTYPES)}; give one of them, or 'auto' "
            "for the checkpoint's own."
        )
    return dtype


def _names_dtype(text: str) -> bool:
    return text.removeprefix("torch.") in DTYPES


def _begin_prefix(model: Any, info: dict[str, Any], name: Any) -> None:
    """Initialise a P-Tuning prefix that the checkpoint lacks; transformers 5 leaves its memory as it is.

    Training starts like this, or users load the prefix later from a file of its own.
    """
    missing = sorted(key for key in info["missing_keys"] if _PREFIX in key)
    if not missing:
        return
    prefix = model.base_model.prefix_encoder
    if len(missing) < len(list(prefix.parameters())):
        raise ValueError(
            f"The weights of {name} hold a P-Tuning prefix without {missing[0]}; take it from the same training as its "
            "config.json, or copy it again."
        )
    prefix.reset_parameters()


def _check_complete(model: Any, info: dict[str, Any], name: Any) -> None:
    """Refuse missing weights, which transformers would fill with random numbers; a P-Tuning prefix may be missing.

    The tensors in files were compared before, but weights that a caller gives, and those of OneFlow, were not.
    """
    tied = {"lm_head.weight", "lm_head.weight_scale"} if model.config.tie_word_embeddings else set()
    missing = sorted(key for key in info["missing_keys"] if key not in tied and _PREFIX not in key)
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ValueError(
            f"The weights of {name} lack {shown}, which its config.json asks for; copy or download the checkpoint "
            "again."
        )
    if info.get("mismatched_keys"):
        raise ValueError(
            f"The weights of {name} have other shapes than its config.json says; take both from the same checkpoint. "
            f"({sorted(info['mismatched_keys'])[0]})"
        )
