"""lm-eval's tasks on a GGUF: the model adapter, and what is asked of it."""
