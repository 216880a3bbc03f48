"""Where a model keeps its blocks and what they consist of, found in the model that transformers builds.

Everything is read off the modules and the shapes of their parameters, on the meta device too, so every process that
builds the model finds the same. `espalier.stages.shard.probe` shows that what was found here is right.
"""

from collections.abc import Iterator

import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from espalier.stages.errors import Refusal
from espalier.stages.model.anatomy import prunable_names
from espalier.stages.model.families import FAMILIES, BlockLayout, Tower, vision_of

RECURRENT = ("Mamba", "Rwkv", "RWKV", "xLSTM", "MLSTM", "Recurrent")  # in the names of modules that carry a state on
ROWS_OF_A_GATE = 1  # outputs of what weighs one shared expert


def layout_in(model: PreTrainedModel, tower: Tower = "language") -> BlockLayout:
    """The layout of `model`: its family's row, or what is found in it; for the vision tower what the row says of it.

    Raises Refusal for a model whose blocks cannot be told, for one that works recurrently, and for the vision tower of
    a family that has none here.
    """
    family = model.config.model_type
    if tower == "vision":
        return vision_of(family)
    return FAMILIES.get(family) or found_layout(model)


def check_family(family: str) -> None:
    """Raises Refusal for a model type that transformers does not know, and for one that is no decoder of text."""
    if family in FAMILIES or (family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not _encodes(family)):
        return
    if family in CONFIG_MAPPING_NAMES:
        raise Refusal(
            f"model family {family!r} is not supported: an encoder, an encoder-decoder or not of text; give a decoder, "
            "which predicts the next token"
        )
    raise Refusal(
        f"model family {family!r} is not supported: transformers {transformers.__version__} does not know it; "
        "install a release that does"
    )


def _encodes(family: str) -> bool:
    """Whether models of the family have an encoder, or are one: those also fill in masked tokens."""
    return family in MODEL_FOR_MASKED_LM_MAPPING_NAMES or bool(CONFIG_MAPPING[family].is_encoder_decoder)


def found_layout(model: PreTrainedModel) -> BlockLayout:
    """What the modules say: the list of decoder layers, their children that hold linears, the routers of experts."""
    family, depth = model.config.model_type, getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if depth is None:
        raise Refusal(
            f"model family {family!r} is not supported: its config has no num_hidden_layers; a row in FAMILIES "
            "(stages/model/families.py) can say where its blocks are"
        )
    blocks, layers = _layers(model, family, depth)
    _refuse_recurrent(family, blocks, layers)
    components = dict.fromkeys(
        name for layer in layers for name, child in layer.named_children() if any(prunable_names(child))
    )
    routers = dict.fromkeys(name for layer in layers for name in _routers(layer))
    return BlockLayout(blocks=blocks, components=tuple(components), routers=tuple(routers))


def _layers(model: PreTrainedModel, family: str, depth: int) -> tuple[str, nn.ModuleList]:
    """The list of `depth` modules with matrices, and its name. Raises Refusal unless there is exactly one."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and all(any(prunable_names(m)) for m in module)
    }
    inside = {name for name, module in model.named_modules() for other in decoder.modules() if other is module}
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    found = [name for name in outermost if name in inside] or outermost
    if len(found) != 1:
        what = f"{len(found)} lists of {depth} ({', '.join(found)})" if found else f"no list of {depth} layers"
        raise Refusal(
            f"model family {family!r} is not supported: {what} in the model, and config.json says {depth} blocks; "
            "a row in FAMILIES (stages/model/families.py) can say where they are"
        )
    return found[0], lists[found[0]]


def _refuse_recurrent(family: str, blocks: str, layers: nn.ModuleList) -> None:
    for index, layer in enumerate(layers):
        for name, module in layer.named_modules():
            kind = type(module).__name__
            if any(part in kind for part in RECURRENT):
                raise Refusal(
                    f"model family {family!r} is not supported: {blocks}.{index}.{name} is a {kind}, and recurrent "
                    "models are not pruned here; give a transformer"
                )


def _routers(layer: nn.Module) -> Iterator[str]:
    """What chooses or weighs experts in one block: the modules beside them whose rows are as many, or one."""
    for name, module in layer.named_modules():
        counts = {inside: count for inside, child in module.named_children() if (count := _experts(child))}
        rows = {ROWS_OF_A_GATE, *counts.values()}
        for inside, child in module.named_children() if counts else ():
            matrices = [parameter for parameter in child.parameters() if parameter.ndim == 2]
            if inside not in counts and matrices and all(matrix.shape[0] in rows for matrix in matrices):
                yield f"{name}.{inside}" if name else inside


def _experts(module: nn.Module) -> int:
    """How many experts a module holds, stacked in its parameters or each a module; 0 if it holds none."""
    stacks = [len(parameter) for parameter in module.parameters(recurse=False) if parameter.ndim == 3]
    if stacks:
        return stacks[0]
    if not isinstance(module, nn.ModuleList) or len(module) < 2 or len({type(child) for child in module}) > 1:
        return 0
    return len(module) if any(prunable_names(module[0])) else 0
