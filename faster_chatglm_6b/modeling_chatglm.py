"""Join the network with what it can do, under Hugging Face's file name; the bases of the class are the architecture."""

from transformers.generation.utils import GenerationMixin

from .configuration_chatglm import ChatGLMConfig
from .conversation.chat import ChatMixin
from .generation.generate import PrefixGenerationMixin
from .generation.processors import InvalidScoreLogitsProcessor
from .layers.prefix_encoder import PrefixEncoder
from .layers.quantized import QuantizedEmbedding, QuantizedLinear
from .network.blocks import GLU, GLMBlock, SelfAttention
from .network.model import ChatGLMModel, ChatGLMPreTrainedModel, ChatGLMWithHead
from .network.quantization import QuantizationMixin
from .network.stock_names import StockGenerationNames

# Includes what scripts import from the checkpoint's file of this name.
__all__ = [
    "ChatGLMConfig",
    "ChatGLMForConditionalGeneration",
    "ChatGLMModel",
    "ChatGLMPreTrainedModel",
    "GLMBlock",
    "GLU",
    "InvalidScoreLogitsProcessor",
    "PrefixEncoder",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "SelfAttention",
]


class ChatGLMForConditionalGeneration(
    ChatMixin,
    PrefixGenerationMixin,
    QuantizationMixin,
    StockGenerationNames,
    ChatGLMWithHead,
    GenerationMixin,
):
    """ChatGLM-6B with its output head, chat and generation."""
