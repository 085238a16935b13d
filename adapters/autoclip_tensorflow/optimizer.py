"""AutoClip as a Keras 3 optimizer that wraps another, on the TensorFlow, JAX and PyTorch backends.

What shaped this module, and must stay true:

- Every rule is the core's: `autoclip_core.arrays`. Here gradients become one norm, and a scale becomes scaled
  gradients.
- `apply` is the one point that every trainer of Keras passes, and the inner optimizer's own `apply` follows it: so its
  schedule, its weight decay and the backend's fast path stay as they are.
- It is an optimizer like the one that it wraps: each option of a Keras optimizer, and each method that uses one, is the
  inner optimizer's. What Keras gives this class besides would be ignored in silence.
- All state is in variables of fixed shape: so `.keras` files, `tf.train.Checkpoint` and JAX's stateless training work.
- The inner optimizer may not accumulate gradients: it would hide the accumulated ones, whose norm is the one that
  counts.
"""

from __future__ import annotations

from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

import keras
import numpy as np
from keras import ops

from autoclip_core import AutoClipTypeError, AutoClipValueError, NormHistory, StateError, arrays
from autoclip_tensorflow.state import DEFAULT_WINDOW, Options, digits_of, first_state

if keras.config.backend() == "tensorflow":
    from autoclip_tensorflow.graph import XP, check_history, count_replicas, global_square, scaled, update_variables
else:
    from autoclip_tensorflow.dense import XP, check_history, count_replicas, global_square, scaled, update_variables

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence


def _option(name: str) -> property:
    """Return an option of the inner optimizer as a property of the wrapper."""

    def get(self: AutoClipOptimizer) -> Any:
        return None if self._is_plain else getattr(self.inner_optimizer, name)

    def put(self: AutoClipOptimizer, value: Any) -> None:
        if not self._is_plain:
            _check_option(name, value)
            setattr(self.inner_optimizer, name, value)

    return property(get, put, doc=f"The `{name}` of the inner optimizer.")


