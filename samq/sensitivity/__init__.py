"""How much each weight matters: gradients, Fisher information and Gram matrices of the model in torch."""
