"""Small faults put into the kernel and the core, one at a time: the tests must notice.

    python -P tests/mutation.py --count 220

A mutant is a changed operator or constant, a swapped condition, a statement left out. Those of the kernel are judged by
the C tests with tiny nodes under ASan and UBSan, those of the core by the tests that know the file, in a copy of the
installed package. The same seed gives the same mutants of the same sources.
"""

import argparse
import ast
import io
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tokenize
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
KERNEL = ROOT / "csrc/src"
CORE = ROOT / "autoclip_core"

# The tests that know a file of the core, fast ones first; then all that are fast.
KNOWN_BY = {
    "_backend.py": "test_backend",
    "_native.py": "test_history test_bad_input",
    "_numba.py": "test_history test_percentile test_snapshot",
    "__main__.py": "test_command_line",
    "arrays.py": "test_arrays",
    "clip.py": "test_clip test_state test_bad_input",
    "errors.py": "test_bad_input",
    "history.py": "test_history test_bad_input",
    "replay.py": "test_replay",
}  # but plot.py: pictures are judged by looking at them
FAST = "test_model test_percentile test_snapshot test_state test_trace test_processes test_threads"
KERNEL_TESTS = ("status", "check", "snapshot", "model", "faults", "shared", "bounds")

SWAPS = {
    "<": "<=",
    "<=": "<",
    ">": ">=",
    ">=": ">",
    "==": "!=",
    "!=": "==",
    "+": "-",
    "-": "+",
    "*": "+",
    "/": "*",
    "%": "+",
    "//": "+",
    "+=": "-=",
    "-=": "+=",
    "*=": "+=",
    "&&": "||",
    "||": "&&",
    "and": "or",
    "or": "and",
    "<<": ">>",
    ">>": "<<",
    "&": "|",
    "|": "&",
    "|=": "=",
    "&=": "=",
    "++": "--",
    "True": "False",
    "False": "True",
    "true": "false",
    "false": "true",
    "break": "continue",
}


class Mutant(NamedTuple):
    file: Path
    start: int
    end: int
    text: str  # in place of source[start:end]

    def apply(self):
        source = self.file.read_text(encoding="utf-8")
        return source[: self.start] + self.text + source[self.end :]

    def __str__(self):
        source = self.file.read_text(encoding="utf-8")
        line = source.count("\n", 0, self.start) + 1
        before = source[source.rfind("\n", 0, self.start) + 1 : self.start].lstrip()
        after = source[self.end : source.find("\n", self.end)]
        old = " ".join(source[self.start : self.end].split())
        return f"{self.file.name}:{line}: {before}[{old} -> {self.text}]{after}"


# --- Making mutants ---------------------------------------------------------------------------------------------------


def number_after(text):
    """Another number: one more."""
    return text.replace(re.match(r"\d+", text)[0], str(int(re.match(r"\d+", text)[0]) + 1), 1)


def mutants_of_c(file):
    source = file.read_text(encoding="utf-8")
    hidden = re.compile(r'/\*.*?\*/|"(\\.|[^"\\\n])*"|\'(\\.|[^\'\\])*\'|^[ \t]*#.*?(?<!\\)$', re.DOTALL | re.MULTILINE)
    code = hidden.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), source)
    # A star may be a pointer's, an ampersand an address, a bracket an include: only with spaces around, as is laid out.
    for match in re.finditer(
        r"(?<= )(?:[<>=!]=|[<>]|[-+*/%|&]=?|&&|\|\||<<|>>)(?= )|\+\+|\b(?:true|false|break)\b", code
    ):
        if match[0] in SWAPS:
            yield Mutant(file, *match.span(), SWAPS[match[0]])
    for match in re.finditer(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.])", code):
        yield Mutant(file, *match.span(), number_after(match[0]))
    for match in re.finditer(r"\bif (?=\()", code):
        end, depth = match.end(), 0
        while depth > 0 or end == match.end():
            depth += (code[end] == "(") - (code[end] == ")")
            end += 1
        yield Mutant(file, match.end(), end, f"(!{source[match.end() : end]})")
    for match in re.finditer(
        r"^ +(?!return|const|static|enum|double \w|size_t|uint\w+ \w|struct|case|break|goto)[^\n;{}]*;$",
        code,
        re.MULTILINE,
    ):
        if not re.match(r" +(?:\w+ )*\w+ \*?\w+(?:\[.*\])?(?: =|;)", match[0]):  # a declaration
            yield Mutant(file, match.end() - len(match[0].lstrip()), match.end(), ";")


def mutants_of_python(file):
    source = file.read_text(encoding="utf-8")
    starts = [0, *(match.end() for match in re.finditer("\n", source))]
    tree = ast.parse(source)
    words = set()  # of annotations, which are no code
    for node in ast.walk(tree):
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            words |= {(n.lineno, n.col_offset) for n in ast.walk(part) if hasattr(n, "lineno")} if part else set()
    lines_of_types = {line for line, _ in words}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        at = starts[token.start[0] - 1] + token.start[1]
        if token.start[0] in lines_of_types:
            continue
        if token.type in (tokenize.OP, tokenize.NAME) and token.string in SWAPS:
            if token.string == "*" and source[at - 1] != " ":
                continue
            if token.string in "*/" and source[at + 1] in ",)abcdefghijklmnopqrstuvwxyz":  # of a signature
                continue
            yield Mutant(file, at, at + len(token.string), SWAPS[token.string])
        elif token.type == tokenize.NUMBER and token.string[0].isdigit():
            yield Mutant(file, at, at + len(token.string), number_after(token.string))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) != "TYPE_CHECKING":
            start = starts[node.test.lineno - 1] + node.test.col_offset
            end = starts[node.test.end_lineno - 1] + node.test.end_col_offset
            yield Mutant(file, start, end, f"not ({source[start:end]})")
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.Expr | ast.Assign | ast.AugAssign) and not docstring and node.col_offset:
            start = starts[node.lineno - 1] + node.col_offset
            yield Mutant(file, start, starts[node.end_lineno - 1] + node.end_col_offset, "pass")


