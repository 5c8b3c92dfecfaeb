"""Where a stage is called from a command line: its arguments are checked, and a user's mistake is one line.

if __name__ == "__main__":
    run_stage("heads", main, "BACKBONE", "DATASET")
"""

import sys
from collections.abc import Callable, Sequence

from tve_pipeline.lineage.evidence import leaving_evidence
from tve_pipeline.params import require_defined

SECTION_OF = {"BACKBONE": "backbones", "DATASET": "datasets", "METHOD": "methods"}


def run_stage(stage: str, main: Callable[[list[str]], None], *usage: str) -> None:
    """Calls `main` with the command line's arguments; what a user can mend ends as one line and exit code 1.

    Args:
        stage: its name, which the line begins with.
        main: the stage.
        usage: what each argument is, BACKBONE, DATASET or METHOD: a name that params.yaml must define.
    """
    arguments = sys.argv[1:]
    try:
        require_arguments(arguments, usage)
        with leaving_evidence():
            main(arguments)
    except FileNotFoundError as error:
        # The system's own error names a file alone; ours say what to do.
        made = f"expected {error.filename}, which does not exist; `dvc repro` makes what a stage reads"
        sys.exit(f"{stage}: {made if error.filename else error}")
    except ValueError as error:
        sys.exit(f"{stage}: {error}")


def require_arguments(arguments: Sequence[str], usage: Sequence[str]) -> None:
    """Raises ValueError unless there is an argument for each word of `usage`, and params.yaml defines its name."""
    if len(arguments) != len(usage):
        raise ValueError(f"expected {' '.join(usage) or 'no arguments'}, got {list(arguments)}")
    for word, name in zip(usage, arguments, strict=True):
        require_defined(SECTION_OF[word], name)
