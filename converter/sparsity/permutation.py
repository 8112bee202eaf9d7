"""Permutation: which channels share a group. Neighbours are correlated; channels that are large together should not be.

A token drops least when each group holds few of its large channels at once.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def decorrelate(together: Tensor, group: int) -> Tensor:
    """Return a permutation `[K]` int64: group g holds channels permutation[g*group : (g+1)*group], rising.

    `together [K, K]` is the second moment of the channels' magnitudes. Channels go, by falling energy, each to the
    group with room whose members have the smallest summed moment with it; of equal ones, to the first.
    """
    moments = together.cpu().numpy()
    channels = len(moments)
    groups = channels // group
    members: list[list[int]] = [[] for _ in range(groups)]
    room = np.full(groups, group)
    load = np.zeros((groups, channels))  # of each group's members, summed, with every channel
    for channel in np.argsort(-np.diagonal(moments), kind="stable").tolist():
        best = int(np.argmin(np.where(room > 0, load[:, channel], np.inf)))
        members[best].append(channel)
        room[best] -= 1
        load[best] += moments[channel]
    return torch.tensor([channel for chosen in members for channel in sorted(chosen)], device=together.device)


def stray(order: Tensor) -> str:
    """Return what keeps `order`, a vector of integers, from holding each of its places once; nothing where it does."""
    outside = ((order < 0) | (order >= len(order))).nonzero()
    if len(outside):
        place = int(outside[0])
        return f"{int(order[place])} at place {place}"
    counts = torch.bincount(order, minlength=1)
    return f"{int(counts.argmax())} {int(counts.max())} times" if counts.max() > 1 else ""
