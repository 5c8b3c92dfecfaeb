"""ViT-Shapley: a network that predicts the Shapley values of a picture's patches, for all classes in one pass.

    v(S)  = p(. | x_S)                                        probabilities of the backbone's own classes
    phi_i = raw_i + (v(Z) - v(∅) - sum over j of raw_j) / N    they sum to v(Z) - v(∅), whatever raw is: efficiency

Covert, Kim and Lee, "Learning to estimate Shapley values with vision transformers" (ICLR 2023, arXiv 2206.05282). v
comes from a surrogate, a copy of the backbone with its classifier that was tuned on parts of pictures; how it and the
network are trained is in `tve.baselines.vit_shapley_training`.

The paper's network is a vision transformer, tuned from the surrogate, one more block and three layers on each token.
Here the extra block reads `Backbone.features`, through a projection to its own width: levels on the patch grid and, as
one more token, the embedding. So every timm model is served alike.

Another task than the backbone's own gets the map of the class that the backbone's own head predicts (TVE, arXiv
2312.15359, section 5).
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from timm.layers.norm import LayerNorm2d
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from tve.backbones import Backbone, damage_named, open_backbone, save_backbone, trainable_copy
from tve.baselines.method import Answer, Answers, Cost, Question
from tve.coalitions import require_whole
from tve.evaluator import CoalitionEvaluator
from tve.precision import RequestedPrecision, choose_precision
from tve.removal import Removal, parse_removal
from tve.transfer_rule import Head, of_class
from tve.weights import misfits, state_digest

NAME = "vit_shapley"
STATE_FILE = "vit_shapley.safetensors"
CONFIG_FILE = "config.json"
SURROGATE_FOLDER = "surrogate"
FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class VitShapleyConfig:
    """The network, and the numbers of its training."""

    trunk: Literal["frozen", "trained"]  # whether the surrogate's copy is trained; the paper trains it
    width: int  # of the extra block
    num_heads: int  # of the extra block
    num_steps: int
    coalitions_per_picture: int  # in a step; one half is drawn, the other half are their complements
    learning_rate: float  # the peak: it rises during warm-up and falls to 0 along a cosine
    trunk_learning_rate: float  # the same for the trunk
    weight_decay: float
    warmup_steps: int  # of either training
    evaluate_every: int  # steps between measurements on held-out pictures
    surrogate_steps: int  # 0: the backbone is its own surrogate
    surrogate_learning_rate: float  # the peak
    precision: RequestedPrecision
    memory_mib: int  # of the evaluation of coalitions
    seed: int

    def __post_init__(self) -> None:
        if self.trunk not in ("frozen", "trained"):
            raise ValueError(f"trunk: expected 'frozen' or 'trained', got {self.trunk!r}")
        choose_precision(self.precision, torch.device("cpu"))  # raises where there is no such precision
        least = {"width": 1, "num_heads": 1, "num_steps": 1, "coalitions_per_picture": 2, "warmup_steps": 0}
        least |= {"evaluate_every": 1, "surrogate_steps": 0, "memory_mib": 1}
        for name, low in least.items():
            require_whole(name, getattr(self, name))
            if getattr(self, name) < low:
                raise ValueError(f"{name}: expected at least {low}, got {getattr(self, name)}")
        require_whole("seed", self.seed)
        for name in ("learning_rate", "trunk_learning_rate", "weight_decay", "surrogate_learning_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a finite number, at least 0, got {getattr(self, name)}")
        if self.width % self.num_heads:
            raise ValueError(f"width: expected a multiple of the {self.num_heads} heads, got {self.width}")
        shorter = min(self.num_steps, self.surrogate_steps or self.num_steps)
        if self.warmup_steps > shorter:
            raise ValueError(f"warmup_steps: expected at most {shorter}, the shorter training, got {self.warmup_steps}")
        require_pairs(self.coalitions_per_picture)


def efficient(raw_BNC: Tensor, total_BC: Tensor) -> Tensor:
    """Values [B, N, C] that sum to the total over patches: what is missing is shared equally (the paper, section 4)."""
    missing_BC = total_BC - raw_BNC.sum(1)
    return raw_BNC + missing_BC[:, None] / raw_BNC.shape[1]


def own_head(backbone: Backbone) -> nn.Linear:
    """The classifier H_g that the backbone was trained with.

    Raises:
        ValueError: it has no single linear one.
    """
    head = backbone.classifier()
    if head is None:
        raise ValueError(
            f"backbone: expected one with one linear classifier, got {backbone.config.name}, which has none; "
            "ViT-Shapley explains the backbone's own classes"
        )
    return head


def untrained(
    backbone: Backbone, surrogate: Backbone, removal: Removal, config: VitShapleyConfig
) -> "ShapleyExplainer":
    """What training starts from, on the backbone's device; its weights depend on the seed alone. v(∅) is evaluated."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        explainer = ShapleyExplainer(backbone, surrogate, removal, config).to(device_of(backbone))
    empty_D = CoalitionEvaluator(surrogate, removal, memory_mib=config.memory_mib).empty()
    with torch.no_grad():
        explainer.empty_C.copy_(own_head(surrogate)(empty_D).softmax(-1))
    return explainer


