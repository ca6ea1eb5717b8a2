"""Allocation of types to tensors: the ladder of types, their prices, and the threshold and budget methods."""
