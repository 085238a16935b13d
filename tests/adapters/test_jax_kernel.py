"""The handlers of the kernel in XLA: their binary interface, what programs call, and what there is without them."""

import ctypes
import pickle
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from autoclip_jax import autoclip, kernel
from jax import export
from jax.experimental import serialize_executable

from autoclip_core import BackendError, NormHistory, kernel_library

ROOT = Path(__file__).resolve().parent.parent.parent

# Ours, theirs, and each field used, by both names.
LAYOUT = {
    ("xla_extension", "XLA_FFI_Extension_Base"): "struct_size:struct_size type:type next:next",
    ("xla_version", "XLA_FFI_Api_Version"): "extensions:extension_start major:major_version minor:minor_version",
    ("xla_metadata", "XLA_FFI_Metadata"): "struct_size:struct_size version:api_version traits:traits",
    ("xla_metadata_extension", "XLA_FFI_Metadata_Extension"): "extension:extension_base metadata:metadata",
    ("xla_error_arguments", "XLA_FFI_Error_Create_Args"): "extensions:extension_start message:message code:errc",
    ("xla_api", "XLA_FFI_Api"): "version:api_version internal:internal_api create_error:XLA_FFI_Error_Create",
    ("xla_buffer", "XLA_FFI_Buffer"): "type:dtype data:data rank:rank sizes:dims",
    ("xla_buffers", "XLA_FFI_Args"): "count:size kinds:types buffers:args",
    ("xla_buffers ", "XLA_FFI_Rets"): "count:size kinds:types buffers:rets",
    ("xla_scalar", "XLA_FFI_Scalar"): "type:dtype value:value",
    ("xla_attributes", "XLA_FFI_Attrs"): "count:size kinds:types names:names values:attrs",
    ("xla_call", "XLA_FFI_CallFrame"): (
        "extensions:extension_start api:api context:ctx stage:stage operands:args results:rets attributes:attrs"
    ),
}
# They may grow at their ends.
LONGER_THERE = {"xla_api", "xla_call", "xla_metadata"}
NUMBERS = {
    "XLA_MAJOR": "XLA_FFI_API_MAJOR",
    "XLA_EXTENSION_METADATA": "XLA_FFI_Extension_Metadata",
    "XLA_INVALID_ARGUMENT": "XLA_FFI_Error_Code_INVALID_ARGUMENT",
    "XLA_FAILED_PRECONDITION": "XLA_FFI_Error_Code_FAILED_PRECONDITION",
    "XLA_S32": "XLA_FFI_DataType_S32",
    "XLA_S64": "XLA_FFI_DataType_S64",
    "XLA_F32": "XLA_FFI_DataType_F32",
    "XLA_F64": "XLA_FFI_DataType_F64",
    "XLA_SCALAR_ATTRIBUTE": "XLA_FFI_AttrType_SCALAR",
}


def interface_checks():
    for (own, theirs), fields in LAYOUT.items():
        relation = "<=" if own in LONGER_THERE else "=="
        yield f"sizeof({own}) {relation} sizeof({theirs})"
        for own_field, field in (pair.split(":") for pair in fields.split()):
            yield f"offsetof({own}, {own_field}) == offsetof({theirs}, {field})"
            yield f"sizeof((({own} *)0)->{own_field}) == sizeof((({theirs} *)0)->{field}) || {int(own in LONGER_THERE)}"
    for number, value in NUMBERS.items():
        yield f"(int){number} == (int){value}"
    yield "XLA_MINOR <= XLA_FFI_API_MINOR"


