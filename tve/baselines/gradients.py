"""Gradient baselines through captum: Integrated Gradients, DeepLift and GradientShap, summed over a patch's pixels.

    Integrated Gradients   a = x * mean over t in [0, 1] of df(t x)/dx
    GradientShap           a = mean over t and noise e of (x + e) * df(t (x + e))/dx
    DeepLift               a = x * df(x)/dx, with delta out / delta in for the slope of each activation

Sundararajan et al., arXiv 1703.01365; Lundberg and Lee, arXiv 1705.07874; Shrikumar et al., arXiv 1704.02685, its
rescale rule in the form of Ancona et al., arXiv 1711.06104.

f is the output of the explained class: its logit by default, since the gradient of a probability near 1 vanishes. The
reference of all three is the zero picture, which is what removal `zero` leaves of a picture. Maps are signed; those of
Integrated Gradients sum to f(x) - f(0), up to the error of their quadrature.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from timm.layers.activations import GELU, GELUTanh, QuickGELU
from torch import Tensor, nn

from tve.backbones import Backbone
from tve.baselines.method import Answer, Answers, Cost, Question, generator_of
from tve.transfer_rule import Head, Output, class_of_each, of_class, read, require_head

# Activations to which captum 0.9 has no rescale rule.
SMOOTH_ACTIVATIONS = (nn.GELU, nn.SiLU, GELU, GELUTanh, QuickGELU)
# Below it delta out / delta in is rounding, in float32, and the gradient is the better slope.
SMALLEST_DELTA = 1e-4

# Attributions [b, 3, S, S] of some pictures, from their classes [b] and keys.
Attribute = Callable[["ClassOutput", Tensor, Tensor, Sequence[str]], Tensor]


@dataclass(frozen=True, slots=True)
class IntegratedGradients:
    """The gradient along the straight way from the zero picture, by Gauss-Legendre quadrature (captum's default)."""

    backbone: Backbone
    num_steps: int = 50
    output: Output = "logit"
    pass_size: int = 32  # pictures in one pass of the backbone, at most

    def __post_init__(self) -> None:
        _require_positive(num_steps=self.num_steps, pass_size=self.pass_size)

    @property
    def variants(self) -> tuple[str, ...]:
        return ("integrated_gradients",)

    def __call__(self, images_B3SS: Tensor, keys: Sequence[str], questions: Mapping[str, Question]) -> Answers:
        from captum import attr

        def attribute(output: ClassOutput, images_b3SS: Tensor, target_b: Tensor, keys: Sequence[str]) -> Tensor:
            found: Tensor = attr.IntegratedGradients(output).attribute(
                images_b3SS,
                torch.zeros_like(images_b3SS),
                additional_forward_args=target_b,
                n_steps=self.num_steps,
                internal_batch_size=max(self.pass_size, len(images_b3SS)),
            )
            return found

        maps = patch_maps(self.backbone, images_B3SS, keys, questions, self.output, self.pass_size, attribute)
        return _answers(maps, self.variants[0], Cost(self.num_steps, self.num_steps))


@dataclass(frozen=True, slots=True)
class DeepLift:
    """The rescale rule at activations, the gradient at x everywhere else.

    captum knows a rule for ReLU, Tanh and the like; that for GELU and SiLU is added here. Norms and attention have
    none: timm calls softmax as a function, out of captum's reach, and captum's rule for a softmax module subtracts a
    mean over the whole batch, so such a module is left to its gradient, too. Without norms and attention maps sum to
    f(x) - f(0). Of a vision transformer they do not: on noise pictures the sum missed it by 0.6 to 1.1 times its size
    (root mean squares, six untrained models of 2 blocks of width 32 or 6 of width 64).
    """

    backbone: Backbone
    output: Output = "logit"
    pass_size: int = 32  # pictures and references in one pass of the backbone, at most, but no less than one of each

    def __post_init__(self) -> None:
        _require_positive(pass_size=self.pass_size)

    @property
    def variants(self) -> tuple[str, ...]:
        return ("deep_lift",)

    def __call__(self, images_B3SS: Tensor, keys: Sequence[str], questions: Mapping[str, Question]) -> Answers:
        def attribute(output: ClassOutput, images_b3SS: Tensor, target_b: Tensor, keys: Sequence[str]) -> Tensor:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Setting forward, backward hooks", UserWarning)
                found: Tensor = _rescaled()(output, eps=SMALLEST_DELTA).attribute(
                    images_b3SS.clone().requires_grad_(),
                    torch.zeros_like(images_b3SS),
                    additional_forward_args=target_b,
                )
            return found

        pairs = max(self.pass_size // 2, 1)
        maps = patch_maps(self.backbone, images_B3SS, keys, questions, self.output, pairs, attribute)
        # The reference runs along, forwards and backwards.
        return _answers(maps, self.variants[0], Cost(2, 2))


@dataclass(frozen=True, slots=True)
class GradientShap:
    """The gradient at random places between the zero picture and the noisy picture.

    The draws depend on the seed and the picture's key alone: all questions share them, and the generators of torch and
    numpy are left as they were. They differ between CPU and GPU.
    """

    backbone: Backbone
    seed: int
    num_samples: int = 50
    noise: float = 0.1  # standard deviation, in normalised pixels
    output: Output = "logit"
    pass_size: int = 32  # draws in one pass of the backbone, at most

    def __post_init__(self) -> None:
        _require_positive(num_samples=self.num_samples, pass_size=self.pass_size)
        if self.noise < 0:
            raise ValueError(f"noise: expected a standard deviation of at least 0, got {self.noise}")

    @property
    def variants(self) -> tuple[str, ...]:
        return ("gradient_shap",)

    def __call__(self, images_B3SS: Tensor, keys: Sequence[str], questions: Mapping[str, Question]) -> Answers:
        from captum import attr

        def attribute(output: ClassOutput, image_13SS: Tensor, target_1: Tensor, keys: Sequence[str]) -> Tensor:
            total_13SS = torch.zeros_like(image_13SS)
            with _seeded(self.seed, *keys, self.variants[0]):
                for start in range(0, self.num_samples, self.pass_size):
                    num_draws = min(self.pass_size, self.num_samples - start)
                    total_13SS += num_draws * attr.GradientShap(output).attribute(
                        image_13SS,
                        torch.zeros_like(image_13SS),
                        n_samples=num_draws,
                        stdevs=float(self.noise),
                        additional_forward_args=target_1,
                    )
            return total_13SS / self.num_samples

        maps = patch_maps(self.backbone, images_B3SS, keys, questions, self.output, 1, attribute)
        return _answers(maps, self.variants[0], Cost(self.num_samples, self.num_samples))


class ClassOutput(nn.Module):
    """f: pictures [B, 3, S, S] and their classes [B] to the outputs [B] of these classes, through backbone and head."""

    def __init__(self, backbone: Backbone, head: Head, output: Output) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.output: Output = output

    def forward(self, images_B3SS: Tensor, target_B: Tensor) -> Tensor:
        embedding_BD = self.backbone.pool(self.backbone.model.forward_features(images_B3SS))  # type: ignore[operator]
        return of_class(read(self.head, embedding_BD, self.output)[..., None, None], target_B).flatten()


def patch_maps(
    backbone: Backbone,
    images_B3SS: Tensor,
    keys: Sequence[str],
    questions: Mapping[str, Question],
    output: Output,
    num_together: int,
    attribute: Attribute,
) -> dict[str, Tensor]:
    """Of each question the attributions [B, P, P], float32, summed over colours and the pixels of a patch.

    Args:
        backbone: the explained encoder.
        images_B3SS: normalised pictures.
        keys: their names.
        questions: by any name.
        output: what of the class is explained.
        num_together: pictures that are given to `attribute` at once, at most.
        attribute: attributions of pixels.

    Raises:
        ValueError: pictures that are not the backbone's, another number of keys or classes, a head that does not fit,
            or a class that it does not have.
    """
    backbone.require_images(images_B3SS)
    if len(keys) != len(images_B3SS):
        raise ValueError(f"keys: expected one a picture, {len(images_B3SS)}, got {len(keys)}")
    images_B3SS = images_B3SS.detach()
    patch_size = backbone.image_size // backbone.patches_per_side
    maps = {}
    for name, asked in questions.items():
        require_head(asked.head, images_B3SS.new_zeros(1, backbone.embed_dim))
        target_B = class_of_each(asked.target_B, len(images_B3SS)).to(images_B3SS.device)
        explained = ClassOutput(backbone, asked.head, output)
        parts = []
        for start in range(0, len(images_B3SS), num_together):
            part = slice(start, start + num_together)
            found_b3SS = attribute(explained, images_B3SS[part], target_B[part], keys[part])
            parts.append(found_b3SS.detach().float().sum(1))
        pixels_BSS = torch.cat(parts) if parts else images_B3SS.float().sum(1)
        maps[name] = nn.functional.avg_pool2d(pixels_BSS, patch_size, divisor_override=1)
    return maps


def _answers(maps: Mapping[str, Tensor], variant: str, cost: Cost) -> Answers:
    return {(name, variant): Answer(map_BPP, cost) for name, map_BPP in maps.items()}


def _require_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")


@contextmanager
def _seeded(seed: int, *words: str) -> Iterator[None]:
    """Seeds the generators of torch and numpy, which captum draws from, and puts them back."""
    own_seed = generator_of(seed, *words).initial_seed()
    numpy_state = np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(own_seed)
            np.random.seed(own_seed % 2**32)
            yield
    finally:
        np.random.set_state(numpy_state)


@cache
def _rescaled() -> Callable[..., Any]:
    """A class, made when it is first asked for: the library imports where captum is not installed."""
    from captum import attr

    class Rescaled(attr.DeepLift):  # type: ignore[misc]
        """captum's DeepLift, with the rescale rule for smooth activations and without its rule for softmax."""

        def _is_non_linear(self, module: nn.Module) -> bool:
            known: bool = super()._is_non_linear(module)
            return isinstance(module, SMOOTH_ACTIVATIONS) or (known and not isinstance(module, nn.Softmax))

        def _backward_hook(self, module: nn.Module, grad_input: Tensor, grad_output: Tensor) -> Tensor:
            if not isinstance(module, SMOOTH_ACTIVATIONS):
                slope: Tensor = super()._backward_hook(module, grad_input, grad_output)
                return slope
            if not self.satisfies_attribute_criteria(module):
                raise ValueError(
                    f"backbone: expected activations that are called once a pass, got {module} called again; DeepLift "
                    "cannot tell its calls apart"
                )
            # The first half of the rows are pictures, the second their references.
            (given, reference), (result, of_reference) = module.input.chunk(2), module.output.chunk(2)  # type: ignore[operator]
            del module.input, module.output
            delta_in, delta_out = (torch.cat([delta, delta]) for delta in (given - reference, result - of_reference))
            return torch.where(delta_in.abs() < self.eps, grad_input, grad_output * delta_out / delta_in)

        def _remove_hooks(self, extra_hooks_to_remove: list[torch.utils.hooks.RemovableHandle]) -> None:
            super()._remove_hooks(extra_hooks_to_remove)
            # captum keeps what a module saw on the module, until a gradient reaches it.
            for module in self.model.modules():
                if self._is_non_linear(module):
                    vars(module).pop("input", None)
                    vars(module).pop("output", None)

    return Rescaled
