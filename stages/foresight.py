"""What a unit will read once those before it, rebuilt at the same time, have taken back their share of the error.

Methods §6, sweeps. Blocks rebuilt one after the other see inputs in which those before have already undone part of the
error. Rebuilt all at once on the inputs of the last sweep, each would undo the whole of it, ten times over. So what
they read is foreseen: with e_u = x_u − x′_u, the dense input of unit u less the pruned model's, and κ the share of
the error in its input that a unit takes back,

    ê_1 = e_1,    ê_{u+1} = (1 − κ) ê_u + (e_{u+1} − e_u)

is what will be left of the error at unit u: what the units before it leave, and what the last of them adds. The unit is
fitted with x_u − ê_u as its input to the dense output. Along the stream travels g_u = ê_u − e_u, zero at first:

    x_u − ê_u = x′_u − g_u,    g_{u+1} = (1 − κ) g_u − κ e_u.
"""

import torch
from torch import Tensor

SHARE = 0.6  # κ of an attention or an MLP, the best of 0.3, 0.6, 0.8 and 1 on a trained model


class Foresight:
    """One microbatch on its way through the units: `change` is g, float32, of the shape of the hidden states."""

    def __init__(self, change: Tensor) -> None:
        self.change = change

    def at(self, given: Tensor, dense: Tensor, units: int) -> Tensor:
        """The foreseen input of a unit, from what the pruned model gives it and the dense model gave, which stands for
        so many attentions and MLPs; and on to the next."""
        foreseen = given.float() - self.change
        kept = (1 - SHARE) ** units
        self.change = kept * self.change - (1 - kept) * (dense.float() - given.float())
        return foreseen.to(given.dtype)


def joined(hidden: Tensor, change: Tensor) -> Tensor:
    """Hidden states and what travels with them as one tensor (2 · samples, length, hidden), in the states' dtype."""
    return torch.cat([hidden, change.to(hidden.dtype)])


def parted(both: Tensor) -> tuple[Tensor, Tensor]:
    """(hidden states, what travels with them, float32) from `joined`."""
    hidden, change = both.chunk(2)
    return hidden, change.float()
