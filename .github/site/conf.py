"""The site: the pages where they stand, and a reference made of docstrings and of the C header.

Sphinx with MyST, because it takes the root of the repository as its source: a relative link or an anchor that works in
the repository works in the site, and one that does not is a warning, which `make docs` makes an error. (MkDocs wants
all pages below one folder.)
"""

import re
from importlib.metadata import version as version_of
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer

project = "autoclip-core"
author = copyright = "The autoclip-core developers"  # noqa: A001 - Sphinx's name
release = version = version_of("autoclip-core")

root_doc = "README"
include_patterns = [
    *("README.md", "CHANGELOG.md", "autoclip_core/README.md", "adapters/**.md"),
    *("csrc/README.md", "bench/**.md", "tests/RELIABILITY.md", ".github/*.md", ".github/site/*.md"),
]
exclude_patterns = [".venv", "build", "dist", "demo-output"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.githubpages"]
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # a page that begins with a heading of another level
default_role = "code"  # docstrings have single backticks, as Markdown has
napoleon_use_ivar = True
napoleon_attr_annotations = False
autodoc_member_order = "bysource"
autodoc_mock_imports = ["fastai", "skorch", "stable_baselines3"]  # `make docs` installs none of them
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = c_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
add_module_names = False

html_theme = "furo"
pygments_dark_style = "github-dark"
smartquotes_action = "De"  # dashes and ellipses; quotes stay as in code
html_title = f"autoclip-core {release}"
html_copy_source = False
html_static_path: list[str] = []
templates_path = ["templates"]
html_additional_pages = {"index": "index.html"}

_HEADER = Path(__file__).parents[2] / "csrc/include/autoclip.h"

# What the repository shows as folders.
_PARTS: dict[str, dict[str, list[str]]] = {
    "README": {
        "Use it": [
            "bench/tutorial/README",
            *(f"adapters/autoclip_{framework}/README" for framework in ("torch", "jax", "tensorflow")),
            *("autoclip_core/README", "adapters/README", "adapters/TRAINERS", "csrc/README"),
        ],
        "Reference": [
            *(f".github/site/autoclip_{package}" for package in ("torch", "jax", "tensorflow", "core")),
            *(".github/site/c", "CHANGELOG"),
        ],
        "Trust it, work on it": ["bench/README", "tests/RELIABILITY", ".github/*"],
    },
    "bench/README": {"Results": ["separation/README", "results/*/*"]},
}


def add_contents(app: Sphinx, docname: str, source: list[str]) -> None:
    """Give a page the list of those below it, and the C reference its header."""
    if docname == ".github/site/c":
        app.env.note_dependency(str(_HEADER))
        source[0] += markdown_of(_HEADER.read_text(encoding="utf-8"))
    for caption, pages in _PARTS.get(docname, {}).items():
        source[0] += f"\n```{{toctree}}\n:hidden:\n:glob:\n:caption: {caption}\n\n" + "\n".join(pages) + "\n```\n"


def name_the_class(
    app: Sphinx, what: str, name: str, found: object, options: object, signature: str | None, returned: str | None
) -> tuple[str | None, ...]:
    """Tell classes of one name apart: each package means its own AutoClip, and all mean one ClipStep."""
    places = {"AutoClip": f"{name.partition('.')[0]}.AutoClip", "ClipStep": "autoclip_core.ClipStep"}
    return tuple(
        text and re.sub(r"(?<!\.)\b(AutoClip|ClipStep)\b", lambda found: places[found[0]], text)
        for text in (signature, returned)
    )


def markdown_of(header: str) -> str:
    """Return a C header as Markdown: a blank line ends a declaration, and a comment between dashes is a heading."""
    first, *blocks = re.split(r"\n(?:[ \t]*\n)+", header[: header.index("/* [end of declarations] */")])
    first, _, _ = first.partition(" * SPDX")
    parts = [_text_of(first), "## Versions and types"]
    for block in blocks:
        comment, code = re.fullmatch(r"(/\*.*?\*/)?\s*(.*)", block, re.DOTALL).groups("")
        text = _text_of(comment)
        if heading := re.fullmatch(r"-+ (.*?) -+", text):
            parts.append(f"## {heading[1]}")
            continue
        functions = re.findall(r"^\w[^;{}]*\([^;{}]*\)(?=;)", code, re.MULTILINE)
        others = re.findall(r"^#define (\w+) \d", code, re.MULTILINE) or re.findall(
            r"^typedef (?:[^{;]*|.*?\n\}) (\w+);$", code, re.MULTILINE | re.DOTALL
        )
        if others:
            kind = "c:macro" if code.startswith("#") else "c:type"
            parts += [f"```{{{kind}}} {name}\n```" for name in others]
            parts.append(f"{text}\n\n```c\n{code}\n```")
        elif len(functions) == 1:
            parts.append(f"```{{c:function}} {' '.join(functions[0].split())}\n\n{text}\n```")
        elif functions or (not code and not text.startswith("[")):
            parts.append(text)
            parts += [f"```{{c:function}} {' '.join(function.split())}\n```" for function in functions]
    return "\n\n".join(parts)


def _text_of(comment: str) -> str:
    lines = comment.removeprefix("/*").removesuffix("*/").strip().splitlines()
    return "\n".join(line.removeprefix(" *").removeprefix(" ") for line in lines).replace("_*", "_\\*")


def setup(app: Sphinx) -> None:
    """Register what this file adds to Sphinx."""
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-signature", name_the_class)
    # A reader wants the one signature that has the defaults.
    ModuleAnalyzer.overloads = property(lambda _: {}, lambda *_: None)  # type: ignore[assignment]
