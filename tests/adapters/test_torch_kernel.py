"""Gradients on a CPU that the compiled kernel measures and scales, past torch: what it must find, and must not touch.

Norms are judged by torch in float64, scaled gradients by torch's own product.
"""

import copy
import ctypes
import pickle
from math import inf, isnan
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from autoclip_torch import AutoClip, attach, kernel
from autoclip_torch.gradients import Gradients
from torch import Tensor, nn

FLOATS = [torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def usable(absent):
    if not kernel.is_usable():
        absent("the backend is not the compiled kernel")


@pytest.fixture
def calls(monkeypatch):
    """How many tensors each call of the kernel that measures or scales was given."""
    made = []
    for method, name in (("__init__", "measure"), ("scale_", "scale_")):
        monkeypatch.setattr(kernel.KernelBatch, method, counted(made, name, getattr(kernel.KernelBatch, method)))
    return made


def counted(made, name, method):
    def call(self, *args):
        method(self, *args)
        made.append((name, len(self.tensors)))

    return call


def params_of(grads):
    params = [nn.Parameter(torch.zeros(grad.shape, dtype=grad.dtype)) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return params


def grads_of(count, size, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator, dtype=dtype) for _ in range(count)]


def norm_of(grads):
    return torch.cat([grad.flatten().double() for grad in grads]).norm().item()


def measured(grads):
    return Gradients([params_of(grads)]).norms()[0]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1,), (17,), (3, 5, 7), (70_000,)])
def test_norm_and_scaled_gradients_are_those_of_torch(shape, dtype, calls):
    grads = grads_of(3, shape, dtype)
    before = [grad.clone() for grad in grads]
    clip = AutoClip(params_of(grads), 50.0)
    clip.history.extend([1e-3] * 3)
    step = clip.step()
    assert step.norm == pytest.approx(norm_of(before), rel=1e-12)
    assert step.clipped
    for grad, was in zip(grads, before, strict=True):
        assert torch.equal(grad, was * torch.tensor(step.scale, dtype=dtype))
    assert calls == [("measure", 3), ("scale_", 3)]


@pytest.mark.parametrize("dtype", FLOATS)
def test_norm_does_not_depend_on_the_order_of_parameters(dtype):
    grads = [grad * 10.0 ** (number % 9 - 4) for number, grad in enumerate(grads_of(200, 37, dtype))]
    orders = [np.random.default_rng(seed).permutation(200) for seed in range(20)]
    assert len({measured([grads[at] for at in order]) for order in orders}) == 1


@pytest.mark.parametrize("number", [inf, -inf, float("nan")])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.filterwarnings("ignore:The gradient norm")
def test_one_number_that_is_not_finite_is_found(dtype, number):
    grads = grads_of(20, 33, dtype)
    grads[13][31] = number
    norm = measured(grads)
    assert isnan(norm) if isnan(number) else norm == inf
    clip = AutoClip(params_of(grads))
    assert clip.step().scale == 0.0
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize(
    ("dtype", "number"),
    [
        (torch.float32, 1e-44),
        (torch.float32, 1e-30),
        (torch.float32, 1e16),
        (torch.float64, 1e-310),
        (torch.float64, 1e200),
    ],
)
def test_range_of_norms_is_that_of_the_numbers(dtype, number):
    grads = [torch.full((100,), number, dtype=dtype) for _ in range(100)]
    assert measured(grads) == pytest.approx(100 * grads[0][0].item(), rel=1e-12)


def test_float32_norm_overflows_where_squares_do_in_torch():
    norms = {}
    for number in (1.8e19, 1.9e19):
        gradients = Gradients([params_of([torch.tensor([number, 1.0])])])
        norms[number] = [gradients.norms(least)[0] for least in FLOATS]
    assert norms == {1.8e19: pytest.approx([1.8e19] * 2), 1.9e19: pytest.approx([inf, 1.9e19])}


def test_scopes_scale_each_group_by_its_own_factor(calls):
    grads = grads_of(6, 50)
    before = [grad.clone() for grad in grads]
    clip = AutoClip(params_of(grads), 0.0, scope="parameter")
    for number, history in enumerate(clip.histories.values()):
        history.push(1.0 if number % 2 else 1e6)
    steps = clip.step()
    for grad, was, step in zip(grads, before, steps.values(), strict=True):
        assert step.norm == pytest.approx(norm_of([was]), rel=1e-12)
        assert torch.equal(grad, was * torch.tensor(step.scale))
    assert [step.clipped for step in steps.values()] == [False, True] * 3
    assert len(calls) == 2


