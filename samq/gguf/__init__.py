"""The GGUF format: files, headers, types, the codes inside blocks, and the audit of a finished file."""
