"""What methods are called and how they look, in every figure, table and legend."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class LineStyle:
    """How a method looks in every figure and legend."""

    label: str
    colour: str
    dash: tuple[float, ...] = ()  # on, off, … in widths of the line; solid where empty
    width: float = 1.3

    @property
    def scaled_dash(self) -> tuple[float, ...]:
        """The dash as a plot draws it: in multiples of the line's width."""
        return tuple(round(length * self.width, 2) for length in self.dash)


# Okabe and Ito's palette for what is compared; greys, told apart by their dashes, for the controls. The exact windows
# are the ink of the page, which a dark page inverts.
INK = "#1a1c20"
METHOD_STYLES: dict[str, LineStyle] = {
    "tve": LineStyle("TVE", "#0072B2", width=2.4),
    "tve_mean": LineStyle("TVE, window mean", "#56B4E9", (4, 1.5)),
    "tve_u": LineStyle("TVE, windows", "#56B4E9", (1, 1.4)),
    "tve_hg": LineStyle("TVE-Hg", "#CC79A7", width=1.7),
    "tve_untrained": LineStyle("Untrained TVE", "#8fb8d6", (1, 1.4)),
    "tve_untrained_mean": LineStyle("Untrained, window mean", "#8fb8d6", (4, 1.5)),
    "tve_untrained_u": LineStyle("Untrained, windows", "#8fb8d6", (6, 1.5, 1, 1.5)),
    "tve_two_networks": LineStyle("TVE, two networks", "#004b75", (6, 1.5, 1, 1.5)),
    "tve_two_networks_mean": LineStyle("Two networks, window mean", "#004b75", (4, 1.5)),
    "tve_two_networks_u": LineStyle("Two networks, windows", "#004b75", (1, 1.4)),
    "vit_shapley": LineStyle("ViT-Shapley", "#D55E00", width=1.7),
    "integrated_gradients": LineStyle("Integrated Gradients", "#b59f00", (6, 1.5, 1, 1.5)),
    "deep_lift": LineStyle("DeepLift", "#b59f00", (1, 1.4)),
    "gradient_shap": LineStyle("GradSHAP", "#b59f00", (4, 1.5)),
    "grad_cam": LineStyle("Grad-CAM", "#7a6a00"),
    "rollout": LineStyle("Attention rollout", "#7a6a00", (4, 1.5)),
    "attn_lrp": LineStyle("AttnLRP", "#009E73", width=1.7),
    "occlusion": LineStyle("Occlusion", "#8d5a97"),
    "rise": LineStyle("RISE", "#CC79A7", (6, 1.5, 1, 1.5), 1.5),
    "kernel_shap": LineStyle("Kernel SHAP", "#8d5a97", (4, 1.5), 1.5),
    "lime": LineStyle("LIME", "#8d5a97", (1, 1.4), 1.5),
    "exact_windows": LineStyle("Exact windows", INK, (5, 1.8), 1.7),
    "exact_windows_mean": LineStyle("Exact, window mean", "#5b6168", (4, 1.5)),
    "exact_windows_u": LineStyle("Exact, windows", "#5b6168", (2, 1.5)),
    "random": LineStyle("Random", "#8c9199"),
    "random_blurred": LineStyle("Random, blurred", "#8c9199", (1, 1.4), 1.6),
    "centre": LineStyle("Centre", "#E69F00", (6, 1.5, 1, 1.5)),
}


def style_of(method: str) -> LineStyle:
    """The look of a method; a method that is not known gets its own name and a plain green line.

    A number at the end of a name is a budget of evaluations.

    >>> style_of("rise_200").label
    'RISE, 200'
    """
    if method in METHOD_STYLES:
        return METHOD_STYLES[method]
    base, _, budget = method.rpartition("_")
    if base in METHOD_STYLES and budget.isdigit():
        return replace(METHOD_STYLES[base], label=f"{METHOD_STYLES[base].label}, {budget}")
    return LineStyle(method, "#009E73")
