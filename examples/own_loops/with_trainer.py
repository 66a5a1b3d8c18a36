"""Train a pruned model of transformers with its Trainer (pip install transformers accelerate).

python examples/own_loops/with_trainer.py [--short]: a small BERT that tells whether most of seven digits are above
four. The pruned model is of the same class, and `save_pretrained` writes a config with its widths.
"""

import sys

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import autoprune


class Sums(Dataset):
    """Rows of digits, and whether more than half of them are above four."""

    def __init__(self, count: int, seed: int) -> None:
        self.words = torch.randint(0, 10, (count, 7), generator=torch.Generator().manual_seed(seed))
        self.labels = ((self.words > 4).sum(1) > 3).long()

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.words[i], "labels": self.labels[i]}


def trained(model: torch.nn.Module, data: Sums, steps: int) -> torch.nn.Module:
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no"}
    settings = TrainingArguments("trainer", max_steps=steps, learning_rate=1e-3, use_cpu=True, **quiet)
    Trainer(model, settings, train_dataset=data).train()
    return model.eval()


@torch.no_grad()
def accuracy(model: torch.nn.Module, data: Sums) -> float:
    return (model(input_ids=data.words).logits.argmax(1) == data.labels).float().mean().item()


def main() -> None:
    short = "--short" in sys.argv
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=10, **sizes))
    fit, check = Sums(256 if short else 4096, 0), Sums(256, 1)
    trained(model, fit, 4 if short else 400)
    batches = [{"input_ids": fit.words[:128], "labels": fit.labels[:128]}] * 2
    result = autoprune.search(model, "flops <= 50%", batches, trials=4 if short else 60)
    small = result.build()
    before = accuracy(small.eval(), check)
    trained(small, fit, 4 if short else 200)
    print(f"Trainer: accuracy {before:.4f} as built, {accuracy(small, check):.4f} after training")
    small.save_pretrained("small")
    print("saved by save_pretrained; autoprune.from_pretrained('small') loads it")


if __name__ == "__main__":
    main()
