"""ViT-Shapley: a network that predicts the Shapley values of a picture's patches, for all classes in one pass.

    v(S)  = p(. | x_S)                                        probabilities of the backbone's own classes
    phi_i = raw_i + (v(Z) - v(∅) - sum over j of raw_j) / N    they sum to v(Z) - v(∅), whatever raw is: efficiency
    loss  = E ||v(S) - v(∅) - sum over i in S of phi_i||^2     |S| = k in proportion to 1 / (k (N - k)), 0 < k < N

Covert, Kim and Lee, "Learning to estimate Shapley values with vision transformers" (ICLR 2023, arXiv 2206.05282). The
minimum of the loss is the Shapley value. v comes from a surrogate: the backbone with its classifier, tuned until its
output on a part of a picture is near the backbone's on the whole one. A backbone that saw parts of pictures when it was
trained can be its own surrogate (no surrogate steps). No label is read anywhere.

The paper's network is a vision transformer, tuned from the surrogate, one more block and three layers on each token.
Here the extra block reads `Backbone.features`, through a projection to its own width: levels on the patch grid and, as
one more token, the embedding. So every timm model is served alike. The paper's loss has a factor N more, and the mean
over classes where a sum stands here: constants.

Another task than the backbone's own gets the map of the class that the backbone's own head predicts (TVE, arXiv
2312.15359, section 5).
"""

import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from timm.layers.norm import LayerNorm2d
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from tqdm import tqdm

from tve.backbones import Backbone, damage_named, misfits, open_backbone, save_backbone, state_digest
from tve.baselines.method import Answer, Answers, Cost, Question, generator_of
from tve.coalitions import require_whole
from tve.evaluator import CoalitionEvaluator, require_droppable
from tve.pictures import PictureBatch
from tve.plain_vits import pools_prefix
from tve.precision import RequestedPrecision, choose_precision
from tve.removal import Removal, parse_removal, zero_pixels
from tve.training import LOG_EVERY, NonFiniteLossError, Row
from tve.transfer_rule import Head, of_class

NAME = "vit_shapley"
STATE_FILE = "vit_shapley.safetensors"
CONFIG_FILE = "config.json"
SURROGATE_FOLDER = "surrogate"
FORMAT = 1
HELD_OUT_BATCH = 64


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
        _require_pairs(self.coalitions_per_picture)


@dataclass(frozen=True, slots=True)
class ShapleyResult:
    """What a training made. R² is `explained_gain` of the held-out pictures."""

    explainer: "ShapleyExplainer"
    held_out_r2: float
    rows: list[Row]  # step, elapsed_s, images_per_s, loss (mean since the row before), held_out_r2 where measured
    surrogate_rows: list[Row]  # the same of the surrogate; loss is the divergence, in nats
    elapsed_s: float


def train_vit_shapley(
    backbone: Backbone,
    removal: Removal,
    batches: Iterator[PictureBatch],
    held_out_B3SS: Tensor,
    config: VitShapleyConfig,
) -> ShapleyResult:
    """Trains a surrogate, if the configuration asks for one, then the network that predicts Shapley values.

    Args:
        backbone: with one linear classifier; it stays as it is.
        removal: what it means that a patch is absent.
        batches: normalised pictures, as many batches as there are steps of both; the surrogate takes the first ones.
        held_out_B3SS: normalised pictures on which R² is measured, never trained on.
        config: the network and the numbers.

    Raises:
        NonFiniteLossError: naming the step and the keys of the batch.
        ValueError: a backbone without one linear classifier, or one whose tokens cannot be left out where the removal
            operator is `drop`.
    """
    started = time.perf_counter()
    device, patches = _device(backbone), backbone.patches_per_side
    surrogate, surrogate_rows = backbone, list[Row]()
    if config.surrogate_steps:
        surrogate, surrogate_rows = train_surrogate(backbone, removal, batches, config)
    evaluator = CoalitionEvaluator(surrogate, removal, memory_mib=config.memory_mib, precision=config.precision)
    explainer = untrained(backbone, surrogate, removal, config)

    def loss_of(images_B3SS: Tensor, generator: torch.Generator) -> Tensor:
        drawn = shapley_coalitions(len(images_B3SS), config.coalitions_per_picture, patches, generator)
        present_BKPP = drawn.to(device)
        gain_BKC = coalition_values(evaluator, images_B3SS, present_BKPP) - explainer.empty_C
        with _autocast(device, config):
            phi_BNC = explainer(images_B3SS).phi_BNC
        return shapley_loss(phi_BNC, present_BKPP, gain_BKC)

    measured = _held_out_measure(explainer, evaluator, held_out_B3SS.to(device), config)
    rows = _optimise(loss_of, _groups(explainer, config), batches, config.num_steps, config, NAME, device, measured)
    r2 = rows[-1]["held_out_r2"]
    assert r2 is not None
    return ShapleyResult(explainer.eval(), r2, rows, surrogate_rows, time.perf_counter() - started)


