"""Choose the settings of a config.json to take: none that makes transformers fetch, import, read or reserve something.

transformers keeps every key of a config.json as an attribute of the configuration and reads many of them later: the
attention to use (a repository whose Python it runs, with the optional ``kernels`` package), the file with the weights,
the layers to patch. From a checkpoint, only what is known to be harmless is taken. A caller's own arguments of
``from_pretrained`` are not filtered here.
"""

import logging
from typing import Any

from .recognition import LOCAL_CLASSES, class_name

logger = logging.getLogger("faster_chatglm_6b")

# transformers' own settings that concern this model, or have no effect on it.
HARMLESS = frozenset(
    """
    _commit_hash _name_or_path architectures auto_map bad_words_ids begin_suppress_tokens decoder_start_token_id
    diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label initializer_factor
    initializer_range label2id length_penalty max_length max_new_tokens min_length model_type name_or_path
    no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences output_attentions
    output_hidden_states output_scores prefix problem_type remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tokenizer_class top_k top_p
    torch_dtype transformers_version typical_p use_bfloat16
    """.split()
)
# Settings that lead to code or files, or to another model than the checkpoint's. Other names that begin with an
# underscore, or are those of a member of the configuration class, are not taken either.
NEVER = frozenset(
    """
    _attn_implementation _attn_implementation_internal _experts_implementation _experts_implementation_internal
    add_cross_attention alibi assistant_model attention_chunk_size attention_dropout attn_implementation attn_config
    base_model_ep_plan base_model_fsdp_plan base_model_pp_plan base_model_tp_plan chunk_size_feed_forward
    configuration_files cross_attention_hidden_size custom_generate custom_pipelines decoder device_map device_mesh
    distributed_config encoder experts_implementation extra_config_files extra_files ffn_config fusion_config generator
    head_dim init_std is_causal is_decoder is_encoder_decoder kernel_config kv_sharing_modes language_config
    language_model layer_types layers_block_type llm_config loss_type max_window_layers mlp_layer_types
    mtp_layer_types mtp_mlp_layer_types mtp_per_layer_config num_key_value_heads num_kv_shared_layers num_mtp_layers
    per_layer_config pruned_heads rope_parameters rope_scaling rope_theta sliding_window state_dict sub_configs
    sub_configs_defaults text_config text_encoder tf_legacy_loss thinker_config tie_encoder_decoder torchscript tp_plan
    transformers_weights trust_remote_code use_alibi use_kernels use_sliding_window vision_config audio_config
    audio_vocab_size cache_size_limit first_k_dense_replace output_vocab_size use_mla weights_file
    """.split()
)
# transformers itself saves these if somebody chose them; they have no effect on this model.
_SILENT = (None, False, "eager", "sdpa", {}, [], 0)
_MOST_LABELS = 10_000
_PLUGINS = ("bitsandbytes",)
ATTENTIONS = ("eager", "sdpa")

_told: set[tuple[str, str]] = set()


def of_a_file(settings: dict[str, Any], path: str, config_class: type) -> dict[str, Any]:
    """Return the settings of a config.json that are taken.

    A key that is unknown here stays if it cannot be the name of a member and its value cannot name a path or a
    repository: numbers, switches, texts without a slash, and lists and objects of these. A setting that is left out is
    logged once, unless it has no effect.

    Args:
        settings: the content of the file.
        path: of the file, for the messages.
        config_class: that is built from them.

    Raises:
        ValueError: two names of one setting have different values, there are more labels than anybody has, or
            transformers would hand the quantisation to a plug-in.
    """
    own = own_keys(config_class)
    kept = {}
    for key, value in settings.items():
        name = config_class.attribute_map.get(key, key)
        if name != key:
            if settings.get(name, value) != value:
                raise ValueError(
                    f"{path} gives {name}={settings[name]!r} and {key}={value!r}, which are two names of one setting; "
                    "take config.json from the checkpoint again."
                )
            kept[name] = value
        elif key in own or key in HARMLESS:
            kept[key] = value
        elif key == "quantization_config":
            if value:
                _check_plugin(value, path)
                kept[key] = value
        elif is_never(key, config_class) or not _is_plain(value):
            if value not in _SILENT and (path, key) not in _told:
                _told.add((path, key))
                logger.warning(
                    "%s: %s=%.80r is not taken from a checkpoint; give it to from_pretrained() where you want it.",
                    path, key, value,
                )  # fmt: skip
        else:
            kept[key] = value
    _check_labels(kept, path)
    kept["auto_map"] = _local_auto_map(kept.get("auto_map"))
    if not kept["auto_map"]:
        del kept["auto_map"]
    return kept


