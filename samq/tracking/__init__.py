"""MLflow: a sweep as runs, and the registry of models."""
