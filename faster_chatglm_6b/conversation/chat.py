"""Give the model ``chat``, ``stream_chat``, ``process_response`` and ``chat_batch``.

Arguments and results are those of the checkpoint's own code, which lacks ``chat_batch``.
"""

import copy
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers.generation.logits_process import LogitsProcessorList

from ..generation.generate import no_room
from ..generation.processors import InvalidScoreLogitsProcessor
from ..layers.placement import input_device
from ..templates.history import History
from ..templates.prompts import process_response
from ..tokenization_chatglm import ChatGLMTokenizer
from .detokenizer import IncrementalDetokenizer

MAX_LENGTH = 2048
# Rounds of (query, response), or messages with a role and a content: see ``History.of``.
Rounds = Sequence[tuple[str, str]] | Sequence[dict[str, Any]]


class ChatMixin:
    """Conversations on top of ``generate`` and ``stream_generate``."""

    def process_response(self, response: str) -> str:
        """Clean up decoded text as ``prompts.process_response`` does."""
        return process_response(response)

    def chat(
        self,
        tokenizer: ChatGLMTokenizer,
        query: str,
        history: Rounds | None = None,
        max_length: int = MAX_LENGTH,
        num_beams: int = 1,
        do_sample: bool = True,
        top_p: float = 0.7,
        temperature: float = 0.95,
        logits_processor: LogitsProcessorList | None = None,
        **kwargs: Any,
    ) -> tuple[str, list[Any]]:
        """Answer one turn.

        Args:
            tokenizer: the checkpoint's tokenizer.
            query: the user's text. Control tokens typed in it ("[gMASK]", "<sop>"...) stay text.
            history: earlier (query, response) rounds, or messages such as ``{"role": "user", "content": ...}`` that
                end with an answer. System messages go before the first user text. The list is not changed.
            max_length: limit of prompt and answer together, in tokens. Left at 2048, it gives way to the
                ``max_new_tokens`` of ``kwargs`` or of the checkpoint's generation_config.json.
            num_beams, do_sample, top_p, temperature, logits_processor, kwargs: as in ``generate``, whose default
                ``top_k=50`` applies too. So do ``stopping_criteria`` and ``stop_strings``, of which the one that ended
                the answer stays in the response. ``speculate=0`` switches drafts off, which are the default.

        Returns:
            the response, and the history with this round appended in the form of the others: a pair, or two messages.

        Raises:
            ValueError: an empty query, a history that cannot be read, a tokenizer that does not fit the model, or a
                prompt that leaves no room.
        """
        history = History.of(history)
        input_ids = self._chat_input_ids(tokenizer, query, history)
        kwargs["num_beams"] = num_beams
        settings = self._chat_settings(tokenizer, max_length, do_sample, top_p, temperature, logits_processor, kwargs)
        output_ids = _sequences(self.generate(input_ids, **self._arguments(settings, input_ids.shape[1])))
        response = process_response(tokenizer.decode(output_ids[0, input_ids.shape[1] :].tolist()))
        return response, history.with_round(query, response)

    def chat_batch(
        self,
        tokenizer: ChatGLMTokenizer,
        queries: Sequence[str],
        histories: Sequence[Rounds | None] | None = None,
        max_length: int = MAX_LENGTH,
        num_beams: int = 1,
        do_sample: bool = True,
        top_p: float = 0.7,
        temperature: float = 0.95,
        logits_processor: LogitsProcessorList | None = None,
        **kwargs: Any,
    ) -> tuple[list[str], list[list[Any]]]:
        """Answer one turn of several conversations at once; a step costs little more than that of one.

        Without sampling, each answer is the one that ``chat`` gives to its query alone.

        Args:
            queries: the users' texts, one per conversation.
            histories: for each query its earlier rounds or messages, or None; None alone if no conversation has any.
                The lists are not changed.
            max_length: limit of prompt and answer together in each conversation, in tokens, as in ``chat``.
            tokenizer, num_beams, do_sample, top_p, temperature, logits_processor, kwargs: as in ``chat``.

        Returns:
            the responses, and the histories with this round appended, both in the order of the queries.

        Raises:
            ValueError: one of the queries would raise it in ``chat``; the queries are no list, or an empty one; there
                are more or fewer histories than queries; or ``min_length``, which would count the padding, is not 0.
        """
        _check_batch(queries, histories)
        self._check_min_length(kwargs)
        histories = [History.of(history) for history in histories or [None] * len(queries)]
        prompts = [self._chat_ids(tokenizer, *turn) for turn in zip(queries, histories, strict=True)]
        lengths = [len(ids) for ids in prompts]
        longest = max(lengths)
        kwargs["num_beams"] = num_beams
        settings = self._chat_settings(tokenizer, max_length, do_sample, top_p, temperature, logits_processor, kwargs)
        # Answers that end early are filled up with pads, which decoding leaves out.
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
        output = self.generate(
            torch.tensor(padded, device=device),
            attention_mask=torch.tensor(mask, device=device),
            **self._arguments(settings, longest),
        )
        output_ids = _sequences(output)
        # The first of several returned sequences, as chat takes it.
        answers = output_ids[:: len(output_ids) // len(prompts), longest:].tolist()
        limited = [answer[:limit] for answer, limit in zip(answers, room, strict=True)]
        responses = [process_response(tokenizer.decode(answer)) for answer in limited]
        turns = zip(queries, histories, responses, strict=True)
        return responses, [history.with_round(query, response) for query, history, response in turns]

    def stream_chat(
        self,
        tokenizer: ChatGLMTokenizer,
        query: str,
        history: Rounds | None = None,
        max_length: int = MAX_LENGTH,
        do_sample: bool = True,
        top_p: float = 0.7,
        temperature: float = 0.95,
        logits_processor: LogitsProcessorList | None = None,
        **kwargs: Any,
    ) -> Iterator[tuple[str, list[Any]]]:
        """Answer one turn token by token; arguments as in ``chat``, without the beams of generation_config.json.

        Yields:
            the response so far and the history with it, once per token. A character is held back until its last byte
            has come. An answer that ends at once yields one empty response.
        """
        history = History.of(history)
        input_ids = self._chat_input_ids(tokenizer, query, history)
        settings = self._chat_settings(tokenizer, max_length, do_sample, top_p, temperature, logits_processor, kwargs)
        tokens = self.stream_tokens(input_ids, **self._arguments(settings, input_ids.shape[1]))
        return self._stream_responses(tokenizer, query, history, tokens)

    def _stream_responses(
        self, tokenizer: ChatGLMTokenizer, query: str, history: History, tokens: Iterator[torch.Tensor]
    ) -> Iterator[tuple[str, list[Any]]]:
        text = IncrementalDetokenizer(tokenizer)
        yielded, response = None, ""
        for token in tokens:
            token_id = int(token[0])
            if token_id == tokenizer.eos_token_id and yielded is not None:
                break
            response = yielded = process_response(text.push([token_id]))
            yield response, history.with_round(query, response)
        response = process_response(text.finish())
        if response != yielded:
            yield response, history.with_round(query, response)

    def _chat_input_ids(self, tokenizer: ChatGLMTokenizer, query: str, history: Any) -> torch.Tensor:
        """Return the ids [1, length] of a turn's prompt, on the model's device."""
        return torch.tensor([self._chat_ids(tokenizer, query, history)], device=input_device(self))

    def _chat_ids(self, tokenizer: ChatGLMTokenizer, query: str, history: Any) -> list[int]:
        if not isinstance(query, str) or not query.strip():
            raise ValueError(f"The query is {query!r}, but chat needs a text that is not empty.")
        self._check_tokenizer(tokenizer)
        ids = tokenizer.encode_text(History.of(history).prompt(query))
        return [*ids, tokenizer.gmask_token_id, tokenizer.bos_token_id]

    def _chat_settings(
        self,
        tokenizer: ChatGLMTokenizer,
        max_length: int,
        do_sample: bool,
        top_p: float,
        temperature: float,
        logits_processor: LogitsProcessorList | None,
        kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        """Return the arguments of ``generate`` for a chat turn, with a copy of the caller's list of processors."""
        processors = LogitsProcessorList(
            [*(logits_processor or []), InvalidScoreLogitsProcessor(tokenizer.blank_token_id)]
        )
        settings = {"do_sample": do_sample, "logits_processor": processors, **kwargs}
        given, file = settings.get("generation_config"), self.generation_config
        for name, value in _NOT_FROM_THE_FILE.items():
            if getattr(file, name, None) not in (None, value) and getattr(given, name, None) is None:
                settings.setdefault(name, value)
        if settings.get("max_new_tokens") is None and getattr(given, "max_new_tokens", None) is None:
            if max_length not in (None, MAX_LENGTH) or getattr(file, "max_new_tokens", None) is None:
                settings["max_length"] = MAX_LENGTH if max_length is None else max_length
        sources = (settings.get("stop_strings"), *(getattr(source, "stop_strings", None) for source in (given, file)))
        stop_strings = next((strings for strings in sources if strings not in (None, [], ())), None)
        if stop_strings is not None:
            settings |= {"stop_strings": _as_generated(stop_strings), "tokenizer": tokenizer}
        if do_sample:
            settings |= {"top_p": top_p, "temperature": temperature}
        return settings

    def _arguments(self, settings: dict[str, Any], length: int) -> dict[str, Any]:
        """Return ``settings`` as ``generate`` takes them for a prompt of ``length`` tokens.

        Raises:
            ValueError: ``max_length`` leaves no room.
        """
        if "max_length" in settings and getattr(self.generation_config, "max_new_tokens", None) is not None:
            # generate() prefers max_new_tokens, wherever it is given.
            max_length = settings.pop("max_length")
            if length >= max_length:
                raise no_room(length, max_length)
            settings["max_new_tokens"] = max_length - length
        return _in_one_place(settings)

    def _check_min_length(self, kwargs: dict[str, Any]) -> None:
        """Refuse ``min_length`` for padded rows: in the arguments, else in a given config, else in the checkpoint's.

        Raises:
            ValueError: the first that is found is not 0.
        """
        sources = [
            kwargs,
            *(vars(config) for config in (kwargs.get("generation_config"), self.generation_config) if config),
        ]
        min_length = next((source["min_length"] for source in sources if source.get("min_length") is not None), 0)
        if min_length:
            raise ValueError(
                f"min_length is {min_length}, but in a batch it would count the padding too; pass min_length=0 and "
                "min_new_tokens, which counts the answer alone."
            )

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


# A chat turn returns one text, whatever generation_config.json asks of generate(). The caller's arguments are kept.
_NOT_FROM_THE_FILE = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
}


def _as_generated(stop_strings: Any) -> list[str]:
    """Give stop strings half-width marks, the only ones in the vocabulary; ``process_response`` widens them later."""
    strings = [stop_strings] if isinstance(stop_strings, str) else stop_strings
    if not isinstance(strings, (list, tuple)) or not all(isinstance(text, str) and text for text in strings):
        raise ValueError(f"stop_strings is {stop_strings!r}, but it must be a text or a list of texts, none empty.")
    return [unicodedata.normalize("NFKC", text) for text in strings]


def _sequences(output: Any) -> torch.Tensor:
    """Return the ids of ``generate``'s result, also if a caller asks for more than ids."""
    return output if isinstance(output, torch.Tensor) else output.sequences


def _in_one_place(settings: dict[str, Any]) -> dict[str, Any]:
    """Move the arguments for which a given ``generation_config`` has a field into a copy of it, where they win.

    transformers 5 warns of settings in two places.
    """
    if settings.get("generation_config") is None:
        return settings
    config = copy.deepcopy(settings["generation_config"])
    arguments = {"generation_config": config}
    for name, value in settings.items():
        if name not in arguments:
            target = vars(config) if hasattr(config, name) else arguments
            target[name] = value
    return arguments


def _check_batch(queries: Sequence[str], histories: Sequence[Rounds | None] | None) -> None:
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
