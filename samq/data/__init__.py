"""Text and tokens: data sets, the hub, and the token sequences that calibration runs on."""
