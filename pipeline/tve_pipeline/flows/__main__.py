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

ASK_AGAIN_S = 5.0


def main(arguments: list[str]) -> None:
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, leave)  # by default the process ends at once, and Prefect's temporary server stays
    name = arguments[0] if arguments else "reproduce"
    if name not in FLOWS or len(arguments) > 1:
        sys.exit(f"flows: expected one of {', '.join(FLOWS)}, got {' '.join(arguments)!r}")
    if "PREFECT_API_URL" not in os.environ and (url := running_server()):
        os.environ["PREFECT_API_URL"] = url  # before Prefect is imported, which reads it
    module = import_module(f"tve_pipeline.flows.{name}")
    try:
        getattr(module, name)()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def leave(number: int, frame: FrameType | None) -> None:
    """Exits as a shell reports SIGTERM, after what is registered to run at exit.

    Where the signal meets code that lets no exception out, such as a finaliser, the exit is lost: so it is asked again.
    """
    signal.setitimer(signal.ITIMER_REAL, ASK_AGAIN_S)
    sys.exit(128 + signal.SIGTERM)


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
