"""llama.cpp: where its programs are, how they are run, and its library in this process."""
