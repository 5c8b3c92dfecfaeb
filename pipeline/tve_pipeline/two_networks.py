"""Stage `two_networks`: the paper's form of the explainer, a baseline, trained on what the explainer is trained on.

    python -m tve_pipeline.two_networks BACKBONE

Steps, windows, norm and pictures are those of section `pretrain`; section `two_networks` says what differs.
"""

from tve_pipeline.entry import run_stage
from tve_pipeline.params import Positive, Section, load_section
from tve_pipeline.pretraining import MaeParams, PretrainParams, TwoNetworksParams, train_explainer


class TwoNetworksTraining(Section):
    """The two networks, where they start, and how fast they learn."""

    learning_rate: Positive
    mae: MaeParams | None
    networks: TwoNetworksParams


class TwoNetworksStageParams(Section):
    """Section `two_networks` of params.yaml; null where no backbone of `run.two_networks` asks for it."""

    train: TwoNetworksTraining | None

    def beside(self, pretrain: PretrainParams) -> PretrainParams:
        """The parameters of the explainer's pre-training, in the paper's form.

        Raises:
            ValueError: nothing is said of the networks.
        """
        if self.train is None:
            raise ValueError("two_networks.train: expected values, since run.two_networks names a backbone; got null")
        own = {"learning_rate": self.train.learning_rate, "mae": self.train.mae, "two_networks": self.train.networks}
        return pretrain.model_copy(update={"form": "two_networks", **own})


def main(argv: list[str]) -> None:
    (name,) = argv
    own, pretrain = load_section("two_networks", TwoNetworksStageParams), load_section("pretrain", PretrainParams)
    train_explainer(name, own.beside(pretrain), stage="two_networks", section="two_networks.train")


if __name__ == "__main__":
    run_stage("two_networks", main, "BACKBONE")
