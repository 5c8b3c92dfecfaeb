"""One interface for every explanation method: pictures, heads and classes to maps on the patch grid, and their price.

A method is asked about several heads at once, since some methods can answer all of them from the same evaluations of
the backbone; others answer one after the other. It may draw several maps for a question (by shares and by the
window mean; after 10, 20, 50 evaluations): each has a name of its own, a variant.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tve.backbones import Backbone
from tve.transfer_rule import Head, PerPatch

# What the maps of a meta-attribution are called, after its own name.
SUFFIXES: dict[PerPatch, str] = {"share": "", "mean": "_mean", "window": "_u"}


@dataclass(frozen=True, slots=True)
class Question:
    """Of each picture: why does this head decide for this class?"""

    head: Head
    target_B: Tensor  # int64, the class that is explained


@dataclass(frozen=True, slots=True)
class Cost:
    """What one map of one picture takes, where nothing is shared with other heads.

    A masked copy of the picture counts as a forward pass, whatever part of it is kept. Passes of other networks than
    the backbone, such as an explainer's, are not counted here: seconds tell them.
    """

    forwards: int  # of the backbone
    backwards: int = 0  # through the backbone

    def __str__(self) -> str:
        return f"{self.forwards} + {self.backwards}" if self.backwards else str(self.forwards)


@dataclass(frozen=True, slots=True)
class Answer:
    """A map of each picture, higher where a patch speaks more for the class; neither rescaled nor clipped."""

    map_BPP: Tensor  # float32
    cost: Cost


# By (question, variant).
Answers = Mapping[tuple[str, str], Answer]


class Method(Protocol):
    """Explains pictures. The same picture, key, question and settings give the same map, whatever the batch."""

    @property
    def variants(self) -> tuple[str, ...]:
        """The names of the maps that each question gets, the method's own name first."""
        ...

    def __call__(self, images_B3SS: Tensor, keys: Sequence[str], questions: Mapping[str, Question]) -> Answers:
        """Maps for every question and variant.

        Args:
            images_B3SS: normalised pictures, float32, on the backbone's device.
            keys: the pictures' names, from which methods that draw take their seed.
            questions: by any name.
        """
        ...


def generator_of(seed: int, *words: str) -> torch.Generator:
    """A CPU generator that depends on the seed and the words (a picture's key, a method) alone."""
    digest = hashlib.sha256(" ".join([str(seed), *words]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]))


def no_classifier(backbone: Backbone) -> str:
    """Why there is no H_g to explain or to carry over, or "" where there is."""
    return "" if backbone.classifier() is not None else "the backbone has no single linear classifier of its own"