def mutants(count, seed=0):
    """So many mutants: six of eleven in the kernel, four in the core, one in its Numba backend, which takes long."""
    chance = random.Random(seed)  # noqa: S311
    numba = count // 11
    core = count * 4 // 11
    pools = {
        count - core - numba: [m for file in sorted(KERNEL.glob("*.[ch]")) for m in mutants_of_c(file)],
        core: [m for name in KNOWN_BY if name != "_numba.py" for m in mutants_of_python(CORE / name)],
        numba: list(mutants_of_python(CORE / "_numba.py")),
    }
    return [mutant for size, pool in pools.items() for mutant in chance.sample(pool, size)]


# --- Judging them -----------------------------------------------------------------------------------------------------


def passes(command, timeout, **options):
    """Whether a command succeeds; whatever it started ends with it."""
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, **options
    )
    try:
        return process.wait(timeout) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
            process.wait()


class KernelCourt:
    """The C tests with tiny nodes; only what a mutant changes is compiled again."""

    FLAGS = ("-std=c11", "-O1", "-g0", "-ffp-contract=off", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    NODES = ("-DAUTOCLIP_LEAF=4", "-DAUTOCLIP_FANOUT=4", "-DAUTOCLIP_BUFFER=4")

    def __init__(self, folder):
        self.folder = folder
        shutil.copytree(KERNEL, folder / "src")
        for name in KERNEL_TESTS:
            assert self.compile(ROOT / f"tests/c/test_{name}.c", KERNEL, folder / f"test_{name}.o"), name
        self.sources = sorted((folder / "src").glob("*.c"))
        for source in self.sources:
            assert self.compile(source, folder / "src", source.with_suffix(".o")), source
        began = time.monotonic()
        assert self.judge([]), "the tests fail without a mutant"
        self.patience = 20 + 3 * (time.monotonic() - began)

    patience = 600.0

    def compile(self, source, private, made):
        headers = (f"-I{private}", f"-I{ROOT / 'csrc/include'}")
        return passes(["cc", *self.FLAGS, *self.NODES, *headers, "-c", source, "-o", made], 120)

    def judge(self, sources):
        """Whether the tests pass with these sources compiled again."""
        objects = {source: source.with_suffix(".o") for source in self.sources}
        for source in sources:
            objects[source] = self.folder / f"{source.stem}.mutant.o"
            if not self.compile(source, self.folder / "src", objects[source]):
                return None
        for name in KERNEL_TESTS:
            program = self.folder / f"test_{name}"
            link = ["cc", *self.FLAGS, self.folder / f"test_{name}.o", *objects.values(), "-pthread", "-o", program]
            if not passes(link, 120) or not passes([program], self.patience):
                return False
        return True

    def survives(self, mutant):
        changed = self.folder / "src" / mutant.file.name
        original = changed.read_text(encoding="utf-8")
        changed.write_text(mutant.apply(), encoding="utf-8")
        try:
            return self.judge([changed] if changed.suffix == ".c" else self.sources)
        finally:
            changed.write_text(original, encoding="utf-8")


class CoreCourt:
    """The Python tests on a copy of the installed core."""

    def __init__(self, folder):
        import autoclip_core

        self.copy = folder / "site/autoclip_core"
        shutil.copytree(Path(autoclip_core.__file__).parent, self.copy, ignore=shutil.ignore_patterns("__pycache__"))

    def survives(self, mutant):
        changed = self.copy / mutant.file.name
        original = changed.read_text(encoding="utf-8")
        changed.write_text(mutant.apply(), encoding="utf-8")
        numba = mutant.file.name == "_numba.py"
        names = KNOWN_BY[mutant.file.name].split()
        if mutant.file.name in ("_native.py", "clip.py", "history.py"):
            names += [name for name in FAST.split() if name not in names]
        command = [
            sys.executable,
            "-P",
            "-B",
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "--hypothesis-seed=0",
        ]
        only_fast = ["-k", "not tensorboard and not backends and not in_the_other and not long_run"]
        try:
            return passes(
                [*command, *only_fast, *(f"tests/core/{name}.py" for name in names)],
                timeout=400,
                cwd=ROOT,
                env=os.environ
                | {"PYTHONPATH": str(self.copy.parent), "AUTOCLIP_BACKEND": "numba" if numba else "native"},
            )
        finally:
            changed.write_text(original, encoding="utf-8")


def campaign(count, seed=0, say=lambda line: None):
    """The mutants that were judged, and those of them that survived; what does not compile is no mutant."""
    judged, survived = [], []
    with tempfile.TemporaryDirectory() as folder:
        courts = {".c": KernelCourt(Path(folder)), ".py": CoreCourt(Path(folder))}
        courts[".h"] = courts[".c"]
        for mutant in mutants(count, seed):
            began = time.monotonic()
            verdict = courts[mutant.file.suffix].survives(mutant)
            if verdict is None:
                continue
            judged.append(mutant)
            survived += [mutant] if verdict else []
            say(f"{'SURVIVED' if verdict else 'killed'} in {time.monotonic() - began:.1f} s: {mutant}")
    return judged, survived


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=220)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    judged, survived = campaign(options.count, options.seed, lambda line: print(line, flush=True))
    print(f"{len(judged) - len(survived)} of {len(judged)} killed")
