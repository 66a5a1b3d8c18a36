"""Prune the heads, feed-forward widths and blocks of a transformer encoder.

python examples/transformer_encoder.py [--short]: a small BERT on rows of tokens, without labels: what counts is how
close the embeddings stay to the dense model's.
"""

import sys

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import autoprune


class Sentences(nn.Module):
    """The mean of the last hidden states."""

    def __init__(self, bert: BertModel) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.bert(input_ids=input_ids).last_hidden_state.mean(1)


def main() -> None:
    short = "--short" in sys.argv
    torch.manual_seed(0)
    width = 32 if short else 128
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": 4}
    model = Sentences(BertModel(BertConfig(vocab_size=100, num_hidden_layers=2 if short else 6, **sizes))).eval()
    print(autoprune.inspect(model, {"input_ids": torch.randint(0, 100, (2, 16))}))
    data = [{"input_ids": torch.randint(0, 100, (16, 16))} for _ in range(4 if short else 24)]
    result = autoprune.search(model, "params <= 70%", data, metric="cosine", space="auto", trials=5 if short else 100)
    print(result)
    small = result.build()
    print([tuple(layer.intermediate.dense.weight.shape) for layer in small.bert.encoder.layer])


if __name__ == "__main__":
    main()
