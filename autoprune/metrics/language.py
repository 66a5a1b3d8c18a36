"""Scores of language models: the prediction of each next token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autoprune.data.batch import Batch, map_tensors, pieces, targets, token_ids
from autoprune.metrics.scorers import NO_LABEL, main_output, unpadded


def next_token(outputs: Any, batch: Batch, dense: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the next token in nats, averaged over the tokens of a sample that count, shape (n,), twice."""
    logits = main_output(outputs)
    wanted = next_tokens(outputs, batch)
    logits = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none", ignore_index=NO_LABEL)
    loss = losses.sum(1) / (wanted != NO_LABEL).sum(1).clamp(min=1)
    return loss, loss


def foreseen_tokens(outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Tokens of each sample that count, shape (n,), twice: the denominators of `next_token`."""
    count = (next_tokens(outputs, batch) != NO_LABEL).sum(1).double()
    return count, count


def next_tokens(outputs: Any, batch: Batch) -> Tensor:
    """Target token of each position but the last, int64, shape (n, positions - 1).

    These are the labels where they are tokens, else the inputs, shifted by one position; `NO_LABEL` where they hold it,
    and wherever ``attention_mask`` says that the token or the one before it is padding.
    """
    logits, ids = main_output(outputs), token_ids(batch)
    assert ids is not None
    labels = targets(batch)
    wanted = labels if isinstance(labels, Tensor) and labels.shape == ids.shape else ids
    wanted = wanted.to(logits.device).long()[:, 1:]
    kept = unpadded(batch, logits)
    return wanted.masked_fill(~(kept[:, 1:] & kept[:, :-1]), NO_LABEL)


def why_no_language_model(outputs: Any, batch: Batch) -> str:
    """Say what is missing for outputs to be logits of the next token; empty if nothing is."""
    ids, logits = token_ids(batch), main_output(outputs)
    if ids is None:
        return "whole numbers of shape (n, positions) as input_ids or as the first input"
    if logits.ndim != 3 or logits.shape[:2] != ids.shape or not logits.is_floating_point() or ids.shape[1] < 2:
        return f"outputs of shape (n, positions, vocabulary) for tokens of shape {tuple(ids.shape)}"
    if int(ids.max()) >= logits.shape[2]:
        return f"a vocabulary above the largest token, {int(ids.max())}, got {logits.shape[2]} outputs a position"
    return ""


def foresees(forward: Callable[[Batch], Any], batch: Batch) -> bool:
    """Return whether outputs depend on earlier tokens alone: another last token must change nothing before it.

    A masked language model, which sees all tokens, has the same inputs and outputs, but predicts no next token.
    """
    few = pieces(batch, 2)[0]
    ids = token_ids(few)
    assert ids is not None
    kept = unpadded(few, main_output(forward(few)))
    last = kept.sum(1).clamp(min=1) - 1  # padding at the end is not seen anyway
    other = ids.clone()
    rows = torch.arange(len(ids), device=ids.device)
    last = last.to(ids.device)
    other[rows, last] = torch.where(ids[rows, last] == 0, 1, 0).to(ids.dtype)
    changed = map_tensors(lambda tensor: other if tensor is ids else tensor, few)
    with torch.no_grad():
        before, after = (main_output(forward(each)).float() for each in (few, changed))
    earlier = torch.arange(ids.shape[1], device=before.device) < last.to(before.device)[:, None]
    if not earlier.any():
        return True
    return torch.allclose(before[earlier], after[earlier], rtol=1e-3, atol=1e-3 * float(before.abs().max()))