@keras.saving.register_keras_serializable("autoclip")
class AutoClipOptimizer(keras.optimizers.Optimizer):  # type: ignore[misc] # keras has no types
    r"""Clip gradients to a percentile of the gradient norms seen so far, then let another optimizer apply them.

    At step t the global L2 norm n(t) of the gradients joins the history, the threshold is the p-th percentile of that
    history, and the gradients are multiplied by

        scale = min(threshold / n(t), 1)

    Compile the model with it; learning rate and schedule are those of the inner optimizer. Under a mixed_float16 policy
    Keras puts its LossScaleOptimizer around it, so that it sees unscaled gradients of finite steps alone.

    Args:
        inner_optimizer: any Keras optimizer without a clipping, an accumulation or a loss scaling of its own.
        percentile: from 0 (clip to the smallest norm seen) to 100 (never clip). May be assigned at any step.
        window: how many norms the variables remember, the oldest leaving first: all norms until the window is full. It
            takes 8 bytes per norm. At most 2**24.
        history: a NormHistory of the core that remembers every norm instead, without bound, on the host; other code of
            the process may read it or push to it. On the TensorFlow backend without `jit_compile=True`, and on the
            PyTorch backend with variables on the CPU. A `.keras` file holds it, `tf.train.Checkpoint` does not.
        warmup: do not clip before this many norms have been recorded.
        nonfinite: what a NaN or infinite norm does. "skip": the gradients become zeros; momentum and weight decay of
            the inner optimizer still act. "pass": nothing.
        max_threshold: an upper cap on the threshold, in the unit of the norm.
        gradient_accumulation_steps: average the gradients of so many batches, and take one step with them, with one
            norm; on one replica only.
        name: the name of the optimizer.

    Raises:
        AutoClipTypeError, AutoClipValueError: an argument cannot be used.
        BackendError: a history was given, and it cannot be reached by the kernel.

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile(AutoClipOptimizer(keras.optimizers.Adam(0.125)), loss="mse")
    >>> float(model.optimizer.learning_rate)
    0.125

    Source: Seetharaman, Wichern, Pardo, Le Roux, MLSP 2020, arXiv:2007.14469, Algorithm 1.
    """

    # Keras's own methods see an optimizer without options, where they prepare this one.
    _is_plain = True

    weight_decay = _option("weight_decay")
    use_ema = _option("use_ema")
    ema_momentum = _option("ema_momentum")
    ema_overwrite_frequency = _option("ema_overwrite_frequency")
    clipnorm = _option("clipnorm")
    global_clipnorm = _option("global_clipnorm")
    clipvalue = _option("clipvalue")
    loss_scale_factor = _option("loss_scale_factor")

    def __init__(
        self,
        inner_optimizer: keras.optimizers.Optimizer,
        percentile: float = 10.0,
        *,
        window: int = DEFAULT_WINDOW,
        history: NormHistory | None = None,
        warmup: int = 0,
        nonfinite: Literal["skip", "pass"] = "skip",
        max_threshold: float | None = None,
        gradient_accumulation_steps: int | None = None,
        name: str | None = None,
    ) -> None:
        _check_inner(inner_optimizer)
        options = Options(window, history, warmup, nonfinite, max_threshold)
        state = first_state(options, percentile)
        if history is not None:
            check_history()
        steps = gradient_accumulation_steps
        if steps is not None and not (isinstance(steps, Integral) and 2 <= steps < 2**31):
            raise AutoClipValueError(
                f"gradient_accumulation_steps must be a whole number of at least 2, or None, but {steps!r} was given."
            )
        super().__init__(learning_rate=0.0, name=name)  # its own rate is never used
        self.inner_optimizer = inner_optimizer
        self._is_plain = False
        self._options = options
        self._accumulation_steps = gradient_accumulation_steps
        self._state = {
            key: self.add_variable(
                value.shape,
                partial(_constant, value=value),
                value.dtype.name,
                aggregation="only_first_replica",
                name=key,
            )
            for key, value in state.items()
        }

    @property
    def percentile(self) -> float:
        """The percentile, from 0 to 100. Assign to change it from the next step on, compiled steps included.

        During `fit` on the JAX backend a value is taken at the beginning and at the end of an epoch, as one for the
        learning rate is.
        """
        digits = self._value("percentile")
        return arrays.percentile_of_digits(int(digits[place]) for place in range(digits.shape[0]))

    @percentile.setter
    def percentile(self, percentile: float) -> None:
        self._state["percentile"].assign(digits_of(percentile))

    @property
    def history(self) -> NormHistory | None:
        """The history that was given, None where variables keep the norms."""
        return self._options.history

    def metrics(self) -> dict[str, Any]:
        """Return what was measured at the latest step, and counts.

        Returns:
            `grad_norm` (before clipping), `clip_threshold`, `clip_scale`, `clipped` of the latest step, and the
            counts `steps`, `clipped_steps`, `nonfinite_steps`, and `skipped_in_a_row`, how many of the latest updates
            were dropped one after the other; scalar tensors.

        Raises:
            StateError: in the middle of an epoch on the JAX backend, where the model holds the state. A callback that
                asks `self.model.optimizer` gets it, for there Keras gives the state back.
        """
        return arrays.metrics(XP, self._value("counts"), self._value("last"))

    def _value(self, key: str) -> Any:
        variable = self._state[key]
        # Then Keras would give the first value that the variable ever had.
        if getattr(variable, "_value", variable) is None and not _is_stateless():
            raise StateError(
                "During an epoch on Keras's JAX backend the model holds the state of its optimizer; in a callback use "
                "`self.model.optimizer`, or call `model.jax_state_sync()` first."
            )
        return ops.convert_to_tensor(variable)

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Make the variables of both optimizers.

        Raises:
            AutoClipValueError: gradients are to be accumulated on several replicas.
        """
        if self._accumulation_steps and count_replicas() > 1:
            raise AutoClipValueError(
                f"gradient_accumulation_steps={self._accumulation_steps} is for one replica, but there are "
                f"{count_replicas()}; leave it out, and give each of them larger batches."
            )
        self.inner_optimizer.build(variables)
        # A function, because Keras would count variables that it finds in an attribute among the optimizer's own.
        self._built_for: Callable[[], list[keras.Variable]] = partial(list, variables)
        if self._accumulation_steps:
            self._accumulated_batches = self.add_variable((), "zeros", "int32", name="accumulated_batches")
            self._accumulated = [
                self.add_variable_from_reference(variable, "accumulated_gradient") for variable in variables
            ]
        self._is_plain = True
        super().build(variables)
        self._is_plain = False

    def apply(self, grads: Iterable[Any], trainable_variables: Iterable[keras.Variable] | None = None) -> None:
        """Clip the gradients, and let the inner optimizer apply them.

        Args:
            grads: one per variable; None for a variable that has none.
            trainable_variables: the variables; without them those that the optimizer was built with.

        Raises:
            AutoClipValueError: the inner optimizer has been told to clip, to accumulate or to scale the loss.
        """
        grads = list(grads)
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
            if not self.built:
                with keras.name_scope(self.name):
                    self.build(trainable_variables)
        if self._accumulation_steps and grads:
            self._accumulate_and_apply(grads, trainable_variables or self._built_for())
        else:
            self._clip_and_apply(grads, trainable_variables)

    def _clip_and_apply(self, grads: list[Any], variables: list[keras.Variable] | None) -> None:
        _check_inner(self.inner_optimizer)  # whose options may have been set since
        scale = update_variables(self._options, self._state, global_square(grads))
        self.inner_optimizer.apply([scaled(grad, scale) for grad in grads], variables)

    def _accumulate_and_apply(self, grads: list[Any], variables: list[keras.Variable]) -> None:
        total_of = {id(variable): total for variable, total in zip(self._built_for(), self._accumulated, strict=True)}
        totals = [total_of[id(variable)] for variable in variables]
        sums = [
            None if grad is None else ops.add(total, ops.convert_to_tensor(grad))
            for total, grad in zip(totals, grads, strict=True)
        ]
        batches = ops.add(self._accumulated_batches, 1)
        is_last = ops.equal(batches, self._accumulation_steps)
        means = [None if total is None else ops.divide(total, self._accumulation_steps) for total in sums]
        self._when(is_last, partial(self._clip_and_apply, means, variables), [*self.variables, *variables])
        self._accumulated_batches.assign(ops.where(is_last, 0, batches))
        for total, value in zip(totals, sums, strict=True):
            if value is not None:
                total.assign(ops.where(is_last, ops.zeros_like(value), value))

    def _when(self, condition: Any, action: Callable[[], None], variables: list[keras.Variable]) -> None:
        """Do it if the condition holds, all that it changes being variables."""
        if keras.config.backend() != "jax":
            ops.cond(condition, action, lambda: None)
            return

        try:
            holds: bool | None = bool(condition)
        except TypeError:  # of JAX, which traces the step
            holds = None
        if holds is not None:  # JAX would compile the branches anew in every step
            if holds:
                action()
            return

        # In JAX a branch has no effects, so it returns what the variables become.
        def values_after() -> list[Any]:
            with keras.StatelessScope(state_mapping=[(variable, variable.value) for variable in variables]) as scope:
                action()
            return [scope.get_current_value(variable) for variable in variables]

        values = ops.cond(condition, values_after, lambda: [variable.value for variable in variables])
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)

    @property
    def variables(self) -> list[keras.Variable]:
        """The variables of both optimizers, this one's first."""
        return [*super().variables, *self.inner_optimizer.variables]

    @property
    def iterations(self) -> Any:
        """How many steps the inner optimizer has taken."""
        return self.inner_optimizer.iterations

    @property
    def learning_rate(self) -> Any:
        """The learning rate of the inner optimizer."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def gradient_accumulation_steps(self) -> int | None:
        """How many batches make a step; it is given at construction."""
        return None if self._is_plain else self._accumulation_steps

    @gradient_accumulation_steps.setter
    def gradient_accumulation_steps(self, steps: int | None) -> None:
        if not self._is_plain and steps != self._accumulation_steps:
            raise AutoClipValueError(
                f"gradient_accumulation_steps={steps!r} has to be given to AutoClipOptimizer when it is constructed."
            )

    @property
    def _model_variables_moving_average(self) -> Any:
        # SwapEMAWeights looks here, if Keras's loss scaling is around this optimizer.
        return self.inner_optimizer._model_variables_moving_average

    def apply_gradients(self, grads_and_vars: Iterable[tuple[Any, keras.Variable]]) -> Any:
        """Do what `apply` does, and return how many steps were taken."""
        super().apply_gradients(grads_and_vars)
        return self.iterations

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        """Let the weight decay of the inner optimizer leave out these variables, or those with such names."""
        self.inner_optimizer.exclude_from_weight_decay(var_list=var_list, var_names=var_names)

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Set all `variables`, those of both optimizers."""
        own = len(super().variables)
        self.inner_optimizer.set_weights(weights[own:])
        super().set_weights(weights[:own])

    def finalize_variable_values(self, var_list: list[keras.Variable]) -> None:
        """Let the inner optimizer put its averages into the variables, if it keeps some."""
        self.inner_optimizer.finalize_variable_values(var_list)

    def save_own_variables(self, store: Any) -> None:
        """Write the state of both optimizers, and the history."""
        super().save_own_variables(store)
        if self.history is not None:
            store["history"] = np.frombuffer(self.history.to_bytes(), np.uint8)

    def load_own_variables(self, store: Any) -> None:
        """Read what `save_own_variables` wrote.

        Raises:
            StateError: the state has another window or is of other variables, or keeps its norms elsewhere.
            SnapshotError: its history is damaged.
        """
        state = {key: store[key] for key in store.keys()}  # noqa: SIM118 - not a mapping
        saved = state.pop("history", None)
        if (saved is None) != (self.history is None):
            here, there = ("variables", "a NormHistory") if self.history is None else ("a NormHistory", "variables")
            raise StateError(
                f"This AutoClipOptimizer keeps its norms in {here}, but the state is of one that keeps them in {there}."
            )
        if len(state) != len(self.variables):
            super().load_own_variables(state)  # which warns, and loads nothing
            return
        for at, variable in enumerate(self.variables):
            _check_shape(variable, np.shape(state[str(at)]), is_window=variable is self._state["norms"])
        loaded = None if saved is None else NormHistory.from_bytes(np.asarray(saved, np.uint8).tobytes())
        super().load_own_variables(state)
        if self.history is not None and loaded is not None:
            self.history.clear()  # the same object: compiled steps know it by its id
            self.history.extend(loaded.values())

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` takes; of a history only that there is one."""
        return {
            "inner_optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
            "percentile": self.percentile,
            **self._options._asdict(),
            "history": self.history is not None,
            "gradient_accumulation_steps": self._accumulation_steps,
            "name": self.name,
        }

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None
    ) -> AutoClipOptimizer:
        """Make an optimizer from its configuration, its history being empty."""
        inner = keras.saving.deserialize_keras_object(config["inner_optimizer"], custom_objects=custom_objects)
        history = NormHistory() if config["history"] else None
        return cls(**{**config, "inner_optimizer": inner, "history": history})


def _check_inner(inner: Any) -> None:
    name = type(inner).__name__
    if any(cls.__module__.partition(".")[0] == "tf_keras" for cls in type(inner).__mro__):
        raise AutoClipTypeError(
            f"AutoClipOptimizer wraps an optimizer of Keras 3, but {name} of tf_keras, which is Keras 2, was given; "
            f"use keras.optimizers.{name}, or autoclip_tensorflow.AutoClip in a loop of your own."
        )
    if not isinstance(inner, keras.optimizers.Optimizer):
        raise AutoClipTypeError(
            f"AutoClipOptimizer wraps a Keras optimizer, such as keras.optimizers.Adam(), but {inner!r} was given."
        )
    if isinstance(inner, AutoClipOptimizer):
        raise AutoClipValueError(
            "The optimizer is wrapped in an AutoClipOptimizer already; clipping twice is a mistake."
        )
    if isinstance(inner, keras.optimizers.LossScaleOptimizer):
        _check_option("loss_scale_factor", inner.initial_scale)
    for name in ("loss_scale_factor", "clipnorm", "global_clipnorm", "clipvalue"):
        _check_option(name, getattr(inner, name))
    if inner.gradient_accumulation_steps is not None:
        raise AutoClipValueError(
            "The inner optimizer accumulates gradients where AutoClip cannot see them; give "
            f"gradient_accumulation_steps={inner.gradient_accumulation_steps} to AutoClipOptimizer instead."
        )


def _check_option(name: str, value: Any) -> None:
    """Check an option of the inner optimizer."""
    if name == "loss_scale_factor" and value is not None:
        raise AutoClipValueError(
            "AutoClipOptimizer needs unscaled gradients, so loss scaling goes around it: "
            "keras.optimizers.LossScaleOptimizer(AutoClipOptimizer(inner))."
        )
    if name in ("clipnorm", "global_clipnorm", "clipvalue") and value is not None:
        raise AutoClipValueError(
            f"The inner optimizer has {name}={value} and would clip again what AutoClip has clipped; leave it out. An "
            "upper cap on the threshold is max_threshold."
        )


def _check_shape(variable: keras.Variable, saved: tuple[int, ...], *, is_window: bool) -> None:
    """Check what is to be loaded: Keras would find out when a part of the variables is loaded."""
    if saved == tuple(variable.shape):
        return
    if is_window:
        raise StateError(
            f"The state has window={saved[-1]}, but this AutoClipOptimizer has window={variable.shape[-1]}; construct "
            "it with the window of the run that is resumed."
        )
    raise StateError(
        f"The state has shape {saved} for {variable.path}, whose shape here is {tuple(variable.shape)}; construct the "
        "model and the inner optimizer of the run that is resumed."
    )


def _is_stateless() -> bool:
    """Return whether Keras takes the values of variables from elsewhere, as it does while a program is traced."""
    with keras.StatelessScope() as scope:
        return scope.original_scope is not None


def _constant(shape: tuple[int, ...], dtype: Any = None, *, value: Any) -> Any:
    return ops.reshape(ops.convert_to_tensor(value, dtype), shape)