def save_vit_shapley(explainer: "ShapleyExplainer", folder: str | Path, facts: Mapping[str, Any] | None = None) -> None:
    """Writes what was trained, the surrogate included but not the backbone; the same explainer gives the same bytes.

    Args:
        explainer: trained.
        folder: made if absent.
        facts: what else the configuration should state, such as R² and the pictures; JSON values.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in explainer.trained_state().items()}
    save_file(state, folder / STATE_FILE)
    if not explainer.is_own_surrogate:
        save_backbone(explainer.surrogate, folder / SURROGATE_FOLDER)
    document = {
        "format": FORMAT,
        "vit_shapley": asdict(explainer.config),
        "removal": explainer.removal,
        "vit_shapley_sha256": state_digest(state),
        "backbone_sha256": explainer.backbone.weights_sha256,
        "surrogate_sha256": explainer.surrogate.weights_sha256,
        "facts": dict(facts or {}),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")


def load_vit_shapley(folder: str | Path, backbone: Backbone) -> "ShapleyExplainer":
    """What `save_vit_shapley` wrote, on the backbone's device, ready to explain.

    Raises:
        FileNotFoundError: nothing was written there.
        ValueError: another format, a backbone with other weights, or damaged or altered files.
    """
    folder = Path(folder)
    config_file, state_file = folder / CONFIG_FILE, folder / STATE_FILE
    if not config_file.is_file():
        raise FileNotFoundError(f"expected a trained ViT-Shapley with {CONFIG_FILE}, got {folder}; train one first")
    with damage_named(config_file):
        document = json.loads(config_file.read_text())
        if document["format"] != FORMAT:
            raise ValueError(f"{folder}: expected format {FORMAT}, got {document['format']}; train again")
        digests = [document[f"{name}_sha256"] for name in ("backbone", "surrogate", "vit_shapley")]
        removal, config = parse_removal(document["removal"]), VitShapleyConfig(**document["vit_shapley"])
    if backbone.weights_sha256 != digests[0]:
        raise ValueError(
            f"{folder}: expected the backbone {digests[0]}, got {backbone.weights_sha256}; ViT-Shapley serves the "
            "backbone that it was trained for"
        )
    surrogate = backbone if digests[1] == digests[0] else open_backbone(folder / SURROGATE_FOLDER)
    with damage_named(state_file):
        state = load_file(state_file)
    if [surrogate.weights_sha256, actual := state_digest(state)] != digests[1:]:
        got = f"{surrogate.weights_sha256} and {actual}"
        raise ValueError(
            f"{folder}: expected surrogate and state {digests[1]} and {digests[2]}, got {got}; train again"
        )
    explainer = ShapleyExplainer(backbone, surrogate, removal, config)
    explainer.load_trained_state(state)
    return explainer.to(device_of(backbone)).eval()


@dataclass(frozen=True, slots=True)
class ShapleyValues:
    """Of each picture; all float32. phi sums to v(Z) - v(∅) over patches."""

    phi_BNC: Tensor
    full_BC: Tensor  # v(Z), the surrogate's probabilities of the whole picture
    empty_C: Tensor  # v(∅)


@dataclass(frozen=True, slots=True)
class VitShapley:
    """The map of the class that the backbone's own head predicts, whatever head is asked about.

    Where the head that is asked about is the backbone's own, or has its weights, the map is of the class that is
    asked about.
    """

    explainer: "ShapleyExplainer"

    @property
    def variants(self) -> tuple[str, ...]:
        return (NAME,)

    @torch.no_grad()
    def __call__(self, images_B3SS: Tensor, keys: Sequence[str], questions: Mapping[str, Question]) -> Answers:
        explainer = self.explainer
        backbone = explainer.backbone
        head, patches = own_head(backbone), backbone.patches_per_side
        values = explainer(images_B3SS)
        maps_BCPP = values.phi_BNC.transpose(1, 2).unflatten(2, (patches, patches))
        logits_BC = values.full_BC if explainer.is_own_surrogate else head(backbone(images_B3SS))
        carried_over = Answer(of_class(maps_BCPP, logits_BC.argmax(-1)), Cost(1))
        own = state_digest(head.state_dict())
        return {
            (name, NAME): Answer(of_class(maps_BCPP, asked.target_B), Cost(1))
            if _is_own(asked.head, own)
            else carried_over
            for name, asked in questions.items()
        }


class ShapleyExplainer(nn.Module):
    """Predicts Shapley values for one backbone. `explainer(images)` returns `ShapleyValues`, efficient always."""

    empty_C: Tensor

    def __init__(self, backbone: Backbone, surrogate: Backbone, removal: Removal, config: VitShapleyConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.surrogate = surrogate
        self.removal = removal
        self.config = config
        num_classes = own_head(backbone).out_features
        self.register_buffer("empty_C", torch.zeros(num_classes))
        self.network = ShapleyNetwork(surrogate, num_classes, config)

    @property
    def is_own_surrogate(self) -> bool:
        return self.surrogate is self.backbone

    def forward(self, images_B3SS: Tensor) -> ShapleyValues:
        """The predicted values of normalised pictures [B, 3, S, S].

        Raises:
            ValueError: images of another form than [B, 3, S, S].
        """
        trunk = self.network.trunk
        # Outside autocast: what phi must sum to is no matter of precision.
        with torch.no_grad(), torch.autocast(images_B3SS.device.type, enabled=False):
            if trunk is None:
                features = self.surrogate.features(images_B3SS, 1)
                full_BD = features.embedding_BD
            else:
                full_BD = self.surrogate(images_B3SS)
            full_BC = own_head(self.surrogate)(full_BD).softmax(-1)
        if trunk is not None:
            features = trunk.features(images_B3SS, 1)
        raw_BNC = self.network(features.levels, features.embedding_BD)
        phi_BNC = efficient(raw_BNC.float(), full_BC - self.empty_C)
        return ShapleyValues(phi_BNC, full_BC, self.empty_C)

    def trained_state(self) -> dict[str, Tensor]:
        """The state without the backbone and the surrogate."""
        frozen = ("backbone.", "surrogate.")
        return {key: tensor for key, tensor in self.state_dict().items() if not key.startswith(frozen)}

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Loads what `trained_state` returned.

        Raises:
            ValueError: a state that does not fit.
        """
        if differences := misfits(self.trained_state(), state):
            raise ValueError(f"ViT-Shapley's state: does not fit this configuration: {differences}")
        self.load_state_dict(state, strict=False)


