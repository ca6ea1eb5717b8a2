"""How llama.cpp's converter stores the weights of a torch model: a table of views.

An entry names the tensors of a GGUF that hold a parameter, and the views that their values may have of it. A GGUF of the same
architecture may have any of them, so `samq.sensitivity.layout` compares the values and takes the first view that holds. An
entry that is wrong for a file is therefore never used, and one that is missing costs only the measurement of its tensors.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Order = NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class View:
    """Where in a parameter of torch the values of one GGUF tensor are.

    `matrix` turns the parameter, or a tensor of its shape such as a gradient, into (rows, row length). Stacked experts come
    first. None: it has that shape already. `rows` and `columns` are torch's numbers of the GGUF's; None for all in order.
    """

    matrix: Callable[[torch.Tensor], torch.Tensor] | None = None
    rows: Order | None = None
    columns: Order | None = None

    def __call__(self, parameter: torch.Tensor) -> torch.Tensor:
        """The parameter, or a tensor of its shape, as the GGUF stores it."""
        values = parameter if self.matrix is None else self.matrix(parameter)
        if self.rows is not None:
            values = values[torch.from_numpy(self.rows).to(values.device)]
        return values if self.columns is None else values[:, torch.from_numpy(self.columns).to(values.device)]


# (configuration of the text model, shape of the parameter) -> view; None if these have no such view.
MakeView = Callable[[Any, tuple[int, ...]], View | None]


def plain(config: Any, shape: tuple[int, ...]) -> View | None:
    """The parameter as it is."""
    return View()


def turned(config: Any, shape: tuple[int, ...]) -> View | None:
    """Rows and columns exchanged, of each expert if they are stacked."""
    return View(matrix=lambda parameter: parameter.transpose(-1, -2))


def half(index: int) -> MakeView:
    """One half of the rows: gate (0) or up (1) projection of a fused pair."""

    def make(config: Any, shape: tuple[int, ...]) -> View | None:
        rows = shape[-2] // 2
        if len(shape) == 2:
            return View(rows=np.arange(index * rows, (index + 1) * rows))
        return View(matrix=lambda parameter: parameter[:, index * rows : (index + 1) * rows])

    return make


def turned_half(index: int) -> MakeView:
    """One half of the columns of stacked experts, exchanged with the rows (Llama 4)."""

    def make(config: Any, shape: tuple[int, ...]) -> View | None:
        rows = shape[-1] // 2
        return View(matrix=lambda parameter: parameter[..., index * rows : (index + 1) * rows].transpose(-1, -2))

    return make


def turned_every_other(index: int) -> MakeView:
    """Every other column of stacked experts, exchanged with the rows (gpt-oss)."""
    return lambda config, shape: View(matrix=lambda parameter: parameter[..., index::2].transpose(-1, -2))


def experts_apart(*, transposed: bool) -> MakeView:
    """The experts' matrices one below the other, as DBRX has them, stacked."""

    def make(config: Any, shape: tuple[int, ...]) -> View | None:
        experts = getattr(getattr(config, "ffn_config", None), "moe_num_experts", 0)
        if not experts or shape[0] % experts:
            return None

        def matrix(parameter: torch.Tensor) -> torch.Tensor:
            stacked = parameter.reshape(experts, -1, parameter.shape[-1])
            return stacked.transpose(1, 2) if transposed else stacked

        return View(matrix=matrix)

    return make


