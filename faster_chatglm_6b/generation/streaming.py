"""Tell ``generate`` to return a stream of tokens instead of finished sequences."""

from contextvars import ContextVar

# Set while stream_tokens asks generate() for an iterator over tokens instead of the finished sequences.
streaming: ContextVar[bool] = ContextVar("faster_chatglm_6b_streaming", default=False)


def no_single_next_token() -> ValueError:
    """Return the error for a stream from a search that does not go one token at a time."""
    return ValueError(
        "Streaming yields one token at a time, which beams and assisted decoding cannot; call generate() for them, or "
        "leave num_beams, prompt_lookup_num_tokens and assistant_model out."
    )