def test_write_is_told_to_autograd():
    grads = grads_of(2, 10)
    weight = torch.ones(10, requires_grad=True)
    output = (weight * grads[0]).sum()  # keeps the gradient for its own backward()
    versions = [grad._version for grad in grads]
    clip = AutoClip(params_of(grads), 50.0)
    clip.history.extend([1e-3] * 3)
    assert clip.step().clipped
    assert all(grad._version > version for grad, version in zip(grads, versions, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


def test_gradients_that_are_not_scaled_keep_their_version():
    grads = grads_of(2, 10)
    versions = [grad._version for grad in grads]
    AutoClip(params_of(grads)).step()
    assert [grad._version for grad in grads] == versions


class Sub(Tensor):
    pass


def with_gap():
    return torch.randn(6, 4)[:, :2]


LEFT_TO_TORCH = {
    "half": lambda: torch.randn(8, dtype=torch.bfloat16),
    "subclass": lambda: torch.randn(8).as_subclass(Sub),
    "gap": with_gap,
    "sparse": lambda: torch.randn(3, 3).to_sparse(),
    "unaligned": lambda: torch.frombuffer(bytearray(41), dtype=torch.float32, offset=1, count=10),
    "functional": lambda: torch._to_functional_tensor(torch.randn(8)),
    "zero": lambda: torch._efficientzerotensor(8),
    "meta": lambda: torch.empty(8, device="meta"),
    "empty": lambda: torch.empty(0),
    "large": lambda: torch.ones(2**18 + 1),
    "inference": torch.inference_mode()(lambda: torch.randn(8)),
    "expanded": lambda: torch.randn(1).expand(8),
}


@pytest.mark.parametrize("make", LEFT_TO_TORCH.values(), ids=LEFT_TO_TORCH)
def test_kernel_leaves_to_torch_what_is_not_plain_memory(make):
    assert not kernel.takes(make())


@pytest.mark.parametrize("kind", ["half", "subclass", "gap", "empty", "large"])
def test_gradients_left_to_torch_count_beside_the_others(kind, calls):
    odd = LEFT_TO_TORCH[kind]()
    grads = [*grads_of(3, 20), odd]
    before = [grad.clone() for grad in grads]
    clip = AutoClip(params_of(grads), 50.0)
    clip.history.extend([1e-3] * 3)
    step = clip.step()
    assert step.norm == pytest.approx(norm_of(before), rel=1e-2 if kind == "half" else 1e-6)
    for grad, was in zip(grads, before, strict=True):
        torch.testing.assert_close(grad, was * step.scale)
    assert [count for _, count in calls] == [3, 3]


@pytest.mark.parametrize("clipped", [0, 1])
def test_groups_that_the_kernel_takes_and_others_are_scaled_each_by_itself(clipped):
    grads = [torch.randn(8), torch.randn(8, dtype=torch.bfloat16)]
    before = [grad.clone() for grad in grads]
    clip = AutoClip(params_of(grads), 0.0, scope="parameter")
    for number, history in enumerate(clip.histories.values()):
        history.push(1e-3 if number == clipped else 1e6)
    steps = list(clip.step().values())
    assert [step.clipped for step in steps] == [number == clipped for number in range(2)]
    for grad, was, step in zip(grads, before, steps, strict=True):
        torch.testing.assert_close(grad, was * step.scale)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        lambda: torch.randn(7, 5).t(),
        lambda: torch.randn(3, 1, 5).transpose(0, 2),
        lambda: torch.randn(()),
        lambda: torch._neg_view(torch.randn(8)),
        lambda: torch.view_as_real(torch.randn(6, dtype=torch.complex64)),
    ],
    ids=["channels-last", "transposed", "size-one", "scalar", "pending sign", "complex"],
)
def test_kernel_takes_dense_tensors_in_any_order(make):
    grad = make()
    assert kernel.takes(grad)
    before = grad.clone()
    clip = AutoClip(params_of([grad]), 50.0)
    clip.history.extend([1e-3] * 3)
    step = clip.step()
    assert step.norm == pytest.approx(norm_of([before]), rel=1e-12)
    assert torch.equal(grad, before * torch.tensor(step.scale))


def given(params, grads):
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad


def test_new_gradients_like_those_before_are_collected_at_once(monkeypatch):
    params = params_of(grads_of(5, 20))
    clip = AutoClip(params)
    clip.step()
    monkeypatch.setattr(kernel, "takes", lambda tensor: pytest.fail("one tensor after the other"))
    for seed in range(1, 4):
        grads = grads_of(5, 20, seed=seed)
        expected = norm_of(grads)
        given(params, grads)
        assert clip.step().norm == pytest.approx(expected, rel=1e-12)


CHANGED = {
    **LEFT_TO_TORCH,
    "float64": lambda: torch.randn(8, dtype=torch.float64),
    "complex": lambda: torch.randn(8, dtype=torch.complex64),
    "fewer": lambda: torch.randn(7),
    "shape": lambda: torch.randn(2, 4),
    "parameter": lambda: nn.Parameter(torch.randn(8)),
    "released": lambda: released(torch.randn(8)),
}


def released(tensor):
    tensor.untyped_storage().resize_(0)
    return tensor


def layout(grads):
    return Gradients([params_of(grads)]).layout


@pytest.mark.parametrize("make", CHANGED.values(), ids=CHANGED)
def test_layout_is_not_that_of_other_tensors(make):
    grads = grads_of(3, 8)
    known = layout(grads)
    assert known.sort(grads_of(3, 8, seed=1))
    assert known.sort([grads[0], make(), grads[2]]) is None
    assert known.sort([grads[0], None, grads[2]]) is None


def test_layout_counts_a_tensor_once():
    grads = grads_of(3, 8)
    assert layout(grads).sort([grads[0], grads[1], grads[1]]) is None


MIXED = {
    "float32": lambda number: torch.full((40,), 1.0 + number),
    "float64": lambda number: torch.full((30,), 2.0 + number, dtype=torch.float64),
    "half": lambda number: torch.full((20,), 3.0 + number, dtype=torch.bfloat16),
    "large": lambda number: torch.full((2**18 + 1,), 1e-3 * (4.0 + number)),
}


def test_gradients_of_several_kinds_are_sorted_at_once(monkeypatch):
    params = params_of([make(0) for make in [*MIXED.values()] * 2])
    clip = AutoClip(params, 0.0, scope="parameter")
    for history in clip.histories.values():
        history.push(1.0)
    clip.step()
    monkeypatch.setattr(Gradients, "_sort", lambda *_: pytest.fail("one tensor after the other"))
    for number in range(1, 4):
        grads = [make(number) for make in [*MIXED.values()] * 2]
        norms = [norm_of([grad]) for grad in grads]
        given(params, grads)
        steps = list(clip.step().values())
        assert [step.norm for step in steps] == pytest.approx(norms, rel=1e-4)
        assert [norm_of([param.grad]) for param in params] == pytest.approx([1.0] * 8, rel=1e-2)


# Torch has no norm of the others, or cannot scale them.
@pytest.mark.parametrize("kind", sorted(LEFT_TO_TORCH.keys() - {"functional", "meta", "zero"}))
def test_one_gradient_that_is_another_in_each_step_is_measured_as_what_it_is(kind):
    params = params_of(grads_of(3, 8))
    clip = AutoClip(params)
    for number in range(4):
        odd = LEFT_TO_TORCH[kind]() if number % 2 else torch.randn(8)
        grads = grads_of(3, 8, seed=number)
        given(params, [grads[0], None, grads[2]])
        params[1].data = torch.zeros(odd.shape, dtype=odd.dtype)
        params[1].grad = odd
        expected = norm_of([grads[0], grads[2], odd.to_dense()])
        assert clip.step().norm == pytest.approx(expected, rel=1e-2 if kind == "half" else 1e-6)


@pytest.mark.parametrize("make", [lambda: torch.randn(6, dtype=torch.complex64), lambda: torch.randn(3, 2).to_sparse()])
def test_gradients_of_which_something_else_is_taken_are_measured_in_each_step(make):
    grad = make()
    param = nn.Parameter(torch.zeros(grad.shape, dtype=grad.dtype))
    clip = AutoClip([param])
    for _ in range(3):
        param.grad = make()
        expected = param.grad.to_dense().abs().double().norm().item()
        assert clip.step().norm == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("graph_is_made", [False, True])
def test_gradient_with_a_graph_keeps_it_after_others(graph_is_made):
    (param,) = params = params_of(grads_of(1, 8))
    clip = AutoClip(params, 0.0)
    with torch.set_grad_enabled(graph_is_made):
        clip.step()
    weight = torch.ones(8, requires_grad=True)
    param.grad = weight * 1e3
    with torch.set_grad_enabled(graph_is_made):
        step = clip.step()
    assert step.clipped
    param.grad.sum().backward()
    assert weight.grad == pytest.approx(torch.full((8,), 1e3 * step.scale))


