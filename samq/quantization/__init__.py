"""How a plan becomes a file: recipes, assembly from the ladder, and compensated rounding (GPTQ)."""