def compile_checks(folder, checks):
    typedefs = "".join(
        f"typedef struct {theirs} {theirs};\n"
        for _, theirs in LAYOUT
        if theirs not in {"XLA_FFI_Extension_Base", "XLA_FFI_Scalar"}
    )
    code = ["#include <xla/ffi/api/c_api.h>", '#include "ffi.h"', typedefs]
    code += [f'_Static_assert({check}, "{check}");' for check in checks]
    (folder / "checks.c").write_text("\n".join(code), encoding="utf-8")
    include = [f"-I{jax.ffi.include_dir()}", f"-I{ROOT / 'csrc/xla'}"]
    command = [shutil.which("cc"), "-std=c11", "-fsyntax-only", *include, "checks.c"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_interface_is_that_of_the_headers_of_jaxlib(tmp_path, absent):
    if shutil.which("cc") is None:
        absent("needs a C compiler")
    done = compile_checks(tmp_path, interface_checks())
    assert done.returncode == 0, done.stderr
    assert (
        compile_checks(tmp_path, ["offsetof(xla_call, results) == offsetof(XLA_FFI_CallFrame, args)"]).returncode != 0
    )


# What programs call.


def lowered(tx, platform):
    params = {"w": jnp.ones(3)}
    state = jax.eval_shape(tx.init, params)
    return jax.jit(tx.update).trace(params, state, params).lower(lowering_platforms=(platform,)).as_text()


recent_jax = pytest.mark.skipif(
    jax.__version_info__ < (0, 7), reason="what is for other platforms stays in the text until XLA removes it"
)


@recent_jax
@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
@pytest.mark.parametrize("percentile", [10.0, "scheduled"])
def test_window_needs_no_host_on_any_platform(platform, percentile):
    if percentile == "scheduled":
        tx = optax.inject_hyperparams(autoclip, static_args="window")(percentile=optax.linear_schedule(50.0, 10.0, 9))
    else:
        tx = autoclip(percentile)
    text = lowered(optax.chain(tx, optax.adam(1e-3)), platform)
    assert "callback" not in text
    assert text.count("autoclip_xla_window(") == (platform == "cpu")
    assert text.count("custom_call") == (platform == "cpu")


@recent_jax
@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_tree_is_for_the_cpu_and_says_so_elsewhere(platform):
    text = lowered(autoclip(history=NormHistory()), platform)
    assert "callback" not in text
    assert text.count("autoclip_xla_tree") == (platform == "cpu")
    assert ("is for the CPU only; on this device leave it out" in text) == (platform != "cpu")


def test_target_that_no_device_has_is_named_by_the_error(monkeypatch):
    # On a device other than the CPU XLA looks for this target, and says which one it lacks.
    monkeypatch.setattr(kernel, "_TREE", kernel._NO_TREE)
    tx = autoclip(history=NormHistory())
    with pytest.raises(jax.errors.JaxRuntimeError, match="is for the CPU only"):
        jax.jit(tx.update)(jnp.ones(1), tx.init(jnp.ones(1)))


# The handlers by themselves.


def window_call(ascending, ring, recorded_steps, norm, percentile, **options):
    assert kernel.backend() == "native"
    arguments = (
        jnp.asarray([ascending, ring], jnp.float32),
        jnp.int32(recorded_steps),
        jnp.float32(norm),
        jnp.atleast_1d(jnp.asarray(percentile, jnp.float32)),
    )
    shapes = tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (arguments[0], arguments[2]))
    norms, threshold = jax.jit(jax.ffi.ffi_call("autoclip_xla_window", shapes, **options))(*arguments)
    return *norms, threshold


def test_handler_works_beside_its_operands_too():
    ascending, ring, threshold = window_call([1, 3, 5], [5, 1, 3], 6, 2, 50)
    assert (ascending.tolist(), ring.tolist(), threshold) == ([1, 2, 3], [2, 1, 3], 2)


def test_handler_stays_inside_arrays_that_are_no_window():
    for ascending, ring, recorded_steps in (
        ([1, 2, 3], [9, 9, 9], 3),
        ([3, 2, 1], [np.nan] * 3, 2**31 - 1),
        ([np.nan] * 3, [0, 0, 0], -1),
        ([np.inf] * 3, [np.inf] * 3, 3),
    ):
        for norm in (0.5, 2.5, 100):
            after, _, _ = window_call(ascending, ring, recorded_steps, norm, 50)
            assert norm in after.tolist()


@pytest.mark.parametrize("percentile", [np.nan, -1, 101, [60, 60]])
def test_handler_refuses_what_is_no_percentile(percentile):
    with pytest.raises(jax.errors.JaxRuntimeError, match="from 0 to 100"):
        jax.block_until_ready(window_call([1], [1], 1, 1, percentile))


def test_handlers_refuse_calls_that_are_not_theirs():
    shape = jax.ShapeDtypeStruct((1,), jnp.float32)
    for target in ("autoclip_xla_window", "autoclip_xla_tree"):
        for results, operands in ((1, 0), (2, 4), (3, 4), (2, 5)):
            with pytest.raises(jax.errors.JaxRuntimeError, match=f"{target}: bad call"):
                jax.block_until_ready(jax.jit(jax.ffi.ffi_call(target, (shape,) * results))(*[jnp.ones(1)] * operands))
    with pytest.raises(jax.errors.JaxRuntimeError, match="bad call"):
        window_call([], [], 1, 1, 50)


