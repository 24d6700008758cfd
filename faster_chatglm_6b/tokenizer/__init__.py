"""What the tokenizer is made of; ``tokenization_chatglm`` joins it."""
