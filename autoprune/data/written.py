"""Text that a language model writes itself: calibration samples of all kinds of text that it was trained on."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.arguments import whole_number

MOST_SAMPLES = 2**20


@torch.no_grad()
def write_text(
    model: nn.Module, start: int, samples: int = 64, tokens: int = 256, seed: int = 0, batch_size: int = 64
) -> Tensor:
    """Draw sequences from a language model, token by token.

    A re-fit leans on the text that it is calibrated on: text of another kind loses more. What the dense model writes is
    of every kind that it was trained on, and needs no data. Added to the samples given, it spreads what is lost.

    A sequence does not end at a token that ends a text: another text follows, as in training. Each token costs a
    forward pass of one position, so all of them together about four times a pass over the text.

    Args:
        model: A causal language model in the manner of transformers: its forward takes `input_ids`, `past_key_values`
            and `use_cache`, and returns `logits` and `past_key_values`. It is run in evaluation mode.
        start: Token that sequences begin after, and that is left out of them: the one that separates texts in training,
            such as ``tokenizer.bos_token_id``. That of a chat model may begin chats alone.
        samples: Number of sequences.
        tokens: Length of each.
        seed: Of the draws; global random states stay as they were.
        batch_size: Sequences that are written at the same time.

    Returns:
        Token ids, int64, shape (samples, tokens), on the device of the model.

    Raises:
        TypeError: If the model keeps no cache of what it has read.

    Reference:
        Williams, Chrysostomou and Aletras, "Self-calibration for Language Model Quantization and Pruning", NAACL 2025,
        arXiv:2410.17170; here at a temperature of 1 throughout.
    """
    start = whole_number("start", start, 0)
    samples, tokens = whole_number("samples", samples, 1, MOST_SAMPLES), whole_number("tokens", tokens, 1)
    batch_size = whole_number("batch_size", batch_size, 1)
    if not {"input_ids", "past_key_values", "use_cache"} <= set(inspect.signature(model.forward).parameters):
        raise TypeError(
            "model must be a language model whose forward takes input_ids, past_key_values and use_cache, as those of "
            f"transformers do, got {type(model).__name__}; write the text with it yourself"
        )
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        sizes = [min(batch_size, samples - first) for first in range(0, samples, batch_size)]
        firsts = [torch.full((size, 1), start, device=device) for size in sizes]
        return torch.cat([_continued(model, first, tokens, generator) for first in firsts])
    finally:
        for module, mode in modes.items():
            module.training = mode


def _continued(model: nn.Module, latest: Tensor, tokens: int, generator: torch.Generator) -> Tensor:
    """Tokens that follow `latest`, shape (n, 1); shape (n, tokens)."""
    found: list[Tensor] = []
    past: Any = None
    for _ in range(tokens):
        out = model(input_ids=latest, past_key_values=past, use_cache=True)
        past = out.past_key_values
        latest = torch.multinomial(out.logits[:, -1].float().softmax(-1), 1, generator=generator)
        found.append(latest)
    return torch.cat(found, 1)
