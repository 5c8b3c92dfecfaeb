"""The report's sentences: the headline, the protocol, and what was cut short."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tve.fidelity.controls import CONTROLS
from tve.method_styles import style_of
from tve_pipeline.measure_names import FIDELITIES
from tve_pipeline.report_results import Results
from tve_pipeline.report_tables import in_table_order, number, percent, times, verdict_of

OWN = ("tve", "exact_windows")  # how the names of TVE's forms and of its reference begin
Words = tuple[str, list[dict[str, str]]]  # a sentence, and the large figures that it holds
Sections = Mapping[str, Any]  # sections of params.yaml, as they stand there

# What the headline takes for granted, said below it: the name, and a sentence or two.
TERMS = (
    (
        "ĝ and ĥ",
        "What the explainer predicts, for the window around each patch: the backbone's embedding with only that window "
        "kept (ĝ), and with that window removed (ĥ). R² is the share of the differences within a picture that it "
        "predicts.",
    ),
    (
        "F⁺ and F⁻",
        "Fidelity⁺ (F⁺) is the probability of the predicted class that is lost without the patches which a map ranks "
        "highest; higher is better. Fidelity⁻ (F⁻) is what is lost with those patches alone; lower is better.",
    ),
    (
        "Controls and exact windows",
        "Controls are maps that know nothing of the model: noise, blurred noise, the centre of the picture. Exact "
        "windows, the reference, are the embeddings evaluated for each window rather than predicted in one pass.",
    ),
)
GLOSSARY = {
    "TVE": "the explainer's ĝ and ĥ read through the task's head: one forward pass, nothing trained on the task; "
    "each patch has the share that sums over windows to u / 2; “window mean” is the paper’s map, "
    "the mean of u over the windows that hold a patch; “windows” is u itself",
    "TVE-Hg": "the same explainer read through the backbone's own classifier instead of the task's head: an ablation",
    "Untrained TVE": "an explainer of the same form with the weights that training starts from",
    "ViT-Shapley": "a network trained, on the same unlabelled pictures, to predict Shapley values of the backbone's "
    "own head (Covert et al., 2023), carried over to the task as TVE-Hg is",
    "Integrated Gradients, DeepLift, GradSHAP": "captum's, against the zero picture, for the logit, summed over each "
    "patch",
    "Grad-CAM, attention rollout, AttnLRP": "read from the last block's activations and gradients, from all attention "
    "(whatever the class), and by layer-wise relevance propagation (Achtibat et al., 2024)",
    "RISE, Kernel SHAP, LIME": "as many masked copies of the picture as the number says; RISE of random halves, the "
    "others captum's",
    "Occlusion": "captum's: the drop of the probability when a window slides over the picture",
    "Exact windows": "the quantity that TVE predicts, evaluated at two passes of the backbone per patch: a reference, "
    "not a bound",
    "Random": "uniform noise; “blurred” is the same noise under the window mean, since removal rewards blur",
    "Centre": "a Gaussian about the middle of the picture",
}


def headline(results: Results, trained_for: Mapping[str, str]) -> tuple[list[str], list[dict[str, str]]]:
    """The result in sentences, and as a few large figures {"value", "label"}; under the removal trained for."""
    beaten: dict[str, bool] = {}  # of each task: is every control beaten in both fidelities?
    shares: dict[str, dict[str, float]] = {fidelity: {} for fidelity in FIDELITIES}
    ratios: dict[str, float] = {}
    for (backbone, _), evaluation in results.evaluations.items():
        removal = trained_for[backbone]
        for task, result in evaluation.tasks.items():
            name = task if len(results.backbones) == 1 else f"{task} of {backbone}"
            differences = result.get("differences", {}).get(removal, {})
            found = [differences[control] for control in CONTROLS if control in differences]
            if found:
                beaten[name] = all(verdict_of(each[f], f) == "better" for each in found for f in FIDELITIES)
            for fidelity, share in result.get("share_of_way", {}).get(removal, {}).items():
                shares[fidelity] |= {} if share is None else {name: share}
            ratio = ((result.get("density") or {}).get(evaluation.reference) or {}).get("ratio")
            ratios |= {} if ratio is None else {name: ratio}

    parts = [_learned_words(results), _beaten_words(beaten), _rivals_words(results, trained_for)]
    parts += [_share_words(shares), _density_words(ratios)]
    sentences = [sentence for sentence, _ in parts if sentence]
    figures = [figure for _, large in parts for figure in large]
    return sentences or ["Nothing has been evaluated yet: every part of this report is missing."], figures


def protocol(results: Results, sections: Sections) -> list[str]:
    """How the numbers were made, a sentence each."""
    evaluate = sections["evaluate"]
    sentences = [_backbone_words(name, sections["backbones"][name]) for name in results.backbones]
    sentences += [_pretraining_words(name, found.metrics) for name, found in results.pretraining.items()]
    sentences.append(
        "Each task is a linear head on the frozen backbone's pooled embedding; the explainer never saw a head or "
        "a label."
    )
    evaluations = list(results.evaluations.values())
    if evaluations:
        fractions = sorted({point[0] for found in evaluations for points in found.curves.values() for point in points})
        levels = f"{len(fractions)} levels ({_range(fractions, percent)} of the patches)" if fractions else "levels"
        sentences += [
            "The watched probability p(y|x) is that of the class y which the task's head predicts for the whole "
            f"picture. S* are the patches of highest attribution, at {levels}; ties follow one fixed "
            "pseudo-random order.",
            "F⁺ = p(y|x) − p(y|x without S*), higher is better. F⁻ = p(y|x) − p(y|x with S* only), "
            "lower is better. Both are means over levels, then over pictures, ± the standard deviation over pictures.",
            "Intervals of TVE minus another method are 95 % paired bootstrap intervals over pictures, of "
            f"{_count(sections['compare']['num_bootstrap'])} resamples. Where an interval holds zero, nothing is "
            "claimed.",
            f"TVE and the exact windows are read as the {evaluate['output'].replace('_', '-')} of y. Maps are never "
            "rescaled or clipped for a score; for display alone each takes its own scale, centred at zero.",
        ]
    return sentences


def cut_short(results: Results, sections: Sections) -> list[str]:
    """What is smaller than it could be, a sentence each."""
    sentences = []
    for name, found in results.pretraining.items():
        metrics = found.metrics
        sentences.append(
            f"The explainer of {name} was trained for {_count(metrics['num_steps'])} steps"
            f"{_in_minutes(metrics)}; its curve shows whether it had levelled off."
        )
        if metrics.get("resumed_from_step"):
            sentences.append(f"That run was interrupted and resumed from step {_count(metrics['resumed_from_step'])}.")
    for name in results.backbones:
        if sections["backbones"][name]["weights"] == "random":
            sentences.append(
                f"The weights of {name} are random: its numbers show that the parts fit, and nothing else."
            )
    for (backbone, dataset), evaluation in results.evaluations.items():
        num_pictures, num_test = evaluation.metrics["num_pictures"], _num_test(results, backbone, dataset)
        if num_test is not None and num_pictures < num_test:
            sentences.append(
                f"{backbone} on {dataset} was scored on {_count(num_pictures)} of {_count(num_test)} test pictures."
            )
        for method, reason in evaluation.metrics.get("not_defined", {}).items():
            sentences.append(f"{style_of(method).label} is not defined for {backbone}: {reason}.")
    for dataset in results.datasets:
        splits = sections["datasets"].get(dataset, {}).get("splits") or {}
        for split, values in splits.items():
            limit = values.get("limit") if isinstance(values, dict) else None
            if limit is not None:
                sentences.append(f"{dataset}: at most {_count(limit)} pictures of the split {split} are used.")
    if sections["heads"]["max_train"] is not None:
        sentences.append(f"Heads are fitted on at most {_count(sections['heads']['max_train'])} pictures.")
    return sentences


def _learned_words(results: Results) -> Words:
    explainers = results.pretraining.values()
    if not explainers:
        return "", []
    kept, removed = ([found.metrics[f"r2_{name}"] for found in explainers] for name in ("kept", "removed"))
    return (
        f"After one label-free pre-training, the explainer predicts {_share(kept)} of what differs from window to "
        "window inside a held-out picture when the window alone is kept (R² of ĝ), and "
        f"{_share(removed)} when it is taken away (R² of ĥ).",
        [
            {"value": _range(kept, number), "label": "R² of ĝ, only the window kept"},
            {"value": _range(removed, number), "label": "R² of ĥ, the window removed"},
        ],
    )


def _share(r2: list[float]) -> str:
    """R² as a share; below 0 it is none: each picture's own mean would do better."""
    return _range(r2, percent) if min(r2) >= 0 else f"less than each picture's own mean would, {_range(r2, number)},"


