"""From a model's name to its weights: finding files, reading tensors by reference, tokenizers."""
