"""``from_pretrained``: the checkpoint's own dtype, no remote code, and an error instead of a half-loaded model."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from . import _status
from .backend import is_too_old
from .checkpoint_files import HUB_ARGUMENTS, DamagedFile, check_contents, only, weight_files
from .configuration_chatglm import ChatGLMConfig
from .foreign_quantization import check_converted, prepare_foreign
from .hook import checkpoint_code_blocked, is_checkpoint_code_blocked
from .model_size import check_weight_files
from .quantized_loading import load_quantized, quantizes_while_loading

# How torch, safetensors and transformers say that a file cannot be read.
_DAMAGE = (SafetensorError, UnpicklingError, EOFError, DamagedFile)
_DAMAGE_WORDS = ("PytorchStreamReader", "Unable to load weights from pytorch checkpoint file")

# transformers' name of the argument; it warns of the older one.
_DTYPE = "torch_dtype" if is_too_old(transformers.__version__, "4.56") else "dtype"

_PREFIX = "prefix_encoder."
# Arguments with which the weights come from somewhere else.
_OTHER_WEIGHTS = ("state_dict", "gguf_file", "variant", "from_tf", "from_flax")


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
        """transformers' ``from_pretrained``, in the checkpoint's dtype unless the caller names another.

        With ``quantization_bit=8`` or ``4`` (and ``quantization_group_size``, ``quantization_head_bits``) a float
        checkpoint is quantised while it is read, so that memory holds the quantised model and one weight file at most.

        Raises:
            OSError: weights that are missing, truncated or corrupt.
            ValueError: weights that do not fit config.json, or a config.json that is not one of ChatGLM-6B.
        """
        given = (kwargs.pop("dtype", None), kwargs.pop("torch_dtype", None))
        kwargs[_DTYPE] = next((dtype for dtype in given if dtype is not None), "auto")
        config = kwargs.get("config")
        if config is not None and not isinstance(config, ChatGLMConfig) and hasattr(config, "to_dict"):
            kwargs["config"] = ChatGLMConfig.from_dict(config.to_dict())
        is_foreign = prepare_foreign(pretrained_model_name_or_path, kwargs)
        _check_weight_files(pretrained_model_name_or_path, kwargs)
        with _clear_errors(pretrained_model_name_or_path):
            _check_contents(pretrained_model_name_or_path, kwargs)
        if quantizes_while_loading(pretrained_model_name_or_path, kwargs):
            with _clear_errors(pretrained_model_name_or_path):
                model = load_quantized(cls, pretrained_model_name_or_path, kwargs)
            _status.record_served("model", str(pretrained_model_name_or_path))
            return model
        wants_info = kwargs.pop("output_loading_info", False)
        # Without remote code transformers takes us for a native model and would ask the hub to convert .bin files.
        with (
            checkpoint_code_blocked(),
            _environment_default("DISABLE_SAFETENSORS_CONVERSION", "true"),
            _clear_errors(pretrained_model_name_or_path),
        ):
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
            )
        _check_complete(info, pretrained_model_name_or_path)
        if is_foreign:
            check_converted(model, pretrained_model_name_or_path)
        _begin_prefix(model, info, pretrained_model_name_or_path)
        model.tie_head()
        # transformers 5 puts new parameters in the place of those that were frozen.
        model.base_model.freeze_below_prefix()
        _status.record_served("model", str(pretrained_model_name_or_path))
        return (model, info) if wants_info else model

    def tie_head(self) -> None:
        """Share the embedding with the head where the config ties them.

        transformers 5 leaves them apart if a checkpoint holds two different tensors; stock always let the embedding
        win.
        """
        head = self.get_output_embeddings()
        if head is not None and self.config.tie_word_embeddings:
            embedding = self.get_input_embeddings()
            head.weight = embedding.weight
            if hasattr(embedding, "weight_scale"):
                head.weight_scale = embedding.weight_scale

    def load_custom_generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' loader of a generate() from a repository; a checkpoint that merely holds one never runs it."""
        if is_checkpoint_code_blocked():
            raise OSError(
                "A custom generate() in a ChatGLM-6B checkpoint is not run; pass custom_generate= to generate()."
            )
        return super().load_custom_generate(*args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, *args: Any, **kwargs: Any) -> None:
        """Nothing: registering would make ``save_pretrained`` copy this package's source into checkpoints."""


