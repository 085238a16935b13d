"""Whose gradients are clipped, and which of them together.

Parameters are known by their names, their order or their optimizer, never by `id`: a state must survive a restart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import is_
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from autoclip_core import AutoClipTypeError, AutoClipValueError

Scope = Literal["global", "group", "parameter"]
Parameters = Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | torch.nn.Module | Optimizer


class Groups:
    """Parameters in named groups, each with a norm, a history and a threshold of its own.

    Args:
        source: as `params` of AutoClip. An optimizer is asked again by `refresh`; everything else is read once.
        scope: as for AutoClip.

    Raises:
        AutoClipTypeError, AutoClipValueError: they cannot be used, or there are no parameters.
    """

    params: list[Tensor]  # of all groups
    by_name: dict[str, list[Tensor]]

    def __init__(self, source: Parameters, scope: Scope | Callable[[str], str]) -> None:
        if not callable(scope) and scope not in get_args(Scope):
            raise AutoClipValueError(
                f'scope must be "global", "group", "parameter" or a function, but {scope!r} was given.'
            )
        if scope == "group" and not isinstance(source, Optimizer):
            raise AutoClipValueError(
                'scope="group" means the parameter groups of an optimizer, but none was given; give the optimizer, or '
                "a function from a parameter's name to the name of its group as the scope."
            )
        self._group_of = scope if callable(scope) else None
        self.scope = "function" if callable(scope) else scope
        self._optimizer = source if isinstance(source, Optimizer) else None
        named = _named_tensors(source) if self._optimizer is None else []
        self.params = [param for _, param in named]
        self._listed: list[Tensor] = []  # as the optimizer has them
        self.by_name = self._grouped([name for name, _ in named])
        self.refresh()
        if not self.params:
            raise AutoClipValueError(
                f"There are no parameters to clip in the {type(source).__name__} given; if it is a generator, it may "
                "have been used up before."
            )

    def __len__(self) -> int:
        """Return the number of parameters."""
        return len(self.params)

    def refresh(self) -> bool:
        """Read the optimizer's parameters again; return whether they have changed."""
        if self._optimizer is None:
            return False
        groups = self._optimizer.param_groups
        listed = [param for group in groups for param in group["params"]]
        if len(listed) == len(self._listed) and all(map(is_, listed, self._listed)):
            return False
        self._listed = listed
        names = [name for index, group in enumerate(groups) for name in _names(index, group)]
        named = dict(zip(reversed(listed), reversed(names), strict=True))  # the first name of a tensor listed twice
        self.params = list(dict.fromkeys(listed))
        self.by_name = (
            {str(index): list(dict.fromkeys(group["params"])) for index, group in enumerate(groups)}
            if self.scope == "group"
            else self._grouped([named[param] for param in self.params])
        )
        return True

    def _grouped(self, names: list[str]) -> dict[str, list[Tensor]]:
        if self.scope == "global":
            return {"global": self.params}
        grouped: dict[str, list[Tensor]] = {}
        for name, param in zip(names, self.params, strict=True):
            group = name if self._group_of is None else self._group_of(name)
            if not isinstance(group, str):
                raise AutoClipTypeError(
                    f"The scope must give the name of a group for each parameter, but for {name!r} it gave {group!r}."
                )
            grouped.setdefault(group, []).append(param)
        return grouped


def _names(index: int, group: dict[str, Any]) -> list[str]:
    """Return the names that an optimizer was given, or the places of its parameters."""
    names: list[str] = group.get("param_names") or [f"{index}.{place}" for place in range(len(group["params"]))]
    return names


def _named_tensors(source: Any) -> list[tuple[str, Tensor]]:
    if isinstance(source, torch.nn.Module):
        return list(source.named_parameters())
    if isinstance(source, Tensor):
        return [("0", source)]
    if not isinstance(source, Iterable):
        raise AutoClipTypeError(
            f"AutoClip takes tensors, a module or an optimizer, but a {type(source).__name__} was given."
        )
    named: dict[Tensor, str] = {}
    for index, item in enumerate(source):
        name, tensor = item if isinstance(item, tuple) and len(item) == 2 else (str(index), item)
        if not isinstance(tensor, Tensor) or not isinstance(name, str):
            raise AutoClipTypeError(
                f"AutoClip takes tensors, but item {index} is a {type(item).__name__}; give model.parameters(), "
                "model.named_parameters(), the model itself, or its optimizer."
            )
        named.setdefault(tensor, name)  # a tensor given twice has one gradient, which must count once
    return [(name, tensor) for tensor, name in named.items()]
