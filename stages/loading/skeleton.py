"""A whole model without its weights: the model's own code runs around blocks that live elsewhere.

The model is built from its config on the meta device and its decoder layers are replaced by stubs. The model's own
forward then tells how each layer is called, makes the first layer's input, and turns the last layer's output into
logits: embedding scale, position embeddings, masks, rotary tables, final norm and soft-capping are never rewritten.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from espalier.stages.errors import Refusal
from espalier.stages.loading.stub import Answers, Stub, Visit
from espalier.stages.loading.weight_mapping import WeightMapping
from espalier.stages.model.calls import Call
from espalier.stages.model.empty import empty_model, text_alone
from espalier.stages.model.families import BlockLayout, Tower
from espalier.stages.model.packing import Given, Passage, found_passages, pack_layers
from espalier.stages.model.structure import check_family, layout_in
from espalier.stages.precision import check_range, note_dtypes
from espalier.stages.storage.config_file import read_config_file
from espalier.stages.storage.headers import TensorEntry
from espalier.stages.storage.hf_checkpoint import Checkpoint
from espalier.stages.storage.staging import upload


class _Stop(Exception):
    """Ends a forward pass at a stub, carrying what reached it."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def read_config(directory: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The model's config. Raises Refusal if it cannot be read or names no model family known here."""
    file = read_config_file(directory)
    check_family(file.model_type)
    return file.config(trust_remote_code)


CONTEXT = 2048  # the longest sample of a model whose config names none
VARYING = ("position_ids", "token_type_ids")  # inputs of a sample with an image that shape how layers are called


