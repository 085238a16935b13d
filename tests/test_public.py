"""Every public name is shown to type checkers as a user writes it, and stands in the reference."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = (
    *("autoclip_core", "autoclip_core.arrays", "autoclip_core.plot", "autoclip_core.replay"),
    *("autoclip_torch", "autoclip_torch.deepspeed", "autoclip_torch.lightning", "autoclip_torch.transformers"),
    *("autoclip_jax", "autoclip_tensorflow"),
)
CLASSES = ("autoclip_core/history.py", "autoclip_core/clip.py", "adapters/autoclip_torch/clip.py")


def tree_of(path):
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def path_of(module):
    place = ROOT / ("" if module.startswith("autoclip_core") else "adapters") / module.replace(".", "/")
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


def names_of(module):
    [names] = [
        ast.literal_eval(node.value)
        for node in tree_of(path_of(module)).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    return names


def members_of(path):
    """The public methods and properties of the classes of a file."""
    classes = (node for node in tree_of(path).body if isinstance(node, ast.ClassDef))
    nodes = (node for found in classes if found.name in {"AutoClip", "NormHistory"} for node in found.body)
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")}


def words_of(path):
    nodes = list(ast.walk(tree_of(path)))
    return {
        *(node.id for node in nodes if isinstance(node, ast.Name)),
        *(node.attr for node in nodes if isinstance(node, ast.Attribute)),
    }


@pytest.mark.parametrize("module", MODULES)
def test_type_checkers_see_each_name_as_a_user_writes_it(module):
    assert set(names_of(module)) - words_of("tests/programs/typed.py") == set()


@pytest.mark.parametrize("path", CLASSES)
def test_type_checkers_see_each_method_as_a_user_writes_it(path):
    members = members_of(path)
    assert len(members) > 5
    assert members - words_of("tests/programs/typed.py") == set()
