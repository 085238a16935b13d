"""Every public name is shown to type checkers as a user writes it, and stands in the reference."""

import ast
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = (
    *("autoclip_core", "autoclip_core.arrays", "autoclip_core.plot", "autoclip_core.replay"),
    *("autoclip_torch", "autoclip_torch.deepspeed", "autoclip_torch.lightning", "autoclip_torch.transformers"),
    *("autoclip_torch.fastai", "autoclip_torch.skorch", "autoclip_torch.stable_baselines3"),
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


def test_pyright_finds_nothing_in_a_users_program(tmp_path):
    """mypy reads the same file in `make static`. Here the packages are the installed ones, as an editor sees them."""
    shutil.copy(ROOT / "tests/programs/typed.py", tmp_path)
    settings = {"typeCheckingMode": "strict", "reportMissingTypeStubs": False}  # optax has none
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
    command = [sys.executable, "-P", "-m", "basedpyright", "--pythonpath", sys.executable, "--outputjson"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600)
    found = json.loads(done.stdout)
    assert found["summary"]["filesAnalyzed"] == 1
    assert [f"{one['range']['start']['line'] + 1}: {one['message']}" for one in found["generalDiagnostics"]] == []


# The site.


class Page(HTMLParser):
    """The ids of a page, and what it refers to."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.targets = set(), set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name == "id":
                self.ids.add(value)
            elif name in {"href", "src"}:
                self.targets.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Every page of the site by its path; a warning is an error."""
    folder = tmp_path_factory.mktemp("site").resolve()
    options = ["-q", "--fail-on-warning", "--keep-going", "-c", ".github/site", "-d", folder / "doctrees"]
    command = [sys.executable, "-P", "-m", "sphinx", *options, ".", folder / "site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return {path: Page(path) for path in sorted((folder / "site").rglob("*.html"))}


def test_each_link_of_the_site_leads_somewhere(site):
    checked = 0
    for path, page in site.items():
        for target in page.targets:
            scheme, host, name, _, _, fragment = urlparse(target)
            if scheme or host or (not name and not fragment):
                continue
            file = path.parent.joinpath(unquote(name)).resolve() if name else path
            assert file.is_file(), f"{path.name} refers to {target}"
            if file in site and fragment:
                assert unquote(fragment) in site[file].ids, f"{path.name} refers to {target}"
            checked += 1
    assert checked > 1000


def test_site_has_each_page_of_the_repository(site):
    [root] = {path.parent for path in site if path.name == "genindex.html"}
    patterns = ("README.md", "[a-z]*/README.md", "[a-z]*/*/README.md", "tests/*.md", ".github/*.md", "CHANGELOG.md")
    pages = [path for pattern in patterns for path in ROOT.glob(pattern)]
    assert len(pages) > 10
    assert [page for page in pages if root / page.relative_to(ROOT).with_suffix(".html") not in site] == []


@pytest.mark.parametrize("module", MODULES)
def test_reference_has_each_name(site, module):
    ids = set().union(*(page.ids for page in site.values()))
    names = {f"{module}.{name}" for name in names_of(module)}
    assert {name for name in names if not {name, f"module-{name}"} & ids} == set()


def test_reference_has_each_name_of_the_header(site):
    ids = set().union(*(page.ids for page in site.values()))
    header = (ROOT / "csrc/include/autoclip.h").read_text(encoding="utf-8")
    names = {*re.findall(r"\b(autoclip_\w+)\(", header), *re.findall(r"^#define (AUTOCLIP_\w+) ", header, re.MULTILINE)}
    assert len(names) > 40
    assert {name for name in names if f"c.{name}" not in ids} == set()