def test_gradients_belong_to_the_groups_of_today():
    params = params_of(grads_of(3, 8))
    optimizer = torch.optim.SGD([{"params": params[:2]}, {"params": params[2:]}], lr=0.1)
    clip = AutoClip(optimizer, scope="group")
    clip.step()
    grads = grads_of(3, 8, seed=1)
    given(params, grads)
    optimizer.param_groups[1]["params"].insert(0, optimizer.param_groups[0]["params"].pop())
    norms = [step.norm for step in clip.step().values()]
    assert norms == pytest.approx([norm_of(grads[:1]), norm_of(grads[1:])])


def test_without_the_names_that_torch_does_not_promise_steps_are_the_same(monkeypatch):
    def steps():
        params = params_of(grads_of(4, 30))
        clip = AutoClip(params, 50.0)
        for seed in range(5):
            given(params, grads_of(4, 30, seed=seed))
            step = clip.step()
            yield step.norm, step.scale, params[3].grad.sum().item()

    expected = [pytest.approx(step, rel=1e-5) for step in steps()]
    monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    assert list(steps()) == expected
    monkeypatch.delattr(torch._C, "_len_torch_dispatch_stack")
    assert not kernel.is_usable()
    assert list(steps()) == expected


def test_gradients_of_other_parameters_than_before_are_not_mistaken():
    params = params_of(grads_of(3, 10))
    clip = AutoClip(params, scope="parameter")
    for number, given_ones in enumerate([(0, 1, 2), (0, 1), (1, 2), (0, 1, 2), (2,)]):
        grads = grads_of(3, 10, seed=number)
        given(params, [grad if at in given_ones else None for at, grad in enumerate(grads)])
        expected = {str(at): pytest.approx(norm_of([grads[at]]), rel=1e-12) for at in given_ones}
        assert {name: step.norm for name, step in clip.step().items()} == expected


def test_copy_and_pickle_after_steps_go_on():
    params = params_of(grads_of(3, 10))
    clip = AutoClip(params)
    clip.step()
    for copied in (copy.deepcopy(clip), pickle.loads(pickle.dumps(clip))):
        assert copied.steps == 1
        assert copied.threshold == clip.threshold


