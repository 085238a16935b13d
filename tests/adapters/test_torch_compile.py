"""AutoClip beside and inside what torch.compile compiles: no error, no compilation per step, the run of eager PyTorch.

The graph ends where AutoClip reads norms on the host, and goes on behind it.
"""

import threading
import warnings

import numpy as np
import pytest
import torch
from autoclip_torch import AutoClip, attach
from torch import nn

WARMING_UP, STEPS = 8, 16
OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "adamw-fused": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
}


@pytest.fixture(autouse=True)
def quiet_compiler():
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch")  # what PyTorch says about PyTorch
        yield
    torch.compiler.reset()


def batch_of(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 5, generator=generator) * float(torch.rand((), generator=generator).exp())


def run(compiled, backend, optimizer, mode, by, *, scope="global"):
    """Train with one thing compiled; return the norms, the parameters, and the decisions where they are returned."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    clip = (attach if by == "attach" else AutoClip)(optimizer, 40.0, mode=mode, scope=scope)

    def compile_if(name, function):
        return torch.compile(function, backend=backend) if compiled == name else function

    net = compile_if("model", model)

    def update():
        step = clip.step() if by == "step" else None
        optimizer.step()
        return step

    update = compile_if("optimizer", update)

    def train(inputs):
        optimizer.zero_grad()
        (net(inputs) - 3.0).square().mean().backward()
        return update()

    train = compile_if("train", train)
    decided = []
    for step in range(STEPS):
        # By then there has been everything that there is.
        with torch.compiler.set_stance("fail_on_recompile" if step >= WARMING_UP else "default"):
            decided.append(train(batch_of(step)))
    return [history.values() for history in clip.histories.values()], list(model.parameters()), decided, clip


def assert_same_run(compiled, eager):
    norms, params, decided, clip = compiled
    for values, others in zip(norms, eager[0], strict=True):
        np.testing.assert_allclose(values, others, rtol=1e-4)
    for param, other in zip(params, eager[1], strict=True):
        torch.testing.assert_close(param, other, rtol=1e-4, atol=1e-5)
    for step, other in zip(decided, eager[2], strict=True):
        if step is not None and other is not None:
            assert [float(field) for field in step] == pytest.approx([float(field) for field in other], rel=1e-4)
    assert clip.steps == STEPS
    assert 0 < clip.clipped_steps < STEPS


@pytest.mark.parametrize("by", ["attach", "step"])
@pytest.mark.parametrize("mode", ["immediate", "deferred"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("compiled", ["model", "optimizer", "train"])
def test_compiled_run_is_that_of_eager_pytorch(compiled, optimizer, mode, by):
    how = (optimizer, mode, by)
    assert_same_run(run(compiled, "aot_eager", *how), run("nothing", None, *how))


@pytest.mark.parametrize("scope", ["group", "parameter"])
def test_compiled_run_may_have_scopes(scope):
    how = ("sgd", "immediate", "attach")
    compiled, eager = run("train", "aot_eager", *how, scope=scope), run("nothing", None, *how, scope=scope)
    for values, others in zip(compiled[0], eager[0], strict=True):
        np.testing.assert_allclose(values, others, rtol=1e-4)


def test_compiled_run_may_be_that_of_inductor():
    how = ("sgd", "immediate", "attach")
    assert_same_run(run("train", "inductor", *how), run("nothing", None, *how))


def test_another_thread_may_compile_meanwhile():
    started, done = threading.Event(), threading.Event()

    def slow_backend(graph, inputs):
        started.set()
        done.wait(30)
        return graph.forward

    thread = threading.Thread(target=lambda: torch.compile(lambda x: x * 2, backend=slow_backend)(torch.ones(3)))
    thread.start()
    try:
        assert started.wait(60)
        assert_same_run(
            run("nothing", None, "sgd", "immediate", "step"), run("nothing", None, "sgd", "immediate", "attach")
        )
    finally:
        done.set()
        thread.join()
