"""``chat``, ``stream_chat`` and ``process_response``, with the arguments and results of the checkpoint's own code, and
``chat_batch``, which it lacks."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

from .detokenizer import IncrementalDetokenizer
from .generation import no_room
from .placement import input_device
from .prompts import build_prompt, process_response
from .tokenization_chatglm import ChatGLMTokenizer

History = list[tuple[str, str]]


class InvalidScoreLogitsProcessor(LogitsProcessor):
    """Makes a row whose logits overflowed (NaN or +inf) say token 5, a blank, instead of failing.

    Unlike stock's, it looks at each row alone and takes -inf for what it is: a token that another processor forbade.
    """

    token_id = 5
    score = 5e4

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores [B, vocab_size] with invalid rows replaced."""
        invalid = (scores.isnan() | (scores == torch.inf)).any(dim=-1, keepdim=True)
        certain = torch.zeros_like(scores)
        certain[:, self.token_id] = self.score
        return torch.where(invalid, certain, scores)


class ChatMixin:
    """Conversations on top of ``generate`` and ``stream_generate``."""

    def process_response(self, response: str) -> str:
        """See ``prompts.process_response``."""
        return process_response(response)

    def chat(
        self,
        tokenizer: ChatGLMTokenizer,
        query: str,
        history: History | None = None,
        max_length: int = 2048,
        num_beams: int = 1,
        do_sample: bool = True,
        top_p: float = 0.7,
        temperature: float = 0.95,
        logits_processor: LogitsProcessorList | None = None,
        **kwargs: Any,
    ) -> tuple[str, History]:
        """Answer one turn.

        Args:
            tokenizer: the checkpoint's tokenizer.
            query: the user's text. Control tokens typed in it ("[gMASK]", "<sop>"...) stay text.
            history: earlier (query, response) rounds; not changed.
            max_length: limit of prompt and answer together, in tokens.
            num_beams, do_sample, top_p, temperature, logits_processor, kwargs: as in ``generate``, whose default
                ``top_k=50`` applies too.

        Returns:
            the response, and the history with this round appended.

        Raises:
            ValueError: an empty query, a tokenizer that does not fit the model, or a prompt that leaves no room.
        """
        history = list(history or [])
        input_ids = self._chat_input_ids(tokenizer, query, history)
        kwargs["num_beams"] = num_beams
        settings = _chat_settings(max_length, do_sample, top_p, temperature, logits_processor, kwargs)
        output_ids = self.generate(input_ids, **_in_one_place(settings))
        response = process_response(tokenizer.decode(output_ids[0, input_ids.shape[1] :].tolist()))
        return response, [*history, (query, response)]

    def chat_batch(
        self,
        tokenizer: ChatGLMTokenizer,
        queries: Sequence[str],
        histories: Sequence[History | None] | None = None,
        max_length: int = 2048,
        num_beams: int = 1,
        do_sample: bool = True,
        top_p: float = 0.7,
        temperature: float = 0.95,
        logits_processor: LogitsProcessorList | None = None,
        **kwargs: Any,
    ) -> tuple[list[str], list[History]]:
        """Answer one turn of several conversations at once; a step costs little more than that of one.

        Without sampling each answer is the one that ``chat`` gives to its query alone.

        Args:
            queries: the users' texts, one per conversation.
            histories: the earlier rounds of each conversation (None: it has none); not changed.
            max_length: limit of prompt and answer together in each conversation, in tokens, as in ``chat``.
            tokenizer, num_beams, do_sample, top_p, temperature, logits_processor, kwargs: as in ``chat``.

        Returns:
            the responses and the histories with this round appended, in the order of the queries.

        Raises:
            ValueError: as in ``chat`` for one of the queries, no list of queries, as many histories as there are no
                queries, or ``min_length``, which would count the padding.
        """
        _check_batch(queries, histories, kwargs)
        histories = [list(history or []) for history in histories or [None] * len(queries)]
        prompts = [self._chat_ids(tokenizer, *turn) for turn in zip(queries, histories, strict=True)]
        lengths = [len(ids) for ids in prompts]
        longest = max(lengths)
        kwargs["num_beams"] = num_beams
        settings = _chat_settings(max_length, do_sample, top_p, temperature, logits_processor, kwargs)
        # Answers that end early are filled up with it, and decoding leaves it out.
        settings["pad_token_id"] = tokenizer.pad_token_id
        room = [None] * len(prompts)
        if "max_length" in settings:
            room = [settings["max_length"] - length for length in lengths]
            if min(room) <= 0:
                raise no_room(longest, settings["max_length"])
            settings["max_length"] = longest + max(room)
        padded = [[tokenizer.pad_token_id] * (longest - len(ids)) + ids for ids in prompts]
        mask = [[0] * (longest - length) + [1] * length for length in lengths]
        device = input_device(self)
        output_ids = self.generate(
            torch.tensor(padded, device=device),
            attention_mask=torch.tensor(mask, device=device),
            **_in_one_place(settings),
        )
        # The first of several returned sequences, as chat takes it.
        answers = output_ids[:: len(output_ids) // len(prompts), longest:].tolist()
        limited = [answer[:limit] for answer, limit in zip(answers, room, strict=True)]
        responses = [process_response(tokenizer.decode(answer)) for answer in limited]
        turns = zip(queries, histories, responses, strict=True)
        return responses, [[*history, (query, response)] for query, history, response in turns]

    def stream_chat(
        self,
        tokenizer: ChatGLMTokenizer,
        query: str,
        history: History | None = None,
        max_length: int = 2048,
        do_sample: bool = True,
        top_p: float = 0.7,
        temperature: float = 0.95,
        logits_processor: LogitsProcessorList | None = None,
        **kwargs: Any,
    ) -> Iterator[tuple[str, History]]:
        """Answer one turn token by token; arguments as in ``chat``, without beams.

        Yields:
            the response so far and the history with it, once per token. A character of which only some bytes are there
            yet is held back. An answer that ends at once yields one empty response.
        """
        history = list(history or [])
        input_ids = self._chat_input_ids(tokenizer, query, history)
        settings = _chat_settings(max_length, do_sample, top_p, temperature, logits_processor, kwargs)
        tokens = self.stream_tokens(input_ids, **_in_one_place(settings))
        return self._stream_responses(tokenizer, query, history, tokens)

    def _stream_responses(
        self, tokenizer: ChatGLMTokenizer, query: str, history: History, tokens: Iterator[torch.Tensor]
    ) -> Iterator[tuple[str, History]]:
        text = IncrementalDetokenizer(tokenizer)
        yielded, response = None, ""
        for token in tokens:
            token_id = int(token[0])
            if token_id == tokenizer.eos_token_id and yielded is not None:
                break
            response = yielded = process_response(text.push([token_id]))
            yield response, [*history, (query, response)]
        response = process_response(text.finish())
        if response != yielded:
            yield response, [*history, (query, response)]

    def _chat_input_ids(self, tokenizer: ChatGLMTokenizer, query: str, history: History) -> torch.Tensor:
        """Ids [1, length] of a turn's prompt, on the model's device."""
        return torch.tensor([self._chat_ids(tokenizer, query, history)], device=input_device(self))

    def _chat_ids(self, tokenizer: ChatGLMTokenizer, query: str, history: History) -> list[int]:
        if not isinstance(query, str) or not query.strip():
            raise ValueError(f"The query is {query!r}, but chat needs a text that is not empty.")
        self._check_tokenizer(tokenizer)
        ids = tokenizer.encode_text(build_prompt(query, history))
        return [*ids, tokenizer.gmask_token_id, tokenizer.bos_token_id]

    def _check_tokenizer(self, tokenizer: ChatGLMTokenizer) -> None:
        if not isinstance(tokenizer, ChatGLMTokenizer):
            raise ValueError(
                f"The tokenizer is a {type(tokenizer).__name__}, but ChatGLM-6B needs a ChatGLMTokenizer; load it with "
                "AutoTokenizer.from_pretrained from the same checkpoint as the model."
            )
        config = self.config
        tokenizer.check_end_of_answer(config.eos_token_id)
        theirs = (tokenizer.gmask_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
        ours = (config.gmask_token_id, config.bos_token_id, config.eos_token_id)
        if theirs != ours or tokenizer.vocab_size > config.vocab_size:
            raise ValueError(
                f"The tokenizer has {tokenizer.vocab_size} tokens with [gMASK], <sop> and <eop> at {theirs}, but the "
                f"model has {config.vocab_size} with them at {ours}; load both from the same checkpoint."
            )


def _chat_settings(
    max_length: int,
    do_sample: bool,
    top_p: float,
    temperature: float,
    logits_processor: LogitsProcessorList | None,
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """Arguments of ``generate`` for a chat turn. The caller's list of processors is copied, not extended."""
    processors = LogitsProcessorList([*(logits_processor or []), InvalidScoreLogitsProcessor()])
    settings = {"do_sample": do_sample, "logits_processor": processors, **kwargs}
    config = settings.get("generation_config")
    if settings.get("max_new_tokens") is None and getattr(config, "max_new_tokens", None) is None:
        settings["max_length"] = max_length
    if do_sample:
        settings |= {"top_p": top_p, "temperature": temperature}
    return settings


def _in_one_place(settings: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``generate``, those that a given ``generation_config`` has a field for in a copy of it:
    transformers 5 warns of settings in two places. As before, the arguments of chat win."""
    if settings.get("generation_config") is None:
        return settings
    config = copy.deepcopy(settings["generation_config"])
    arguments = {"generation_config": config}
    for name, value in settings.items():
        if name not in arguments:
            target = vars(config) if hasattr(config, name) else arguments
            target[name] = value
    return arguments


def _check_batch(queries: Sequence[str], histories: Sequence[History | None] | None, kwargs: dict[str, Any]) -> None:
    if isinstance(queries, str) or not isinstance(queries, Sequence) or not queries:
        raise ValueError(
            f"The queries are {queries!r}, but chat_batch needs one text or more in a list; call chat() for one text."
        )
    if histories is not None and (not isinstance(histories, Sequence) or len(histories) != len(queries)):
        given = len(histories) if isinstance(histories, Sequence) else repr(histories)
        raise ValueError(
            f"There are {len(queries)} queries, but the histories are {given}; pass one list of rounds, or None, for "
            "each query."
        )
    if kwargs.get("min_length"):
        raise ValueError(
            f"min_length is {kwargs['min_length']}, but in a batch it would count the padding too; pass "
            "min_new_tokens, which counts the answer alone."
        )
