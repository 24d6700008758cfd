"""Configuration of ChatGLM-6B, field for field that of THUDM/chatglm-6b's config.json."""

import math
from typing import Any

from transformers.configuration_utils import PretrainedConfig

from . import config_keys
from .disk.json_files import read_json
from .disk.replacing import replaced_file

# Each size with its largest value: far more than any ChatGLM-6B has.
_SIZES = {
    "vocab_size": 2**24,
    "hidden_size": 2**16,
    "num_layers": 2**10,
    "num_attention_heads": 2**12,
    "max_sequence_length": 2**24,
    "inner_hidden_size": 2**18,
}
# Further sizes, which may be None.
_OPTIONAL_SIZES = {"pre_seq_len": 2**16, "quantization_group_size": 2**18}
_SWITCHES = (
    "use_cache",
    "position_encoding_2d",
    "quantization_embeddings",
    "prefix_projection",
    "tie_word_embeddings",
)
# Far above every ChatGLM-6B, and far below what would fill a machine by a slip or on purpose.
_MOST_PARAMETERS = 10**11
DTYPES = ("float16", "bfloat16", "float32", "float64")
# What quantize() takes: a float checkpoint that is quantised while it is read has none of these in its config.json.
QUANTIZATION_SETTINGS = ("quantization_bit", "quantization_group_size", "quantization_head_bits")
_AUTO_MAP = {
    "AutoConfig": "configuration_chatglm.ChatGLMConfig",
    "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
}
# Places of the control tokens in ice_text.model, before <sop>; <eop> follows it.
_BEFORE_SOP = {"mask_token_id": 4, "gmask_token_id": 3}
# Id of <pad>, by the id of <sop>: the first checkpoints' ids are 20000 higher.
_PAD_BY_SOP = {130004: 3, 150004: 20003}
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id", "gmask_token_id")


