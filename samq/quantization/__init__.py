"""Plans become files: assembly from the ladder, and compensated rounding (GPTQ)."""
