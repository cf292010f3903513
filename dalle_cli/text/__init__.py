"""BPE: training a tokenizer and encoding captions."""
