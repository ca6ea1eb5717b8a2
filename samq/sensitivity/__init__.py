"""Sensitivity of the loss to the weights: gradients, Fisher information and Gram matrices of the model in torch."""
