"""ChatGLM-6B in lm-evaluation-harness: prompts end in [gMASK] <sop>, and what is scored or generated follows them.

    pip install lm_eval
    python examples/lm_eval_chatglm.py run --model chatglm --tasks hellaswag \
        --model_args pretrained=THUDM/chatglm-6b,trust_remote_code=True

This is lm_eval's own command with one more model, "chatglm", which takes the arguments of "hf". With
--apply_chat_template contexts are written as chat writes them. In Python, import this file and pass
``model="chatglm"``, or ``ChatGLMLM(pretrained=model, tokenizer=tokenizer)``, to ``simple_evaluate``.

A text without a context (``loglikelihood_rolling``, for perplexities) is scored as the answer to an empty prompt. If it
is longer than the model's window, the prompt of each further window is the token before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import faster_chatglm_6b  # noqa: F401  first: it serves the checkpoint

# isort: split
import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from faster_chatglm_6b.templates.chat_template import START


@register_model("chatglm")
class ChatGLMLM(HFLM):
    """lm_eval's "hf" model with a prefix LM's prompts."""

    def __init__(self, pretrained: Any, **kwargs: Any) -> None:
        """Take the arguments of "hf"."""
        super().__init__(pretrained, **({"backend": "causal"} | kwargs))

    @property
    def max_length(self) -> int:
        """The most tokens of context and continuation together."""
        return self._max_length or self.model.config.max_sequence_length

    @property
    def prefix_token_id(self) -> int:
        """The id of <sop>, which stands before every continuation."""
        return self.tokenizer.bos_token_id

    @property
    def _prompt_end(self) -> list[int]:
        return [self.tokenizer.gmask_token_id, self.tokenizer.bos_token_id]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Encode the text alone; control tokens in it stay text."""
        return self.tokenizer.encode_text(string)

    def tok_batch_encode(
        self,
        strings: Sequence[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return prompts [B, L] padded on the left, and their mask [B, L] with 0 for padding.

        Contexts longer than ``left_truncate_len`` lose their beginning, never their [gMASK] <sop>.
        """
        prompts = [self._prompt(string) for string in strings]
        prompts = [ids[-left_truncate_len:] if left_truncate_len else ids for ids in prompts]
        length = max(map(len, prompts))
        pads = [length - len(ids) for ids in prompts]
        pad_id = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad_id] * count + row for count, row in zip(pads, prompts, strict=True)])
        return ids, (torch.arange(length) >= torch.tensor(pads)[:, None]).long()

    def tok_decode(self, tokens: int | Iterable[int], skip_special_tokens: bool = True) -> str:
        """Decode the tokens; <eop> gives its name and never '', because lm_eval makes it a stop string."""
        if tokens == self.eot_token_id:
            return self.tokenizer.eos_token
        return self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-probability of the continuation, whether it is the greedy one) per (context, continuation).

        Raises:
            ValueError: a continuation that does not fit into the model's window with its [gMASK] <sop>.
        """
        encoded = []
        for context, continuation in (request.args for request in requests):
            context_ids, ids = self._prompt(context), self.tok_encode(continuation)
            self._check_room(ids)
            encoded.append(((context, continuation), context_ids, ids))
        return self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return each text's log-probability as the answer to an empty prompt, in windows if it is too long for one."""
        windows, owners = [], []
        for owner, (text,) in enumerate(request.args for request in requests):
            for context, ids in self._windows(self.tok_encode(text)):
                windows.append((("", text), [*context, *self._prompt_end], ids))
                owners.append(owner)
        scores = [0.0] * len(requests)
        scored = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm) if windows else []
        for owner, (score, _) in zip(owners, scored, strict=True):
            scores[owner] += score
        for request, score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, score)
        return scores

    def _prompt(self, context: str) -> list[int]:
        """Encode a context with its [gMASK] <sop>, which a conversation of --apply_chat_template has already."""
        if context.startswith(START):
            return self.tokenizer.encode(context)
        return [*self.tok_encode(context), *self._prompt_end]

    def _windows(self, ids: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        """Yield (prompt, scored tokens): the first prompt is empty, the others are the token before."""
        room = self.max_length - len(self._prompt_end) - 1
        for begin in range(0, len(ids), room):
            yield ids[max(begin - 1, 0) : begin], ids[begin : begin + room]

    def _check_room(self, ids: list[int]) -> None:
        room = self.max_length - len(self._prompt_end)
        if not 0 < len(ids) <= room:
            raise ValueError(
                f"A continuation has {len(ids)} tokens, but 1 to {room} can be scored in a window of {self.max_length} "
                "tokens; give another text, or a larger max_length in --model_args."
            )


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
