"""What a model is: its files, configuration, tokenizer protocol, chat template and where to get it."""