def _beaten_words(beaten: Mapping[str, bool]) -> Words:
    if not beaten:
        return "", []
    number_beaten, of = sum(beaten.values()), len(beaten)
    others = ", ".join(name for name, won in beaten.items() if not won)
    where = f"all {of} tasks" if not others else f"{number_beaten} of {of} tasks (not on {others})"
    return (
        f"On {where}, TVE beats each of the controls in both fidelities with a 95 % interval clear of zero."
        if number_beaten
        else "On no task does TVE beat each of the controls in both fidelities with a 95 % interval clear of zero.",
        [{"value": f"{number_beaten} / {of}", "label": "tasks on which every control is beaten"}],
    )


def _rivals_words(results: Results, trained_for: Mapping[str, str]) -> Words:
    """Which other methods TVE wins against and loses to, over all tasks and both fidelities."""
    balance: dict[str, int] = {}  # fidelities won less those lost, with intervals clear of zero
    for (backbone, _), evaluation in results.evaluations.items():
        for result in evaluation.tasks.values():
            for method, found in result.get("differences", {}).get(trained_for[backbone], {}).items():
                if method in CONTROLS or method.startswith(OWN):
                    continue
                verdicts = [verdict_of(found[fidelity], fidelity) for fidelity in FIDELITIES]
                balance[method] = balance.get(method, 0) + verdicts.count("better") - verdicts.count("worse")
    won, lost = (_listed(method for method, n in balance.items() if sign * n > 0) for sign in (1, -1))
    if not won and not lost:
        return "", []
    return (
        "Counted over tasks and both fidelities, it is more often significantly better than worse against "
        f"{won or 'no other method'}, and more often worse against {lost or 'none'}.",
        [],
    )