def rotary(config: Any, shape: tuple[int, ...]) -> View | None:
    """The two halves of each head's rows interleaved."""
    width = _head_width(config)
    return View(rows=rotary_row_order(shape[0], shape[0] // width)) if width and shape[0] % width == 0 else None


def partly_rotary(config: Any, shape: tuple[int, ...]) -> View | None:
    """The two halves of what is rotated of each head's rows interleaved, and the rest in order (Bamba)."""
    width = _head_width(config)
    rope = getattr(config, "rope_parameters", None) or {}
    rotated = int(width * rope.get("partial_rotary_factor", 1.0))
    if not width or shape[0] % width or rotated % 2:
        return None
    return View(rows=rotary_row_order(shape[0], shape[0] // width, rotated))


def rotary_row_order(rows: int, heads: int, rotated: int | None = None) -> Order:
    """GGUF row -> torch row, where llama.cpp's converter interleaved the two halves of each rotary head.

    With `rotated` only so many rows of each head are, and the others keep their places. Source: `LlamaModel.permute` in
    llama.cpp's conversion/llama.py.
    """
    by_head = np.arange(rows).reshape(heads, -1)
    turned, rest = np.split(by_head, [by_head.shape[1] if rotated is None else rotated], axis=1)
    interleaved = turned.reshape(heads, 2, -1).swapaxes(1, 2).reshape(turned.shape)
    return np.concatenate([interleaved, rest], axis=1).ravel()


def heads_of_qkv(config: Any, shape: tuple[int, ...]) -> View | None:
    """Query, key and value of each head in turn (Bloom, GPT-NeoX): all queries first, then all keys, then all values."""
    heads = config.num_attention_heads
    if shape[0] % (3 * heads):
        return None
    return View(rows=np.arange(shape[0]).reshape(heads, 3, -1).swapaxes(0, 1).ravel())


def groups_of_qkv(config: Any, shape: tuple[int, ...]) -> View | None:
    """Queries, key and value of each group of heads in turn (Falcon): all queries, then all keys, then all values."""
    width = _head_width(config)
    heads = config.num_attention_heads
    groups = shape[0] // width - heads if width else 0  # one key and one value a group
    if groups <= 0 or groups % 2 or heads % (groups // 2):
        return None
    rows = np.arange(shape[0]).reshape(groups // 2, -1, width)
    return View(rows=np.concatenate([rows[:, :-2].ravel(), rows[:, -2].ravel(), rows[:, -1].ravel()]))


def latent(part: str) -> MakeView:
    """Keys' or values' part of what multi-head latent attention expands; llama.cpp multiplies queries by the keys' part."""

    def make(config: Any, shape: tuple[int, ...]) -> View | None:
        keys, values = getattr(config, "qk_nope_head_dim", 0), getattr(config, "v_head_dim", 0)
        if not keys or not values or shape[0] % (keys + values):
            return None

        def matrix(parameter: torch.Tensor) -> torch.Tensor:
            heads = parameter.reshape(-1, keys + values, parameter.shape[-1])
            return heads[:, :keys].transpose(1, 2) if part == "keys" else heads[:, keys:]

        return View(matrix=matrix)

    return make


def linear_attention_groups(first: int, last: int) -> MakeView:
    """Parts `first` to `last` of query, key, value and gate (0 to 3), which Qwen3-Next has for each key head in turn."""

    def make(config: Any, shape: tuple[int, ...]) -> View | None:
        heads = _LinearAttention.of(config)
        if not heads:
            return None
        rows = np.arange(shape[0]).reshape(heads.keys, -1)
        value = heads.values // heads.keys * heads.value_width
        ends = np.cumsum([0, heads.key_width, heads.key_width, value, value])
        if ends[-1] != rows.shape[1]:
            return None
        parts = [rows[:, start:end].ravel() for start, end in pairwise(ends)]
        return View(rows=np.concatenate(parts[first : last + 1]))

    return make


def value_heads(what: str) -> MakeView:
    """Value heads in turn over the key heads, where torch has those of each key head together (Qwen3.5).

    They are the last rows (`what` is "rows") or the columns (`what` is "columns").
    """

    def make(config: Any, shape: tuple[int, ...]) -> View | None:
        heads = _LinearAttention.of(config)
        if not heads:
            return None
        extent = shape[0 if what == "rows" else 1]
        before = (
            2 * heads.keys * heads.key_width if extent > heads.values * heads.value_width else 0
        )  # queries and keys
        if (extent - before) % heads.values:
            return None
        tail = np.arange(before, extent).reshape(heads.keys, heads.values // heads.keys, -1)
        order = np.concatenate([np.arange(before), tail.swapaxes(0, 1).ravel()])
        return View(rows=order) if what == "rows" else View(columns=order)

    return make


@dataclass(frozen=True)
class _LinearAttention:
    """Numbers and widths of the heads of linear attention in a configuration."""

    keys: int
    values: int
    key_width: int
    value_width: int

    @classmethod
    def of(cls, config: Any) -> "_LinearAttention | None":
        names = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")
        numbers = [getattr(config, f"linear_{name}", None) or 0 for name in names]
        return cls(*numbers) if all(numbers) and numbers[1] % numbers[0] == 0 else None


def _head_width(config: Any) -> int:
    """Rows of a head of attention; 0 if the configuration has no heads, or several widths (Gemma 4)."""
    heads = getattr(config, "num_attention_heads", None)
    try:
        width: int = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    except RuntimeError:  # transformers' AmbiguousGlobalPerLayerAttributeError
        return 0
    return width


@dataclass(frozen=True)
class Entry:
    """One way of storing the parameters whose names end in `ending` (a regular expression)."""

    ending: str
    tensors: Mapping[
        str, tuple[MakeView, ...]
    ]  # what to look up in place of the ending -> its possible views, in order


def _own(ending: str, *views: MakeView) -> Entry:
    """A parameter that one tensor holds, which has the parameter's name."""
    return Entry(ending, {r"\g<0>": views})


def _pair(ending: str, gate: str, up: str, *views: Callable[[int], MakeView]) -> Entry:
    """A parameter that holds two projections, which GGUF has apart."""
    return Entry(ending, {gate: tuple(view(0) for view in views), up: tuple(view(1) for view in views)})


TABLE = (
    _own(r"\b[qk]_proj", plain, rotary, partly_rotary),
    _own(r"\bquery_key_value", plain, heads_of_qkv, groups_of_qkv),
    _pair(r"\bexperts\.gate_up_proj", "experts.gate_proj", "experts.up_proj", half, turned_half, turned_every_other),
    _own(r"\bexperts\.down_proj", plain, turned),
    # some models call the block otherwise, where the map of names has only this one
    _pair(r"\w+\.experts\.gate_up_proj", "mlp.experts.gate_proj", "mlp.experts.up_proj", half),
    Entry(r"\w+\.experts\.down_proj", {"mlp.experts.down_proj": (plain,)}),
    _own(r"experts\.mlp\.[wv]1", experts_apart(transposed=False)),
    _own(r"experts\.mlp\.w2", experts_apart(transposed=True)),
    _pair(r"shared_mlp\.input_linear", "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", half),
    _pair(r"shared_mlp\.input_linear", "mlp.gate_proj", "mlp.up_proj", half),
    Entry(r"shared_mlp\.input_linear", {"mlp.shared_expert.up_proj": (plain,)}),
    Entry(r"shared_mlp\.output_linear", {"mlp.shared_expert.down_proj": (plain,)}),
    Entry(r"shared_mlp\.output_linear", {"mlp.down_proj": (plain,)}),
    Entry(r"\bkv_b_proj", {"k_b_proj": (latent("keys"),), "v_b_proj": (latent("values"),)}),
    Entry(
        r"\bin_proj_qkvz",
        {"in_proj_qkv": (linear_attention_groups(0, 2),), "in_proj_z": (linear_attention_groups(3, 3),)},
    ),
    _own(r"linear_attn\.in_proj_(qkv|z|a|b)", plain, value_heads("rows")),
    _own(r"linear_attn\.out_proj", plain, value_heads("columns")),
)


def storages(hf_name: str) -> Iterator[Mapping[str, tuple[MakeView, ...]]]:
    """The ways in which a GGUF may store a parameter: names to look up -> views that are tried in order."""
    stem = hf_name.removesuffix(".weight")
    suffix = hf_name[len(stem) :]
    for entry in TABLE:
        pattern = re.compile(rf"(?:{entry.ending})\Z")
        if pattern.search(stem):
            yield {pattern.sub(name, stem) + suffix: views for name, views in entry.tensors.items()}
    yield {hf_name: (plain,)}