def train_surrogate(
    backbone: Backbone, removal: Removal, batches: Iterator[PictureBatch], config: VitShapleyConfig
) -> tuple[Backbone, list[Row]]:
    """A copy of the backbone, tuned on parts of pictures of every size to what the backbone says of the whole ones.

    Loss: KL(p(. | x) of the backbone, p(. | x_S) of the copy), nats; |S| uniform.

    Args:
        backbone: with one linear classifier; it stays as it is.
        removal: what it means that a patch is absent.
        batches: normalised pictures, a batch for each surrogate step.
        config: the numbers.

    Raises:
        ValueError, NonFiniteLossError: as `train_vit_shapley`.
    """
    head, device = own_head(backbone), _device(backbone)
    if removal == "drop":
        _require_gatherable(backbone)
    student = _trainable_copy(backbone)
    student_head = own_head(student)

    def loss_of(images_B3SS: Tensor, generator: torch.Generator) -> Tensor:
        with torch.no_grad():
            target_BC = head(backbone(images_B3SS)).log_softmax(-1)
        present_BPP = uniform_coalitions(len(images_B3SS), backbone, removal, generator).to(device)
        with _autocast(device, config):
            logits_BC = student_head(masked_embeddings(student, removal, images_B3SS, present_BPP))
        given_BC = logits_BC.float().log_softmax(-1)
        return nn.functional.kl_div(given_BC, target_BC, reduction="batchmean", log_target=True)

    groups = [{"params": list(student.parameters()), "peak": config.surrogate_learning_rate}]
    rows = _optimise(loss_of, groups, batches, config.surrogate_steps, config, "surrogate", device)
    return Backbone(backbone.config, student.model), rows


