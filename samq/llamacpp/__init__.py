"""llama.cpp: its programs as functions, and its library in this process."""
