"""The parts of the tokenizer; ``tokenization_chatglm`` joins them."""
