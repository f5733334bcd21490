"""What every pass shares: its parts in order, equal layers once; of a training step the way back.

In training the first layer of each kind is written apart from those like it: it comes last on the
way back and frees what they share (rotary tables, masks). All others of the kind are one segment,
repeated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Generic, TypeVar

from planner.autograd.aten import Aten
from planner.autograd.autocast import FLOAT32
from planner.autograd.checkpointing import Frame
from planner.autograd.dora import Frozen, Trained, dora
from planner.autograd.engine import Graph, run_back
from planner.autograd.functions import Functions
from planner.autograd.gathering import Gathering, Group
from planner.autograd.layouts import contiguous
from planner.autograd.master_weights import MasterCopies
from planner.autograd.tensors import Dims, Gradients, Leaf, Like, Node, Storage, Tensor
from planner.layers import Layer
from planner.model import Model
from planner.parameters import layer_parameters
from planner.program import (
    BACKWARD,
    FORWARD,
    OPTIMIZER_STEP,
    B,
    Buffer,
    Program,
    Symbol,
    T,
    Tape,
)
from planner.runtimes.writer import layer_label
from planner.tensors import Parameter
from planner.trained.frozen import NOTHING, FrozenParts, unfrozen
from planner.trained.lora import adapted, adapter_bytes, adapters_beside
from planner.trained.loss_scaling import LossScaler
from planner.trained.optimizer_parts import Part as TrainedPart
from planner.trained.optimizers import OptimizerWriter
from planner.trained.sharding import Sharding, lying
from planner.workload import LoRA

Given = TypeVar("Given")
ORDINALS = ("first", "second", "third", "fourth")
EMBEDDING, HEAD, AGAIN = "embedding", "head", ", which runs again"


class PassWriter(Generic[Given]):
    """Writes one pass of a model whose parts a subclass runs: forward alone, or a training step.

    `numbers` are sizes that stand for the symbols, `b` bytes of an element of the weights. Without
    `trains` nothing is recorded for a way back. `checkpointed`: every such layer, from the first
    on, keeps its inputs alone and runs again on the way back; 0: none does. `selective`: they keep
    what their products return, too. `autocast`: bytes of an element that products take in a region
    of autocast around the forward. `crossing` are what made tensors that later parts
    use besides what they are handed, and what their gradients are called while they wait. `lora`:
    adapters beside the linear layers `adapted`, all that is trained then. `accumulates`: the
    gradients of earlier steps are there, and those of this one are added to them. `scales`: the
    loss, by a GradScaler. `copies`: master weights in float32, which the optimizer steps.
    `frozen`: parts that are not trained.
    """

    def __init__(
        self,
        model: Model,
        b: int,
        numbers: Mapping[Symbol, int],
        *,
        trains: bool = True,
        checkpointed: int = 0,
        selective: bool = False,
        autocast: int | None = None,
        lora: LoRA | None = None,
        accumulates: bool = False,
        scales: bool = False,
        copies: bool = False,
        sharding: Sharding | None = None,
        frozen: FrozenParts = NOTHING,
    ) -> None:
        self.accumulates, self.scales, self.copies = accumulates, scales, copies
        self.model, self.b, self.trains, self.checkpointed = model, b, trains, checkpointed
        self.lora, self.adapted = lora, frozenset[str]() if lora is None else adapted(model, lora)
        self.selective, self.frozen_parts = selective, frozen
        self.layer_is_frozen: bool | None = None  # None: the part is none
        self.keeps_inputs = False  # of the layer that is being written: it will run again
        self.flows = False  # whether a gradient flows back through what is carried
        self.carries_leaf = False  # such as nothing made: embeddings that are asked for one
        self.hidden, self.hidden_gradient = (  # what goes from part to part, the same everywhere
            Buffer(name=name, shape=(B, T, model.hidden_size), itemsize=b)
            for name in ("hidden states", "gradient of hidden states")
        )
        self.tape = Tape()
        self.gathering: Gathering | None = None
        if sharding is not None:
            self.gathering = Gathering(self.tape, sharding, b, accumulates=accumulates)
        self.aten = Aten(self.tape, numbers)
        self.f = Functions(self.aten)
        self.f.low, self.f.casts = autocast, {}
        # of each part, cached until the region ends
        self.casts: dict[str, dict[Leaf | Node, Tensor]] = {}
        self.walking = ""  # the part that is being written
        self.leaves: dict[str, list[Leaf]] = {}  # of each part
        self.known: Iterator[Leaf] | None = None  # of a layer that runs again, in order
        self.with_loss: list[Tensor] = []  # leaves that are no parameters: its graph holds them
        self.held_by_nodes: dict[str, list[Tensor]] = {}  # of each part, beside what they save
        self.crossing: list[tuple[Node, Buffer]] = []

    def embed(self) -> Tensor:
        """Token ids to hidden states, and what all layers share."""
        raise NotImplementedError

    def shared(self, layer: Layer) -> Given:
        """What a layer is given besides the hidden states."""
        raise NotImplementedError

    def block(self, layer: Layer, x: Tensor, given: Given) -> Tensor:
        """One layer."""
        raise NotImplementedError

    def head(self, hidden: list[Tensor]) -> Tensor:
        """The loss, or the logits; it empties the list of the last hidden states when it can."""
        raise NotImplementedError

    def weight(self, name: str, *shape: int) -> Tensor:
        """A parameter, trained where anything is but what is frozen."""
        made = self.given(name, tuple((n,) for n in shape), self.b)
        if not self.trains or self.lora is not None or self._is_frozen(name):
            return made
        return self._trained_leaf(made)

    def _is_frozen(self, name: str) -> bool:
        """Whether a parameter of the part that is written is left as it is."""
        if self.layer_is_frozen is not None:
            return self.layer_is_frozen
        return self.frozen_parts.has_outer(name, tied=self.model.tie_word_embeddings)

    def adapter(self, name: str, *shape: int) -> Tensor:
        """A parameter beside the frozen ones."""
        assert self.lora is not None
        dims = tuple((n,) for n in shape)
        return self._trained_leaf(self.given(name, dims, adapter_bytes(self.lora)))

    def with_adapters(
        self, result: Tensor, x: Tensor, module: str, name: str, frozen: Frozen | None = None
    ) -> Tensor:
        """A linear layer's result and what its adapters make of x.

        peft/tuners/lora/layer.py, Linear.forward; attnlab's lora.py has the same ops. The result
        goes when the sum is there: the caller has no name for it. DoRA needs what is `frozen`.
        """
        assert self.lora is not None
        f, rank, kept = self.f, self.lora.rank, result.itemsize
        into = self.adapter(f"{module}.lora_A", rank, x.sizes[-1])
        back = self.adapter(f"{module}.lora_B", result.sizes[-1], rank)
        x = f.cast(x, into.itemsize, f"{module}, input of the adapters")
        called = f"{module}, adapters"
        result = f.add(
            result,
            f.scale(f.linear(f.linear(x, into, None, called), back, None, called), called)
            if frozen is None
            else self._dora(result, x, into, back, frozen, module),
            f"{module} with adapters",
        )
        return f.cast(result, kept, name or module)

    def with_adapters_of_four_bits(
        self, result: Tensor, x: Tensor, module: str, frozen: Frozen | None
    ) -> Tensor:
        """The same beside 4-bit weights: peft/tuners/lora/bnb.py, Linear4bit.forward.

        The result is copied first. What the adapters make is cast before the sum, and their input,
        but for a region of autocast on a GPU (torch.is_autocast_enabled asks for that one).
        """
        assert self.lora is not None
        f, rank, kept = self.f, self.lora.rank, result.itemsize
        converts = f.low is None or not self.aten.on_gpu
        result = f.clone(result, f"{module}, copy")
        into = self.adapter(f"{module}.lora_A", rank, x.sizes[-1])
        back = self.adapter(f"{module}.lora_B", result.sizes[-1], rank)
        called = f"{module}, adapters"
        if converts:
            x = f.cast(x, into.itemsize, f"{module}, input of the adapters")
        if frozen is not None:
            result = f.add(
                result,
                self._dora(result, x, into, back, frozen, module),
                f"{module} with adapters",
            )
            return f.cast(result, kept, module) if converts else result
        beside = f.scale(f.linear(f.linear(x, into, None, called), back, None, called), called)
        if converts:
            beside = f.cast(beside, kept, called)
        return f.add(result, beside, f"{module} with adapters")

    def _dora(
        self, result: Tensor, x: Tensor, into: Tensor, back: Tensor, frozen: Frozen, module: str
    ) -> Tensor:
        magnitude = self.adapter(f"{module}.lora_magnitude_vector", result.sizes[-1])
        return dora(self.f, frozen, Trained(into, back, magnitude), x, result, module)

    def _trained_leaf(self, made: Tensor) -> Tensor:
        if self.known is not None:  # a layer that runs again
            return replace(made, node=next(self.known))
        like = Like(made.dims, made.sizes, made.strides, made.itemsize, made.name)
        leaf = Leaf(like, gathered=self.gathering is not None)
        self.leaves[self.walking].append(leaf)
        if self.accumulates and self.gathering is None:
            leaf.grad = self._accumulated(leaf.tensor)
        return replace(made, node=leaf)

    def _accumulated(self, like: Like) -> Tensor:
        """The gradient of earlier steps."""
        shape = tuple(extent for dim in like.dims for extent in dim)
        name = f"gradient of {like.name}"
        buffer = Buffer(name=name, shape=shape, itemsize=like.itemsize, gradient=True)
        storage = Storage(buffer, self.tape)
        return Tensor(storage, like.dims, like.sizes, like.strides, like.itemsize, name)

    def ask_gradient(self, x: Tensor) -> None:
        """PreTrainedModel.enable_input_require_grads, which checkpointing turns on."""
        if self.checkpointed and x.node is None:
            x.node = Node("input embeddings", self.keep_with_loss, (), ())
            x.node.is_leaf = True
            self.f.graph.nodes.append(x.node)
            self.with_loss.append(x.detach())

    def keep_with_loss(self, node: Node, flowed: Gradients) -> Gradients:
        """A leaf that is no parameter: the loss's graph holds it with its gradient."""
        self.with_loss += [gradient for gradient in flowed if gradient is not None]
        return []

    def given(self, name: str, dims: Dims, itemsize: int) -> Tensor:
        """A tensor that was there before the pass: token ids."""
        shape = tuple(extent for dim in dims for extent in dim)
        there = Storage(Buffer(name=name, shape=shape, itemsize=itemsize), None)
        sizes = self.aten.sizes(dims)
        return Tensor(there, dims, sizes, contiguous(sizes), itemsize, name)

    def write_forward(self, name: str) -> Program:
        """The forward pass alone; what it returns lives on."""
        tape = self.tape
        carried: Gradients = []
        for part in self.parts():
            if not tape.again(part.label, count=part.count, first_layer=part.layer):
                with tape.segment(part.label, count=part.count, first_layer=part.layer):
                    self._walk(part, carried)
        return tape.program(name)

    def write_step(self, name: str, optimizer: str | None, impl: str) -> Program:
        """Forward and backward; with an optimizer its step, which uses the gradients up."""
        tape, graphs = self.tape, dict[str, Graph]()
        carried: Gradients = []  # the hidden states, later their gradient: no other reference
        tape.phase = FORWARD
        for part in self.parts():
            if not tape.again(part.label, count=part.count, first_layer=part.layer):
                with tape.segment(part.label, count=part.count, first_layer=part.layer):
                    graphs[part.label] = self._walk(part, carried)
                    self._reshard(part)
        self._end_autocast()
        if self.accumulates:
            self._open_with_gradients()
        tape.phase = BACKWARD
        loss = carried[0]
        assert loss is not None
        sent = self._scaled_loss(loss, graphs[HEAD]) if self.scales else loss
        for part in reversed(list(self.parts())):
            label = f"backward of {part.label}"
            last = None if part.layer is None else part.layer + part.count - 1
            if not tape.again(label, count=part.count, first_layer=last):
                with tape.segment(label, count=part.count, first_layer=last, layer_step=-1):
                    if part.label == HEAD:
                        root = self._ones_like(sent)
                        carried[0] = root
                    self._gather_again(part)
                    run_back(self.aten, graphs[part.label], carried)
                    if carried and carried[0] is not None:
                        carried[0].storage.known_as(self.handed(part)[1])
                    for node, waits in self.crossing:
                        if 0 in node.waiting:
                            node.waiting[0].storage.known_as(waits)
                    self._reduce(part)
        with tape.segment("end of the backward"):
            del root, sent
        tape.phase = OPTIMIZER_STEP
        if optimizer is not None:
            self._write_optimizer(optimizer, impl)
        if any(self.held_by_nodes.values()):
            self._drop("graph of", self.held_by_nodes)
        with tape.segment("end"):
            del loss
            self.with_loss.clear()
        return tape.program(name)

    def _write_optimizer(self, optimizer: str, impl: str) -> None:
        """The optimizer's step, around which master weights are read and written."""
        b, parts = self.b if self.lora is None else adapter_bytes(self.lora), self.trained_parts()
        if self.gathering is not None:
            b = self.gathering.sharding.held_bytes
        scaler = LossScaler(self.tape) if self.scales else None
        if not self.copies:
            OptimizerWriter(self.tape, optimizer, impl, b, scaler).write(parts)
            self._zero_gradients()
            return
        master = MasterCopies(self.tape, b)
        master.take(parts, self.leaves)
        OptimizerWriter(self.tape, optimizer, impl, FLOAT32, scaler).write(parts)
        master.give(parts)

    def _group(self, layer: Layer | None) -> Group:
        """What is gathered with a layer; None: all that stands outside of the layers."""
        assert self.gathering is not None
        h = self.model.hidden_size
        own = self._outer() if layer is None else self.inside(layer_parameters(layer, h))
        shapes = (lying(self.model, p, inside=layer is not None) for p in own)
        return self.gathering.group(shapes, root=layer is None)

    def _outer(self) -> Iterable[Parameter]:
        return chain.from_iterable(
            self.outside(part) for part in self._parts() if part.layer_kind is None
        )

    def _gather(self, part: Part) -> None:
        """Before a part's forward; the root's begins with the embedding."""
        if self.gathering is None:
            return
        if part.layer is not None:
            self.gathering.at(waiting=self._beside(part.layer, -1) or self._group(None))
        self.gathering.before_forward(self._group(part.layer_kind))

    def _reshard(self, part: Part) -> None:
        """Behind a part's forward; the root's ends with the head."""
        if self.gathering is None:
            return
        if part.layer is not None:
            freed = self._freed(part.layer)
            if freed is not None:
                self.gathering.after_forward(freed)
        elif part.label == HEAD:
            self.gathering.at(waiting=self._group(self.model.layers[-1]))
            self.gathering.end_forward()

    def _gather_again(self, part: Part) -> None:
        """Before the way back through a part."""
        if self.gathering is None or part.label == EMBEDDING:
            return
        layers = len(self.model.layers)
        at = layers if part.layer is None else part.layer
        self.gathering.before_backward(self._freed(at), self._freed(at - 1))

    def _reduce(self, part: Part) -> None:
        """Behind the way back through a part; the root's ends with the embedding."""
        if self.gathering is None or part.label == HEAD:
            return
        leaves = self.leaves[part.label]
        if part.layer is None:
            last = self._group(self.model.layers[0])
            self.gathering.at(reducing=last)
            leaves = [
                leaf for p in self.parts() if p.layer is None for leaf in self.leaves[p.label]
            ]
        else:
            self.gathering.at(reducing=self._beside(part.layer, 1))
        self.gathering.after_backward(self._group(part.layer_kind), leaves)
        if part.layer is None:
            self.gathering.end_backward()

    def _freed(self, index: int) -> Group | None:
        """The layer's group, where there is such a layer and its weights went after the forward."""
        assert self.gathering is not None
        last = len(self.model.layers) - 1
        if not 0 <= index <= last or not self.gathering.sharding.frees(last=index == last):
            return None
        return self._group(self.model.layers[index])

    def _beside(self, index: int, step: int) -> Group | None:
        """The layer before or behind one of them; None at the ends."""
        at = index + step
        inside = 0 <= at < len(self.model.layers)
        return self._group(self.model.layers[at]) if inside else None

    def _end_autocast(self) -> None:
        """The region's cache is cleared."""
        if self.f.low is None:
            return
        self.f.casts = {}
        self._drop("autocast ends:", self.casts)

    def _drop(
        self, what: str, kept: Mapping[str, dict[Leaf | Node, Tensor] | list[Tensor]]
    ) -> None:
        """Let go of what is kept of each part."""
        for part in self.parts():
            label = f"{what} {part.label}"
            if not self.tape.again(label, count=part.count, first_layer=part.layer):
                with self.tape.segment(label, count=part.count, first_layer=part.layer):
                    kept[part.label].clear()

    def _scaled_loss(self, loss: Tensor, graph: Graph) -> Tensor:
        """GradScaler.scale: the product, and its node in the graph of the loss."""
        with self.tape.segment("scale of the loss"):
            scale = self.given("scale of the loss", (), FLOAT32)
            self.f.graph = graph
            return self.f.mul(replace(loss, node=graph.nodes[-1]), scale, "scaled loss").detach()

    def _ones_like(self, loss: Tensor) -> Tensor:
        return self.aten.new("ones_like", "gradient of the loss", (), loss.itemsize)

    def trained_parts(self) -> list[TrainedPart]:
        """The parameters of each part, in the order of the module's."""
        trained = []
        for part in self.parts():
            own = list(self.trained_in(part))
            shapes = tuple(p.shape for p in own)
            if self.gathering is not None:
                lie = (lying(self.model, p, inside=part.layer_kind is not None) for p in own)
                shapes = tuple(map(self.gathering.sharding.shard, lie))
            if shapes:
                trained.append(
                    TrainedPart(
                        label=part.label, shapes=shapes, count=part.count, first_layer=part.layer
                    )
                )
        return trained

    def trained_in(self, part: Part) -> Iterable[Parameter]:
        """What the optimizer updates of a part, or of one of its layers."""
        if part.frozen:
            return ()
        kind, h = part.layer_kind, self.model.hidden_size
        own = self.outside(part) if kind is None else self.inside(layer_parameters(kind, h))
        if kind is None:
            own = unfrozen(own, self.model, self.frozen_parts)
        return own if self.lora is None else adapters_beside(own, self.lora, self.adapted)

    def inside(self, parameters: Iterable[Parameter]) -> Iterable[Parameter]:
        """A layer's parameters in the order of its module's."""
        return parameters

    def outside(self, part: Part) -> Iterable[Parameter]:
        """The parameters of a part that is no layer."""
        embeds = part.label == EMBEDDING
        outer = self.model.outer_parameters()
        return (p for p in outer if p.name.startswith("embed") == embeds)

    def _open_with_gradients(self) -> None:
        for part in self.parts():
            grads = [leaf.grad for leaf in self.leaves[part.label]]
            buffers = tuple(grad.storage.buffer for grad in grads if grad is not None)
            if self.gathering is not None and part.label != EMBEDDING:
                buffers = (self._group(part.layer_kind).gradients,)
            if buffers:
                self.tape.open_with(
                    "gradients so far", buffers, count=part.count, first_layer=part.layer
                )

    def _zero_gradients(self) -> None:
        """Set all gradients to None."""
        for part in self.parts():
            label = f"zero_grad of {part.label}"
            if not self.tape.again(label, count=part.count, first_layer=part.layer):
                with self.tape.segment(label, count=part.count, first_layer=part.layer):
                    for leaf in self.leaves[part.label]:
                        leaf.grad = None
                    if self.gathering is not None and part.label != EMBEDDING:
                        self.tape.free(self._group(part.layer_kind).gradients)

    def parts(self) -> Iterator[Part]:
        """Embedding, runs of equal layers with the first of each kind apart, head.

        Layers that are gathered are alike where those beside them are of the same size, too.
        """
        for part in self._parts():
            if part.layer_kind is None or self.gathering is None:
                yield part
            else:
                yield from self._between_alike(part)

    def _between_alike(self, part: Part) -> Iterator[Part]:
        start, kind = part.layer, part.layer_kind
        assert start is not None
        assert kind is not None
        own = self._group(kind)
        beside = {None: "an end", own: "its like"}
        runs: list[Part] = []
        for index in range(start, start + part.count):
            before, behind = (
                beside.get(group, f"{id(group)}")
                for group in (self._beside(index, -1), self._beside(index, 1))
            )
            label = f"{part.label}, between {before} and {behind}"
            if runs and runs[-1].label == label:
                runs[-1] = replace(runs[-1], count=runs[-1].count + 1)
            else:
                runs.append(replace(part, label=label, count=1, layer=index))
        yield from runs

    def _parts(self) -> Iterator[Part]:
        yield Part(EMBEDDING)
        seen: dict[str, int] = {}
        for start, count, layer, keeps in self._cut_runs():
            frozen = self.frozen_parts.has_layer(start)
            label = f"{'frozen ' * frozen}{layer_label(layer)}{keeps}"
            again = keeps in ("", AGAIN) and self.checkpointed > 0
            while count and seen.get(label, 0) < self._apart(layer, start):
                order = ORDINALS[seen.get(label, 0)]
                seen[label] = seen.get(label, 0) + 1
                yield Part(f"{order} {label}", 1, start, layer, again=again, frozen=frozen)
                start, count = start + 1, count - 1
            if count:
                yield Part(label, count, start, layer, again=again, frozen=frozen)
        yield Part(HEAD)

    def _cut_runs(self) -> Iterator[tuple[int, int, Layer, str]]:
        """The runs, none with both frozen layers and trained ones."""
        for start, count, layer, keeps in self._runs():
            left = min(max(0, self.frozen_parts.layers - start), count)
            if left:
                yield start, left, layer, keeps
            if count > left:
                yield start + left, count - left, layer, keeps

    def _runs(self) -> Iterator[tuple[int, int, Layer, str]]:
        """Runs of layers that are alike: (first, how many, the layer, what it keeps, in words).

        Behind a layer that runs again, one that does not may let go of what that one returned.
        """
        every = self.checkpointed
        for start, count, layer in self.model.layer_groups():
            if every < 2:
                yield start, count, layer, ""
                continue
            for index in range(start, start + count):
                keeps = {0: AGAIN, 1: ", behind it"}.get(index % every, ", which keeps all")
                yield index, 1, layer, keeps

    def _apart(self, layer: Layer, start: int) -> int:
        """How many layers of a kind are written apart, seen from the one at `start`.

        Without a way back only the first of all differs: its input may live on. Of a kind whose
        first layer is the model's, and reached by no gradient from before, the second may be the
        one that frees what they share; behind frozen ones that may be a layer of any kind.
        """
        if not self.trains:
            return int(start == 0)
        if self.frozen_parts:
            return 2
        return 1 + (self.lora is not None and layer == self.model.layers[0])

    def _walk(self, part: Part, carried: Gradients) -> Graph:
        """Run one part on what is carried, and carry its result."""
        self.walking, self.leaves[part.label], self.held_by_nodes[part.label] = part.label, [], []
        self.keeps_inputs = part.again
        self.layer_is_frozen = None if part.layer_kind is None else part.frozen
        self.casts[part.label] = self.f.casts = {}
        self.f.graph = graph = Graph([Node("entrance", _no_way_back, (), ())])
        entrance = graph.nodes[0] if self.trains else None
        graph.nodes[0].is_leaf = self.carries_leaf
        entered: list[Tensor] = []
        if carried:
            x = carried.pop()
            assert x is not None
            entered.append(replace(x, node=entrance if self.flows else None, output=0))
            del x
        out = self.run(part, entered)
        if part.ends:
            return graph
        self.flows = out.node is not None
        self.carries_leaf = out.node is not None and out.node.is_leaf
        if part.layer_kind is not None:  # what others make may live on, and is not one of these
            out.storage.known_as(self.handed(part)[0])
        carried.append(out.detach())
        return graph

    def run(self, part: Part, entered: list[Tensor]) -> Tensor:
        """One part on what it is handed."""
        if part.label == EMBEDDING:
            self._gather(part)
            return self.embed()
        if part.layer_kind is None:
            return self.head(entered)
        return self.run_layer(part, part.layer_kind, entered[0])

    def received(self, given: Given) -> Given:
        """What a layer is given, as its forward takes it: before its weights are gathered."""
        return given

    def handed(self, part: Part) -> tuple[Buffer, Buffer]:
        """What goes from this part to the next, and its gradient: the same for every layer."""
        return self.hidden, self.hidden_gradient

    def run_layer(self, part: Part, layer: Layer, x: Tensor) -> Tensor:
        """One layer, which keeps its inputs alone where it is checkpointed."""
        f, given = self.f, self.received(self.shared(layer))
        self._gather(part)
        if not self.keeps_inputs:
            return self.block(layer, x, given)
        leaves, entrance, frozen = self.leaves[self.walking], x.node, self.layer_is_frozen

        def again(frame: Frame[Given], x: Tensor, given: Given) -> None:
            graph, f.graph, f.frame, f.casts = f.graph, Graph(), frame, {}
            self.known, expected = iter(leaves), [leaf.expected for leaf in leaves]
            self.layer_is_frozen = frozen
            try:
                self.block(layer, replace(x, node=entrance), given)
            finally:
                self.known, f.graph, f.frame, f.casts = None, graph, None, {}
                for leaf, gradients in zip(leaves, expected, strict=True):
                    leaf.expected = gradients  # this graph sends none

        f.frame = Frame(self.aten, again, x, given)
        self.aten.keeps = f.frame.kept if self.selective else None
        self.aten.products = 0
        out = self.block(layer, x, given)
        f.frame = self.aten.keeps = None
        return out


@dataclass(frozen=True, slots=True)
class Part:
    """A run of equal layers, or what stands before or behind them.

    `ends`: what it makes is not handed to the next part. `again`: it is checkpointed. `frozen`:
    layers that are not trained.
    """

    label: str
    count: int = 1
    layer: int | None = None
    layer_kind: Layer | None = None
    stack: str = ""
    ends: bool = False
    again: bool = False
    frozen: bool = False


def _no_way_back(node: Node, flowed: Gradients) -> Gradients:
    raise AssertionError("the engine stops before the entrance")
