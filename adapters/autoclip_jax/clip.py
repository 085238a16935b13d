"""AutoClip as an optax transformation.

What shaped this module, and must stay true:

- Every rule is the core's: `autoclip_core.arrays`. Here updates become one norm, and a scale becomes
  scaled updates.
- The state is a plain pytree of arrays with fixed shapes: so jit, donation, scan, vmap, sharding and every checkpoint
  format work with nothing to do.
- The norm is taken in float32 at least: one in bfloat16 has three digits.
- A non-finite update is never multiplied: 0 times infinity is NaN.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from autoclip_core import AutoClipError, AutoClipTypeError, AutoClipValueError, NormHistory, StateError, arrays
from autoclip_jax import kernel

# Longer than the paper's runs of 80,000 steps, so that the window is the whole history of most runs: 1 MB. A step in
# the kernel costs as much as with a small one; elsewhere it passes over the window, at the speed of memory.
DEFAULT_WINDOW = 131_072

# JAX by the names that autoclip_core.arrays uses.
_XP = SimpleNamespace(**vars(jnp), stop_gradient=jax.lax.stop_gradient)


class AutoClipState(NamedTuple):
    """The state of `autoclip`: the norms, counts, and what was decided at the latest step.

    `autoclip_core.arrays` says how these arrays are laid out; the properties name what is in them.
    """

    norms: Array
    counts: Array
    last: Array

    @property
    def steps(self) -> Array:
        """How many updates were seen."""
        return self.counts[..., arrays.STEPS]

    @property
    def recorded_steps(self) -> Array:
        """How many norms were recorded."""
        return self.counts[..., arrays.RECORDED_STEPS]

    @property
    def clipped_steps(self) -> Array:
        """How many updates were clipped."""
        return self.counts[..., arrays.CLIPPED_STEPS]

    @property
    def nonfinite_steps(self) -> Array:
        """How many norms were NaN or infinite."""
        return self.counts[..., arrays.NONFINITE_STEPS]

    @property
    def grad_norm(self) -> Array:
        """The norm of the latest updates, before clipping."""
        number: Array = arrays.number_of(jnp, self.last[..., arrays.GRAD_NORM])
        return number

    @property
    def clip_threshold(self) -> Array:
        """The percentile of the history, at most `max_threshold`; infinity while there is none."""
        number: Array = arrays.number_of(jnp, self.last[..., arrays.CLIP_THRESHOLD])
        return number

    @property
    def clip_scale(self) -> Array:
        """The factor of the latest updates; 0 if they were dropped."""
        return self.last[..., arrays.CLIP_SCALE]

    @property
    def clipped(self) -> Array:
        """Whether the scale shortened the latest updates, which were finite."""
        return self.last[..., arrays.OUTCOME] > 0.0


def autoclip(
    percentile: float | Array = 10.0,
    *,
    window: int | None = DEFAULT_WINDOW,
    history: NormHistory | None = None,
    warmup: int | Array = 0,
    nonfinite: Literal["skip", "raise", "pass"] = "skip",
    max_threshold: float | Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Clip updates to a percentile of the gradient norms seen so far.

    At step t the global L2 norm n(t) of the updates joins the history, the threshold is the p-th percentile of that
    history, and the updates are multiplied by

        scale = min(threshold / n(t), 1)

    Put it before the optimizer: `optax.chain(autoclip(), optax.adam(1e-3))`. Gradients must be averaged over replicas
    before (under `pmap` and `shard_map` by `jax.lax.pmean`; under `jit` they are). Donate the optimizer state to the
    compiled step, or every step copies the window.

    Args:
        percentile: from 0 (clip to the smallest norm seen) to 100 (never clip). A traced value, as
            `optax.inject_hyperparams` gives, is held within these bounds.
        window: how many norms the state remembers, the oldest leaving first: all norms until the window is full. It
            takes 8 bytes per norm. At most 2**24.
        history: a NormHistory of the core that remembers every norm instead, without bound, on the host; other code of
            the process may read it or push to it. For one run on CPU devices. It is not part of the state: save it
            with `save_history`.
        warmup: do not clip before this many norms have been recorded.
        nonfinite: what a NaN or infinite norm does. "skip": the updates become zeros; momentum and weight decay of a
            later transformation still act (`optax.apply_if_finite` around the whole chain leaves all as it was).
            "pass": nothing.
        max_threshold: an upper cap on the threshold, in the unit of the norm.

    Returns:
        A transformation whose state is an `AutoClipState`.

    Raises:
        AutoClipTypeError, AutoClipValueError: an argument cannot be used.
        AutoClipError: in a step, the norm differs between the devices of a `shard_map`, and the state does not.
        BackendError: a history was given, and it or this JAX cannot be reached by the kernel.

    >>> import jax.numpy as jnp
    >>> clip = autoclip(percentile=50.0)
    >>> state = clip.init(jnp.zeros(2))
    >>> updates, state = clip.update(jnp.array([0.0, 2.0]), state)
    >>> updates, state = clip.update(jnp.array([0.0, 8.0]), state)
    >>> updates
    Array([0., 5.], dtype=float32)

    Source: Seetharaman, Wichern, Pardo, Le Roux, MLSP 2020, arXiv:2007.14469, Algorithm 1.
    """
    known_window = _known(window)
    arrays.check_options(  # what is traced has no value to check
        _known(percentile, 10.0),
        _known(window, DEFAULT_WINDOW),
        history,
        _known(warmup, 0),
        nonfinite,
        _known(max_threshold),
        DEFAULT_WINDOW,
    )
    if isinstance(percentile, jax.core.Tracer):
        percentile = jax.lax.stop_gradient(jnp.clip(_wide(percentile), 0.0, 100.0))
    else:
        percentile = float(_known(percentile))

    def observe(norms: Array, recorded_steps: Array, norm: Array) -> tuple[Array, Array]:
        if history is None:
            return kernel.observe_window(norms, recorded_steps, norm, percentile)
        return kernel.observe_tree(history.shared_id, norms, recorded_steps, norm, percentile)

    def init(params: optax.Params) -> AutoClipState:
        if history is None and known_window is None:
            raise AutoClipTypeError(
                "window must be known while the program is traced, for it is a shape: give optax.inject_hyperparams "
                'static_args=("window",).'
            )
        state = AutoClipState(**arrays.initial_state(jnp, None if history is not None else known_window))
        # Where each device of a shard_map trains parameters of its own, its norms are its own as well.
        varying: AutoClipState = _made_to_vary(state, _varies_over(params))
        return varying

    def update(
        updates: optax.Updates, state: AutoClipState, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, AutoClipState]:
        del params, extra
        _check_state(state, known_window, history)
        # Narrow gradients are widened on purpose, however strict the program is about its own types.
        with jax.numpy_dtype_promotion("standard"):
            norm = _vary_like(state, _global_norm(updates))
            *after, scale = arrays.take_step(
                _XP,
                observe,
                state.norms,
                state.counts,
                state.last,
                norm,
                warmup=warmup,
                nonfinite=nonfinite,
                max_threshold=None if max_threshold is None else jnp.asarray(max_threshold, jnp.float32),
            )
            state = AutoClipState(*after)
            return jax.tree.map(lambda update: _scaled(update, scale), updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def metrics(state: Any) -> dict[str, Array]:
    """Return what `autoclip` measured, from its own state or any optimizer state that holds it.

    Args:
        state: a state with one `AutoClipState` in it. Of `optax.partition` and the like, take the part of one group.

    Returns:
        `grad_norm` (before clipping), `clip_threshold`, `clip_scale`, `clipped` of the latest step, and the counts
        `steps`, `clipped_steps`, `nonfinite_steps`, and `skipped_in_a_row`, how many of the latest updates were dropped
        one after the other; scalar arrays.

    Raises:
        AutoClipValueError: there is no such state, or more than one.

    >>> tx = optax.chain(autoclip(), optax.sgd(0.1))
    >>> sorted(metrics(tx.init({"w": jnp.zeros(2)})))[:4]
    ['clip_scale', 'clip_threshold', 'clipped', 'clipped_steps']
    """
    found = _find(state)
    return arrays.metrics(jnp, found.counts, found.last)


def save_history(history: NormHistory, state: Any = None) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Return a NormHistory as an array, to be saved in the same checkpoint as the state that goes with it.

    Args:
        history: what `autoclip` was given.
        state: the state that goes with it, or any optimizer state that holds it. Where a step was evaluated more than
            once from the same state, it tells which outcome was kept; without it the first one is saved. This waits
            until it is computed; else wait (`jax.block_until_ready`) before calling this.

    Raises:
        AutoClipValueError: there is no such state, or more than one.
        StateError: the state is not one of this history.

    >>> history = NormHistory()
    >>> history.push(2.0)
    >>> load_history(save_history(history)).values()
    array([2.])
    """
    if state is not None:
        found = _find(state)
        kernel.settle(history.shared_id, found.norms, found.recorded_steps)
    return np.frombuffer(history.to_bytes(), np.uint8).copy()


def load_history(saved: Any) -> NormHistory:
    """Make the NormHistory again that `save_history` saved; give it to a new `autoclip`.

    A state that has seen more steps than its history holds norms is refused at its first step.

    Raises:
        SnapshotError: this is not what `save_history` returned, or it is damaged.
    """
    return NormHistory.from_bytes(np.asarray(saved, np.uint8).tobytes())


def _find(state: Any) -> AutoClipState:
    leaves = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, AutoClipState))
    found = [leaf for leaf in leaves if isinstance(leaf, AutoClipState)]
    if len(found) != 1:
        raise AutoClipValueError(
            f"A state with one AutoClipState in it is needed, but this {type(state).__name__} has {len(found)}."
        )
    return found[0]


def _known(value: Any, otherwise: Any = None) -> Any:
    """Return an argument as a Python value; what is traced has none yet, and is `otherwise`."""
    if isinstance(value, jax.core.Tracer):
        return otherwise
    return value.item() if isinstance(value, jax.Array) else value


def _check_state(state: Any, window: int | None, history: NormHistory | None) -> None:
    if not isinstance(state, AutoClipState):
        raise AutoClipTypeError(
            f"autoclip's update takes the state made by its init, but a {type(state).__name__} was given."
        )
    if (jnp.ndim(state.norms) == 1) != (history is not None):
        here, there = ("a NormHistory", "the state") if history is not None else ("the state", "a NormHistory")
        raise StateError(
            f"This autoclip keeps its norms in {here}, but the state is of one that keeps them in {there}."
        )
    if history is None and window not in (None, state.norms.shape[-1]):
        raise StateError(
            f"The state has window={state.norms.shape[-1]}, but this autoclip has window={window}; construct it with "
            "the window of the run that is resumed."
        )


def _varies_over(tree: Any) -> frozenset[str]:
    """Return the axes of a `shard_map` over which arrays differ, as far as JAX follows that (`check_vma=True`)."""
    if not hasattr(jax, "typeof"):  # before JAX 0.6
        return frozenset()
    kinds = [jax.typeof(leaf) for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    # Until JAX 0.10 the axes were in .vma.
    return frozenset().union(
        *(getattr(getattr(kind, "manual_axis_type", None), "varying", getattr(kind, "vma", ())) for kind in kinds)
    )


def _made_to_vary(tree: Any, axes: frozenset[str]) -> Any:
    """Return arrays as those that may differ over these axes, too."""

    def cast(leaf: Array) -> Any:
        lax: Any = jax.lax
        missing = tuple(axes - _varies_over(leaf))
        if not missing:
            return leaf
        return lax.pcast(leaf, missing, to="varying") if hasattr(lax, "pcast") else lax.pvary(leaf, missing)

    return jax.tree.map(cast, tree)


def _vary_like(state: AutoClipState, norm: Array) -> Array:
    """Return the norm as one that may differ wherever the state may; it must not differ elsewhere."""
    here = _varies_over(state)
    if axes := sorted(_varies_over(norm) - here):
        names = ", ".join(map(repr, axes))
        raise AutoClipError(
            f"The gradient norm differs between the devices of the shard_map axis {names}, and the state of autoclip "
            f"is the same on all of them. Average the gradients before autoclip, by jax.lax.pmean(gradients, {names}); "
            "where each device has a shard of one gradient, call update under jit and outside of shard_map; where each "
            "trains a model of its own, call init inside the shard_map as well, with the parameters of that model."
        )
    varying: Array = _made_to_vary(norm, here)
    return varying


def _wide(leaf: Any) -> Array:
    array = jnp.asarray(leaf)
    # Eight bits promote to nothing by themselves.
    narrow = jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize < 4
    return array.astype(jnp.float32 if narrow else jnp.promote_types(array.dtype, jnp.float32))


def _global_norm(updates: optax.Updates) -> Array:
    wide = [_wide(leaf) for leaf in jax.tree.leaves(updates)]
    squares = [
        jnp.sum(jnp.square(leaf.real) + jnp.square(leaf.imag)) if jnp.iscomplexobj(leaf) else jnp.sum(jnp.square(leaf))
        for leaf in wide
    ]
    norm: Array = arrays.root(jnp, sum(squares, jnp.zeros((), jnp.float32))).astype(jnp.float32)
    return norm


def _scaled(update: Any, scale: Array) -> Array:
    # Not a product alone: what is dropped may hold infinities.
    return jnp.where(scale > 0.0, _wide(update) * scale, 0.0).astype(jnp.asarray(update).dtype)