class ChatGLMConfig(PretrainedConfig):
    """Sizes and special ids of a ChatGLM-6B checkpoint.

    Args:
        vocab_size: rows of the embedding and of the output head.
        hidden_size, inner_hidden_size: width of the residual stream and of the MLP.
        num_layers, num_attention_heads: depth, and heads per layer, which share hidden_size.
        layernorm_epsilon: epsilon of every LayerNorm.
        bos_token_id, eos_token_id: ids of ``<sop>`` and ``<eop>``.
        mask_token_id, gmask_token_id: ids of ``[MASK]`` and ``[gMASK]``.
        max_sequence_length: longest prompt the model was trained for, in tokens.
        position_encoding_2d: rotate one half of each head by position and the other by block position.
        quantization_bit: 8 or 4 if the checkpoint holds quantised linear layers, else 0.
        quantization_embeddings: the embedding, which is also the head, is quantised too (older checkpoints).
        quantization_group_size: columns that share a scale; None for one scale per row, as in stock.
        quantization_head_bits: 8 if the head is quantised on its own, else None.
        pre_seq_len, prefix_projection: P-Tuning v2 prefix, ``None`` for none.
        tie_word_embeddings: the head is the embedding, as stock runs it.

    Raises:
        ValueError: sizes are missing, are not positive integers, contradict each other or ask for terabytes; or another
            field has a wrong type or value.
    """

    model_type = "chatglm"
    attribute_map = {
        "num_hidden_layers": "num_layers",
        "intermediate_size": "inner_hidden_size",
        "max_position_embeddings": "max_sequence_length",
    }

    def __init__(
        self,
        vocab_size: int = 130528,
        hidden_size: int = 4096,
        num_layers: int = 28,
        num_attention_heads: int = 32,
        layernorm_epsilon: float = 1e-5,
        use_cache: bool = True,
        bos_token_id: int = 130004,
        eos_token_id: int = 130005,
        mask_token_id: int = 130000,
        gmask_token_id: int = 130001,
        pad_token_id: int = 3,
        max_sequence_length: int = 2048,
        inner_hidden_size: int = 16384,
        position_encoding_2d: bool = True,
        quantization_bit: int = 0,
        quantization_embeddings: bool = False,
        quantization_group_size: int | None = None,
        quantization_head_bits: int | None = None,
        pre_seq_len: int | None = None,
        prefix_projection: bool = False,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.num_attention_heads = num_attention_heads
        self.layernorm_epsilon = layernorm_epsilon
        self.use_cache = use_cache
        self.mask_token_id = mask_token_id
        self.gmask_token_id = gmask_token_id
        self.max_sequence_length = max_sequence_length
        self.inner_hidden_size = inner_hidden_size
        self.position_encoding_2d = position_encoding_2d
        self.quantization_bit = quantization_bit
        self.quantization_embeddings = quantization_embeddings
        self.quantization_group_size = quantization_group_size
        self.quantization_head_bits = quantization_head_bits
        self.pre_seq_len = pre_seq_len
        self.prefix_projection = prefix_projection
        kwargs = config_keys.of_a_caller(kwargs, type(self))
        # transformers 4.45's pipeline() loads a tokenizer only for a config that names its class.
        kwargs.setdefault("tokenizer_class", "ChatGLMTokenizer")
        _check_dtype(kwargs)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
        # Set after super().__init__: transformers 5 has no such fields on the base class, transformers 4 overwrites
        # them there.
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        # Lets the Auto classes, and through them the hook, find a checkpoint that this config is saved with.
        self.auto_map = getattr(self, "auto_map", None) or dict(_AUTO_MAP)
        self._check()

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Read config.json as transformers does; it must hold an object.

        Raises:
            ValueError: it holds something else.
        """
        try:
            result = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
            is_object = isinstance(result[0], dict)
        except (TypeError, AttributeError, LookupError):
            is_object = False
        if not is_object:
            raise ValueError(
                f"config.json of {pretrained_model_name_or_path} is no JSON object with settings; take it from the "
                "checkpoint again."
            )
        return result

    @classmethod
    def _dict_from_json_file(cls, json_file: Any) -> Any:
        """Read config.json in transformers' place; ``config_keys`` says which settings are taken from a checkpoint."""
        settings = read_json(json_file)
        settings = getattr(cls, "_decode_special_floats", lambda value: value)(settings)
        return config_keys.of_a_file(settings, str(json_file), cls) if isinstance(settings, dict) else settings

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the configuration as transformers does. Every size must be given: none is guessed.

        Ids that the first checkpoints do not give (``[MASK]``, ``[gMASK]``, ``<pad>``) follow from those of ``<sop>``
        and ``<eop>``.

        Raises:
            ValueError: a size is missing, or a setting has a wrong type or value.
        """
        config_dict = {**_missing_ids(config_dict), **config_dict}
        missing = [name for name in (*_SIZES, *_TOKEN_IDS) if name not in config_dict]
        if missing:
            raise ValueError(
                f"config.json lacks {', '.join(missing)}, which a ChatGLM-6B checkpoint must give; take config.json "
                "from the checkpoint again."
            )
        if not isinstance(config_dict.get("model_type", cls.model_type), str):
            raise ValueError(
                f"config.json gives model_type={config_dict['model_type']!r}, but the text 'chatglm' is needed; take "
                "config.json from the checkpoint again."
            )
        try:
            result = super().from_dict(config_dict, **kwargs)
        except (ValueError, OSError):
            raise
        except Exception as error:
            # transformers 5 checks some settings with errors of its own, and fails on wrong types.
            cause = error.__cause__ or error
            raise ValueError(
                f"config.json has a setting of a wrong type; take config.json from the checkpoint again. ({cause})"
            ) from error
        _check_finite(config_dict)
        # transformers sets the caller's own values after construction.
        (result[0] if isinstance(result, tuple) else result)._check()
        return result

    def to_json_file(self, json_file_path: Any, use_diff: bool = True) -> None:
        """Write config.json as transformers does; if that fails, a file that was there stays as it was."""
        with replaced_file(json_file_path) as path:
            super().to_json_file(path, use_diff=use_diff)

    @classmethod
    def register_for_auto_class(cls, *args: Any, **kwargs: Any) -> None:
        """Do nothing: registering would make ``save_pretrained`` copy this package's source into checkpoints."""

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def _check(self) -> None:
        for name, most in _SIZES.items():
            _check_size(name, getattr(self, name), most)
        for name, most in _OPTIONAL_SIZES.items():
            if getattr(self, name) not in (None, 0):
                _check_size(name, getattr(self, name), most)
        for name in _SWITCHES:
            if getattr(self, name) not in (True, False):
                raise ValueError(
                    f"config.json gives {name}={getattr(self, name)!r}, but true or false is needed; take config.json "
                    "from the checkpoint again."
                )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"config.json gives hidden_size={self.hidden_size} and num_attention_heads={self.num_attention_heads}, "
                "but the heads must divide the hidden size; take config.json from the checkpoint again."
            )
        if self.head_size % 4:
            raise ValueError(
                f"config.json gives heads of {self.head_size} values (hidden_size {self.hidden_size} over "
                f"{self.num_attention_heads} heads), but 2-D rotary positions need a multiple of 4; "
                "take config.json from the checkpoint again."
            )
        for name in _TOKEN_IDS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < self.vocab_size:
                raise ValueError(
                    f"config.json gives {name}={value!r}, but an id from 0 to {self.vocab_size - 1} (vocab_size - 1) "
                    "is needed; take config.json from the checkpoint again."
                )
        if self.quantization_bit not in (0, 4, 8, None) or isinstance(self.quantization_bit, float):
            raise ValueError(
                f"config.json or an argument gives quantization_bit={self.quantization_bit!r}, but only 0, 4 and 8 "
                "exist; give one of them, or take config.json from the checkpoint again."
            )
        if self.quantization_head_bits not in (0, 8, None) or isinstance(self.quantization_head_bits, float):
            raise ValueError(
                f"config.json or an argument gives quantization_head_bits={self.quantization_head_bits!r}, but only 8 "
                "exists, and null (None) for a head that is not quantised; give one of them, or take config.json "
                "from the checkpoint again."
            )
        for name in ("quantization_group_size", "quantization_head_bits", "quantization_embeddings"):
            if getattr(self, name) and not self.quantization_bit:
                raise ValueError(
                    f"config.json or an argument gives {name}={getattr(self, name)!r} without quantization_bit, which "
                    "would do nothing; give quantization_bit=8 or 4 with it, or leave it out."
                )
        if not isinstance(self.layernorm_epsilon, (int, float)) or not 0 < self.layernorm_epsilon < 1:
            raise ValueError(
                f"config.json gives layernorm_epsilon={self.layernorm_epsilon!r}, but a number between 0 and 1 is "
                "needed; take config.json from the checkpoint again."
            )
        _check_parameters(self)


