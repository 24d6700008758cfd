"""Tell a ChatGLM-6B checkpoint from its JSON files alone, before any of its code could run.

ChatGLM2, ChatGLM3, GLM-4 and VisualGLM share model_type "chatglm" and the class names with the checkpoints that we
serve, so neither of these can decide.
"""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from .disk.json_files import MOST_BYTES, check_readable

HUB_ID = "THUDM/chatglm-6b"
# Class name in the checkpoint's auto_map -> module and class of ours.
LOCAL_CLASSES = {
    "ChatGLMConfig": "configuration_chatglm",
    "ChatGLMTokenizer": "tokenization_chatglm",
    "ChatGLMModel": "modeling_chatglm",
    "ChatGLMForConditionalGeneration": "modeling_chatglm",
}
# No later GLM names its sizes so. One is enough: if others are missing, ChatGLMConfig says so, not remote code.
_CHATGLM_6B_KEYS = {"inner_hidden_size", "max_sequence_length", "position_encoding_2d"}
_NEWER_GLM_KEYS = {
    "multi_query_attention",
    "padded_vocab_size",
    "ffn_hidden_size",
    "rmsnorm",
    "seq_length",
    "kv_channels",
}
_VISUALGLM_KEYS = {"eva_config", "qformer_config", "vision_config", "image_size", "image_length"}
# Until April 2023 the first 20000 ids stood for images.
_VOCABULARIES = (150528, 130528)
_OUR_AUTO_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoTokenizer")


class Verdict(NamedTuple):
    """What was found about a checkpoint.

    Attributes:
        is_served: it is ours.
        reason: why a related one is not; empty for unrelated models.
        is_named: it calls itself ChatGLM and is not served.
        looks_like_ours: it also has something that ChatGLM-6B has and no later GLM.
    """

    is_served: bool
    reason: str
    is_named: bool = False
    looks_like_ours: bool = False


SERVED = Verdict(True, "")
UNRELATED = Verdict(False, "")
# A class of ChatGLM is asked for, and the checkpoint tells nothing about itself.
UNREADABLE = Verdict(False, "neither its config.json nor its tokenizer_config.json can be read", True, True)


def judge_config(config: Mapping[str, Any]) -> Verdict:
    """Judge the parsed config.json of a checkpoint. int8 and int4 checkpoints (``quantization_bit``) are served."""
    keys = set(config)
    if config.get("model_type", "chatglm") != "chatglm":
        return UNRELATED
    if keys & _NEWER_GLM_KEYS:
        return Verdict(False, f"config.json has {_listed(keys & _NEWER_GLM_KEYS)}, as ChatGLM2, ChatGLM3 and GLM-4 do")
    if keys & _VISUALGLM_KEYS:
        return Verdict(False, f"config.json has {_listed(keys & _VISUALGLM_KEYS)}, as VisualGLM does")
    vocabulary = config.get("vocab_size")
    if not keys & _CHATGLM_6B_KEYS and not (type(vocabulary) is int and vocabulary in _VOCABULARIES):
        if "model_type" not in config:
            return UNRELATED
        return Verdict(False, f"config.json has none of {_listed(_CHATGLM_6B_KEYS)}, which ChatGLM-6B has")
    foreign = _foreign_classes(config.get("auto_map"))
    if foreign:
        return Verdict(False, f"its auto_map asks for {_listed(foreign)}, which is no class of ChatGLM-6B")
    return SERVED


def judge_tokenizer_config(config: Mapping[str, Any]) -> Verdict:
    """Judge the parsed tokenizer_config.json of a directory that holds a tokenizer and no model."""
    if config.get("tokenizer_class") != "ChatGLMTokenizer":
        return UNRELATED
    # ChatGLM2 and later name none of these. The first checkpoints have eop_token, later ones end_token.
    if "num_image_tokens" in config or ("gmask_token" in config and {"end_token", "eop_token"} & set(config)):
        return SERVED
    return Verdict(False, "tokenizer_config.json has no num_image_tokens, as ChatGLM2, ChatGLM3 and GLM-4 have none")


