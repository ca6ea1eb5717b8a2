"""Into production: gates, the evidence that they judge, and the aliases that they let move."""
