"""A model that a server of this package holds, for a page that shows what it says."""

import json
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx

from faster_chatglm_6b.cli.errors import CommandError

SILENCE = 300.0  # seconds without a token: a request may wait in the server's queue


class RemoteModel:
    """What the page asks of a model, by the server's ``/stream``, which has ``stream_chat``'s arguments.

    Attributes:
        config: the model's longest sequence, as the server says.
    """

    def __init__(self, url: str, key: str | None = None):
        """Ask the server what it serves.

        Args:
            url: of the server, with or without the ``/v1`` that OpenAI's clients are given.
            key: its API key; the environment's ``FASTER_CHATGLM_6B_API_KEY``, the first of several, if None.

        Raises:
            CommandError: nothing answers there, or not as this package's server does.
        """
        key = key or os.environ.get("FASTER_CHATGLM_6B_API_KEY", "").split(",")[0].strip()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            # Proxies of the environment are for other hosts than a server of one's own.
            self._client = httpx.Client(
                base_url=url.rstrip("/").removesuffix("/v1"),
                headers=headers,
                timeout=httpx.Timeout(10.0, read=SILENCE),
                trust_env=False,
            )
            answer = self._client.get("/v1/models", timeout=10.0)
            if answer.status_code != 200:
                raise CommandError(f"--api {url}: {_reason(answer)}")
            self.config = SimpleNamespace(max_sequence_length=int(answer.json()["data"][0]["max_model_len"]))
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            raise CommandError(f"--api {url}: no server answers there ({type(error).__name__}: {error}).") from error
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise CommandError(f"--api {url}: what answers there is no server of faster_chatglm_6b.") from error

    def stream_chat(
        self,
        tokenizer: Any,
        query: str,
        history: list,
        max_length: int,
        do_sample: bool = True,
        top_p: float = 0.7,
        temperature: float = 0.95,
    ) -> Iterator[tuple[str, list]]:
        """Yield (response so far, history with it), as the model's own method does; closing it ends the answer.

        Args:
            tokenizer: not looked at; the server has its own.

        Raises:
            ValueError: the server refuses, fails or has gone; the text says why.
        """
        body = {
            "prompt": query,
            "history": history,
            "max_length": max_length,
            "top_p": top_p,
            "temperature": temperature if do_sample else 0,
        }
        try:
            with self._client.stream("POST", "/stream", json=body) as answer:
                if answer.status_code != 200:
                    answer.read()
                    raise ValueError(_reason(answer))
                for line in answer.iter_lines():
                    if line.startswith("data: "):
                        event = json.loads(line.removeprefix("data: "))
                        if "error" in event:
                            raise ValueError(event["error"]["message"])
                        yield event["response"], event["history"]
        except httpx.HTTPError as error:
            raise ValueError(f"The server has gone: {type(error).__name__}: {error}") from error


def _reason(answer: httpx.Response) -> str:
    """Return the sentence of the server's error, or the status."""
    try:
        return answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"the server answers with status {answer.status_code}."