class Skeleton:
    """A model of `config` without weights; `dtype` is what its hidden states are computed in.

    `checkpoint` tells under which names its tensors lie on disk; without it they are those that transformers saves.
    Blocks are held as they are stored, or in `weights`; see `espalier.stages.precision`.
    """

    tower: ClassVar[Tower] = "language"

    def __init__(
        self,
        config: PreTrainedConfig,
        dtype: torch.dtype,
        device: str = "cpu",
        checkpoint: Checkpoint | None = None,
        weights: torch.dtype | None = None,
    ) -> None:
        self.config, self.dtype, self.device, self.weights = config, dtype, device, weights
        self.model = empty_model(text_alone(config), dtype).eval()
        self.layout: BlockLayout = layout_in(self.model, self.tower)
        self._computed = note_dtypes(self.model, dtype)
        shapes = {name: tensor.shape for name, tensor in self.model.state_dict().items()}
        self.storage = WeightMapping(self.model, shapes, None if checkpoint is None else checkpoint.entries)
        holder, _, attribute = self.layout.blocks.rpartition(".")
        self.layers = self._find_layers()  # on the meta device, to be materialised one by one
        answers = Answers()
        stubs = nn.ModuleList(Stub(layer, index, self._on_visit, answers) for index, layer in enumerate(self.layers))
        setattr(self.model.get_submodule(holder), attribute, stubs)
        self._visit: Visit = lambda index, call, hidden: hidden
        self.outer = [name for name, _ in self.model.named_parameters()]
        text = config.get_text_config()
        self.hidden_size: int = text.hidden_size
        self.vocabulary: int = text.vocab_size
        self.context: int = getattr(text, "max_position_embeddings", None) or CONTEXT
        tower = self.layout.blocks.rpartition(".")[0]  # what lies beside it looks at images, the head aside
        head = _parameters_of(self.model, self.model.get_output_embeddings())
        beside = [name for name in self.outer if not name.startswith(f"{tower}.") and name not in head]
        self.vision = frozenset(beside if self.layout.images else [])
        self.ends = frozenset(self.outer)  # of what lies outside the blocks, all that is ever loaded
        self.vision_loaded = False  # whether `vision` is loaded
        self._fill_outer(self.outer, {})
        for name, buffer in list(self.model.named_buffers()):
            holder, _, attribute = name.rpartition(".")
            self.model.get_submodule(holder)._buffers[attribute] = upload(buffer, device)
        self.passages = self._find_passages()
        if self.passages:
            pack_layers(self.layers, self.passages)

    def _find_passages(self) -> list[Passage]:
        """How each layer is passed by what travels; empty where that is hidden states alone."""

        embedding: Any = self.model.get_input_embeddings()

        def given(samples: int, length: int) -> list[Given]:
            @torch.enable_grad()
            def run() -> None:
                inputs = self._nothing(samples, length)
                if "inputs_embeds" in inputs:
                    inputs["inputs_embeds"] = _with_gradient(inputs["inputs_embeds"])
                self.model(**inputs, use_cache=False)

            return self._reached(run)

        handle = embedding.register_forward_hook(lambda module, args, output: _with_gradient(output))
        try:
            return found_passages(self.layers, given, self.dtype)
        except Refusal:
            raise
        except Exception:  # the model's code cannot be run so: the probe of a new family says where it fails
            return []
        finally:
            handle.remove()

    def columns(self, index: int) -> int:
        """How wide the input of block `index` is, all that travels with the hidden states included."""
        return self.passages[index].before.columns if self.passages else self.hidden_size

    def _find_layers(self) -> list[nn.Module]:
        blocks = self.layout.blocks
        try:
            return list(self.model.get_submodule(blocks).children())
        except AttributeError:
            raise Refusal(
                f"tower {self.tower}: this {self.config.model_type} has no {blocks} for it; its row in FAMILIES "
                "(stages/model/families.py) is for other models of this type"
            ) from None

    def _on_visit(self, index: int, call: Call, hidden: Tensor) -> Tensor:
        return self._visit(index, call, hidden)

    @contextmanager
    def _visiting(self, visit: Visit) -> Iterator[None]:
        previous, self._visit = self._visit, visit
        try:
            with torch.no_grad():
                yield
        finally:
            self._visit = previous

    def parameters_of(self, index: int) -> dict[str, str]:
        """Name inside block `index` -> name in the model."""
        return {name: f"{self.layout.blocks}.{index}.{name}" for name in self.layers[index].state_dict()}

    def stored(self, index: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of block `index` by their names inside it, as they lie on disk: name in the checkpoint -> tensor."""
        names = self.parameters_of(index)
        return {
            name: part
            for inside, tensor in tensors.items()
            for name, part in self.storage.of(names[inside]).split(tensor).items()
        }

    def load_block(self, index: int, checkpoint: Checkpoint) -> nn.Module:
        """Layer `index` with its weights, as they are stored, from a checkpoint that uses the names known here."""
        return self.assembled(index, self.load_tensors(index, self.parameters_of(index), checkpoint))

    def load_tensors(self, index: int, inside: Iterable[str], checkpoint: Checkpoint) -> dict[str, Tensor]:
        """Those tensors of layer `index`, by their names inside it, from such a checkpoint."""
        names = self.parameters_of(index)
        tensors = self.storage.load(checkpoint, [names[name] for name in inside], self.weights, self.device)
        check_range(tensors, self.dtype)
        return {name: tensors[names[name]] for name in inside}

    def _load_outer(self, checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, Tensor]:
        """Those tensors outside the blocks, in the dtypes that they are computed in."""
        tensors: dict[str, Tensor] = {}
        for name in names:
            stored = self.storage.load(checkpoint, [name], self.weights, self.device)
            check_range(stored, self.dtype)
            tensors[name] = stored.pop(name).to(self._computed[name])
        return tensors

    def outside(self, checkpoint: Checkpoint) -> list[TensorEntry]:
        """What lies in the checkpoint outside the blocks: ends, image towers, parts that the model does not read."""
        names = {name for index in range(len(self.layers)) for name in self.parameters_of(index).values()}
        mine = {stored for name in names for stored in self.storage.of(name).names}
        return [entry for entry in checkpoint.entries.values() if entry.name not in mine]

    def _fill_outer(self, names: Iterable[str], tensors: Mapping[str, Tensor]) -> None:
        """Give those parameters outside the blocks their values; what is not given becomes zeros without memory."""
        for name in names:
            holder, _, attribute = name.rpartition(".")
            module = self.model.get_submodule(holder)
            shape = getattr(module, attribute).shape
            value = tensors.get(name)
            if value is None:
                value = torch.zeros((), dtype=self._computed[name], device=self.device).expand(shape)
            setattr(module, attribute, nn.Parameter(value, requires_grad=False))

    def ends_wanted(self, embedding: bool = True, head: bool = True) -> dict[str, str]:
        """Parameters outside the blocks -> those that lie in the checkpoint for them: the embeddings, the output head,
        or both, and all smaller parts but those that look at images.

        Where the config ties the head to the embedding, a checkpoint that lacks one of the two is read as tied.
        """
        tied = tied_names(self.model)
        tied |= {partner: name for name, partner in tied.items()}
        tables = [module for module in self.model.modules() if isinstance(module, nn.Embedding)]
        tables.append(self.model.get_input_embeddings())
        of_embedding = {name for module in tables for name in _parameters_of(self.model, module)}
        of_head = _parameters_of(self.model, self.model.get_output_embeddings())
        unwanted = (set() if embedding else of_embedding) | (set() if head else of_head)
        unwanted |= self.vision  # text alone does not pass it
        wanted = (name for name in self.outer if name not in unwanted)
        return {name: name if name in self.storage else tied.get(name, name) for name in wanted}

    def load_ends(self, checkpoint: Checkpoint, embedding: bool = True, head: bool = True) -> None:
        """Load what `ends_wanted` names."""
        tensors: dict[str, Tensor] = {}
        wanted = self.ends_wanted(embedding, head)
        for name, source in wanted.items():
            if source not in tensors:
                tensors |= self._load_outer(checkpoint, [source])
            tensors[name] = tensors[source]
        self._fill_outer(self.outer, tensors)

    def load_vision(self, checkpoint: Checkpoint) -> None:
        """Load what looks at images: the vision tower and what projects its features to the blocks' width."""
        self._fill_outer(self.vision, self._load_outer(checkpoint, self.vision))
        self.vision_loaded = True

    def unload_vision(self) -> None:
        """Let go of what `load_vision` loaded, if it did."""
        if self.vision_loaded:
            self._fill_outer(self.vision, {})
            self.vision_loaded = False

    def calls(self, samples: int, length: int, varying: Mapping[str, Tensor] | None = None) -> list[Call]:
        """How the model calls each layer for a microbatch of (samples, length) tokens.

        `varying`: the samples' own inputs among VARYING, (samples, ..., length), where they have any.
        """
        given = self._nothing(samples, length) | self._given(varying or {})
        calls = self._called(lambda: self.model(**given, use_cache=False))
        if not self.passages:
            return calls
        return [passage.emptied(call) for passage, call in zip(self.passages, calls, strict=True)]

    def _called(self, run: Callable[[], object]) -> list[Call]:
        """How each layer is called when `run` runs the model."""
        return [call for call, _ in self._reached(run)]

    def _reached(self, run: Callable[[], object]) -> list[Given]:
        """How each layer is called when `run` runs the model, and what for, each giving what it is given."""
        seen: list[Given] = []

        def visit(index: int, call: Call, hidden: Tensor) -> Tensor:
            seen.append((call, hidden))
            if index + 1 == len(self.layers):
                raise _Stop(hidden)
            return hidden

        with self._visiting(visit), suppress(_Stop):
            run()
        return seen

    def _given(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inputs as the model takes them: kept by sample, but rotary positions of several axes go axis first."""
        given = {name: upload(tensor, self.device) for name, tensor in inputs.items()}
        if "position_ids" in given:
            given["position_ids"] = given["position_ids"].long().movedim(1, 0)
        return given

    def varying(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of a processor's outputs, and of what the model makes of them, what shapes calls: (samples, ..., length)."""
        taken = inspect.signature(self.model.forward).parameters
        found = {name: inputs[name] for name in VARYING if name in inputs and name in taken}
        place = getattr(self.model.get_submodule(self.model.base_model_prefix), "get_rope_index", None)
        if place is not None:  # positions on the image's grid: temporal, height, width
            ids = inputs["input_ids"].long()
            grids = {name: inputs[name] for name in inputs if name.endswith("_grid_thw")}
            of_image = (ids == self.config.image_token_id).int()
            positions, _ = place(input_ids=ids, mm_token_type_ids=of_image, **grids)
            found["position_ids"] = positions.movedim(0, 1).int()
        return found

    def positions(self, length: int, first: Mapping[str, Tensor]) -> int:
        """How long a sample is of which `length` tokens are wanted. `first`: the first one's varying inputs."""
        return length

    def _nothing(self, samples: int, length: int) -> dict[str, Tensor]:
        """Inputs of the model that say nothing: zeros in place of embedded tokens, as wide as the embedding (OPT's can
        be narrower than its blocks). A model that embeds tokens for each block too would look for them among those."""
        if getattr(self.config.get_text_config(), "hidden_size_per_layer_input", None):
            return {"input_ids": torch.zeros(samples, length, dtype=torch.int64, device=self.device)}
        embedding: Any = self.model.get_input_embeddings()
        zeros = torch.zeros(samples, length, embedding.weight.shape[1], dtype=self.dtype, device=self.device)
        return {"inputs_embeds": zeros}

    def embed(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The first layer's input for the model's inputs, "input_ids" (samples, length) among them.

        With images the model merges their features into the embedded tokens; `load_vision` comes before that.
        """
        given = self._given({n: t for n, t in inputs.items() if n != "input_ids"}) | {
            "input_ids": upload(inputs["input_ids"].long(), self.device)
        }
        return self._entering(lambda: self.model(**given, use_cache=False))

    def _entering(self, run: Callable[[], object]) -> Tensor:
        """The first layer's input when `run` runs the model."""
        if self.passages:
            reached, before = self._reached(run), self.passages[0].before
            tensors = {part: reached[part.layer][0].arguments[part.place[0]] for part in before.parts[1:]}
            return before.pack({before.parts[0]: reached[0][1], **tensors})

        def visit(index: int, call: Call, hidden: Tensor) -> Tensor:
            raise _Stop(hidden)

        with self._visiting(visit):
            try:
                run()
            except _Stop as stop:
                return stop.hidden
        raise AssertionError("the model never called its first layer")

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's logits (samples, length, vocabulary) from its last layer's output."""
        given = self.unpacked(hidden)
        with self._visiting(lambda index, call, _: given):
            return self.model(**self._nothing(*hidden.shape[:2]), use_cache=False).logits

    def unpacked(self, hidden: Tensor) -> Tensor:
        """The last layer's output as the model's own layer gives it."""
        if not self.passages:
            return hidden
        after = self.passages[-1].after
        return after.unpack(hidden)[after.parts[0]]

    def assembled(self, index: int, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Layer `index` holding `tensors` (names inside the block); the skeleton's own layer stays on meta."""
        shared = [self.config, self.config.get_text_config(), getattr(self.config, "vision_config", None)]
        layer = copy.deepcopy(self.layers[index], {id(config): config for config in shared})
        layer.load_state_dict(tensors, assign=True, strict=True)
        for module in layer.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else upload(buffer, self.device)
        return layer.requires_grad_(False).eval()


def _with_gradient(embedded: Tensor) -> Tensor:
    """The same numbers, with what tells in torch's graph what is made of them."""
    return embedded.detach().requires_grad_() * 1


def _parameters_of(model: nn.Module, module: nn.Module | None) -> set[str]:
    """The names of one submodule's parameters in the whole model."""
    return {
        f"{name}.{parameter}"
        for name, candidate in model.named_modules()
        if module is not None and candidate is module
        for parameter, _ in candidate.named_parameters()
    }


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Parameter -> the parameter that the config ties it to."""
    return dict(model.get_expanded_tied_weights_keys())
