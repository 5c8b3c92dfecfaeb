"""The explainer E: one forward pass from a picture to its predicted meta-attribution, for every window at once.

    ĝ[p, q] = mean(g) + delta_g[p, q]          ĥ[p, q] = G(x) + delta_h[p, q] + scale * (reread[p, q] - G(x))

Differences are predicted, not embeddings, and the last layers start at zero: the explainer begins at the two trivial
answers and learns what depends on the place. G(x) costs nothing, since the classifier computes it anyway. Where the
backbone has a class token, its last blocks are read once more for every window (`tve.rereading`), as far as asked for.

Two forms, one setting: `shared`, a light head on the features of the backbone itself, and `two_networks`, the paper's
pair of masked-autoencoder networks (arXiv 2312.15359, section 4).
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

from tve.backbones import Backbone, trainable_copy
from tve.coalitions import CoalitionFamily, Windows, require_whole
from tve.meta_attribution import MetaAttribution
from tve.removal import Removal, parse_removal
from tve.rereading import changed_without, most_blocks, seen_without
from tve.trained_end import TrainedEnd
from tve.transfer_rule import DEFAULT_RULE, Head, Target, TransferRule, class_maps, require_head, transfer
from tve.two_networks import TwoNetworks, TwoNetworksConfig
from tve.weights import misfits


@dataclass(frozen=True, slots=True)
class ExplainerConfig:
    """What it takes to build an explainer again, apart from its weights and its backbone."""

    radius: int
    removal: Removal
    form: Literal["shared", "two_networks"] = "shared"
    trunk: Literal["frozen", "trained"] = "frozen"  # shared: whether a copy of the backbone is trained
    num_levels: int = 4  # shared: intermediate maps that are read
    width: int = 192  # shared: channels of the mixing blocks
    depth: int = 2  # shared: number of mixing blocks
    reread_blocks: int = 0  # shared: last blocks that are read anew, window by window; as many as a backbone allows
    trained_blocks: int | None = None  # shared, trained: last blocks that are copied; None: the whole backbone
    two_networks: TwoNetworksConfig = field(default_factory=TwoNetworksConfig)

    def __post_init__(self) -> None:
        require_whole("radius", self.radius)
        require_whole("reread_blocks", self.reread_blocks)
        if self.reread_blocks < 0:
            raise ValueError(f"reread_blocks: expected 0 or more, got {self.reread_blocks}")
        parse_removal(self.removal)
        for name, value, known in (
            ("form", self.form, ("shared", "two_networks")),
            ("trunk", self.trunk, ("frozen", "trained")),
        ):
            if value not in known:
                raise ValueError(f"{name}: expected one of {list(known)}, got {value!r}")
        self._require_trained_blocks()

    def _require_trained_blocks(self) -> None:
        """Raises ValueError where they are given without a trained trunk, or leave out blocks that are reread."""
        if self.trained_blocks is None:
            return
        require_whole("trained_blocks", self.trained_blocks)
        if self.trunk != "trained":
            raise ValueError(
                f"trained_blocks: expected none where the trunk is {self.trunk}, got {self.trained_blocks}; leave it "
                "out, or set trunk to 'trained'"
            )
        if self.trained_blocks < 1:
            raise ValueError(
                f"trained_blocks: expected 1 or more, got {self.trained_blocks}; leave it out to copy them all"
            )
        if self.trained_blocks < self.reread_blocks:
            raise ValueError(
                f"trained_blocks: expected at least the {self.reread_blocks} that are reread, got "
                f"{self.trained_blocks}; copy more blocks or lower reread_blocks"
            )


class Explainer(nn.Module):
    """Predicts meta-attributions for one frozen backbone. `explainer(images)` returns a `MetaAttribution`."""

    mean_kept_D: Tensor
    empty_D: Tensor

    def __init__(self, backbone: Backbone, config: ExplainerConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.config = config
        self.family = Windows(backbone.patches_per_side, config.radius)
        embed_dim = backbone.embed_dim
        self.register_buffer("mean_kept_D", torch.zeros(embed_dim))
        self.register_buffer("empty_D", torch.zeros(embed_dim))
        self.network: SharedTrunk | TwoNetworks
        if config.form == "shared":
            self.network = SharedTrunk(backbone, config, self.family)
        else:
            self.network = TwoNetworks(backbone.image_size, backbone.patches_per_side, embed_dim, config.two_networks)

    @property
    def reread_blocks(self) -> int:
        """How many of the backbone's last blocks are read anew, window by window."""
        return self.network.reread_blocks if isinstance(self.network, SharedTrunk) else 0

    def forward(self, images_B3SS: Tensor) -> MetaAttribution:
        """The predicted meta-attribution of normalised pictures [B, 3, S, S]."""
        if isinstance(self.network, SharedTrunk):
            delta_kept, delta_removed, full_BD = self.network(images_B3SS, self.backbone)
        else:
            with torch.no_grad():
                full_BD = self.backbone(images_B3SS).float()
            delta_kept, delta_removed = self.network(images_B3SS)
        differences = self.config.form == "shared" or self.config.two_networks.differences
        kept_BND = delta_kept.float() + (self.mean_kept_D if differences else 0)
        removed_BND = delta_removed.float() + (full_BD[:, None] if differences else 0)
        return MetaAttribution(kept_BND, removed_BND, full_BD, self.empty_D, self.config.radius)

    @torch.no_grad()
    def explain(
        self, images_B3SS: Tensor, head: Head, target: Target | None = None, rule: TransferRule = DEFAULT_RULE
    ) -> Tensor:
        """Heatmaps [B, P, P] of one class, in logits unless the rule says otherwise.

        Args:
            images_B3SS: normalised pictures; `explainer.backbone.preprocess` makes them.
            head: embeddings [..., D] to logits [..., C]: linear, or any module in evaluation mode.
            target: a class, one class per picture [B] (a list, an array or a tensor of integers), or None for the class
                that the head predicts.
            rule: how to read the meta-attribution; by default logits, each patch its share.

        Raises:
            ValueError: a target that is no class of the head, a head that `transfer` refuses, or images of another form
                than [B, 3, S, S].
        """
        meta = self(images_B3SS)
        require_head(head, meta.full_BD)
        return class_maps(meta, head, head(meta.full_BD).argmax(-1) if target is None else target, rule)

    @torch.no_grad()
    def explain_all(self, images_B3SS: Tensor, head: Head, rule: TransferRule = DEFAULT_RULE) -> Tensor:
        """Heatmaps [B, C, P, P] of every class of a head, from the same forward pass.

        Raises:
            ValueError: a head that `transfer` refuses, or images of another form than [B, 3, S, S].
        """
        return transfer(self(images_B3SS), head, rule)

    def trained_state(self) -> dict[str, Tensor]:
        """The state without the frozen backbone: what pre-training made."""
        return {key: value for key, value in self.state_dict().items() if not key.startswith("backbone.")}

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Loads what `trained_state` returned.

        Raises:
            ValueError: a state that does not fit.
        """
        if differences := misfits(self.trained_state(), state):
            raise ValueError(f"explainer state: does not fit this configuration: {differences}")
        self.load_state_dict(state, strict=False)


class SharedTrunk(nn.Module):
    """Mixing blocks on the backbone's own intermediate features, its patches' pixels and its embedding."""

    seen_NT: Tensor

    def __init__(self, backbone: Backbone, config: ExplainerConfig, family: CoalitionFamily) -> None:
        super().__init__()
        self.num_levels = config.num_levels
        # A trained trunk starts from the backbone's weights; a frozen one is the backbone itself.
        self.trunk: Backbone | TrainedEnd | None = None
        if config.trunk == "trained":
            last = config.trained_blocks
            self.trunk = trainable_copy(backbone) if last is None else TrainedEnd(backbone, last)
        patches, embed_dim, width = backbone.patches_per_side, backbone.embed_dim, config.width
        pixels = backbone.image_size // patches
        self.from_pixels = nn.Conv2d(3, width, pixels, stride=pixels)
        channels = backbone.level_channels(config.num_levels)
        self.level_norms = nn.ModuleList(LayerNorm2d(c) for c in channels)
        self.from_levels = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.from_embedding = nn.Linear(embed_dim, width)
        self.position = nn.Parameter(torch.zeros(1, width, patches, patches))
        self.reread_blocks = min(config.reread_blocks, most_blocks(backbone))
        if self.reread_blocks:
            tokens_per_side = int(backbone.model.patch_embed.grid_size[0])  # type: ignore[index,union-attr]
            self.register_buffer("seen_NT", seen_without(family, tokens_per_side), persistent=False)
            self.reread_norm = nn.LayerNorm(embed_dim)
            self.from_reread = nn.Linear(embed_dim, width)
            self.reread_scale_D = nn.Parameter(torch.zeros(embed_dim))
        self.blocks = nn.ModuleList(MixingBlock(width, 2 * config.radius + 1) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)
        self.to_kept = _zero_linear(width, embed_dim)
        self.to_removed = _zero_linear(width, embed_dim)

    def forward(self, images_B3SS: Tensor, backbone: Backbone) -> tuple[Tensor, Tensor, Tensor]:
        """(delta_g [B, N, D], delta_h [B, N, D], G(x) [B, D])."""
        with torch.set_grad_enabled(self.trunk is not None and torch.is_grad_enabled()):
            if isinstance(self.trunk, TrainedEnd):
                reader = self.trunk.end
                features = self.trunk(backbone, images_B3SS, self.num_levels, self.reread_blocks)
            else:
                reader = self.trunk or backbone
                features = reader.features(images_B3SS, self.num_levels, self.reread_blocks)
            changed_BND = changed_without(reader, features.entering, self.seen_NT) if self.reread_blocks else None
        full_BD = features.embedding_BD
        if isinstance(self.trunk, Backbone):
            with torch.no_grad():
                full_BD = backbone(images_B3SS)
        mixed = self.from_pixels(images_B3SS) + self.position + self.from_embedding(full_BD)[..., None, None]
        for level, norm, project in zip(features.levels, self.level_norms, self.from_levels, strict=True):
            mixed = mixed + project(norm(level))
        if changed_BND is not None:
            read_BWN = self.from_reread(self.reread_norm(changed_BND)).transpose(1, 2)
            mixed = mixed + read_BWN.unflatten(2, mixed.shape[2:])
        for block in self.blocks:
            mixed = block(mixed)
        mixed_BNW = self.norm(mixed.flatten(2).transpose(1, 2))
        delta_removed_BND = self.to_removed(mixed_BNW)
        if changed_BND is not None:
            delta_removed_BND = delta_removed_BND + self.reread_scale_D * changed_BND
        return self.to_kept(mixed_BNW), delta_removed_BND, full_BD.float()


class MixingBlock(nn.Module):
    """Mixes patches over one window by a convolution, then features by an MLP; both residual."""

    def __init__(self, width: int, window: int) -> None:
        super().__init__()
        self.patch_norm = nn.LayerNorm(width)
        self.patch_mix = nn.Conv2d(width, width, window, padding=window // 2)
        self.feature_norm = nn.LayerNorm(width)
        self.feature_mix = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))

    def forward(self, x_BWPP: Tensor) -> Tensor:
        x: Tensor = x_BWPP.permute(0, 2, 3, 1)
        x = x + self.patch_mix(self.patch_norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.feature_mix(self.feature_norm(x))
        return x.permute(0, 3, 1, 2)


def _zero_linear(width: int, embed_dim: int) -> nn.Linear:
    linear = nn.Linear(width, embed_dim)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
