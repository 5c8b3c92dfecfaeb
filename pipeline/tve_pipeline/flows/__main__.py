"""python -m tve_pipeline.flows [reproduce | retrain | audit | sweep]

Uses the server of `make server` where one answers on the loopback address, else one of its own for as long as it takes.
"""

import os
import signal
import sys
import urllib.request
from importlib import import_module
from types import FrameType

from tve_pipeline.flows import FLOWS


def main(arguments: list[str]) -> None:
    signal.signal(signal.SIGTERM, leave)  # by default the process ends at once, and Prefect's temporary server stays
    name = arguments[0] if arguments else "reproduce"
    if name not in FLOWS or len(arguments) > 1:
        sys.exit(f"flows: expected one of {', '.join(FLOWS)}, got {' '.join(arguments)!r}")
    if "PREFECT_API_URL" not in os.environ and (url := running_server()):
        os.environ["PREFECT_API_URL"] = url  # before Prefect is imported, which reads it
    module = import_module(f"tve_pipeline.flows.{name}")
    getattr(module, name)()


def leave(number: int, frame: FrameType | None) -> None:
    """Exits as a shell reports the signal, after what is registered to run at exit."""
    sys.exit(128 + number)


def running_server() -> str | None:
    """Where the server of `make server` answers, or None."""
    port = os.environ.get("PREFECT_SERVER_API_PORT", "4200")
    url = f"http://127.0.0.1:{port}/api"
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return url if answer.status == 200 else None
    except OSError:
        return None


if __name__ == "__main__":
    main(sys.argv[1:])
