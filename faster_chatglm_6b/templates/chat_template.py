"""Turn role messages into ids in ChatGLM-6B's own chat format: ``apply_chat_template`` and its template.

The ids of the prompt text are exactly those that ``chat`` gets from ``prompts.build_prompt`` and ``encode_text``.
A conversation becomes:

- if the last text is the user's: the prompt text, then [gMASK] <sop> with ``add_generation_prompt``;
- if it is the assistant's (for training, as in the official P-Tuning script): the prompt text with all earlier rounds,
  [gMASK] <sop>, the answer, <eop>.

System texts, each with a line break, come before the first user text: the model has no system role.

Rendered as text, a conversation begins with a mark, a control character that the vocabulary drops. Another mark stands
before each of its control tokens. ``tokenize`` takes only these for control tokens, and texts in messages lose their
marks. So the text can be tokenized later, with special tokens or without, to the same ids.

Put a user's own text into a message or through ``encode_text``. ``tokenizer(text)`` takes control tokens for real:
the marked ones in a text with marks, all of them in one without, as in stock.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .history import read_messages

MARK = "\x10"
# Replaces a mark in a message: the vocabulary drops both, so that the ids stay the same.
HARMLESS = "\x11"
# Begins a rendered text: after a mark alone, a user's text that begins with "<sop>" would be the control token.
START = MARK + HARMLESS
_MARKED = re.compile(rf"{MARK}(\[gMASK\]|<sop>|<eop>)")

_NO_TOOLS = "ChatGLM-6B was trained with neither tools nor documents; leave {} out and write what it needs into a text."

# transformers renders it. A server or a trainer that renders the saved file gets the same text.
CHAT_TEMPLATE = r"""
{%- if tools or documents -%}
  {{- raise_exception('ChatGLM-6B was trained with neither tools nor documents; leave them out.') -}}
{%- endif -%}
{%- set state = namespace(round=0, system='') -%}
{%- set user_count = messages | selectattr('role', 'equalto', 'user') | list | length -%}
{{- '\x10\x11' -}}
{%- for message in messages -%}
  {%- if message['content'] is string -%}
    {%- set text = message['content'] | replace('\x10', '\x11') -%}
  {%- else -%}
    {%- set text = message['content'] | map(attribute='text') | join | replace('\x10', '\x11') -%}
  {%- endif -%}
  {%- if message['role'] == 'system' -%}
    {%- if text -%}
      {%- set state.system = state.system ~ text ~ '\n' -%}
    {%- endif -%}
  {%- elif message['role'] == 'user' -%}
    {%- if user_count == 1 -%}
      {{- state.system ~ text -}}
    {%- else -%}
      {{- '[Round ' ~ state.round ~ ']\n问：' ~ state.system ~ text ~ '\n答：' -}}
    {%- endif -%}
    {%- set state.round = state.round + 1 -%}
    {%- set state.system = '' -%}
    {%- if loop.last and add_generation_prompt -%}
      {{- '\x10[gMASK]\x10<sop>' -}}
    {%- endif -%}
  {%- elif message['role'] == 'assistant' -%}
    {%- if loop.last -%}
      {{- '\x10[gMASK]\x10<sop>' -}}
      {%- generation -%}
        {{- text ~ '\x10<eop>' -}}
      {%- endgeneration -%}
    {%- else -%}
      {{- text ~ '\n' -}}
    {%- endif -%}
  {%- else -%}
    {{- raise_exception('The role ' ~ message['role'] ~ ' is none of system, user and assistant.') -}}
  {%- endif -%}
{%- endfor -%}
""".strip()


class ChatTemplateMixin:
    """Chat messages for ``ChatGLMTokenizer``; comes before ``PreTrainedTokenizer`` among its bases."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take the checkpoint's ``chat_template``, else ``CHAT_TEMPLATE``, if this transformers has templates."""
        if hasattr(super(), "apply_chat_template") and kwargs.get("chat_template") is None:
            kwargs["chat_template"] = CHAT_TEMPLATE
        super().__init__(*args, **kwargs)

    def apply_chat_template(
        self,
        conversation: Any,
        tools: Any = None,
        documents: Any = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Apply the template as transformers does, with the installed release's arguments, defaults and results.

        Args:
            conversation: one conversation or a list of several; messages as ``history.read_messages`` takes them.
            tools, documents: refused, unless a template of the caller's own uses them.
            chat_template: another template, which transformers renders and tokenizes as usual.
            add_generation_prompt: end in [gMASK] <sop>, ready for ``generate``.
            continue_final_message: end after the assistant's last text, without <eop>.
            tokenize: return ids; otherwise text, which ``tokenizer(text)`` turns into the same ids.
            kwargs: ``padding``, ``truncation``, ``max_length``, ``return_tensors``, ``return_dict`` and others.
                ``truncation`` shortens the answer and the prompt text and keeps [gMASK] <sop>.
                ``return_assistant_tokens_mask`` marks the last answer and its <eop>. Earlier answers belong to the
                prompt, which the model reads in both directions and cannot learn to predict.

        Raises:
            ValueError: messages that ``read_messages`` refuses, tools or documents, or arguments that contradict each
                other.
        """
        arguments = {
            "chat_template": chat_template,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tokenize": tokenize,
        }
        if chat_template is None and self.chat_template != CHAT_TEMPLATE or chat_template not in (None, CHAT_TEMPLATE):
            return super().apply_chat_template(conversation, tools=tools, documents=documents, **arguments, **kwargs)
        for name, value in (("tools", tools), ("documents", documents)):
            if value:
                raise ValueError(_NO_TOOLS.format(name))
        wants_mask = kwargs.pop("return_assistant_tokens_mask", False)
        if wants_mask and continue_final_message:
            raise ValueError(
                "continue_final_message and return_assistant_tokens_mask do not go together: a conversation for "
                "training is finished; give one of them."
            )
        # Control tokens that a user typed stay text, whatever is asked for.
        kwargs.pop("sanitize_control_tokens", None)
        is_batch = isinstance(conversation, (list, tuple)) and any(
            isinstance(item, (list, tuple)) or hasattr(item, "messages") for item in conversation[:1]
        )
        messages = [_read(item, add_generation_prompt) for item in (conversation if is_batch else [conversation])]
        encoded = super().apply_chat_template(messages if is_batch else messages[0], **arguments, **kwargs)
        if not wants_mask:
            return encoded
        if not isinstance(encoded, Mapping):
            raise ValueError(
                "return_assistant_tokens_mask needs a dict to put the mask into; give return_dict=True and "
                "tokenize=True as well."
            )
        ids = encoded["input_ids"]
        is_one_row = not is_batch and kwargs.get("return_tensors") is None
        masks = [self._answer_mask(list(row)) for row in ([ids] if is_one_row else ids)]
        encoded["assistant_masks"] = masks[0] if is_one_row else masks
        if kwargs.get("return_tensors") is not None:
            encoded.convert_to_tensors(kwargs["return_tensors"])
        return encoded

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """Split ``text`` into pieces; in a rendered conversation only marked control tokens are their own pieces."""
        if MARK not in text:
            return super().tokenize(text, **kwargs)
        pieces: list[str] = []
        # Texts and the names of marked tokens take turns.
        for number, part in enumerate(_MARKED.split(text)):
            pieces += [part] if number % 2 else self._tokenize(part.replace(START, "").replace(MARK, ""))
        return pieces

    def prepare_for_model(
        self, ids: list[int], pair_ids: list[int] | None = None, add_special_tokens: bool = True, **kwargs: Any
    ) -> Any:
        """Prepare as transformers does, but add no second [gMASK] <sop> to a rendered conversation."""
        end = self._prompt_end(ids) if add_special_tokens else None
        if end is not None and pair_ids is None:
            add_special_tokens = False
        elif end == len(ids):
            ids = ids[:-2]
        return super().prepare_for_model(ids, pair_ids, add_special_tokens=add_special_tokens, **kwargs)

    def truncate_sequences(
        self,
        ids: list[int],
        pair_ids: list[int] | None = None,
        num_tokens_to_remove: int = 0,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[list[int], list[int] | None, list[int]]:
        """Truncate as transformers does, but keep the [gMASK] <sop> of a rendered conversation.

        On the right, tokens go from the answer's end first, then from the prompt text's. On the left, they go from the
        prompt text's beginning first, then from the answer's.
        """
        end = self._prompt_end(ids)
        if end is None or pair_ids is not None or num_tokens_to_remove <= 0:
            return super().truncate_sequences(ids, pair_ids, num_tokens_to_remove, *args, **kwargs)
        prompt, control, answer = ids[: end - 2], ids[end - 2 : end], ids[end:]
        if self.truncation_side == "left":
            from_answer = max(0, num_tokens_to_remove - len(prompt))
            kept = [*prompt[num_tokens_to_remove:], *control, *answer[from_answer:]]
            return kept, None, [*prompt[:num_tokens_to_remove], *answer[:from_answer]]
        answer_length = max(0, len(answer) - num_tokens_to_remove)
        prompt_length = max(0, len(prompt) - max(0, num_tokens_to_remove - len(answer)))
        kept = [*prompt[:prompt_length], *control, *answer[:answer_length]]
        return kept, None, [*prompt[prompt_length:], *answer[answer_length:]]

    def _prompt_end(self, ids: list[int]) -> int | None:
        """Find where the answer begins: the slot after [gMASK] <sop>; None if these do not follow each other."""
        gmask, sop = self.gmask_token_id, self.bos_token_id
        if gmask not in ids:
            return None
        for slot in range(len(ids) - 1, 0, -1):
            if ids[slot] == sop and ids[slot - 1] == gmask:
                return slot + 1
        return None

    def _answer_mask(self, ids: list[int]) -> list[int]:
        """Return 1 for the answer and its <eop>, 0 for padding, prompt and [gMASK] <sop>."""
        end = self._prompt_end([int(index) for index in ids])
        end = len(ids) if end is None else end
        return [0] * end + [1] * (len(ids) - end)


def _read(conversation: Any, add_generation_prompt: bool) -> list[dict[str, str]]:
    """Read messages, check them for what the template needs, and replace the marks in them."""
    messages = read_messages(conversation)
    role = messages[-1]["role"]
    if role == "system":
        raise ValueError("The conversation has no message of the user's; add one, which the system text goes before.")
    if role == "assistant" and add_generation_prompt:
        raise ValueError(
            "add_generation_prompt is True, but the last message is the assistant's: there is nothing to answer; leave "
            "it out for a finished conversation, or give continue_final_message=True to go on with the answer."
        )
    return [{**message, "content": message["content"].replace(MARK, HARMLESS)} for message in messages]
