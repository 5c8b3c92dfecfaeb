"""Prefect flows over DVC's own stage graph. DVC decides what is stale and keeps outputs; Prefect shows and records.

`reproduce` runs what is stale, `retrain` finds backbones without a valid explainer, `audit` holds what is there
against its evidence, `sweep` sees to what killed runs left. Below them: `stages` (DVC's stages as tasks), `processes`
and `supervise` (how a stage is run and what its end means), `ownership` (who writes, who lives), `registry` (which
explainers are in service).
"""

FLOWS = ("reproduce", "retrain", "audit", "sweep")
