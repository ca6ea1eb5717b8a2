"""SAMQ: sensitivity-aware mixed quantization of causal language models to GGUF."""

__version__ = "0.1.0"