# In another process.


def test_saved_programs_run_in_a_process_that_has_registered_the_kernel(run_python, tmp_path):
    grad = jnp.ones(1)
    for home in ("window", "tree"):
        tx = autoclip(50.0, **({"history": NormHistory()} if home == "tree" else {"window": 8}))
        leaves, structure = jax.tree.flatten(tx.init(grad))

        def step(grad, *leaves, tx=tx, structure=structure):
            _, state = tx.update(grad, jax.tree.unflatten(structure, leaves))
            return state.clip_threshold, *jax.tree.leaves(state)

        compiled = jax.jit(step).lower(grad, *leaves).compile()
        (tmp_path / f"{home}.compiled").write_bytes(pickle.dumps(serialize_executable.serialize(compiled)))
        # Before JAX 0.7 what other devices have instead of the tree is in the program too.
        targets = f"autoclip_xla_{home}", kernel._NO_TREE
        allowed = [export.DisabledSafetyCheck.custom_call(target) for target in targets]
        exported = export.export(jax.jit(step), disabled_checks=allowed)(grad, *leaves)
        (tmp_path / f"{home}.exported").write_bytes(exported.serialize())
        np.savez(tmp_path / f"{home}.npz", *leaves)
    code = """
import pickle
from pathlib import Path
import autoclip_jax
assert autoclip_jax.backend() == "native"
import jax.numpy as jnp, numpy as np
from jax import export
from jax.experimental import serialize_executable
for home in ("window", "tree"):
    for program in (
        serialize_executable.deserialize_and_load(*pickle.loads(Path(f"{home}.compiled").read_bytes())),
        export.deserialize(bytearray(Path(f"{home}.exported").read_bytes())).call,
    ):
        leaves, found = [jnp.asarray(leaf) for leaf in np.load(f"{home}.npz").values()], []
        try:
            for norm in (3.0, 6.0, 1.0):
                threshold, *leaves = program(jnp.array([norm]), *leaves)
                found.append(float(threshold))
            print(found)
        except Exception as error:
            print("no history with this id" in str(error))
"""
    assert run_python(code) == "[3.0, 4.5, 3.0]\n[3.0, 4.5, 3.0]\nTrue\nTrue\n"


# Without the handlers.


def fail(error):
    def failing(*_):
        raise error

    return failing


@pytest.mark.parametrize(
    ("module", "name", "replacement", "says"),
    [
        (jax, "devices", fail(RuntimeError("no such platform")), "no such platform"),
        (kernel, "kernel_library", fail(BackendError("not compiled")), "not compiled"),
        (ctypes, "CDLL", fail(OSError("cannot be opened")), "cannot be opened"),
        (ctypes, "CDLL", lambda path: None, "autoclip_xla_window"),
    ],
    ids=["no CPU", "no kernel", "damaged", "of an earlier release"],
)
def test_what_keeps_the_kernel_from_being_registered_is_told(module, name, replacement, says, monkeypatch):
    monkeypatch.setattr(module, name, replacement)
    assert says in kernel._register.__wrapped__()


def test_without_the_kernel_jax_numpy_does_it(run_python, other_backend):
    code = """
import jax.numpy as jnp
from autoclip_jax import autoclip, backend
tx = autoclip(50.0)
state = tx.init(jnp.ones(1))
for norm in (1.0, 2.0):
    _, state = tx.update(jnp.array([norm]), state)
print(backend(), state.clip_threshold)
"""
    assert run_python(code, AUTOCLIP_BACKEND="numba") == "jax.numpy 1.5\n"
    assert run_python(code, AUTOCLIP_BACKEND="native") == "native 1.5\n"


def test_import_and_construction_leave_the_devices_alone(run_python):
    code = """
import autoclip_jax, jax
autoclip_jax.autoclip()
import jax._src.xla_bridge as bridge
print(bridge.backends_are_initialized())
"""
    assert run_python(code) == "False\n"


def test_library_is_found_by_whoever_opens_it():
    history = NormHistory(backend="native")
    library = ctypes.CDLL(kernel_library())
    assert library.autoclip_shared_push(ctypes.c_uint64(history.shared_id), ctypes.c_double(2.5)) == 0
    assert history.values().tolist() == [2.5]
