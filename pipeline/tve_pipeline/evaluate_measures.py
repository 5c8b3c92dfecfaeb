"""What the stage `evaluate` measures of each map, batch by batch: every number of scores.csv."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field, field_validator
from torch import Tensor, nn

from tve.backbones import Backbone
from tve.baselines.method import Answers, Method, Question
from tve.evaluator import CoalitionEvaluator
from tve.fidelity.areas import deletion_area, insertion_area
from tve.fidelity.detection import average_precision, mass_inside, pointing_hit
from tve.fidelity.road import road
from tve.fidelity.robustness import infidelity, sensitivity
from tve.fidelity.scores import Fidelity, ScoredMap, fidelity, target_probability
from tve.fidelity.statistics import positive_density
from tve.precision import RequestedPrecision
from tve.removal import Removal
from tve.samples import Sample, decode_image, decode_masks
from tve.transfer_rule import Output, PerPatch
from tve_pipeline.evaluate_parts import Part
from tve_pipeline.params import Count, Name, Section
from tve_pipeline.scenes import OBJECT_OF_TASK

TIMED_CALLS = 3
Key = tuple[str, str]  # task, map


class RobustnessParams(Section):
    """Section `evaluate.robustness`: measures that are dear, on the first pictures of the evaluation alone."""

    num_pictures: int = Field(ge=0)
    road_fractions: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(min_length=1)
    infidelity_sets: Count  # of patches, drawn for each picture
    sensitivity_radius: Annotated[float, Field(gt=0)]  # of the ball around a picture, in normalised pixels
    sensitivity_draws: int = Field(ge=2)  # from it


class EvaluateParams(Section):
    """Section `evaluate` of params.yaml."""

    split: Name
    num_pictures: Count | None  # drawn from the split by seed; null for all
    removals: tuple[Removal, ...] = Field(min_length=1)
    fractions: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(min_length=1)
    batch_size: Count
    memory_mib: Count
    precision: RequestedPrecision
    output: Output
    per_patch: PerPatch  # which maps of TVE and of exact windows are compared and shown first
    seed: int = Field(ge=0)
    num_heatmaps: int = Field(ge=0)
    robustness: RobustnessParams

    @field_validator("fractions")
    @classmethod
    def _ascend(cls, fractions: tuple[float, ...]) -> tuple[float, ...]:
        if any(low >= high for low, high in pairwise(fractions)):
            raise ValueError(f"expected ascending fractions, got {list(fractions)}")
        return fractions


@dataclass(frozen=True, slots=True)
class TaskHead:
    """A head, and what its classes are called."""

    classes: tuple[str, ...]
    head: nn.Linear


@dataclass(frozen=True, slots=True)
class Measuring:
    """One method's maps, measured on every task."""

    method: Method
    backbone: Backbone
    heads: Mapping[str, TaskHead]
    params: EvaluateParams
    evaluators: Mapping[str, CoalitionEvaluator]
    empty: Mapping[str, Tensor]  # G(∅) by removal operator
    trained_for: Removal
    mask_objects: tuple[str, ...]
    shown: frozenset[int]  # pictures whose maps are kept, by their place in the evaluation

    @classmethod
    def of(
        cls,
        method: Method,
        backbone: Backbone,
        removal: Removal,
        heads: Mapping[str, TaskHead],
        params: EvaluateParams,
        evaluators: Mapping[str, CoalitionEvaluator],
        mask_objects: Sequence[str],
        num_pictures: int,
    ) -> "Measuring":
        # Spread evenly: where shards are sorted by class, the first pictures would all be of one.
        shown = np.linspace(0, num_pictures - 1, min(params.num_heatmaps, num_pictures)).round().astype(int).tolist()
        return cls(
            method=method,
            backbone=backbone,
            heads=heads,
            params=params,
            evaluators=evaluators,
            empty={each: evaluators[each].empty() for each in params.removals},
            trained_for=removal,
            mask_objects=tuple(mask_objects),
            shown=frozenset(shown),
        )

    def part(self, samples: Sequence[Sample], first: int) -> Part:
        """Everything about some pictures, the first of which is number `first` of the evaluation.

        Raises:
            ValueError: a picture without a label.
        """
        device = next(self.backbone.parameters()).device
        images = torch.stack([self.backbone.preprocess(decode_image(each.image)) for each in samples]).to(device)
        keys = [sample.key for sample in samples]
        full_BD = self.evaluators[self.trained_for].full(images)
        with torch.no_grad():
            targets = {task: each.head(full_BD).argmax(-1) for task, each in self.heads.items()}
        questions = {task: Question(each.head, targets[task]) for task, each in self.heads.items()}
        clock = Clock(device)
        with clock("maps"):
            answers = self.method(images, keys, questions)
        about: dict[str, Any] = {}
        if first == 0:  # warm by now
            about = {"costs": _costs(answers), "seconds_per_map": self._seconds_per_map(images, keys, questions)}
        maps = {
            (task, name): ScoredMap(answer.map_BPP, self.heads[task].head, targets[task])
            for (task, name), answer in answers.items()
        }
        columns: dict[Key, dict[str, Tensor]] = {key: {} for key in maps}
        curves: dict[str, list[list[float]]] = {}
        with clock("fidelity"):
            for removal in self.params.removals:
                found = fidelity(self.evaluators[removal], images, full_BD, maps, self.params.fractions)
                for key, scores in found.items():
                    columns[key] |= self._fidelity_columns(removal, scores, maps[key], full_BD)
                    drops_2F = torch.stack([scores.removed_drop_BF, scores.kept_drop_BF]).double().sum(1)
                    curves["/".join((removal, *key))] = drops_2F.tolist()
        if self.mask_objects:
            objects_BOPP = torch.stack([object_patches(s, len(self.mask_objects), self.backbone) for s in samples])
            present = dict(zip(self.mask_objects, objects_BOPP.to(device).unbind(1), strict=True))
            for (task, name), scored in maps.items():
                columns[task, name] |= object_columns(scored.map_BPP, task, present)
        with clock("robustness"):
            some = max(0, min(len(samples), self.params.robustness.num_pictures - first))
            for key, robustness in self._robustness(images, keys, maps, some).items():
                columns[key] |= robustness
        rows = self._rows(samples, maps, full_BD, columns)
        return Part(rows, curves, clock.seconds, about, *self._shown(samples, images, maps, first))

    def _seconds_per_map(self, images: Tensor, keys: Sequence[str], questions: Mapping[str, Question]) -> float:
        """Seconds that the maps of one question take, a picture: the median of a few calls about one batch."""
        task, question = next(iter(questions.items()))
        clock = Clock(images.device)
        taken = []
        for number in range(TIMED_CALLS):
            with clock(str(number)):
                self.method(images, keys, {task: question})
            taken.append(clock.seconds[str(number)] / len(images))
        return sorted(taken)[len(taken) // 2]

    def _robustness(
        self, images_B3SS: Tensor, keys: Sequence[str], maps: Mapping[Key, ScoredMap], count: int
    ) -> dict[Key, dict[str, Tensor]]:
        """ROAD, infidelity and sensitivity of the first `count` pictures; NaN for the others."""
        if not count:
            return {}
        params, seed = self.params.robustness, self.params.seed
        images, names, evaluator = images_B3SS[:count], keys[:count], self.evaluators[self.trained_for]
        few = {key: ScoredMap(s.map_BPP[:count], s.head, s.target_B[:count]) for key, s in maps.items()}
        imputed = road(evaluator, images, names, few, params.road_fractions, seed)
        off = infidelity(evaluator, images, names, few, params.infidelity_sets, seed, "probability")
        moved = self._sensitivity(images, names, few)
        rest = images_B3SS.new_full((len(keys) - count,), torch.nan)
        return {
            key: {
                name: torch.cat([values_B.to(rest), rest])
                for name, values_B in (
                    ("road", imputed[key].score_B),
                    ("infidelity", off[key]),
                    ("sensitivity", moved[key]),
                )
            }
            for key in few
        }

    def _sensitivity(
        self, images_B3SS: Tensor, keys: Sequence[str], maps: Mapping[Key, ScoredMap]
    ) -> dict[Key, Tensor]:
        """Of all maps of all questions: each picture and its draws are explained once."""
        params, place = self.params.robustness, {key: number for number, key in enumerate(keys)}
        answered: dict[tuple[str, int], Answers] = {}  # of a picture, or of its draws, which are two at least

        def explained(images_M3SS: Tensor, key: str, of: Key) -> Tensor:
            if (key, len(images_M3SS)) not in answered:
                targets = {task: s.target_B[place[key]] for (task, _), s in maps.items()}
                questions = {
                    task: Question(self.heads[task].head, target.expand(len(images_M3SS)))
                    for task, target in targets.items()
                }
                answered[key, len(images_M3SS)] = self.method(images_M3SS, [key] * len(images_M3SS), questions)
            return answered[key, len(images_M3SS)][of].map_BPP

        return {
            of: sensitivity(
                lambda images, key, of=of: explained(images, key, of),  # type: ignore[misc]
                images_B3SS,
                keys,
                params.sensitivity_radius,
                params.sensitivity_draws,
                self.params.seed,
            )
            for of in maps
        }

    def _fidelity_columns(
        self, removal: Removal, scores: Fidelity, scored: ScoredMap, full_BD: Tensor
    ) -> dict[str, Tensor]:
        full_B = target_probability(scored.head, full_BD, scored.target_B)
        empty_B = target_probability(scored.head, self.empty[removal].expand_as(full_BD), scored.target_B)
        num_patches, fractions = self.backbone.patches_per_side**2, self.params.fractions
        return {
            f"{removal}_fidelity_plus": scores.plus_B,
            f"{removal}_fidelity_minus": scores.minus_B,
            f"{removal}_insertion": insertion_area(scores, full_B, empty_B, fractions, num_patches),
            f"{removal}_deletion": deletion_area(scores, full_B, empty_B, fractions, num_patches),
        }

    def _rows(
        self,
        samples: Sequence[Sample],
        maps: Mapping[Key, ScoredMap],
        full_BD: Tensor,
        columns: Mapping[Key, Mapping[str, Tensor]],
    ) -> list[dict[str, Any]]:
        rows = []
        for (task, name), scored in maps.items():
            classes = self.heads[task].classes
            probability_B = target_probability(scored.head, full_BD, scored.target_B).tolist()
            numbers = {column: values.double().tolist() for column, values in columns[task, name].items()}
            for place, sample in enumerate(samples):
                predicted, label = int(scored.target_B[place]), label_of(sample, task)
                rows.append(
                    {
                        "key": sample.key,
                        "task": task,
                        "map": name,
                        "predicted": classes[predicted],
                        "label": classes[label],
                        "correct": int(predicted == label),
                        "probability": probability_B[place],
                        **{column: values[place] for column, values in numbers.items()},
                    }
                )
        return rows

    def _shown(
        self, samples: Sequence[Sample], images_B3SS: Tensor, maps: Mapping[Key, ScoredMap], first: int
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        places = [place for place in range(len(samples)) if first + place in self.shown]
        if not places:
            return [], {}
        described = []
        for place in places:
            tasks = {task: scored.target_B[place] for (task, _), scored in maps.items()}
            classes = {
                task: {
                    "predicted": self.heads[task].classes[int(target)],
                    "label": self.heads[task].classes[label_of(samples[place], task)],
                }
                for task, target in tasks.items()
            }
            described.append({"key": samples[place].key, "name": samples[place].name, "tasks": classes})
        arrays = {
            f"{task}/{name}": scored.map_BPP[places].float().cpu().numpy() for (task, name), scored in maps.items()
        }
        return described, {"images": np.stack([self.backbone.pixels(images_B3SS[place]) for place in places]), **arrays}


def object_columns(map_BPP: Tensor, task: str, present: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How a map lies on the object that its task is about, and on the other one; nothing for tasks about neither."""
    if (own := OBJECT_OF_TASK.get(task)) is None:
        return {}
    (other,) = set(OBJECT_OF_TASK.values()) - {own}
    return {
        "mass_inside": mass_inside(map_BPP, present[own]),
        "pointing": pointing_hit(map_BPP, present[own]),
        "average_precision": average_precision(map_BPP, present[own]),
        "density_own": positive_density(map_BPP, present[own]),
        "density_other": positive_density(map_BPP, present[other]),
    }


def label_of(sample: Sample, task: str) -> int:
    """The picture's true class.

    Raises:
        ValueError: it has none.
    """
    if sample.labels is None or task not in sample.labels:
        raise ValueError(f"picture {sample.key}: expected a label for {task}, got {sample.labels}")
    return sample.labels[task]


def object_patches(sample: Sample, num_objects: int, backbone: Backbone) -> Tensor:
    """Patches that hold at least one pixel of each object, as the backbone sees the picture: bool [O, P, P]."""
    assert sample.masks is not None
    seen = []
    for mask_HW in decode_masks(sample.masks, num_objects):
        # The mask goes where the picture goes: resized, cropped.
        shown = backbone.pixels(backbone.preprocess(Image.fromarray(mask_HW.astype(np.uint8) * 255)))
        seen.append(torch.from_numpy(shown[..., 0] > 127))
    masks_OSS = torch.stack(seen)
    patches = backbone.patches_per_side
    pixels = backbone.image_size // patches
    return masks_OSS.reshape(num_objects, patches, pixels, patches, pixels).any(4).any(2)


class Clock:
    """Adds up the seconds that named parts take, on the device's own time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        started = self._now()
        yield
        self.seconds[part] += self._now() - started

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _costs(answers: Answers) -> dict[str, dict[str, int]]:
    """Passes of the backbone that a map takes, by map."""
    return {name: {"forwards": a.cost.forwards, "backwards": a.cost.backwards} for (_, name), a in answers.items()}
