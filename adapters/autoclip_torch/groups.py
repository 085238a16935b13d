"""Whose gradients are clipped, and which of them together.

Parameters are known by their names, their order or their optimizer, never by `id`: a state must survive a restart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import chain, count
from operator import is_
from typing import Any, Literal, get_args
from weakref import ref

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
        names: a module, or (name, tensor) pairs: the names of an optimizer's parameters, if it does not know them.

    Raises:
        AutoClipTypeError, AutoClipValueError: they cannot be used, or there are no parameters.
    """

    params: list[Tensor]  # of all groups
    by_name: dict[str, list[Tensor]]

    def __init__(
        self,
        source: Parameters,
        scope: Scope | Callable[[str], str],
        *,
        names: Parameters | None = None,
    ) -> None:
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
        self._names = {} if names is None else {tensor: name for name, tensor in _named_tensors(names)}
        self._places: dict[str, str] = {}  # the names of groups by those that they have where parameters have no names
        named = [] if isinstance(source, Optimizer) else _named_tensors(source)
        # Changed in place, because `hold` hands them out.
        self.params = [param for _, param in named]
        self._listed: list[Tensor] = []  # as the optimizer has them
        self._sizes: list[int] = []  # of its groups
        self.origins: dict[str, str] = {}  # the names of the groups before the latest `refresh`
        self.by_name = self._grouped([name for name, _ in named])
        self._source: Optimizer | ref[Optimizer] | None = source if isinstance(source, Optimizer) else None
        self.refresh()
        if not self.params:
            raise AutoClipValueError(
                f"There are no parameters to clip in the {type(source).__name__} given; if it is a generator, it may "
                "have been used up before."
            )

    def __len__(self) -> int:
        """Return the number of parameters."""
        return len(self.params)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_source": self.optimizer}

    def hold(self, *, weakly: bool) -> None:
        """Keep the optimizer alive, or give its parameters up with it: what it keeps must not keep it."""
        optimizer = self.optimizer
        if weakly and optimizer is not None:
            give_up = partial(_give_up, self._names, self.params, self._listed, self.by_name)
            self._source = ref(optimizer, give_up)
        else:
            self._source = optimizer

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer whose parameters these are; None if there is none, or none any more."""
        return self._source() if isinstance(self._source, ref) else self._source

    def refresh(self) -> bool:
        """Read the optimizer's parameters again; return whether they have changed."""
        if self._source is None or (optimizer := self.optimizer) is None:
            return False
        groups = optimizer.param_groups
        params = [group["params"] for group in groups]
        listed = list(chain.from_iterable(params))
        sizes = list(map(len, params))
        if sizes == self._sizes and all(map(is_, listed, self._listed)):
            return False
        places = [f"{index}.{at}" for index, group in enumerate(groups) for at in range(len(group["params"]))]
        known = [name for group in groups for name in group.get("param_names") or [None] * len(group["params"])]
        names = [
            name or self._names.get(param, place) for name, param, place in zip(known, listed, places, strict=True)
        ]
        # The first name of a tensor listed twice.
        named = dict(zip(reversed(listed), reversed(names), strict=True))
        self._listed[:] = listed
        self._sizes = sizes
        self.params[:] = dict.fromkeys(listed)
        grouped = (
            {str(index): list(dict.fromkeys(group["params"])) for index, group in enumerate(groups)}
            if self.scope == "group"
            else self._grouped([named[param] for param in self.params])
        )
        self.origins = self._origins(grouped)
        self.by_name.clear()
        self.by_name.update(grouped)
        if self.scope == "parameter":
            self._places = dict(zip(places, names, strict=True))
        return True

    def _origins(self, grouped: dict[str, list[Tensor]]) -> dict[str, str]:
        """Return by the name of each group the name that it had before, of those that were there.

        A group is known by its parameters, because names are places that move when another group is removed. Where all
        are new, as after a wrapping that makes others of them, it is known by its name.
        """
        homes = {param: name for name, params in self.by_name.items() for param in params}
        stays = {homes[param] for params in grouped.values() for param in params if param in homes}
        origins: dict[str, str] = {}
        for name, params in grouped.items():
            origin = next((homes[param] for param in params if param in homes), None)
            if origin is None and name not in stays:
                origin = name
            if origin is not None and origin not in origins.values():
                origins[name] = origin
        return origins

    def renamed(self, saved: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what was saved of each group by the names of today: once the parameters had none but their places."""
        if saved.keys() != self._places.keys():
            return saved
        return {self._places[place]: state for place, state in saved.items()}

    def _grouped(self, names: list[str]) -> dict[str, list[Tensor]]:
        if self.scope == "global":
            return {"global": self.params}
        grouped: dict[str, list[Tensor]] = {}
        if self._group_of is None:
            names = _distinct(names)
        for name, param in zip(names, self.params, strict=True):
            group = name if self._group_of is None else self._group_of(name)
            if not isinstance(group, str):
                raise AutoClipTypeError(
                    f"The scope must give the name of a group for each parameter, but for {name!r} it gave {group!r}."
                )
            grouped.setdefault(group, []).append(param)
        return grouped


def _distinct(names: list[str]) -> list[str]:
    """Return the names, each repeated one with a number: two models in one optimizer have the same."""
    taken: set[str] = set()
    distinct = []
    for name in names:
        numbered = chain([name], (f"{name}#{number}" for number in count(2)))
        distinct.append(next(candidate for candidate in numbered if candidate not in taken))
        taken.add(distinct[-1])
    return distinct


def name_of(subject: Any) -> str:
    """Return the name of an object's class with its module."""
    return f"{type(subject).__module__}.{type(subject).__qualname__}"


def _give_up(
    names: dict[Tensor, str], params: list[Tensor], listed: list[Tensor], by_name: dict[str, list[Tensor]], _: Any
) -> None:
    """Let go of the parameters of an optimizer that is gone, and keep the names of their groups."""
    names.clear()
    for tensors in (params, listed, *by_name.values()):
        tensors.clear()


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
