"""Gram matrices of the inputs of the linear layers, measured on calibration text.

The Gram matrix G of a layer with input x is the mean of x x^T over tokens, (row length, row length). Its diagonal is the
importance matrix of llama-imatrix. The whole matrix determines what an error dW of a row does to the layer's output: the
mean square of the output's error is dW G dW^T.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from samq.data.tokens import TokenBatch, batches
from samq.errors import SamqError
from samq.gguf.formats import EMBEDDING
from samq.progress import Progress, silent
from samq.sensitivity.blocks import logits_of
from samq.sensitivity.layout import Weight
from samq.sensitivity.memory import needs_gpu_memory

PASS_MEMORY_BYTES = 8 * 2**30  # of the matrices that one pass over the text adds up
_SOURCE = "source"  # key of the file's metadata


class GramMatrices:
    """The matrices in a file that `measure_gram` wrote: `matrices[tensor]` reads one, (row length, row length) float32.

    Tensors with the same input, such as a layer's query, key and value, share a matrix: `source` maps each tensor to the
    name of its matrix. Raises SamqError if the file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = safe_open(path, "pt")
            self.source: dict[str, str] = json.loads(self._file.metadata()[_SOURCE])
        except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
            raise SamqError(f"cannot read Gram matrices from {path}: {error}; measure them again") from error

    def __contains__(self, tensor: str) -> bool:
        """Whether the tensor's input was measured."""
        return tensor in self.source

    def __getitem__(self, tensor: str) -> torch.Tensor:
        """The matrix of the tensor's input."""
        matrix: torch.Tensor = self._file.get_tensor(self.source[tensor])
        return matrix


def measure_gram(
    model: PreTrainedModel,
    tokens: TokenBatch,
    path: Path,
    weights: list[Weight],
    *,
    batch_size: int = 1,
    memory_bytes: int = PASS_MEMORY_BYTES,
    progress: Progress = silent,
) -> None:
    """Write the Gram matrix of every linear layer's input to `path`, as safetensors.

    Stacked experts are left out, since each gets only the tokens that the router sends it.

    Args:
        model: in any floating-point type, on any device; the matrices are added up in float32.
        tokens: at least one sequence; padding does not count.
        path: the file to write. Its metadata map every tensor's GGUF name to the name of its matrix. The same matrices
            give the same bytes.
        weights: the model's, as its GGUF has them (`samq.sensitivity.layout`).
        batch_size: sequences a forward pass.
        memory_bytes: limit for the matrices of one pass; if all matrices together exceed it, there are several passes.
        progress: told of the sequences that are done, over all passes.

    Raises:
        SamqError: NaN or Inf in the input of a layer, or the file cannot be written.
    """
    model.eval()
    by_name = {weight.name: weight for weight in weights}
    layers = _layers(model, weights)
    with _Inputs(layers, frozenset()) as first:  # one sequence shows which layers share their input
        first.forward(model, tokens.part(0, 1), 1)
    groups = _groups({name: by_name[name].shape[-1] for name in dict.fromkeys(first.source.values())}, memory_bytes)
    matrices: dict[str, torch.Tensor] = {}
    for number, group in enumerate(groups):

        def tell(sequences: int, total: int, passes_before: int = number) -> None:
            progress(passes_before * total + sequences, len(groups) * total)

        with (
            _Inputs(layers, frozenset(group)) as inputs,
            needs_gpu_memory(
                f"{len(group)} Gram matrices beside the model and {batch_size} sequences",
                "use a smaller batch size, shorter sequences, or more GPUs",
            ),
        ):
            inputs.forward(model, tokens, batch_size, tell)
        for name, matrix in inputs.sums.items():
            if not torch.isfinite(matrix).all():
                raise SamqError(
                    f"the input of {name} has NaN or Inf on the calibration text; load the model in float32"
                )
            if matrix.any():  # an input that is always zero has no use
                matrices[name] = (matrix / int(tokens.lengths.sum())).cpu()
    source = {name: key for name, key in sorted(first.source.items()) if key in matrices}
    try:
        # One entry of metadata: safetensors writes several in any order, which would change the bytes.
        save_file(dict(sorted(matrices.items())), path, metadata={_SOURCE: json.dumps(source)})
    except (OSError, SafetensorError) as error:
        raise SamqError(f"cannot write {path}: {error}; choose a folder that can be written to") from error


