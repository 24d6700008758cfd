"""How a conversation is written as one prompt; knows no tokenizer and no model."""
