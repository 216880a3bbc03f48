"""What a unit will read once those before it, rebuilt at the same time, have taken back their share of the error.

Methods §6, sweeps. Blocks rebuilt one after the other see inputs in which those before have already undone part of the
error. Rebuilt all at once on the inputs of the last sweep, each would undo the whole of it, ten times over. So what
they read is foreseen: the pruned model runs as the last sweep left it, and at every unit the stream is drawn a share κ
of the way to the dense one, as the unit, rebuilt, will draw it:

    x̂_1 = x_1,    x̂_{u+1} = x̂_u + f̃_u(x̂_u) + κ (x_u − x̂_u)

with x_u what unit u read in the dense model and f̃_u what it adds to the stream now that it is pruned. Unit u is fitted
with x̂_u as its input, to the dense output and all of x_u − x̂_u. Inside a block nothing need be foreseen: its units are
rebuilt one after the other, so an MLP reads what the attention before it, rebuilt, makes of the block's x̂.
"""

from torch import Tensor

SHARE = 0.5  # κ of an attention or an MLP, the best of 0.25 to 0.6 on a trained model from two masks


def drawn(output: Tensor, given: Tensor, dense: Tensor, units: int) -> Tensor:
    """`output`, a unit's, drawn towards what the dense model would give, by the error in its input: what it was
    `given` and what the dense model gave it, (S, L, D). It stands for so many attentions and MLPs."""
    share = 1 - (1 - SHARE) ** units
    error = (dense.float() - given.float()).reshape(output.shape)
    return output.float().add_(error, alpha=share).to(output.dtype)