def of_a_caller(settings: dict[str, Any], config_class: type) -> dict[str, Any]:
    """Return the further arguments of the configuration's constructor that are taken: none that leads to code.

    Raises:
        ValueError: this model does not have the attention that is asked for.
    """
    check_attention(settings.get("attn_implementation"))
    allowed = {"attn_implementation", "is_decoder", "is_encoder_decoder", "quantization_config"}
    return {key: value for key, value in settings.items() if key in allowed or not is_never(key, config_class)}


def check_attention(name: Any) -> None:
    """Raise ValueError for an ``attn_implementation`` that this model cannot be asked for."""
    names = name.values() if isinstance(name, dict) else (name,)
    for one in names:
        if one is not None and one not in ATTENTIONS:
            raise ValueError(
                f"attn_implementation={one!r} was asked for, but ChatGLM-6B here has its own attention and takes "
                f"{' or '.join(ATTENTIONS)}, which change nothing; leave the argument out."
            )


def own_keys(config_class: type) -> frozenset[str]:
    """Return the names of the arguments of ChatGLMConfig's constructor, also for a subclass."""
    names: set[str] = set()
    for base in config_class.__mro__:
        code = getattr(base.__dict__.get("__init__"), "__code__", None)
        if code is not None and base.__module__.startswith(f"{__package__}."):
            names |= set(code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount])
    return frozenset(names)


def is_never(key: str, config_class: type) -> bool:
    """Return whether a setting of this name leads to code or files, or would replace a member of the class."""
    if key in HARMLESS:
        return False
    return key in NEVER or key.startswith("_") or hasattr(config_class, key)


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return not set(value) & {"/", "\\", "\0"} and ".." not in value
    if isinstance(value, dict):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float))


def _check_labels(settings: dict[str, Any], path: str) -> None:
    count = settings.get("num_labels")
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= _MOST_LABELS):
        raise ValueError(
            f"{path} gives num_labels={count!r}, but a number from 0 to {_MOST_LABELS} is needed; take config.json "
            "from the checkpoint again."
        )


def _check_plugin(value: Any, path: str) -> None:
    method = value.get("quant_method") if isinstance(value, dict) else value
    if method not in _PLUGINS:
        raise ValueError(
            f"{path} gives quantization_config with quant_method={method!r}, which transformers hands to a plug-in; "
            "ChatGLM-6B's own quantisation is quantization_bit=8 or 4: load a float checkpoint with that argument."
        )


def _local_auto_map(auto_map: Any) -> dict[str, Any]:
    """Leave out the entries that lead to another repository, unless they name a class of ChatGLM-6B.

    Such a repository would be judged by its own files. The hook serves the classes of ChatGLM-6B, and refuses other
    classes of this checkpoint.
    """
    if not isinstance(auto_map, dict):
        return {}
    kept = {}
    for auto_class, reference in auto_map.items():
        references = reference if isinstance(reference, list) else [reference]
        if all(one is None or _is_of_this_checkpoint(one) for one in references):
            kept[auto_class] = reference
    return kept


def _is_of_this_checkpoint(reference: Any) -> bool:
    return isinstance(reference, str) and ("--" not in reference or class_name(reference) in LOCAL_CLASSES)