def without_layer(model: PreTrainedModel, weights: list[Weight]) -> list[str]:
    """The weights that get no Gram matrix whatever the text: no linear layer has them as the GGUF stores them.

    The embedding is not among them, since it has no input.
    """
    with_layer = {weight.name for _, weight in _layers(model, weights)}
    return [weight.name for weight in weights if weight.name not in {*with_layer, EMBEDDING}]


class _Inputs:
    """Hooks on linear layers during a `with` block, which add up x x^T over the tokens of all sequences."""

    def __init__(self, layers: list[tuple[nn.Module, Weight]], measured: frozenset[str]) -> None:
        self.source: dict[str, str] = {}  # layer -> the first layer with the same input
        self.sums: dict[str, torch.Tensor] = {}  # of the layers in `measured`
        self._layers, self._measured = layers, measured
        self._handles: list[Any] = []
        self._is_token = torch.ones(0, dtype=torch.bool)  # False for the padding of the batch
        self._last: tuple[torch.Tensor, str] | None = None  # the input of the layer before, and that layer

    def __enter__(self) -> Self:
        self._handles = [
            layer.register_forward_pre_hook(partial(self._before_forward, weight)) for layer, weight in self._layers
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def forward(self, model: PreTrainedModel, tokens: TokenBatch, batch_size: int, progress: Progress = silent) -> None:
        """Run the sequences through the model."""
        batched = [(ids, mask) for ids, mask, _ in batches(tokens, batch_size)]

        def about(number: int) -> None:
            self._is_token = batched[number][1].bool().flatten()
            self._last = None

        done = 0
        for (ids, _), _ in zip(batched, logits_of(model, batched, about), strict=True):
            done += len(ids)
            progress(done, len(tokens))

    def _before_forward(self, weight: Weight, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        layer_input, name, columns = inputs[0], weight.name, weight.view.columns
        if layer_input.numel() // layer_input.shape[-1] != len(self._is_token):
            return  # the tokens of one expert, of which the padding is not known
        if self._last and layer_input is self._last[0] and columns is None:
            self.source[name] = self._last[1]
            return
        if columns is None:
            self._last = layer_input, name
        self.source[name] = name
        if name in self._measured:
            vectors = layer_input.flatten(0, -2)[self._is_token.to(layer_input.device)].float()
            if columns is not None:
                vectors = vectors[:, torch.from_numpy(columns).to(vectors.device)]
            if name not in self.sums:
                self.sums[name] = vectors.new_zeros(vectors.shape[-1], vectors.shape[-1])
            self.sums[name].addmm_(vectors.t(), vectors)


def _layers(model: PreTrainedModel, weights: list[Weight]) -> list[tuple[nn.Module, Weight]]:
    """Linear layers and their weights; several where the GGUF splits a parameter, and none where it turns it otherwise.

    An output tied to the embedding has the embedding's weight.
    """
    by_parameter: dict[int, list[Weight]] = defaultdict(list)
    for weight in weights:
        by_parameter[id(weight.parameter)].append(weight)
    return [
        (module, weight)
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D)
        for weight in by_parameter[id(module.weight)]
        if weight.user in (None, module) and (weight.view.matrix is None or isinstance(module, Conv1D))
    ]


def _groups(row_lengths: Mapping[str, int], memory_bytes: int) -> list[list[str]]:
    """Split the inputs, in order, into groups whose matrices fit into the memory; one matrix is always a group."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, row_length in row_lengths.items():
        size = 4 * row_length**2
        if groups[-1] and used + size > memory_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return groups
