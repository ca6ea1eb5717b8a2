"""How a model uses its weights: by calling their modules, by `torch.nn.functional.linear`, or in another way."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from samq.sensitivity.layout import Weight

Use = tuple[nn.Module, str]  # a module, and the name that a parameter has in it
_CONVERSIONS = frozenset({torch.Tensor.to, torch.Tensor.type, torch.Tensor.float})


def uses_of(model: PreTrainedModel, weights: list[Weight]) -> list[list[Use]]:
    """For each weight, the modules that have its parameter, or the one that has this copy."""
    uses: dict[int, list[Use]] = defaultdict(list)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            uses[id(parameter)].append((module, name))
    return [
        [(module, name) for module, name in uses[id(weight.parameter)] if weight.user in (None, module)]
        for weight in weights
    ]


class LinearCalls(TorchFunctionMode):
    """Tells `after`, while it is on, of each call of `linear` with one of some weights, which may be converted before."""

    def __init__(self, weights: Mapping[int, int], after: Callable[[int, torch.Tensor, torch.Tensor], None]) -> None:
        """`weights`: a tensor's id -> a number; `after` takes that number, the input and the output."""
        super().__init__()
        self._numbers, self._after = dict(weights), after
        self._converted: list[torch.Tensor] = []  # whose ids must stay theirs

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function, and look at what it was called with."""
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        if (number := self._numbers.get(id(_weight(function, args, kwargs)))) is None:
            return output
        if function in _CONVERSIONS:
            self._numbers[id(output)] = number
            self._converted.append(output)
        else:
            self._after(number, args[0] if args else kwargs["input"], output)
        return output


class _Uses(TorchFunctionMode):
    """Counts, while it is on, the torch functions that each of some parameters, or what it is converted to, is an argument of."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self._of = {id(parameter): id(parameter) for parameter in parameters}  # a tensor's id -> its parameter's
        self._converted: list[torch.Tensor] = []  # whose ids must stay theirs
        self.own = dict.fromkeys(self._of, 0)  # uses of the parameter itself, conversions among them
        self.linear = dict.fromkeys(self._of, 0)  # calls of `linear` with it
        self.others = dict.fromkeys(self._of, 0)  # uses that are neither a conversion nor such a call

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function, and count."""
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        if getattr(function, "__name__", "") == "__get__":  # .shape, .dtype, .device
            return output
        weight = _weight(function, args, kwargs)
        for argument in (*args, *kwargs.values()):
            if (parameter := self._of.get(id(argument))) is None:
                continue
            self.own[parameter] += id(argument) == parameter
            if argument is not weight:
                self.others[parameter] += 1
            elif function in _CONVERSIONS:
                self._of[id(output)] = parameter
                self._converted.append(output)
            else:
                self.linear[parameter] += 1
        return output


def _weight(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `linear` multiplies by, or what is converted; None for other functions."""
    if function is nn.functional.linear:
        return args[1] if len(args) > 1 else kwargs.get("weight")
    return args[0] if function in _CONVERSIONS and args else None


def observed(uses: Mapping[int, list[Use]], run: Callable[[], object]) -> tuple[set[int], set[int]]:
    """What a forward pass does with the weights of these uses.

    Returns:
        Those that it uses more often than it calls their modules, which hooks would not see; and those that it uses in calls of
        `linear` alone.
    """
    parameters = {index: getattr(*of_weight[0]) for index, of_weight in uses.items()}
    calling: dict[int, set[nn.Module]] = defaultdict(set)  # a parameter's id -> its modules
    for index, of_weight in uses.items():
        calling[id(parameters[index])] |= {module for module, _ in of_weight}
    calls = dict.fromkeys(calling, 0)

    def count(parameter: int, *_: object) -> None:
        calls[parameter] += 1

    handles = [
        module.register_forward_pre_hook(partial(count, parameter))
        for parameter, modules in calling.items()
        for module in modules
    ]
    try:
        with torch.no_grad(), _Uses(parameters.values()) as seen:
            run()
    finally:
        for handle in handles:
            handle.remove()
    more = {one for one, own in seen.own.items() if own > calls[one]}
    linear = {one for one, products in seen.linear.items() if products and not seen.others[one]}
    return (
        {index for index, parameter in parameters.items() if id(parameter) in more},
        {index for index, parameter in parameters.items() if id(parameter) in linear},
    )
