"""Define the logits processor that chat adds to transformers' own."""

import torch
from transformers.generation.logits_process import LogitsProcessor


class InvalidScoreLogitsProcessor(LogitsProcessor):
    """Make a row whose logits overflowed (NaN or +inf) say a blank instead of failing.

    Unlike stock's, it looks at each row alone and accepts -inf, by which other processors forbid a token.
    """

    score = 5e4

    def __init__(self, token_id: int = 5):
        """Set the id of the blank: 5, or 20005 if image tokens come first (150528 ids)."""
        self.token_id = token_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores [B, vocab_size] with invalid rows replaced."""
        invalid = (scores.isnan() | (scores == torch.inf)).any(dim=-1, keepdim=True)
        certain = torch.zeros_like(scores)
        certain[:, self.token_id] = self.score
        return torch.where(invalid, certain, scores)
