"""The GGUF format: files, types, the codes inside blocks, and the audit of a finished file."""
