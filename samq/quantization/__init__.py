"""How a plan becomes a file with compensated rounding (GPTQ), and what the layers' inputs tell before."""
