"""A small unit to be fitted: a norm and an MLP, pruned, with its dense inputs and outputs in spools."""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from espalier.stages.model.anatomy import Weight
from espalier.stages.reconstruction.fit import Fit, FitSettings, fit, rate_unit, weight_rms
from espalier.stages.reconstruction.target import Target
from espalier.stages.reconstruction.units import PLAIN, FitUnit, Step, UnitModules
from espalier.stages.storage.spool import Spool, SpoolBudget

HIDDEN, LENGTH = 8, 6
CALLS = (PLAIN, PLAIN)
WEIGHTS = tuple(Weight(name, f"{name}.weight", name) for name in ("mlp.up", "mlp.down"))
UNIT = FitUnit(
    "mlp", "mlp", tuple(Step(0, name, PLAIN) for name in ("norm", "mlp")), tuple((0, weight) for weight in WEIGHTS)
)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, 12)
        self.down = nn.Linear(12, HIDDEN, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.up(hidden)))


class Problem:
    """A unit of a norm and an MLP, its masks, the pruned copy, and spooled inputs with the dense outputs."""

    fitted_in = torch.float32

    def __init__(self, home: Path, samples: int = 10, dtype: torch.dtype = torch.float32) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            block = nn.Module()
            block.norm, block.mlp = nn.RMSNorm(HIDDEN, eps=1e-6), Mlp()
            block.mlp.up.weight.data.mul_(3)
            block.mlp.down.weight.data.mul_(3)
            self.x = torch.randn(samples, LENGTH, HIDDEN).to(dtype)
            self.keep = {f"0.{w.parameter}": torch.rand_like(block.get_parameter(w.parameter)) > 0.5 for w in WEIGHTS}
        self.dense = UnitModules(UNIT, {0: block.to(dtype).requires_grad_(False)})
        self.y = self.dense(self.x, CALLS)
        self.pruned = copy.deepcopy(self.dense)
        for name, parameter in self.pruned.named().items():
            if name in self.keep:
                parameter.data.masked_fill_(~self.keep[name], 0)
        sizes = [(weight_rms(self.dense.named()[name]), keep.numel()) for name, keep in self.keep.items()]
        self.rms = rate_unit(sizes, width=1)
        self.inputs, self.targets = (Spool(home / f"{name}.arrow", SpoolBudget(1 << 20)) for name in ("in", "out"))
        self.inputs.append(self.x)
        self.targets.append(self.y)

    def fit(self, **settings) -> tuple[dict[str, Tensor], Fit]:
        return fit(
            self.pruned,
            self.keep,
            CALLS,
            self.inputs,
            Target(self.targets),
            FitSettings(**{"learning_rate": 0.01, "dtype": self.fitted_in} | settings),
            self.rms,
        )
