"""Run transformers' own command line (5.0 and later) with ChatGLM-6B: an OpenAI-like server, without streaming.

python examples/transformers_serve.py serve THUDM/chatglm-6b --trust-remote-code
curl localhost:8000/v1/chat/completions -H "content-type: application/json" \
     -d '{"model": "THUDM/chatglm-6b", "messages": [{"role": "user", "content": "你好"}]}'

Requests with "stream": true, which ``transformers chat`` sends too, are answered with status 500: transformers
decodes a stream with a fast tokenizer, and a sentencepiece tokenizer is not one. This script needs
pip install "transformers[serving]".
"""

import transformers

import faster_chatglm_6b  # noqa: F401
from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration

# The server looks in transformers itself for the class that config.json names.
transformers.ChatGLMModel = transformers.ChatGLMForConditionalGeneration = ChatGLMForConditionalGeneration

if __name__ == "__main__":
    from transformers.cli.transformers import main

    main()
