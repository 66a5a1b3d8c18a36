"""Scores of language models: the prediction of each next token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoprune.data.batch import Batch, batch_size, map_tensors, pieces, targets, token_ids
from autoprune.metrics.scorers import NO_LABEL, logits_of, main_output, unpadded

_ON_CPU = 2**19  # values of distributions that are compared at once
_ELSEWHERE = 2**26


def next_token(chances: bool, outputs: Any, batch: Batch, dense: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the next token in nats, averaged over the tokens of a sample that count, shape (n,), twice.

    `chances` says whether outputs are probabilities.
    """
    wanted = next_tokens(outputs, batch)
    each = zip(main_output(outputs), wanted, strict=True)
    loss = torch.stack([_of_tokens(chances, logits, following)[0] for logits, following in each])
    return loss, loss


def next_token_by_divergence(chances: bool, outputs: Any, batch: Batch, dense: Tensor | None) -> tuple[Tensor, Tensor]:
    """KL(dense || pruned) in nats, averaged over the tokens of a sample that count, and `next_token`, shape (n,) each.

    The divergence compares whole distributions, so it tells candidates apart on fewer tokens than the loss does.

    Reference:
        Sieberling et al., "EvoPress", ICML 2025, arXiv:2410.14649, steers its search by the same.
    """
    assert dense is not None
    each = zip(main_output(outputs), next_tokens(outputs, batch), dense, strict=True)
    losses, divergences = zip(*(_of_tokens(chances, *sample) for sample in each), strict=True)
    return torch.stack(divergences), torch.stack(losses)


def _of_tokens(chances: bool, logits: Tensor, wanted: Tensor, dense: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean loss of one sample, and mean divergence from dense logits, 0 without them; each of shape ().

    Args:
        chances: Whether outputs are probabilities.
        logits: Shape (positions, vocabulary), as `dense`.
        wanted: The next tokens, shape (positions - 1,).
        dense: Those of the dense model.
    """
    counts = wanted != NO_LABEL
    at_once = max(1, (_ON_CPU if logits.device.type == "cpu" else _ELSEWHERE) // logits.shape[-1])
    # A vocabulary makes the distributions of a sample as large as a small model: few of them stay in the cache.
    loss = divergence = logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
    for start in range(0, len(wanted), at_once):
        part = slice(start, min(start + at_once, len(wanted)))
        kept = counts[part]
        ours = _log_chances(chances, logits[part][kept])
        loss = loss - ours.gather(1, wanted[part][kept, None]).sum()
        if dense is not None:
            theirs = _log_chances(chances, dense[part][kept])
            divergence = divergence + (theirs.exp() * (theirs - ours)).sum()
    count = counts.sum().clamp(min=1)
    return loss / count, divergence / count


def _log_chances(chances: bool, outputs: Tensor) -> Tensor:
    return logits_of(outputs.to(torch.promote_types(outputs.dtype, torch.float32)), chances).log_softmax(-1)


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


def is_language_model(outputs: Any, batches: Sequence[Batch], forward: Callable[[Batch], Any]) -> bool:
    """Return whether outputs are logits of each next one of the ``input_ids``, and labels, if any, are such tokens."""
    first = batches[0]
    if not isinstance(first, Mapping) or "input_ids" not in first or why_no_language_model(outputs, first):
        return False
    labels = targets(first)
    tokens = labels is None or (isinstance(labels, Tensor) and labels.shape == first["input_ids"].shape)
    return tokens and foresees(forward, first)


def first_tokens(batches: Sequence[Batch], tokens: int) -> int:
    """Number of samples, from the first, that hold this number of tokens of ``input_ids`` besides padding."""
    counts: list[int] = []
    for batch in batches:
        ids = token_ids(batch)
        if ids is None:
            return sum(map(batch_size, batches))
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        kept = mask if isinstance(mask, Tensor) and mask.shape == ids.shape else torch.ones_like(ids)
        counts += kept.sum(1).tolist()
    reached = np.flatnonzero(np.cumsum(counts) >= tokens)
    return int(reached[0]) + 1 if reached.size else len(counts)


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
