"""Write a conversation as one prompt, without a tokenizer or a model."""
