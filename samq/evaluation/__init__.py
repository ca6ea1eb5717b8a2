"""Measuring one candidate: fidelity, JSON compliance, speed and memory.

A flow runs this in a child process, `python -m samq.evaluation REQUEST.json`. So a crash in llama.cpp takes nothing else
down, and all memory is given back. The peak of GPU memory is the candidate's own.
"""

import os

# llama.cpp's threads meet after every operation of the graph, and libgomp lets them spin there for milliseconds. On a
# machine with other work that is ruinous: with both cores shared, 40 tokens took 118 s, and 0.6 s without the spinning.
# A short spin costs 8 % on an idle machine. libgomp reads this once, when llama_cpp loads it: hence here.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
