"""Which type each tensor gets: prices, the ladder of types, and the policies that spend a budget or follow a threshold."""