def judge_checkpoint(name: str, hub_options: Mapping[str, Any]) -> Verdict | None:
    """Judge a directory, a config file or a hub id as transformers would read it.

    Args:
        name: ``pretrained_model_name_or_path``.
        hub_options: the caller's other arguments; only those that say where to find the files are used.

    Returns:
        the verdict, or None if neither config.json nor tokenizer_config.json can be read there.

    Raises:
        OSError: one of them is there and is far too large or too deep for a checkpoint.
    """
    for file in ("config.json", "tokenizer_config.json"):
        path = os.path.join(name, str(hub_options.get("subfolder") or ""), file)
        if os.path.isfile(path):
            check_readable(path, MOST_BYTES)
    from transformers.configuration_utils import PretrainedConfig

    options = {key: hub_options[key] for key in _HUB_OPTIONS if hub_options.get(key) is not None}
    try:
        config, _ = PretrainedConfig.get_config_dict(name, **options)
    except (OSError, ValueError):
        config = {}
    except RecursionError as error:
        raise OSError(f"config.json of {name} is nested too deeply to be read; copy or download it again.") from error
    verdict = _with_claims(judge_config(config), config)
    if verdict != UNRELATED or "model_type" in config:
        return verdict
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    try:
        tokenizer_config = get_tokenizer_config(name, **options)
    except (OSError, ValueError):
        tokenizer_config = {}
    if not config and not tokenizer_config:
        return None
    return _with_claims(judge_tokenizer_config(tokenizer_config), tokenizer_config)


def _with_claims(verdict: Verdict, config: Mapping[str, Any]) -> Verdict:
    """Add to a verdict what a config.json or tokenizer_config.json that is not served says about itself."""
    if verdict.is_served or not any(_NAME in text.lower() for text in _texts(_names(config))):
        return verdict
    keys = set(config)
    looks_like_ours = bool(keys & _OUR_KEYS) or config.get("vocab_size") in _VOCABULARIES
    reason = verdict.reason or f"its model_type is {config.get('model_type')!r}, where ChatGLM-6B has 'chatglm'"
    return Verdict(False, reason, True, looks_like_ours)


def _names(config: Mapping[str, Any]) -> list[Any]:
    """Return what a checkpoint calls itself and its classes."""
    auto_map = config.get("auto_map")
    classes = list(auto_map.values()) if isinstance(auto_map, Mapping) else []
    return [config.get("model_type"), config.get("architectures"), config.get("tokenizer_class"), classes]


def _texts(value: Any) -> list[str]:
    if isinstance(value, (list, tuple)):
        return [text for one in value for text in _texts(one)]
    return [value] if isinstance(value, str) else []


# Part of the names of all GLM chat models of the time, in any spelling.
_NAME = "chatglm"
_OUR_KEYS = _CHATGLM_6B_KEYS | {"num_image_tokens", "gmask_token", "gmask_token_id", "eop_token"}
# force_download is left out: the caller has just downloaded what it forced.
_HUB_OPTIONS = ("cache_dir", "proxies", "token", "use_auth_token", "revision", "local_files_only", "subfolder")


def _foreign_classes(auto_map: Any) -> set[str]:
    if not isinstance(auto_map, Mapping):
        return set()
    names = set()
    for auto_class in _OUR_AUTO_CLASSES:
        references = auto_map.get(auto_class)
        for reference in references if isinstance(references, (list, tuple)) else (references,):
            if isinstance(reference, str):
                names.add(class_name(reference))
    return names - set(LOCAL_CLASSES)


def class_name(reference: str) -> str:
    """Return "Name" of an auto_map entry "module.Name" or "owner/repository--module.Name"."""
    return reference.rsplit("--", 1)[-1].rsplit(".", 1)[-1]


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))