def _listed(methods: Iterable[str]) -> str:
    """Methods in the order of the tables, each once: "RISE with 10, 20 masked copies; Attention rollout"."""
    budgets: dict[str, list[str]] = {}
    for method in in_table_order(methods):
        label = style_of(method).label
        name, _, budget = label.partition(", ")
        if budget.isdigit():
            budgets.setdefault(name, []).append(budget)
        else:
            budgets[label] = []
    return "; ".join(
        f"{name} with {', '.join(those)} masked copies" if those else name for name, those in budgets.items()
    )


def _share_words(shares: Mapping[str, Mapping[str, float]]) -> Words:
    plus, minus = (shares[fidelity] for fidelity in FIDELITIES)
    if not plus or not minus:
        return "", []
    covered = [_range(list(found.values()), percent) for found in (plus, minus)]
    least = [f", least on {min(found, key=lambda n: found[n])}" if len(found) > 1 else "" for found in (plus, minus)]
    return (
        f"It covers {covered[0]} (F⁺{least[0]}) and {covered[1]} (F⁻{least[1]}) of the way from random maps to the "
        "exact windows.",
        [
            {"value": covered[0], "label": "of the way to exact windows, F⁺"},
            {"value": covered[1], "label": "of the way to exact windows, F⁻"},
        ],
    )


def _density_words(ratios: Mapping[str, float]) -> Words:
    if not ratios:
        return "", []
    name = min(ratios, key=lambda task: ratios[task])
    return (
        f"The object that a task is about holds {times(ratios[name])} the positive attribution of the other one, patch "
        f"for patch, on {name}" + (", and more on every other task." if len(ratios) > 1 else "."),
        [
            {
                "value": ("≥ " if len(ratios) > 1 else "") + times(ratios[name]),
                "label": "attribution, own object over other",
            }
        ],
    )


def _num_test(results: Results, backbone: str, dataset: str) -> int | None:
    heads = results.heads.get((backbone, dataset), {})
    counts = [entry["num_test"] for entry in heads.values() if isinstance(entry, dict) and "num_test" in entry]
    return max(counts, default=None)


def _backbone_words(name: str, params: Mapping[str, Any]) -> str:
    side = params["patches_per_side"]
    weights = {"train": "trained in its own stage", "timm": "with timm's weights", "random": "with random weights"}
    origin = weights.get(params["weights"], "with given weights")
    arguments = ", ".join(f"{key}={value}" for key, value in params["timm_args"].items())
    shape = f" with {arguments}," if arguments else ""
    grid = f", on a grid of {side} × {side} patches" if side else ""
    model = f"timm's {params['architecture']}{shape} {origin}{grid}"
    return f"Backbone {name}: {model}, frozen; removal “{params['removal']}”."


def _pretraining_words(name: str, metrics: Mapping[str, Any]) -> str:
    batch, centres = metrics.get("batch_size"), metrics.get("centres_per_image")
    drawn = f" of {batch} pictures with {centres} windows each" if batch and centres else ""
    start = f", starting from: {metrics['initialisation']}" if metrics.get("initialisation") else ""
    held_out = f" R² is over {_count(n)} held-out pictures." if (n := metrics.get("num_evaluation_pictures")) else ""
    return f"Explainer of {name}: {_count(metrics['num_steps'])} steps{drawn}, no label read{start}.{held_out}"


def _in_minutes(metrics: Mapping[str, Any]) -> str:
    elapsed_s = metrics.get("elapsed_s")
    return (
        ""
        if elapsed_s is None
        else f" in {elapsed_s / 60:.0f} minutes"
        if elapsed_s >= 120
        else f" in {elapsed_s:.0f} s"
    )


def _count(value: int) -> str:
    return f"{value:,}"


def _range(values: list[float], write: Callable[[float], str | None]) -> str:
    low, high = str(write(min(values))), str(write(max(values)))
    unit = "\u00a0%"
    return low if low == high else f"{low.removesuffix(unit)} to {high}"