def test_kernel_does_nothing_under_a_transform_or_a_mode():
    seen = []

    def loss(weight):
        seen.append((kernel.is_usable(), kernel.takes(weight * 2)))
        return weight.sum()

    torch.func.grad(loss)(torch.randn(3))
    torch.vmap(loss)(torch.randn(2, 3))
    assert seen == [(False, False), (False, False)]

    class Watching(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    with Watching():
        assert not kernel.is_usable()
    assert kernel.is_usable()


@pytest.mark.parametrize("at", range(5))
def test_gradient_that_is_written_behind_torchs_back_is_new_wherever_it_is(at):
    params = params_of(grads_of(5, 70))
    clip = AutoClip(params)
    clip.step()
    clip.step()
    assert clip.steps == 1
    params[at].grad.data.neg_()  # as long as before
    clip.step()
    assert clip.steps == 2


def test_gradient_with_other_memory_than_a_step_before_is_measured_anew():
    grad = torch.ones(4)
    clip = AutoClip(params_of([grad]))
    assert clip.step().norm == 2.0
    grad.data = torch.full((9,), 2.0)
    assert clip.step().norm == 6.0
    grad.resize_(4)
    grad.fill_(5.0)
    assert clip.step().norm == 10.0


@pytest.fixture
def fingerprinted(monkeypatch):
    """The addresses, and the bytes per element, of each call of the kernel that finds a fingerprint."""
    made, functions = [], kernel._functions()

    def fingerprint(addresses, sizes, count, width):
        # Not called where somebody may have taken the memory away: it would crash.
        found = [[*(ctypes.c_uint64 * count).from_address(numbers)] for numbers in (addresses, sizes)]
        made.append([(*tensor, width) for tensor in zip(*found, strict=True)])
        return len(made)

    names = ("tensors_measure", "tensors_scale")
    kept = {name: getattr(functions, name) for name in names}
    monkeypatch.setattr(kernel, "_functions", lambda: SimpleNamespace(**kept, tensors_fingerprint=fingerprint))
    return made


def centralize(grad):
    grad.data = grad.data - grad.data.mean()


def lengthen(grad):
    grad.data = grad.data.repeat(2)


def shorten(grad):
    grad.data = grad.data[:3].clone()


def widen(grad):
    grad.data = grad.data.double()


def narrow(grad):
    grad.data = grad.data.float()


def stretch(grad):
    grad.data = torch.zeros(30)[::2]


def take_memory(grad):
    grad.untyped_storage().resize_(0)


def attached_to(change, grads, **options):
    """Return an AutoClip of an optimizer whose step does this to the gradients, and the optimizer."""

    class Changes(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for param in self.param_groups[0]["params"]:
                change(param.grad)

    optimizer = Changes(params_of(grads), lr=0.0)
    return attach(optimizer, **options), optimizer


@pytest.mark.parametrize("guarded", [True, False])
@pytest.mark.parametrize(
    ("change", "is_known"),
    [
        (centralize, True),
        (lambda grad: grad.mul_(2.0), True),
        (lengthen, False),
        (shorten, False),
        (widen, False),
        (stretch, False),
        (take_memory, False),
    ],
    ids=["centralize", "write", "lengthen", "shorten", "widen", "stretch", "take memory"],
)
def test_memory_is_read_where_it_is_after_a_step_that_moves_it(change, is_known, guarded, fingerprinted, monkeypatch):
    if not guarded:
        monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    grads = grads_of(3, 15)
    clip, optimizer = attached_to(change, grads)
    optimizer.step()
    assert fingerprinted == ([[(grad.data_ptr(), 15, 4) for grad in grads]] if is_known else [])
    assert clip.steps == 1


@pytest.mark.parametrize("guarded", [True, False])
def test_narrower_numbers_are_not_read_past_their_end(guarded, fingerprinted, monkeypatch):
    if not guarded:
        monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    _, optimizer = attached_to(narrow, grads_of(3, 15, torch.float64))
    optimizer.step()
    assert fingerprinted == []


class Hooked(torch.optim.SGD):
    def _init_group(self, group, *rest):
        for param in group["params"]:
            take_memory(param.grad)
            param.grad = None
        return super()._init_group(group, *rest)


@pytest.mark.parametrize("change", [lengthen, shorten, take_memory])
@pytest.mark.parametrize("by", ["hook of before", "hook", "hook that goes", "hook behind", "part of a step"])
def test_memory_is_not_read_where_it_was_after_code_of_others(by, change, fingerprinted):
    params = params_of(grads_of(3, 15))
    optimizer = (Hooked if by == "part of a step" else torch.optim.SGD)(params, lr=0.0)

    def hook(*_):
        for param in params:
            change(param.grad)
            param.grad = None  # which no optimizer reads then
        if by == "hook that goes":
            handle.remove()

    if by == "hook of before":
        optimizer.register_step_post_hook(hook)
    clip = attach(optimizer)
    if by in {"hook", "hook that goes"}:
        handle = optimizer.register_step_pre_hook(hook)
    elif by == "hook behind":
        optimizer.register_step_post_hook(hook)
    optimizer.step()
    assert fingerprinted == [] or by == "hook behind"
    assert clip.steps == 1


def test_gradients_that_a_step_moves_are_known_again_in_the_next_one():
    clip, optimizer = attached_to(centralize, [torch.tensor([1.0, -1.0]), torch.tensor([2.0, -2.0])])
    for _ in range(3):
        optimizer.step()
    assert clip.steps == 1


@pytest.mark.parametrize("mode", ["immediate", "deferred"])
@pytest.mark.parametrize("size", [10, 2**18 + 1])
def test_gradients_whose_memory_a_step_gives_back_are_new_when_they_return(size, mode):
    grad = torch.ones(size)
    clip, optimizer = attached_to(take_memory, [grad], mode=mode)
    for number in range(1, 4):
        optimizer.step()
        assert clip.steps == number
        grad.untyped_storage().resize_(4 * size)
        grad.data.fill_(1.0)


def test_without_the_kernel_torch_does_the_work(monkeypatch, calls):
    monkeypatch.setattr(kernel, "_functions", lambda: None)
    grads = grads_of(4, 30)
    before = [grad.clone() for grad in grads]
    clip = AutoClip(params_of(grads), 50.0)
    clip.history.extend([1e-3] * 3)
    step = clip.step()
    assert step.norm == pytest.approx(norm_of(before), rel=1e-6)
    assert all(torch.equal(grad, was * torch.tensor(step.scale)) for grad, was in zip(grads, before, strict=True))
    assert calls == []
