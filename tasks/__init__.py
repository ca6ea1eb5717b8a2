"""One module a stage: the Prefect task around one function of samq."""
