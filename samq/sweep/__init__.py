"""The candidates of a run: selection, paired comparisons, and what serving them costs."""
