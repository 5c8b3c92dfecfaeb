"""python -m tve_pipeline.flows [reproduce | audit]"""

import sys
from collections.abc import Callable

from tve_pipeline.flows.audit import audit
from tve_pipeline.flows.reproduce import reproduce

FLOWS: dict[str, Callable[[], object]] = {"reproduce": reproduce, "audit": audit}

if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else "reproduce"
    if name not in FLOWS:
        sys.exit(f"flows: expected one of {sorted(FLOWS)}, got {name!r}")
    FLOWS[name]()