def _check_weight_files(name: Any, kwargs: dict[str, Any]) -> None:
    """Refuse a directory whose files cannot hold the model that its config.json asks for, before one is built."""
    folder = os.path.join(str(name), kwargs.get("subfolder") or "")
    if not os.path.isfile(os.path.join(folder, "config.json")):
        return
    config = kwargs.get("config")
    if not isinstance(config, ChatGLMConfig):
        config = ChatGLMConfig.from_pretrained(folder)
    check_weight_files(config, folder)


def _check_contents(name: Any, kwargs: dict[str, Any]) -> None:
    """Look into the weight files, where they are the usual ones, before anything is built from them."""
    if any(kwargs.get(argument) for argument in _OTHER_WEIGHTS):
        return
    hub = only(kwargs, HUB_ARGUMENTS)
    stored, _ = ChatGLMConfig.get_config_dict(name, **hub)
    if stored.get("quantization_config"):
        return  # another library's integers, which it reads itself
    check_contents(weight_files(name, hub, kwargs.get("use_safetensors")), name, stored.get("quantization_bit"))


@contextmanager
def _clear_errors(name: Any) -> Iterator[None]:
    """Say in one sentence that a weight file is damaged or does not fit, where that is what went wrong."""
    default_dtype = torch.get_default_dtype()
    try:
        yield
    except _DAMAGE as error:
        raise _unreadable(name, error) from error
    except AttributeError as error:
        if "'NoneType' object has no attribute 'get'" not in str(error):
            raise
        raise OSError(
            f"A safetensors file of {name} carries no format, which this version of transformers cannot read; use "
            'transformers 4.57 or newer, or save the file again with metadata={"format": "pt"}.'
        ) from error
    except (OSError, RuntimeError) as error:
        causes = (error, error.__cause__, error.__context__)
        if any(isinstance(cause, _DAMAGE) for cause in causes) or any(words in str(error) for words in _DAMAGE_WORDS):
            raise _unreadable(name, error) from error
        if "size mismatch" in str(error) or "mismatched" in str(error):
            raise ValueError(
                f"The weights of {name} have other shapes than its config.json says; take both from the same "
                f"checkpoint. ({error})"
            ) from error
        raise
    finally:
        # transformers 4 leaves the checkpoint's dtype as the process' default where loading fails half way.
        torch.set_default_dtype(default_dtype)


def _unreadable(name: Any, error: BaseException) -> OSError:
    cause: BaseException | None = error
    while cause is not None:
        # torch's reader that takes nothing but tensors names what else it met, and has not run it.
        met = re.search(r"GLOBAL ([\w.]+)", str(cause)) if isinstance(cause, UnpicklingError) else None
        if met:
            return OSError(
                f"A weight file of {name} holds a Python object besides tensors, {met[1]}, which is not run; use the "
                "checkpoint's safetensors files, or take it from a source that you trust."
            )
        cause = cause.__cause__ or cause.__context__
    # Without torch's advice to run what the file holds.
    detail = str(error).splitlines()[0].split(" In PyTorch 2.6")[0] if str(error) else type(error).__name__
    return OSError(
        f"A weight file of {name} is truncated or corrupt and cannot be read; copy or download the checkpoint again. "
        f"({detail})"
    )


def _begin_prefix(model: Any, info: dict[str, Any], name: Any) -> None:
    """Initialise a P-Tuning prefix that the checkpoint lacks: training starts like this, or its users load it from a
    file of its own. transformers 5 leaves the memory as it is."""
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


def _check_complete(info: dict[str, Any], name: Any) -> None:
    """Refuse weights that are missing, which transformers would fill with random numbers; a P-Tuning prefix may be."""
    missing = sorted(key for key in info["missing_keys"] if key != "lm_head.weight" and _PREFIX not in key)
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
