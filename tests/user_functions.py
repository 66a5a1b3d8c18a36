"""Functions that users may hand to autoprune: one that trains, and one that runs out of memory."""

import torch


def shrink(model, steps):
    """A recipe of the user's that leaves traces: the number of steps, and a draw from the global generator."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 - 0.01 * steps).add_(0.01 * torch.rand_like(parameter))


def raise_out_of_memory(*_):
    """Fail as a device does whose memory is full."""
    raise torch.OutOfMemoryError("no memory left")
