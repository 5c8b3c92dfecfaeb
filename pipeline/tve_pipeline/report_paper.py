"""The paper's table beside ours: its rows, and a mark for each cell that TVE wins, ties or loses.

The paper reads TVE by the window mean, which stands here beside the reading that is compared.

Numbers of the paper: TVE, ICML 2024, arXiv 2312.15359, its table of fidelities at 224 px after pre-training on
ImageNet; means over pictures, F⁺ / F⁻.
"""

from typing import Any

from tve.method_styles import style_of
from tve_pipeline.measure_names import FIDELITIES
from tve_pipeline.report_results import Results
from tve_pipeline.report_tables import columns_of, number, verdict_of

ROWS = {"vit_shapley": "vit_shapley", "tve_hg": "tve_hg", "tve_mean": "tve", "tve": ""}  # ours, and the paper's
PAPER_TASKS = ("Cats-vs-dogs", "Imagenette", "CIFAR-10")
# By how an architecture's name begins: what the paper calls it, and F⁺, F⁻ of each method on each task.
PAPER: dict[str, tuple[str, dict[str, tuple[tuple[float, float], ...]]]] = {
    "vit": (
        "ViT-Base",
        {
            "vit_shapley": ((0.11, 0.13), (0.25, 0.25), (0.36, 0.36)),
            "tve_hg": ((0.14, 0.10), (0.29, 0.18), (0.39, 0.34)),
            "tve": ((0.16, 0.09), (0.33, 0.19), (0.40, 0.31)),
        },
    ),
    "swin": (
        "Swin-Base",
        {
            "vit_shapley": ((0.09, 0.11), (0.24, 0.24), (0.25, 0.28)),
            "tve_hg": ((0.14, 0.10), (0.29, 0.24), (0.26, 0.27)),
            "tve": ((0.14, 0.09), (0.29, 0.22), (0.31, 0.24)),
        },
    ),
    "deit": (
        "DeiT-Base",
        {
            "vit_shapley": ((0.12, 0.10), (0.22, 0.29), (0.28, 0.24)),
            "tve_hg": ((0.13, 0.09), (0.33, 0.25), (0.32, 0.24)),
            "tve": ((0.15, 0.08), (0.33, 0.24), (0.30, 0.22)),
        },
    ),
}


def beside_the_paper(results: Results, backbone: str, architecture: str, removal: str) -> dict[str, Any] | None:
    """One backbone's rows: {"paper", "ours", "rows"}; a row {"label", "paper", "ours"}, cells of text and marks.

    None where the paper has no backbone of that kind, or nothing of ours is there.
    """
    kind = next((name for name in PAPER if architecture.startswith(name)), None)
    columns = [column for column in columns_of(results, backbone) if column["result"]]
    if kind is None or not columns:
        return None
    called, theirs = PAPER[kind]
    rows = []
    for method, in_paper in ROWS.items():
        ours = []
        for column in columns:
            scores = column["result"]["methods"].get(method, {}).get(removal)
            difference = column["result"].get("differences", {}).get(removal, {}).get(method)
            ours.append(
                [
                    {
                        "mean": number(scores[fidelity]["mean"]) if scores else "–",
                        "verdict": verdict_of(difference[fidelity], fidelity) if difference else "",
                    }
                    for fidelity in FIDELITIES
                ]
            )
        rows.append(
            {
                "label": style_of(method).label,
                "paper": [f"{number(plus, 2)} / {number(minus, 2)}" for plus, minus in theirs[in_paper]]
                if in_paper
                else ["–"] * len(PAPER_TASKS),
                "ours": ours,
            }
        )
    return {"called": called, "tasks": [column["task"] for column in columns], "rows": rows}
