"""lm-eval's tasks on a GGUF: the model adapter, the tasks, and the results as metrics and items."""
