"""Every optimizer of optax: `autoclip()` before it."""

import inspect
import sys
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from types import FunctionType

import jax
import optax
from checks import PERCENTILE, STEPS, check, result
from harness import autoclip, batch_of, loss_of, make_params, watch


def kinds_of(module):
    """Return what is made from a learning rate alone, by name."""
    made = {}
    for name, kind in inspect.getmembers(module, lambda member: isinstance(member, FunctionType | partial)):
        if name.startswith("scale_by") or "learning_rate" not in inspect.signature(kind).parameters:
            continue
        with suppress(TypeError):  # it wants more
            made[name] = kind(learning_rate=1e-2)
    return made


def train(tx):
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def step(params, state, batch):
        value, grads = jax.value_and_grad(loss_of)(params, batch)
        loss = lambda params: loss_of(params, batch)
        updates, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=loss)
        return optax.apply_updates(params, updates), state

    params = make_params()
    state = tx.init(params)
    for number in range(STEPS):
        params, state = step(params, state, batch_of(number))


def is_tried(optimizer):
    # page
    tx = optax.chain(autoclip(PERCENTILE), optimizer)
    # end of page
    try:
        train(tx)
    except Exception:
        watch.take()
        try:
            train(optimizer)
        except Exception:  # noqa: BLE001 - whatever it wants, it is not AutoClip that has failed
            return False
        raise
    (updates,) = watch.take()
    assert len(updates) == STEPS, f"{len(updates)} updates"
    check(updates, dtype=watch.dtype)
    return True


def main():
    for module in (optax, optax.contrib):
        kinds = kinds_of(module)
        tried = {name: is_tried(kind) for name, kind in kinds.items()}
        clips = sorted(name for name in tried if tried[name])
        failed = sorted(set(tried) - set(clips))
        assert len(clips) > 10, tried
        where = module.__name__
        case = f"{len(clips)} of {where} {version('optax')}"
        result("optax", case, updates=STEPS * len(clips), **{"clips": clips, "not tried": failed})


if __name__ == "__main__":
    if sys.argv[1] == "train":  # what resumes is the same for all of them: see with_optax.py
        main()
