"""Promotion to production: the gates, the evidence that they judge, and the aliases that a passed judgement moves."""
