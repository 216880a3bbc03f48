"""A DeepSpeed engine for one rank, as a run's spec asks for it. The process group is there already."""

from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from espalier.stages.metrics.profile import freed_at_once
from espalier.stages.training.arriving import Arriving, Values
from espalier.stages.training.spec import DTYPES, MOST_BUCKET, MOST_GATHERED, RetrainSpec


def join(backend: str, address: str, rank: int, ranks: int) -> None:
    """Make this process rank `rank` of the group that meets at `address` (tcp://host:port).

    None of DeepSpeed's C++ extensions is to be used, so that nothing has to be compiled for minutes: reduction through
    shared memory, which it would build here, serves inference alone, and torch's fused Adam is as fast as its own.
    """
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(
        dist_backend=backend,
        auto_mpi_discovery=False,
        init_method=address,
        rank=rank,
        world_size=ranks,
        verbose=False,
    )


def make_engine(model: nn.Module, spec: RetrainSpec, ranks: int, values: Values | None = None) -> Any:
    """The model under ZeRO, with Adam of decoupled decay. Its learning rate is for the caller to set, at every step.

    Vectors (biases, norm gains) do not decay. With `values`, of stage 3 alone, the model is hollow and gets them.
    """
    config = settings(spec, ranks, sum(parameter.numel() for parameter in model.parameters()))
    optimizer = _optimizer(model, spec)  # before stage 3 takes the parameters' shapes away
    with freed_at_once():
        if spec.zero_stage == 3:
            _partition(model.to(DTYPES[spec.dtype]), config, values)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    # In 16 bits without ZeRO, DeepSpeed has stepped once already: on gradients of zero and, so far, at a rate of zero.
    optimizer.state.clear()
    if spec.zero_stage == 3 and spec.dtype == "float32" and not spec.offload:
        _share_masters(engine.optimizer)
    return engine


def _partition(model: nn.Module, config: dict[str, Any], values: Values | None) -> None:
    """Cut each parameter among the ranks, one after the other: so no device ever holds the whole model."""
    whole = model if values is None else Arriving(model, values)
    deepspeed.zero.Init(module=whole, config_dict_or_path=config)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(get_accelerator().current_device_name())


def _share_masters(optimizer: Any) -> None:
    """In float32, let stage 3's masters be the partitions themselves.

    DeepSpeed means to do so, but takes the device "cpu" for another than torch.device("cpu"), and keeps two copies.
    """
    for master, partition in zip(
        optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat, strict=True
    ):
        master.data = partition.data


def _optimizer(model: nn.Module, spec: RetrainSpec) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": spec.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, spec.beta2), fused=True)


def settings(spec: RetrainSpec, ranks: int, elements: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a model of so many elements."""
    bucket = min(MOST_BUCKET, elements)
    zero: dict[str, Any] = {
        "stage": spec.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        # By default stage 3 keeps tensors of up to 100 000 elements whole on every rank.
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": MOST_GATHERED,
    }
    if spec.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    config: dict[str, Any] = {
        "train_batch_size": spec.batch,
        "train_micro_batch_size_per_gpu": spec.microbatch,
        "gradient_accumulation_steps": spec.accumulation(ranks),
        "gradient_clipping": spec.clip,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 40,
    }
    if spec.dtype == "bfloat16":
        config["bf16"] = {"enabled": True}
        if spec.zero_stage:  # without ZeRO, DeepSpeed sums gradients in the parameters' own dtype
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    elif spec.dtype == "float16":
        config["fp16"] = {"enabled": True}
    return config


def new_state(home: Tensor, updates: int) -> dict[str, Any]:
    """Adam's state for one of the optimizer's tensors, as after so many updates; its moments zero, to be filled."""
    return {
        "step": torch.tensor(float(updates), device=home.device),
        "exp_avg": torch.zeros_like(home.detach()),
        "exp_avg_sq": torch.zeros_like(home.detach()),
    }


def updates_of(engine: Any) -> int:
    """How often Adam has stepped: fewer than the engine's steps where float16 gradients overflowed."""
    return max((int(state["step"]) for state in engine.basic_optimizer.state.values() if "step" in state), default=0)