def shapley_coalitions(
    num_pictures: int, num_coalitions: int, patches_per_side: int, generator: torch.Generator
) -> Tensor:
    """Coalitions bool [B, K, P, P] of the Shapley kernel: K / 2 drawn by a CPU generator, then their complements.

    Size k has a probability in proportion to 1 / (k (N - k)), 0 < k < N; all sets of one size are alike.

    Raises:
        ValueError: an odd number of coalitions, or a grid of one patch.
    """
    _require_pairs(num_coalitions)
    num_patches = patches_per_side**2
    if num_patches < 2:
        raise ValueError(f"patches_per_side: expected at least 2, got {patches_per_side}; one patch has no coalitions")
    size_S = torch.arange(1, num_patches, dtype=torch.float64)
    weight_S = 1 / (size_S * (num_patches - size_S))
    drawn = num_pictures * num_coalitions // 2
    size_M1 = 1 + torch.multinomial(weight_S, drawn, replacement=True, generator=generator)[:, None]
    present_MN = _random_ranks(drawn, num_patches, generator) < size_M1
    present_BKPP = present_MN.reshape(num_pictures, num_coalitions // 2, patches_per_side, patches_per_side)
    return torch.cat([present_BKPP, ~present_BKPP], dim=1)


def uniform_coalitions(num_pictures: int, backbone: Backbone, removal: Removal, generator: torch.Generator) -> Tensor:
    """A coalition of each picture, bool [B, P, P], whose size is uniform, by a CPU generator.

    Under `drop` all have the same size, so that what is left of each picture is equally long. The empty coalition is
    among them wherever it can be embedded.
    """
    patches = backbone.patches_per_side
    smallest = 0 if removal == "zero" or pools_prefix(backbone.model) else 1
    num_sizes = num_pictures if removal == "zero" else 1
    size_B1 = torch.randint(smallest, patches**2 + 1, (num_sizes, 1), generator=generator)
    return (_random_ranks(num_pictures, patches**2, generator) < size_B1).reshape(-1, patches, patches)


def masked_embeddings(backbone: Backbone, removal: Removal, images_B3SS: Tensor, present_BPP: Tensor) -> Tensor:
    """Embeddings [B, D] of a coalition of each picture, with gradients, unlike those of a `CoalitionEvaluator`.

    Under `drop` all coalitions have the same size, and the backbone is a plain vision transformer.
    """
    if removal == "zero":
        embeddings: Tensor = backbone(zero_pixels(images_B3SS, present_BPP))
        return embeddings
    model: Any = backbone.model
    tokens_BTD = model._pos_embed(model.patch_embed(images_B3SS))
    tokens_per_patch = model.patch_embed.grid_size[0] // backbone.patches_per_side
    present_BN = present_BPP.repeat_interleave(tokens_per_patch, 1).repeat_interleave(tokens_per_patch, 2).flatten(1)
    index_BK = present_BN.nonzero()[:, 1].reshape(len(present_BN), int(present_BN[0].sum()))
    prefix, patches = tokens_BTD.tensor_split([model.num_prefix_tokens], dim=1)
    kept = torch.cat([prefix, patches.take_along_dim(index_BK[..., None], 1)], dim=1)
    return backbone.pool(model.norm(model.blocks(model.norm_pre(kept))))


def coalition_values(evaluator: CoalitionEvaluator, images_B3SS: Tensor, present_BKPP: Tensor) -> Tensor:
    """v(S) [B, K, C]: the probabilities of the evaluator's backbone's own classes."""
    with torch.no_grad():
        logits_BKC: Tensor = own_head(evaluator.backbone)(evaluator(images_B3SS, present_BKPP))
        return logits_BKC.softmax(-1)


def efficient(raw_BNC: Tensor, total_BC: Tensor) -> Tensor:
    """Values [B, N, C] that sum to the total over patches: what is missing is shared equally (the paper, section 4)."""
    missing_BC = total_BC - raw_BNC.sum(1)
    return raw_BNC + missing_BC[:, None] / raw_BNC.shape[1]


def shapley_loss(phi_BNC: Tensor, present_BKPP: Tensor, gain_BKC: Tensor) -> Tensor:
    """The mean over pictures and coalitions of ||v(S) - v(∅) - sum over i in S of phi_i||^2, summed over classes.

    Args:
        phi_BNC: predicted.
        present_BKPP: coalitions of the Shapley kernel.
        gain_BKC: v(S) - v(∅).
    """
    return _residuals(phi_BNC, present_BKPP, gain_BKC).square().sum(-1).mean()


def explained_gain(phi_BNC: Tensor, present_BKPP: Tensor, gain_BKC: Tensor) -> float:
    """R² of v(S) - v(∅) against the trivial answer, which shares v(Z) - v(∅) equally among the patches.

        1 - sum ||v(S) - v(∅) - sum over i in S of phi_i||^2 / sum ||v(S) - v(∅) - (v(Z) - v(∅)) |S| / N||^2

    Over many coalitions of the Shapley kernel no values that sum to v(Z) - v(∅) do better than the Shapley values; as
    far as patches interact, these too stay below 1.
    """
    equal_BNC = phi_BNC.mean(1, keepdim=True).expand_as(phi_BNC)
    left, of = (_residuals(each, present_BKPP, gain_BKC).double().square().sum() for each in (phi_BNC, equal_BNC))
    return float(1 - left / of)


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
        explainer = ShapleyExplainer(backbone, surrogate, removal, config).to(_device(backbone))
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
    return explainer.to(_device(backbone)).eval()


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
        self.trunk = _trainable_copy(surrogate) if config.trunk == "trained" else None
        info: Any = surrogate.model.feature_info
        channels = [int(info[index]["num_chs"]) for index in surrogate.level_indices(1)]
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


def _held_out_measure(
    explainer: ShapleyExplainer, evaluator: CoalitionEvaluator, images_B3SS: Tensor, config: VitShapleyConfig
) -> Callable[[], Row]:
    """Measures R² on pictures whose coalitions are drawn and evaluated here, once."""
    patches, generator = explainer.backbone.patches_per_side, generator_of(config.seed, NAME, "held out")
    drawn = shapley_coalitions(len(images_B3SS), config.coalitions_per_picture, patches, generator)
    present_BKPP = drawn.to(images_B3SS.device)
    pairs = list(zip(images_B3SS.split(HELD_OUT_BATCH), present_BKPP.split(HELD_OUT_BATCH), strict=True))
    gain_BKC = torch.cat([coalition_values(evaluator, *pair) for pair in pairs]) - explainer.empty_C

    @torch.no_grad()
    def measured() -> Row:
        phi_BNC = torch.cat([explainer(images).phi_BNC for images, _ in pairs])
        return {"held_out_r2": explained_gain(phi_BNC, present_BKPP, gain_BKC)}

    return measured


def _groups(explainer: ShapleyExplainer, config: VitShapleyConfig) -> list[dict[str, Any]]:
    network = explainer.network
    rest = [each for name, each in network.named_parameters() if not name.startswith("trunk.")]
    groups: list[dict[str, Any]] = [{"params": rest, "peak": config.learning_rate}]
    if network.trunk is not None:
        groups.append({"params": list(network.trunk.parameters()), "peak": config.trunk_learning_rate})
    return groups


def _optimise(
    loss_of: Callable[[Tensor, torch.Generator], Tensor],
    groups: list[dict[str, Any]],
    batches: Iterator[PictureBatch],
    num_steps: int,
    config: VitShapleyConfig,
    name: str,
    device: torch.device,
    measured: Callable[[], Row] = dict,
) -> list[Row]:
    """AdamW on the loss of a batch of pictures and a generator of its own; the log of every few steps."""
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay, betas=(0.9, 0.98))
    rows: list[Row] = []
    losses: list[float] = []  # since the last row
    started = time.perf_counter()
    for step in tqdm(range(num_steps), desc=name, unit="step", mininterval=2.0):
        batch = next(batches)
        warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * warmup * 0.5 * (1 + math.cos(math.pi * step / num_steps))
        loss = loss_of(batch.images_B3SS.to(device), generator_of(config.seed, name, str(step)))
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise NonFiniteLossError(
                f"{name}, step {step}: expected a finite loss, got {losses[-1]} on pictures {', '.join(batch.keys)}; "
                "lower the learning rate, or look at these pictures"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_((each for group in optimizer.param_groups for each in group["params"]), 1.0)
        optimizer.step()
        done = step + 1
        evaluates = done % config.evaluate_every == 0 or done == num_steps
        if done % LOG_EVERY == 0 or evaluates:
            elapsed_s = time.perf_counter() - started
            row: Row = {"step": done, "elapsed_s": round(elapsed_s, 2), "loss": sum(losses) / len(losses)}
            losses.clear()
            row["images_per_s"] = round(done * len(batch.keys) / elapsed_s, 2)
            rows.append(row | (measured() if evaluates else {}))
    return rows


def _residuals(phi_BNC: Tensor, present_BKPP: Tensor, gain_BKC: Tensor) -> Tensor:
    return gain_BKC - present_BKPP.flatten(2).to(phi_BNC.dtype) @ phi_BNC


def _random_ranks(num_rows: int, num_patches: int, generator: torch.Generator) -> Tensor:
    """A random order of the patches in each row, int64 [M, N]."""
    return torch.rand(num_rows, num_patches, generator=generator).argsort(1).argsort(1)


def _require_pairs(num_coalitions: int) -> None:
    if num_coalitions < 2 or num_coalitions % 2:
        raise ValueError(f"coalitions_per_picture: expected an even number, at least 2, got {num_coalitions}")


def _require_gatherable(backbone: Backbone) -> None:
    """Raises ValueError unless some of the tokens can be taken through the model as a shorter sequence."""
    require_droppable(backbone)
    model = backbone.model
    if type(model) is not VisionTransformer or model.pos_embed is None:
        raise ValueError(
            f"surrogate_steps: expected 0 under 'drop' for {backbone.config.name} ({type(model).__name__}), which has "
            "no absolute positions or other tokens than timm's VisionTransformer; set it to 0, or use 'zero'"
        )


def _autocast(device: torch.device, config: VitShapleyConfig) -> torch.autocast:
    """The arithmetic of passes that are trained."""
    arithmetic = choose_precision(config.precision, device)
    return torch.autocast(device.type, arithmetic.dtype, enabled=arithmetic.precision != "float32")


def _trainable_copy(backbone: Backbone) -> Backbone:
    trunk = copy.deepcopy(backbone)
    return trunk.requires_grad_(True)


def _is_own(head: Head, digest: str) -> bool:
    return isinstance(head, nn.Linear) and state_digest(head.state_dict()) == digest


def _device(backbone: Backbone) -> torch.device:
    return next(backbone.parameters()).device
