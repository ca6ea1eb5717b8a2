"""Second moments of the inputs of weight matrices on calibration text: Gram matrices, one block of the model at a time.

The Gram matrix G of a layer with input x is the mean of x x^T over tokens, (row length, row length). Its diagonal is the
importance matrix of llama-imatrix. The whole matrix determines what an error dW of a row does to the layer's output: the
mean square of the output's error is dW G dW^T.

All matrices of a large model would take more memory than the model itself. So they are handed over as soon as a block's are
there, and whoever takes them uses them before the next block runs.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from samq.data.tokens import TokenBatch
from samq.errors import SamqError
from samq.gguf.formats import EMBEDDING
from samq.progress import Progress, silent
from samq.sensitivity.block_pass import Sequences, batched, deterministic
from samq.sensitivity.blocks import PROBE_TOKENS, Blocks, Entered, main_device
from samq.sensitivity.checkpoints import Checkpoints
from samq.sensitivity.gradients import Batch
from samq.sensitivity.hidden_states import HiddenStates
from samq.sensitivity.layout import Weight
from samq.sensitivity.memory import UNLIMITED, Memory, needs_gpu_memory
from samq.sensitivity.offloading import has_offloaded

BORROWED_TOKENS = 1.0  # for each column of an expert's Gram matrix (benchmarks/experts.py)
MATRICES_BYTES = 8 * 2**30  # of the matrices that are added up at a time; a block with more runs again


@dataclass(frozen=True)
class Moments:
    """Of an input, over its tokens: its Gram matrix, or the diagonal alone."""

    tensors: tuple[str, ...]  # GGUF names of those that have this input
    tokens: int
    gram: torch.Tensor  # (row length, row length) or (row length,), float32, where it was computed
    expert: int | None = None  # of stacked experts, the one that has it; None: all matrices of the tensor
    pooled: torch.Tensor | None = None  # of stacked experts: the matrix over the tokens of all of them
    share: float = 1.0  # of the tokens of all experts, those of this one

    @property
    def squares(self) -> torch.Tensor:
        """The mean squares, (row length,)."""
        return self.gram if self.gram.ndim == 1 else self.gram.diagonal()

    @property
    def estimate(self) -> torch.Tensor:
        """The Gram matrix that other text is expected to have.

        An expert's is a mean of its own and that of all experts, as if it had seen `BORROWED_TOKENS` more tokens for each
        column, those of all experts. So an expert that saw few tokens borrows most of its matrix, and one that saw many little.
        """
        if self.pooled is None:
            return self.gram
        borrowed = BORROWED_TOKENS * len(self.gram)
        return (self.gram * self.tokens).add_(self.pooled, alpha=borrowed).div_(self.tokens + borrowed)


@dataclass(frozen=True)
class Piece:
    """Some of the moments of a part of the model: of a block, by its number, or of what is around the blocks, the last part."""

    part: int
    moments: list[Moments]


def input_moments(
    model: PreTrainedModel,
    tokens: TokenBatch,
    weights: list[Weight],
    *,
    matrices: bool = True,
    batch_size: int = 1,
    memory: Memory = UNLIMITED,
    matrices_bytes: int = MATRICES_BYTES,
    progress: Progress = silent,
) -> Iterator[Piece]:
    """Yield the moments of the inputs of all layers, block after block, and at last of those around the blocks.

    Inputs that are always zero are left out. So are experts that saw no token, if there are no matrices; with matrices they
    have that of all experts.

    Args:
        model: in any floating-point type, on any device; moments are added up in float32.
        tokens: at least one sequence; padding does not count.
        weights: the model's, as its GGUF has them (`samq.sensitivity.layout`).
        matrices: whole Gram matrices; else their diagonals alone.
        batch_size: sequences a forward pass; 1 with stacked experts, where the padding of a batch cannot be told.
        memory: what hidden states may take. With a folder a pass that was killed goes on at a part that was not finished: one is
            finished when the next one's moments are asked for.
        matrices_bytes: limit for the matrices that are added up at a time; a part with more runs several times.
        progress: told of the parts that are done.

    Raises:
        SamqError: NaN or Inf in the input of a layer, or too little memory.
    """
    model.eval()
    inputs = _Inputs(model, weights, matrices_bytes if matrices else 0)
    batches = [_probe(tokens), *batched(tokens, 1 if inputs.has_experts else batch_size)]
    blocks = Blocks.of(model)
    with _experts_one_by_one(model):
        if blocks is None:
            yield from _whole(model, batches, inputs, progress)
        else:
            yield from _by_blocks(blocks, batches, inputs, memory, progress)


def without_input(model: PreTrainedModel, weights: list[Weight]) -> list[str]:
    """The weights whose inputs are not measured whatever the text, by their GGUF names.

    The embedding is not among them, since it has no input.
    """
    measured = _Inputs(model, weights, MATRICES_BYTES).names
    return [weight.name for weight in weights if weight.name not in {*measured, EMBEDDING}]


def _probe(tokens: TokenBatch) -> Sequences:
    """A few tokens, which show what layers share an input."""
    length = int(min(PROBE_TOKENS, tokens.lengths[0]))
    ids = torch.from_numpy(tokens.ids[:1, :length].astype(np.int64))
    return Sequences(ids, torch.ones_like(ids), Batch(0, [length]))


def _whole(model: PreTrainedModel, batches: list[Sequences], inputs: "_Inputs", progress: Progress) -> Iterator[Piece]:
    device = main_device(model)

    def run(number: int) -> None:
        ids, mask = batches[number].on(device)
        inputs.about(batches[number].mask)
        with batches[number].memory():
            model(input_ids=ids, attention_mask=mask, use_cache=False)
        progress(number, len(batches))

    yield from inputs.measure(0, list(model.modules()), run, len(batches))
    progress(len(batches), len(batches))


def _by_blocks(
    blocks: Blocks, batches: list[Sequences], inputs: "_Inputs", memory: Memory, progress: Progress
) -> Iterator[Piece]:
    device = main_device(blocks.model)
    with torch.no_grad():
        entered = [blocks.enter(*sequences.on(device)) for sequences in batches]
    size = 3 * sum(batch.hidden.nbytes for batch in entered)
    place = memory.place(size, device, offloaded=has_offloaded(blocks.model))
    with HiddenStates(place, Checkpoints(memory.folder if place is None else None), "inputs") as states:
        yield from _through(blocks, batches, entered, inputs, states, progress)


def _through(
    blocks: Blocks,
    batches: list[Sequences],
    entered: list[Entered],
    inputs: "_Inputs",
    states: HiddenStates,
    progress: Progress,
) -> Iterator[Piece]:
    device, count = main_device(blocks.model), len(blocks)
    done = max((block for block in range(count + 1) if states.has(block)), default=0)
    if not done:
        for number, batch in enumerate(entered):
            states.put(0, number, batch.hidden)
        states.close(0)
    with blocks.resident() as resident:
        for block in range(done, count):
            progress(block, count + 1)
            here = resident.devices[block]

            def run(number: int, block: int = block, here: torch.device = here) -> None:
                inputs.about(batches[number].mask)
                hidden = states.get(block, number, here)
                with batches[number].memory():
                    states.put(block + 1, number, blocks.run(block, hidden, entered[number].calls[block]))

            with resident.block(block, min(block + 1, count - 1)) as layer:
                yield from inputs.measure(block, list(layer.modules()), run, len(batches))
            states.close(block + 1)  # by a thread; those before this block are on disk now
            states.drop(block - 1)
    progress(count, count + 1)

    def run_around(number: int) -> None:
        sequences, hidden = batches[number], states.get(count, number, device)
        for row, length in enumerate(sequences.batch.lengths):  # one at a time: logits are large
            inputs.about(torch.ones(1, length))
            with sequences.memory():
                blocks.logits(hidden[row : row + 1, :length], sequences.ids[row : row + 1, :length].to(device))

    inside = {module for layer in blocks.layers for module in layer.modules()}
    around = [module for module in blocks.model.modules() if module not in inside]
    yield from inputs.measure(count, around, run_around, len(batches))
    for block in (count - 1, count):
        states.drop(block)
    progress(count + 1, count + 1)


@dataclass(frozen=True)
class _Use:
    """A weight, and what of its parameter's input its columns are: numbers in the GGUF's order, or None for all in order."""

    weight: Weight
    columns: NDArray[np.intp] | None


_Key = tuple[str, int | None]  # the first tensor with an input, and the expert


class _Inputs(TorchFunctionMode):
    """Adds up the moments of what enters layers."""

    def __init__(self, model: PreTrainedModel, weights: list[Weight], matrices_bytes: int) -> None:
        """`matrices_bytes`: what whole matrices may take at a time; 0: there are only diagonals."""
        super().__init__()
        self._matrices_bytes, self._device = matrices_bytes, main_device(model)
        self._layers = _layers(model, weights)
        self._stacks = _stacks(model, weights)
        self._is_token = torch.ones(0, dtype=torch.bool)  # False for the padding of the batch
        self._last: tuple[torch.Tensor, str, int | None] | None = None  # the input before, its layer, its expert
        self._source: dict[str, str] = {}  # tensor -> the first tensor with the same input
        self._measured: frozenset[_Key] = frozenset()
        self._experts_at: dict[int, tuple[nn.Parameter, list[_Use]]] = {}  # address -> experts of the part
        self._sums: dict[_Key, torch.Tensor] = {}
        self._tokens: dict[_Key, int] = defaultdict(int)
        self._pools: dict[_Key, torch.Tensor] = {}  # over all experts, without a number
        self._pool_tokens: dict[_Key, int] = defaultdict(int)
        self._pooling = False  # whether experts that are not measured yet go into the pools

    @property
    def has_experts(self) -> bool:
        """Whether there are stacked experts to measure."""
        return bool(self._stacks)

    @property
    def names(self) -> set[str]:
        """The tensors whose inputs are measured."""
        uses = [*self._layers.values(), *self._stacks.values()]
        return {use.weight.name for of_module in uses for use in of_module}

    def about(self, mask: torch.Tensor) -> None:
        """Say what runs next: sequences of this mask, 0 at padding."""
        self._is_token = mask.bool().flatten()
        self._last = None

    def measure(self, part: int, modules: list[nn.Module], run: Callable[[int], None], batches: int) -> Iterator[Piece]:
        """Run all batches through a part of the model, the first of which only shows what layers share an input."""
        self._source, self._measured, self._pooling = {}, frozenset(), False
        self._pools, self._pool_tokens = {}, defaultdict(int)
        self._experts_at = {
            getattr(module, name).data_ptr(): (getattr(module, name), uses)
            for (module, name), uses in self._stacks.items()
            if module in set(modules)
        }
        with self._watching():
            run(0)
        for number, group in enumerate(_groups(self._sizes(modules), self._matrices_bytes)):
            self._measured, self._pooling = frozenset(group), number == 0 and self._matrices_bytes > 0
            advice = "use a smaller batch size, shorter sequences, or more GPUs"
            what = f"{len(group)} inputs' Gram matrices beside the model and a batch"
            with self._watching(), needs_gpu_memory(what, advice):
                for batch in range(1, batches):
                    run(batch)
            yield Piece(part, self._taken(group))

    def _sizes(self, modules: list[nn.Module]) -> dict[_Key, int]:
        """The bytes of each input's matrix in a part of the model: those of experts that the probe showed, and of the others."""
        uses = [use for module in modules for use in self._layers.get(module, ())]
        stacked = [use for _, of_stack in self._experts_at.values() for use in of_stack]
        weights = {use.weight.name: use.weight for use in [*uses, *stacked]}
        experts = {use.weight.name: math.prod(use.weight.shape[:-2]) for use in stacked}
        return {
            (name, expert): 4 * weights[name].shape[-1] ** 2
            for name in dict.fromkeys(self._source.values())
            for expert in (range(experts[name]) if name in experts else (None,))
        }

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Look at what enters the layers: not between parts, where others compute."""
        handles = [
            layer.register_forward_pre_hook(partial(self._before_forward, uses)) for layer, uses in self._layers.items()
        ]
        try:
            with torch.no_grad(), deterministic(self._device), self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _taken(self, group: list[_Key]) -> list[Moments]:
        tensors: dict[str, list[str]] = defaultdict(list)
        for name, source in self._source.items():
            tensors[source].append(name)
        if self._pooling:
            self._complete_pools()
        taken = []
        for name, expert in group:
            pooled, count = self._pools.get((name, None)), self._tokens[name, expert]
            sums = self._sums.get((name, expert))
            if sums is None and pooled is not None:
                sums = torch.zeros_like(pooled)
            if sums is None:
                continue
            if not torch.isfinite(sums).all():
                raise SamqError(
                    f"the input of {name} has NaN or Inf on the calibration text; load the model in float32"
                )
            if sums.any() or (pooled is not None and not count):  # an input that is always zero has no use
                share = 1.0 if pooled is None else count / self._pool_tokens[name, None]
                taken.append(Moments(tuple(tensors[name]), count, sums.div_(max(count, 1)), expert, pooled, share))
        self._sums, self._tokens = {}, defaultdict(int)
        return taken

    def _complete_pools(self) -> None:
        """Add the experts that have sums of their own, and divide by the tokens."""
        for (name, expert), sums in self._sums.items():
            if expert is not None:
                self._pool_tokens[name, None] += self._tokens[name, expert]
                pool = self._pools.setdefault((name, None), torch.zeros_like(sums))
                pool += sums
        self._pools = {key: pool.div_(count) for key, pool in self._pools.items() if (count := self._pool_tokens[key])}

    def _before_forward(self, uses: list[_Use], module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        layer_input = inputs[0]
        if layer_input.numel() // layer_input.shape[-1] != len(self._is_token):
            return  # the tokens of one expert, of which the padding is not known
        vectors = layer_input.flatten(0, -2)
        if not self._is_token.all():
            vectors = vectors[self._is_token.to(vectors.device)]
        self._add(uses, None, layer_input, vectors)

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._experts_at and len(args) >= 2 and function in _PRODUCTS:
            with torch._C.DisableTorchFunction():
                self._before_product(args[0], args[1])
        return function(*args, **kwargs or {})

    def _before_product(self, vectors: torch.Tensor, weight: torch.Tensor) -> None:
        """Take the input of an expert, whose matrix is a slice of the stack's memory."""
        for address, (stack, uses) in self._experts_at.items():
            offset = weight.data_ptr() - address
            size = stack[0].nbytes
            if 0 <= offset < stack.nbytes and offset % size == 0 and weight.shape[-2:] in (stack.shape[1:],):
                experts = enumerate(vectors) if weight.ndim == 3 else [(offset // size, vectors)]
                for expert, of_one in experts:
                    given = of_one.flatten(0, -2)
                    routed = given[
                        given.any(dim=-1)
                    ]  # some models give every expert all tokens, those of others as zeros
                    self._add(uses, expert, of_one, routed)

    def _add(self, uses: list[_Use], expert: int | None, layer_input: torch.Tensor, vectors: torch.Tensor) -> None:
        """Add the tokens, (tokens, row length), of what enters a layer or an expert."""
        for use in uses:
            name = use.weight.name
            if self._last and layer_input is self._last[0] and expert == self._last[2] and use.columns is None:
                self._source[name] = self._last[1]
                continue
            if use.columns is None:
                self._last = layer_input, name, expert
            self._source[name] = name
            if (name, expert) in self._measured:
                self._tokens[name, expert] += len(vectors)
                self._add_to(self._sums, (name, expert), vectors, use.columns)
            elif expert is not None and self._pooling:
                self._pool_tokens[name, None] += len(vectors)
                self._add_to(self._pools, (name, None), vectors, use.columns)

    def _add_to(
        self, sums: dict[_Key, torch.Tensor], key: _Key, vectors: torch.Tensor, columns: NDArray[np.intp] | None
    ) -> None:
        vectors = vectors.float()
        if columns is not None:
            vectors = vectors[:, torch.from_numpy(columns).to(vectors.device)]
        length, is_matrix = vectors.shape[-1], self._matrices_bytes > 0
        if key not in sums:
            sums[key] = vectors.new_zeros((length, length) if is_matrix else length)
        if is_matrix:
            sums[key].addmm_(vectors.t(), vectors)
        else:
            sums[key] += vectors.square().sum(0)


_PRODUCTS = frozenset({nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm})


def _layers(model: PreTrainedModel, weights: list[Weight]) -> dict[nn.Module, list[_Use]]:
    """Linear layers and their weights; several where the GGUF splits a parameter, and none where it has rows of its inputs.

    An output tied to the embedding has the embedding's weight.
    """
    by_parameter: dict[int, list[Weight]] = defaultdict(list)
    for weight in weights:
        by_parameter[id(weight.parameter)].append(weight)
    layers: dict[nn.Module, list[_Use]] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            axis = -2 if isinstance(module, Conv1D) else -1
            own = [weight for weight in by_parameter[id(module.weight)] if weight.user in (None, module)]
            if uses := [use for weight in own if (use := _use(weight, axis))]:
                layers[module] = uses
    return layers


def _stacks(model: PreTrainedModel, weights: list[Weight]) -> dict[tuple[nn.Module, str], list[_Use]]:
    """Where stacked experts are, (module, name), and their weights."""
    by_parameter: dict[int, list[Weight]] = defaultdict(list)
    for weight in weights:
        if weight.parameter.ndim == 3:
            by_parameter[id(weight.parameter)].append(weight)
    stacks = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            found = [_use(weight, -1) or _use(weight, -2) for weight in by_parameter.get(id(parameter), ())]
            if uses := [use for use in found if use]:
                stacks[module, name] = uses
    return stacks


def _use(weight: Weight, axis: int) -> _Use | None:
    """The weight, if its columns are the parameter's numbers along an axis; None if they are not."""
    view = weight.view
    if view.matrix is None:
        return _Use(weight, view.columns) if axis == -1 else None
    shape = weight.parameter.shape
    numbers = torch.arange(shape[axis]).reshape([-1] + [1] * (-1 - axis)).expand(shape)
    viewed = view(numbers)
    columns = viewed.reshape(-1, viewed.shape[-1])[0] if viewed.numel() else viewed
    if not (viewed == columns).all():
        return None
    in_order = torch.equal(columns, torch.arange(len(columns)))
    return _Use(weight, None if in_order else columns.numpy())


@contextmanager
def _experts_one_by_one(model: PreTrainedModel) -> Iterator[None]:
    """Let each expert's product be a call of its own, which shows its tokens."""
    if not model._can_set_experts_implementation():
        yield
        return
    before = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def _groups(sizes: Mapping[_Key, int], memory_bytes: int) -> list[list[_Key]]:
    """Split the inputs, in order, into groups whose matrices fit into the memory; one matrix is always a group.

    Without a limit (0) all are one group, which may be empty.
    """
    groups: list[list[_Key]] = [[]]
    used = 0
    for key, size in sizes.items():
        if memory_bytes and groups[-1] and used + size > memory_bytes:
            groups.append([])
            used = 0
        groups[-1].append(key)
        used += size
    return groups
