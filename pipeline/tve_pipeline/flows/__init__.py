"""Prefect flows over DVC's own stage graph. DVC decides what is stale and keeps outputs; Prefect shows and records.

`reproduce` runs what is stale, `audit` holds what is there against its evidence; `processes` is how a stage is run and
what its end means.
"""
