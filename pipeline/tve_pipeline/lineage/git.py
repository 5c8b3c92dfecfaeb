"""What git says of a repository."""

import subprocess
from pathlib import Path


def git(*arguments: str, root: Path = Path(".")) -> bytes | None:
    """What a git command prints; None where it fails, or where there is no git."""
    try:
        finished = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True)
    except OSError:
        return None
    return finished.stdout if finished.returncode == 0 else None
