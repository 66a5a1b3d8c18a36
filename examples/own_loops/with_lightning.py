"""Train a pruned model with Lightning (pip install lightning): the module goes into a LightningModule as it is.

python examples/own_loops/with_lightning.py [--short]
"""

import sys

import lightning
from built import accuracy, built, told
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Classifier(lightning.LightningModule):
    def __init__(self, small: nn.Module) -> None:
        super().__init__()
        self.small = small

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return F.cross_entropy(self.small(batch[0]), batch[1])

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.AdamW(self.small.parameters(), lr=1e-3)


def main() -> None:
    short = "--short" in sys.argv
    small, data = built(short)
    before = accuracy(small.eval(), data["test"])
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(max_epochs=1 if short else 8, accelerator="cpu", **quiet)
    trainer.fit(Classifier(small.train()), DataLoader(TensorDataset(*data["train"]), batch_size=50, shuffle=True))
    told("Lightning", small, data, before)


if __name__ == "__main__":
    main()