class ShapleyNetwork(nn.Module):
    """One block of self-attention over patches and the embedding, then three layers on each patch.

    The last layer starts at 0: after normalisation that is the equal split.
    """

    def __init__(self, surrogate: Backbone, num_classes: int, config: VitShapleyConfig) -> None:
        super().__init__()
        # The trained trunk starts from the surrogate's weights; a frozen one is the surrogate itself.
        self.trunk = trainable_copy(surrogate) if config.trunk == "trained" else None
        channels = surrogate.level_channels(1)
        width = config.width
        self.level_norms = nn.ModuleList(LayerNorm2d(each) for each in channels)
        self.from_levels = nn.ModuleList(nn.Conv2d(each, width, 1) for each in channels)
        self.from_embedding = nn.Linear(surrogate.embed_dim, width)
        self.block = Block(width, config.num_heads, qkv_bias=True)
        self.norm = nn.LayerNorm(width)
        last = nn.Linear(4 * width, num_classes)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.to_values = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, 4 * width), nn.GELU(), last
        )

    def forward(self, levels: tuple[Tensor, ...], embedding_BD: Tensor) -> Tensor:
        """Values [B, N, C] before normalisation, from what `Backbone.features` returns."""
        projected = zip(levels, self.level_norms, self.from_levels, strict=True)
        mixed_BWPP = torch.stack([project(norm(level)) for level, norm, project in projected]).sum(0)
        tokens = torch.cat([self.from_embedding(embedding_BD)[:, None], mixed_BWPP.flatten(2).transpose(1, 2)], dim=1)
        values_BNC: Tensor = self.to_values(self.norm(self.block(tokens)[:, 1:]))
        return values_BNC


def require_pairs(num_coalitions: int) -> None:
    """Raises ValueError for a number of coalitions that cannot be drawn with their complements."""
    if num_coalitions < 2 or num_coalitions % 2:
        raise ValueError(f"coalitions_per_picture: expected an even number, at least 2, got {num_coalitions}")


def _is_own(head: Head, digest: str) -> bool:
    return isinstance(head, nn.Linear) and state_digest(head.state_dict()) == digest


def device_of(backbone: Backbone) -> torch.device:
    """Where the backbone's weights are."""
    return next(backbone.parameters()).device
