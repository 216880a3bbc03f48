"""Targets of a reconstruction, and the inputs that a unit is foreseen to read once those before it are reconstructed.

stages/README.md §6, inputs and targets; sweeps. Blocks reconstructed one after the other see inputs in which those
before have already undone part of the error. Reconstructed all at once on the inputs of the last sweep, each would undo
the whole of it, ten times over. So what they read is foreseen: the pruned model runs as the last sweep left it, and at
every unit the stream is moved a share κ of the way to the dense one, as the unit, reconstructed, will move it:

    x̂_1 = x_1,    x̂_{u+1} = x̂_u + f̃_u(x̂_u) + κ (x_u − x̂_u)

with x_u what unit u read in the dense model and f̃_u what it adds to the stream now that it is pruned. Unit u is fitted
with x̂_u as its input, to the dense output and all of x_u − x̂_u. Inside a block nothing need be foreseen: its units are
reconstructed one after the other, so an MLP reads what the attention before it, reconstructed, makes of the block's x̂.
"""

from torch import Tensor

from espalier.stages.storage.spool import Spool
from espalier.stages.storage.staging import Room


class Target:
    """What a unit is to give, sample by sample: its dense output, and a share of the error in its input taken back.

    y + shift · (x − x′), with x the dense input and x′ the input given; stages/README.md §6. For a component, whose
    output y is what it adds to the residual stream, shift is the correction c; for a block, whose output holds the
    stream, c − 1.
    """

    def __init__(self, outputs: Spool, dense: Spool | None = None, given: Spool | None = None, shift: float = 0.0):
        if shift and (dense is None or given is None):
            raise ValueError("a shifted target needs the dense inputs and those given")
        self._outputs, self._dense, self._given, self._shift = outputs, dense, given, shift

    def batch(self, indices: list[int], room: Room | None = None) -> Tensor:
        """Targets of those samples, (S, L, D); in memory that `room` gives, if it is given and can be used."""
        if not self._shift or self._dense is None or self._given is None:
            return self._outputs.batch(indices, room)
        outputs_SLD = self._outputs.batch(indices)
        error_SLD = self._dense.batch(indices).float() - self._given.batch(indices)
        error_SLD = error_SLD[..., : outputs_SLD.shape[-1]]  # of the hidden states, which come first
        return outputs_SLD.float().add_(error_SLD, alpha=self._shift)


SHARE = 0.5  # κ of an attention or an MLP, the best of 0.25 to 0.6 on a trained model from two masks


def corrected_output(output: Tensor, given: Tensor, dense: Tensor, units: int) -> Tensor:
    """`output`, a unit's, moved towards what the dense model would give, by the error in its input: what it was
    `given` and what the dense model gave it, (S, L, D). It stands for so many attentions and MLPs."""
    share = 1 - (1 - SHARE) ** units
    error = (dense.float() - given.float()).reshape(output.shape)
    return output.float().add_(error, alpha=share).to(output.dtype)
