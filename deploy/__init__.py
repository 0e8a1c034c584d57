"""From the best trial to a model people use: merge, GGUF, quantise, verify, chat."""
