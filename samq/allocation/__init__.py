"""Allocation of types to tensors: the types that tensors may have, their prices, and the threshold and budget methods."""
