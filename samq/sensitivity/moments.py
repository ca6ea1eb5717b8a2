"""Sums over what enters the layers of a model, and stacked experts: moments of inputs, without code for any architecture.

Layers are seen by torch's hooks, and experts by the function that computes them (`samq.sensitivity.experts`). In a model with a
function of its own an expert's matrix is a slice of a parameter, so a mode of torch's functions sees its product.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from samq.errors import SamqError
from samq.sensitivity.block_pass import deterministic
from samq.sensitivity.blocks import main_device
from samq.sensitivity.experts import Product, modules_of_experts
from samq.sensitivity.layout import Weight
from samq.sensitivity.memory import needs_gpu_memory
from samq.sensitivity.shares import in_turn

BORROWED_TOKENS = 1.0  # for each column of an expert's Gram matrix (benchmarks/experts.py)
Rounds = Sequence[Sequence[Sequence[int]]]  # numbers of batches: runs of them, one a device, round after round
_ROWS = 1024  # of a matrix that are brought from another device at a time


@dataclass(frozen=True)
class Moments:
    """Of an input, over its tokens: its Gram matrix, or the diagonal alone."""

    tensors: tuple[str, ...]  # GGUF names of those that have this input
    tokens: int
    gram: torch.Tensor  # (row length, row length) or (row length,), float32, where it was computed
    expert: int | None = None  # of stacked experts, the one that has it; None: all matrices of the tensor
    pooled: torch.Tensor | None = None  # of stacked experts: the matrix over the tokens of all of them
    share: float = 1.0  # of the tokens of all experts, those of this one

    def on(self, device: torch.device | None) -> "Moments":
        """The same on a device; None: where they are."""
        if device is None:
            return self
        return replace(self, gram=self.gram.to(device), pooled=None if self.pooled is None else self.pooled.to(device))

    @property
    def squares(self) -> torch.Tensor:
        """The mean squares, (row length,)."""
        return self.gram if self.gram.ndim == 1 else self.gram.diagonal()

    @property
    def estimate(self) -> torch.Tensor:
        """The Gram matrix that other text is expected to have.

        An expert's is a mean of its own and that of all experts. It is as if the expert had seen `BORROWED_TOKENS` more tokens
        for each column, those of all experts. So an expert that saw few tokens borrows most of its matrix, and one that saw
        many borrows little.
        """
        if self.pooled is None:
            return self.gram
        borrowed = BORROWED_TOKENS * len(self.gram)
        return (self.gram * self.tokens).add_(self.pooled, alpha=borrowed).div_(self.tokens + borrowed)


@dataclass(frozen=True)
class Piece:
    """Some of the moments of a part of the model: a block, by its number, or the last part, which is around the blocks."""

    part: int
    moments: list[Moments]


@dataclass(frozen=True)
class _Use:
    """A weight, and what of its parameter's input its columns are: numbers in the GGUF's order, or None for all in order."""

    weight: Weight
    columns: NDArray[np.intp] | None


_Key = tuple[str, int | None]  # the first tensor with an input, and the expert


@dataclass(frozen=True)
class _Sums:
    """Second moments, times the number of tokens."""

    own: dict[_Key, torch.Tensor] = field(default_factory=dict)
    pooled: dict[_Key, torch.Tensor] = field(default_factory=dict)


class InputSums(TorchFunctionMode):
    """Adds up the moments of what enters layers."""

    def __init__(self, model: PreTrainedModel, weights: list[Weight], matrices_bytes: int) -> None:
        """`matrices_bytes`: what whole matrices may take at a time; 0: there are only diagonals."""
        super().__init__()
        self._matrices_bytes, self._device = matrices_bytes, main_device(model)
        self._layers = _layers(model, weights)
        self._stacks = _stacks(model, weights)
        self._shown = set(modules_of_experts(model))  # whose experts' products `see` is told of
        self._watches = False
        self._is_token = torch.ones(0, dtype=torch.bool)  # False for the padding of the batch
        self._last: tuple[torch.Tensor, str, int | None] | None = None  # the input before, its layer, its expert
        self._source: dict[str, str] = {}  # tensor -> the first tensor with the same input
        self._measured: frozenset[_Key] = frozenset()
        self._of_part: list[tuple[nn.Module, str, list[_Use]]] = []  # the stacks of experts
        self._experts_at: dict[int, tuple[nn.Parameter, list[_Use]]] = {}  # address -> experts of the part
        self._sums: dict[_Key, torch.Tensor] = {}
        self._tokens: dict[_Key, int] = defaultdict(int)
        self._pools: dict[_Key, torch.Tensor] = {}  # over all experts, without a number
        self._pool_tokens: dict[_Key, int] = defaultdict(int)
        self._pooling = False  # whether experts that are not measured yet go into the pools
        self._of_run = _Sums()  # not among the others yet: of the batches that a device is at

    @property
    def one_sample_only(self) -> bool:
        """Whether there are stacked experts whose tokens are not known, and so not which of them are padding."""
        return any(module not in self._shown for module, _ in self._stacks)

    @property
    def names(self) -> set[str]:
        """The tensors whose inputs are measured."""
        uses = [*self._layers.values(), *self._stacks.values()]
        return {use.weight.name for of_module in uses for use in of_module}

    def about(self, mask: torch.Tensor) -> None:
        """Say what runs next, with the weights that are in place now: sequences of this mask, 0 at padding."""
        self._is_token = mask.bool().flatten()
        self._last = None
        stacks = [(getattr(module, name), uses) for module, name, uses in self._of_part if module not in self._shown]
        self._experts_at = {stack.data_ptr(): (stack, uses) for stack, uses in stacks}

    def measure(
        self,
        part: int,
        modules: list[nn.Module],
        run: Callable[[int, int], None],
        turns: Rounds,
        finished: Callable[[], None] = lambda: None,
    ) -> Iterator[Piece]:
        """Run the batches of `turns` through a part of the model, after batch 0, which shows what layers share an input.

        `run` takes the number of a batch and that of its device; `finished` is called when all has run, before the last piece.
        """
        self._source, self._measured, self._pooling = {}, frozenset(), False
        self._pools, self._pool_tokens = {}, defaultdict(int)
        inside = set(modules)
        self._of_part = [(module, name, uses) for (module, name), uses in self._stacks.items() if module in inside]
        with self._watching():
            run(0, 0)
        groups = _groups(self._sizes(modules), self._matrices_bytes)
        for number, group in enumerate(groups):
            self._measured, self._pooling = frozenset(group), number == 0 and self._matrices_bytes > 0
            advice = "use a smaller batch size, shorter sequences, or more GPUs"
            what = f"{len(group)} inputs' Gram matrices beside the model and a batch"
            with self._watching(), needs_gpu_memory(what, advice):
                for of_round in turns:
                    self._run(of_round, run)
            if number == len(groups) - 1:
                finished()
            yield Piece(part, self._taken(group))

    def _sizes(self, modules: list[nn.Module]) -> dict[_Key, int]:
        """The bytes of each input's matrix in a part of the model: those of experts that the probe showed, and of the others."""
        uses = [use for module in modules for use in self._layers.get(module, ())]
        stacked = [use for _, _, of_stack in self._of_part for use in of_stack]
        weights = {use.weight.name: use.weight for use in [*uses, *stacked]}
        experts = {use.weight.name: math.prod(use.weight.shape[:-2]) for use in stacked}
        return {
            (name, expert): 2 * 4 * weights[name].shape[-1] ** 2  # of a run of batches, and of all before
            for name in dict.fromkeys(self._source.values())
            for expert in (range(experts[name]) if name in experts else (None,))
        }

    def _run(self, of_round: Sequence[Sequence[int]], run: Callable[[int, int], None]) -> None:
        """A run of batches a device, whose sums are then added to those of all."""
        of_devices = [_Sums() for _ in of_round]
        for share, batch in in_turn(of_round):
            self._of_run = of_devices[share]
            run(batch, share)
        home = self._device if len(of_round) > 1 else None
        for of_run in of_devices:
            _add_all(self._sums, of_run.own, home)
            _add_all(self._pools, of_run.pooled, home)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Look at what enters the layers: not between parts, where others compute."""
        handles = [
            layer.register_forward_pre_hook(partial(self._before_forward, uses)) for layer, uses in self._layers.items()
        ]
        try:
            self._watches = True
            with torch.no_grad(), deterministic(self._device), self:
                yield
        finally:
            self._watches = False
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
            squares = sums if sums.ndim == 1 else sums.diagonal()  # |x y| is at most the larger of x^2 and y^2
            if not torch.isfinite(squares).all():
                raise SamqError(
                    f"the input of {name} has NaN or Inf on the calibration text; load the model in float32"
                )
            if squares.any() or (pooled is not None and not count):  # an input that is always zero has no use
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

    def see(self, product: Product, vectors: torch.Tensor) -> None:
        """Take the input of an expert."""
        uses = self._stacks.get((product.module, product.name))
        if self._watches and uses:
            of_tokens = vectors
            if not self._is_token.all():
                if product.entering != len(self._is_token):
                    raise SamqError(
                        f"{uses[0].weight.name} mixes the tokens of several samples; measure with a batch size of 1"
                    )
                of_tokens = vectors[self._is_token.to(vectors.device)[product.tokens]]
            self._add(uses, product.expert, vectors, of_tokens)

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at a product before it is computed."""
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
                self._add_to(self._of_run.own, (name, expert), vectors, use.columns)
            elif expert is not None and self._pooling:
                self._pool_tokens[name, None] += len(vectors)
                self._add_to(self._of_run.pooled, (name, None), vectors, use.columns)

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


def _add_all(totals: dict[_Key, torch.Tensor], sums: dict[_Key, torch.Tensor], home: torch.device | None) -> None:
    """Add the sums at home, and forget them; some rows at a time, since a wide matrix of another device takes gigabytes."""
    for key in list(sums):
        of_run = sums.pop(key)
        if key not in totals:
            totals[key] = of_run if home is None else of_run.to(home)
            continue
        for total, some in zip(totals[key].split(_ROWS), of_run.split(_ROWS), strict=True):
            total += some.to(total.device)


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
            candidates = [_use(weight, -1) or _use(weight, -2) for weight in by_parameter.get(id(parameter), ())]
            if uses := [use for use in candidates if use]:
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