def parameter_count(config: Any) -> int:
    """Count the parameters of the embedding, the layers and the P-Tuning prefix; the head is the embedding."""
    hidden, inner, layers = config.hidden_size, config.inner_hidden_size, config.num_layers
    attention = 4 * hidden * hidden + 4 * hidden
    mlp = 2 * hidden * inner + hidden + inner
    prefix = (config.pre_seq_len or 0) * layers * hidden * 2
    return config.vocab_size * hidden + layers * (attention + mlp + 4 * hidden) + 2 * hidden + prefix


def _check_parameters(config: Any) -> None:
    """Refuse sizes that are each plausible and together ask for terabytes, before memory is taken."""
    count = parameter_count(config)
    if count > _MOST_PARAMETERS:
        raise ValueError(
            f"config.json asks for a model of {count / 1e9:.0f} billion parameters (vocab_size={config.vocab_size}, "
            f"hidden_size={config.hidden_size}, inner_hidden_size={config.inner_hidden_size}, "
            f"num_layers={config.num_layers}, pre_seq_len={config.pre_seq_len}), but ChatGLM-6B has 6 and more than "
            f"{_MOST_PARAMETERS // 10**9} are refused; take config.json from the checkpoint again."
        )


def _missing_ids(config: dict[str, Any]) -> dict[str, int]:
    """Return the ids that follow from those of <sop> and <eop>; none if these do not stand side by side."""
    sop, eop = config.get("bos_token_id"), config.get("eos_token_id")
    if type(sop) is not int or type(eop) is not int or eop != sop + 1:
        return {}
    ids = {name: sop - before for name, before in _BEFORE_SOP.items()}
    if sop in _PAD_BY_SOP:
        ids["pad_token_id"] = _PAD_BY_SOP[sop]
    return ids


def _check_size(name: str, value: Any, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"config.json or an argument gives {name}={value!r}, but a positive integer is needed; "
            "give one, or take config.json from the checkpoint again."
        )
    if value > most:
        raise ValueError(
            f"config.json or an argument gives {name}={value}, but more than {most} is refused; "
            "give less, or take config.json from the checkpoint again."
        )


def _check_finite(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(
                f"config.json gives {name}={value!r}, but a finite number is needed; take config.json from the "
                "checkpoint again."
            )


def _check_dtype(fields: dict[str, Any]) -> None:
    """Refuse other names than dtypes: transformers would look one up among everything that torch has."""
    for name in ("dtype", "torch_dtype"):
        value = fields.get(name)
        if value is not None and str(value).rsplit(".", 1)[-1] not in (*DTYPES, "auto"):
            raise ValueError(
                f"config.json gives {name}={value!r}, but one of {', '.join(DTYPES)} is needed; "
                "take config.json from the checkpoint again."
            )
