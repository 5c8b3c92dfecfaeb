"""Where every number came from: signed evidence of each stage, and the audit that recomputes it from bytes.

`evidence` writes, in the process of a stage; `audit` reads, and imports neither torch nor DVC. docs/lineage.md says
what is promised, against what, and what is not.
"""
