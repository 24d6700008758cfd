"""The steps of the captured loop: a prompt's rows, and one token of every sequence, on the same cache."""
