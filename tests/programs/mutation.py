"""Small faults put into the kernel, the core and the adapters, one at a time: the tests must notice.

    python -P tests/programs/mutation.py --count 220
    python -P tests/programs/mutation.py --count 150 --under adapters --kept build/mutants

A mutant is a changed operator or constant, a swapped condition, a statement left out. Those of the kernel are judged by
the C tests, with tiny nodes, with the real ones, and under ASan and UBSan; those of the core by the Python tests, in a
copy of the installed package; those of the adapters by the tests of their framework. None is made of the adapters
unless --under says so, for their tests take minutes. The same seed gives the same mutants, but for those of lines that
were edited. What no test can tell from the original is named in register.toml.

Judging is quick because most mutants die at once: the tests that know a file best go first, and the rest are run only
for what survives them. Mutants of the adapters still take hours; with --kept a run goes on where another ended.
"""

import argparse
import ast
import gc
import hashlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tokenize
import tomllib
from collections import Counter
from contextlib import suppress
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
KERNEL = ROOT / "csrc"
KERNEL_FOLDERS = ("src", "arrays", "tensorflow", "xla")
CORE = ROOT / "autoclip_core"
REGISTER = tomllib.loads((Path(__file__).parent / "register.toml").read_text(encoding="utf-8"))

# The tests that know a file of the core best.
KNOWN_BY = {
    "_backend.py": "test_backend",
    "_bits.py": "test_history test_check",
    "_native.py": "test_history test_bad_input test_memory",
    "_numba/check.py": "test_check",
    "_numba/compiler.py": "test_backend",
    "_numba/history.py": "test_history test_memory test_snapshot test_model",
    "_numba/snapshot.py": "test_snapshot",
    "_numba/tree.py": "test_check test_history test_percentile test_snapshot test_model",
    "__main__.py": "test_command_line",
    "arrays.py": "test_arrays",
    "clip.py": "test_clip test_state test_bad_input",
    "errors.py": "test_bad_input",
    "history.py": "test_history test_bad_input",
    "replay.py": "test_replay",
    **{
        f"logs/{name}.py": "test_logs"
        for name in ("__init__", "binary", "events", "found", "messages", "records", "tables", "text")
    },
}
# The tests that may judge a file of the adapters: of them those that run what was changed, quick ones first.
ADAPTERS = ROOT / "adapters"
_JAX = "test_jax_kernel test_jax test_jax_surface"
_TORCH = """
    test_torch_edges test_torch_odd test_torch_kernel test_torch_scopes test_torch_engines test_torch_deferred
    test_torch test_torch_repeats test_torch_zoo
"""
ADAPTERS_KNOWN_BY = {
    "autoclip_jax/clip.py": _JAX,
    "autoclip_jax/kernel.py": _JAX,
    "autoclip_tensorflow/clip.py": "test_tensorflow",
    "autoclip_tensorflow/dense.py": "keras_suite",
    "autoclip_tensorflow/graph.py": "test_tensorflow",
    "autoclip_tensorflow/logger.py": "keras_suite",
    "autoclip_tensorflow/optimizer.py": "keras_suite",
    "autoclip_tensorflow/state.py": "test_tensorflow",
    "autoclip_torch/agreement.py": _TORCH,
    "autoclip_torch/attach.py": _TORCH,
    "autoclip_torch/batches.py": f"{_TORCH} test_torch_device",
    "autoclip_torch/clip.py": _TORCH,
    "autoclip_torch/decision.py": "test_torch_device test_torch_compile",
    "autoclip_torch/deepspeed.py": "test_torch_engines",
    "autoclip_torch/deferred.py": "test_torch_edges test_torch_deferred",
    "autoclip_torch/devices.py": "test_torch_device test_torch_odd test_torch_edges",
    "autoclip_torch/engines.py": "test_torch_engines",
    "autoclip_torch/fastai.py": "test_torch_callbacks",
    "autoclip_torch/gradients.py": _TORCH,
    "autoclip_torch/groups.py": _TORCH,
    "autoclip_torch/kernel.py": "test_torch_kernel test_torch_edges",
    "autoclip_torch/layout.py": _TORCH,
    "autoclip_torch/lightning.py": "test_lightning",
    "autoclip_torch/optimizers.py": "test_torch_odd test_torch_zoo",
    "autoclip_torch/pipeline.py": _TORCH,
    "autoclip_torch/plateau.py": "test_torch_plateau",
    "autoclip_torch/repeats.py": "test_torch_repeats test_torch_edges test_torch",
    "autoclip_torch/sharing.py": "test_torch_zoo",
    "autoclip_torch/skorch.py": "test_torch_callbacks",
    "autoclip_torch/stable_baselines3.py": "test_torch_callbacks",
    "autoclip_torch/transformers.py": "test_transformers",
    "autoclip_torch/watch.py": "test_torch_zoo",
}
# Of these no mutants are made: pictures are judged by looking at them, demos by what they print; the rest are names.
WITHOUT_MUTANTS = {"__init__.py", "plot.py", "demo.py"}
# Those that start other processes judge what no test runs in its own.
ADAPTERS_ELSEWHERE = {"autoclip_torch": "test_torch_distributed", "autoclip_jax": "test_jax_processes"}
# What every run would import again, and no mutant changes.
FRAMEWORKS = {
    "autoclip_torch": "pytest hypothesis autoclip_core torch._dynamo",
    "autoclip_jax": "pytest hypothesis autoclip_core jax optax",
    "autoclip_tensorflow": "pytest hypothesis autoclip_core torch",  # tensorflow imports Keras, and that one backend
}
# What takes long, and judges what the rest of the contract judges too.
LONG = "not recorded_trace and not new_process and not demo and not workers and not replicas and not inductor"

KERNEL_TESTS = (
    *("status", "check", "snapshot", "model", "arrays", "xla", "tensorflow", "tensors", "modes", "faults", "shared"),
    "bounds",
)

# How the kernel and its tests are compiled: first the way that kills most at the least cost.
TINY = ("-DAUTOCLIP_LEAF=4", "-DAUTOCLIP_FANOUT=4", "-DAUTOCLIP_BUFFER=4", "-DAUTOCLIP_NO_AVX2")
BUILDS = {
    "tiny": ("-O1", *TINY),
    "real": ("-O2",),
    "sanitized": ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", *TINY),
}
# As tests/c/CMakeLists.txt says.
WRAPS = (
    ("-DTEST_WRAPS_MALLOC", "-Wl,--wrap=malloc,--wrap=posix_memalign,--wrap=pthread_atfork")
    if sys.platform == "linux"
    else ()
)

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

    @property
    def name(self):
        return self.file.relative_to(ROOT).as_posix()

    @property
    def kind(self):
        if self.file.suffix != ".py":
            return "kernel"
        if self.file.is_relative_to(ADAPTERS):
            return self.file.parent.name
        return "Numba" if self.file.parent.name == "_numba" else "core"

    def apply(self):
        source = source_of(self.file)
        return source[: self.start] + self.text + source[self.end :]

    def line(self):
        source = source_of(self.file)
        return source[source.rfind("\n", 0, self.start) + 1 : source.find("\n", self.start)].strip()

    def lines(self):
        """The lines of the statement that it changes, of one with a body those before that."""
        source = source_of(self.file)
        line = source.count("\n", 0, self.start) + 1
        around = [
            range(node.lineno, node.body[0].lineno if hasattr(node, "body") else node.end_lineno + 1)
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.stmt)
        ]
        return min((lines for lines in around if line in lines), key=len, default=range(0))

    def within(self):
        """The function that it is in; of what stands before the first, nothing."""
        beginning = r"^()[a-z].*?(\w+)\(" if self.kind == "kernel" else r"^( *)def (\w+)"
        before = re.findall(beginning, source_of(self.file)[: self.start], re.MULTILINE)
        line = source_of(self.file)[: self.start].rpartition("\n")[2]
        depth = len(line) - len(line.lstrip(" "))
        return ["", *(name for indent, name in before if len(indent) < depth)][-1]

    def change(self):
        source = source_of(self.file)
        before = source[source.rfind("\n", 0, self.start) + 1 : self.start].lstrip()
        after = source[self.end : source.find("\n", self.end)]
        return f"{before}[{' '.join(source[self.start : self.end].split())} -> {self.text}]{after}"

    def __str__(self):
        line = source_of(self.file).count("\n", 0, self.start) + 1
        return f"{self.name}:{line}, {self.within()}: {self.change()}"


@cache
def source_of(file):
    return file.read_text(encoding="utf-8")


# --- Making mutants ---------------------------------------------------------------------------------------------------


def number_after(text):
    """Another number: one more."""
    return text.replace(re.match(r"\d+", text)[0], str(int(re.match(r"\d+", text)[0]) + 1), 1)


# The smaller or the greater of two numbers; of two that are equal either will do.
TERM = r"[\w>.\[\]()-]+(?: [-+] [\w>.\[\]()-]+)*"
CHOICE = re.compile(
    rf"({TERM}) [<>] ({TERM}) \? (?:(?:\(size_t\))?\(?\1\)? : \2|\2 : \1)\b|if \(({TERM}) [<>] ({TERM})\) \3 = \4;"
)


def mutants_of_c(file):
    source = source_of(file)
    hidden = re.compile(r'/\*.*?\*/|"(\\.|[^"\\\n])*"|\'(\\.|[^\'\\])*\'|^[ \t]*#.*?(?<!\\)$', re.DOTALL | re.MULTILINE)
    code = hidden.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), source)
    choices = {
        match.start() + match[0].index(sign)
        for match in CHOICE.finditer(code)
        for sign in (" < ", " > ")
        if sign in match[0]
    }
    # A star may be a pointer's, an ampersand an address, a bracket an include: only with spaces around, as is laid out.
    for match in re.finditer(
        r"(?<= )(?:[<>=!]=|[<>]|[-+*/%|&]=?|&&|\|\||<<|>>)(?= )|\+\+|\b(?:true|false|break)\b", code
    ):
        if match[0] in SWAPS and match.start() - 1 not in choices:
            yield Mutant(file, *match.span(), SWAPS[match[0]])
    for match in re.finditer(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.])", code):
        if re.fullmatch(r" +(?:\w+ )+\w+\[[^]=]*", code[code.rfind("\n", 0, match.start()) + 1 : match.start()]):
            continue  # the size of an array: one place more does no harm
        yield Mutant(file, *match.span(), number_after(match[0]))
    for match in re.finditer(r"\bif (?=\()", code):
        end, depth = match.end(), 0
        while depth > 0 or end == match.end():
            depth += (code[end] == "(") - (code[end] == ")")
            end += 1
        yield Mutant(file, match.end(), end, f"(!{source[match.end() : end]})")
    for match in re.finditer(
        r"^ +(?!return|const|static|enum|double \w|size_t|uint\w+ \w|struct|case|break|goto)[^\n;{}]*;(?= *$)",
        code,
        re.MULTILINE,
    ):
        if not re.match(r" +(?:\w+ )*\w+ \*?\w+(?:\[.*\])?(?: =|;)", match[0]):  # a declaration
            yield Mutant(file, match.end() - len(match[0].lstrip()), match.end(), ";")


def mutants_of_python(file):
    source = source_of(file)
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


def every_mutant():
    """All that can be made, less those of lines that the register leaves out."""
    files = [file for folder in KERNEL_FOLDERS for file in sorted((KERNEL / folder).glob("*.[ch]"))]
    made = [mutant for file in files for mutant in mutants_of_c(file)]
    for folder, known in ((CORE, KNOWN_BY), (ADAPTERS, ADAPTERS_KNOWN_BY)):
        names = {file.relative_to(folder).as_posix() for file in folder.rglob("*.py")}
        unknown = {name for name in names - {*known} if Path(name).name not in WITHOUT_MUTANTS}
        assert not unknown, f"no tests are named that know these: {unknown}"
    made += [mutant for name in KNOWN_BY for mutant in mutants_of_python(CORE / name)]
    made += [mutant for name in ADAPTERS_KNOWN_BY for mutant in mutants_of_python(ADAPTERS / name)]
    for line in REGISTER["line"]:
        if line.get("mutants", True):
            continue
        kept = [
            mutant for mutant in made if mutant.name != line["file"] or not mutant.line().startswith(line["begins"])
        ]
        assert len(kept) < len(made), f"left out, but not there: {line}"
        made = kept
    for entry in REGISTER["mutant"]:
        assert any(fits(entry, mutant) for mutant in made), f"equivalent, but not there: {entry}"
    return made


def fits(entry, mutant):
    named = (mutant.name, mutant.within()) == (entry["file"], entry["function"])
    return named and mutant.change().startswith(entry["change"])


def mutants(count, seed=0, under=""):
    """So many mutants: six of eleven in the kernel, four in the core, one in its Numba backend, which takes long.

    Under the adapters: two of three in PyTorch's, the rest in the two others.
    """
    sizes = {"kernel": count - count * 4 // 11 - count // 11, "core": count * 4 // 11, "Numba": count // 11}
    if under.startswith("adapters"):
        sizes = {
            "autoclip_torch": count - 2 * (count // 6),
            "autoclip_jax": count // 6,
            "autoclip_tensorflow": count // 6,
        }
        if under.startswith("adapters/"):
            sizes = dict.fromkeys(sizes, count)
    seen = Counter()
    lots = {}
    for mutant in every_mutant():
        if not mutant.name.startswith(under):
            continue
        name = f"{mutant.name} {mutant.within()} {mutant.change()}"
        seen[name] += 1
        lots[mutant] = random.Random(f"{seed} {name} {seen[name]}").random()  # noqa: S311 - whatever the others are
    drawn = sorted(lots, key=lots.get)
    return [m for kind, size in sizes.items() for m in [m for m in drawn if m.kind == kind][:size]]


# --- Judging them -----------------------------------------------------------------------------------------------------


def passes(command, patience=120, memory="8000000", **options):
    """Whether a command succeeds in so many seconds of the processor and KiB; whatever it started ends with it."""
    limits = f'ulimit -S -t {int(patience) + 1}; ulimit -S -v {memory}; exec "$@"'
    command = ["sh", "-c", limits, "sh", *map(str, command)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, **options
    )
    try:
        return process.wait(60 + 4 * patience) == 0  # who waits for ever takes no time of the processor
    except subprocess.TimeoutExpired:
        return False
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def patience_for(command, **options):
    """How long to wait for a command that succeeds without a mutant."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert passes(command, 600, **options), f"fails without a mutant: {command}"
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return 1 + 4 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


class Build:
    """The kernel and its tests, compiled in one way; only what a mutant changes is compiled again."""

    def __init__(self, folder, sources, flags):
        folder.mkdir()
        self.folder = folder
        self.flags = ("-std=c11", "-g0", "-ffp-contract=off", *flags)
        self.limits = {"memory": "unlimited"} if "sanitize" in " ".join(flags) else {}  # they reserve terabytes
        self.objects = {source: folder / f"{source.stem}.o" for source in sources}
        tests = {ROOT / f"tests/c/test_{name}.c": folder / f"test_{name}.o" for name in KERNEL_TESTS}
        for source, made in (self.objects | tests).items():
            assert self.compile(source, made), f"does not compile: {source}"
        self.patience = {name: patience_for([self.link(name)], **self.limits) for name in KERNEL_TESTS}

    def compile(self, source, made):
        headers = (f"-I{source.parent}", f"-I{KERNEL / 'src'}", f"-I{KERNEL / 'include'}")
        return passes(["cc", *self.flags, *headers, *WRAPS, "-c", source, "-o", made])

    def link(self, name, objects=None):
        program = self.folder / f"test_{name}"
        parts = [self.folder / f"test_{name}.o", *(objects or self.objects).values()]
        wraps = WRAPS if name == "shared" else ()
        assert passes(["cc", *self.flags, *parts, "-pthread", "-lm", *wraps, "-o", program]), f"does not link: {name}"
        return program

    def survives(self, changed):
        """Whether the tests pass with these sources compiled again; None if they do not compile."""
        again = {source: self.folder / f"{source.stem}.mutant.o" for source in changed}
        if not all(self.compile(source, made) for source, made in again.items()):
            return None
        return all(
            passes([self.link(name, self.objects | again)], self.patience[name], **self.limits) for name in KERNEL_TESTS
        )


class KernelTests:
    """The C tests in each build, one after the other."""

    def __init__(self, folder):
        self.folder = folder
        shutil.copytree(KERNEL, folder / "csrc")
        self.sources = [file for part in KERNEL_FOLDERS for file in sorted((folder / "csrc" / part).glob("*.c"))]
        self.builds = {}

    def build(self, name):
        if name not in self.builds:
            self.builds[name] = Build(self.folder / name, self.sources, BUILDS[name])
        return self.builds[name]

    def survives(self, mutant):
        changed = self.folder / mutant.name
        for name in BUILDS:
            build = self.build(name)
            changed.write_text(mutant.apply(), encoding="utf-8")
            try:
                verdict = build.survives([changed] if changed.suffix == ".c" else self.sources)
            finally:
                changed.write_text(source_of(mutant.file), encoding="utf-8")
            if not verdict:
                return verdict
        return True


class CoreTests:
    """The Python tests on a copy of the installed core: those that know a file, then all."""

    def __init__(self, folder):
        import autoclip_core

        self.copy = folder / "site/autoclip_core"
        shutil.copytree(Path(autoclip_core.__file__).parent, self.copy, ignore=shutil.ignore_patterns("__pycache__"))
        self.patience = {}

    def commands(self, mutant):
        """What is run one after the other, as long as the mutant survives."""
        numba = mutant.kind == "Numba"
        known = [f"tests/core/{name}.py" for name in KNOWN_BY[mutant.file.relative_to(CORE).as_posix()].split()]
        for tests, chosen in (
            (known, "not tensorboard and not backends and not in_the_other"),
            (["tests/core"], "not command_line and not replay and not plot and not arrays" if numba else ""),
        ):
            pytest = [sys.executable, "-P", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
            yield [*pytest, "--hypothesis-profile=hasty", "-k", chosen, *tests]

    def survives(self, mutant):
        try:
            compile(mutant.apply(), mutant.file.name, "exec")
        except SyntaxError:
            return None
        changed = self.copy / mutant.file.relative_to(CORE)
        backend = "numba" if mutant.kind == "Numba" else "native"
        site = {"PYTHONPATH": str(self.copy.parent), "PYTHONDONTWRITEBYTECODE": "1", "AUTOCLIP_BACKEND": backend}
        options = {"cwd": ROOT, "env": os.environ | site}
        for command in self.commands(mutant):
            key = (*command, backend)
            if key not in self.patience:
                self.patience[key] = patience_for(command, **options)
            changed.write_text(mutant.apply(), encoding="utf-8")
            try:
                if not passes(command, self.patience[key], **options):
                    return False
            finally:
                changed.write_text(source_of(mutant.file), encoding="utf-8")
        return True


class LinesOfTests:
    """For pytest: which lines of the files in a folder each test runs, and in how many seconds.

    The first entry, of no test, has what runs when the files are imported.
    """

    def __init__(self, folder, wanted):
        self.folder, self.wanted = folder, wanted
        self.coverage = import_module("coverage").Coverage(data_file=None, config_file=False, include=[f"{folder}/*"])
        self.seconds, self.began = {"": 0.0}, 0.0
        self.coverage.start()

    def pytest_runtest_logstart(self, nodeid):
        self.began = time.monotonic()
        self.coverage.switch_context(nodeid)

    def pytest_runtest_logfinish(self, nodeid):
        self.seconds[nodeid] = time.monotonic() - self.began

    def pytest_sessionfinish(self):
        self.coverage.stop()
        data = self.coverage.get_data()
        seen = {test: [] for test in self.seconds}
        for file in data.measured_files():
            name = Path(file).relative_to(self.folder).as_posix()
            for line, tests in data.contexts_by_lineno(file).items():
                for test in tests:
                    seen[test].append((name, line))
        learned = [(test, self.seconds[test], lines) for test, lines in seen.items()]
        self.wanted.write_text(json.dumps(learned), encoding="utf-8")


class FirstFailure:
    """For pytest: writes down the first test that fails, or the file that cannot be imported."""

    def __init__(self, wanted):
        self.wanted = wanted

    def pytest_runtest_logreport(self, report):
        if report.failed and not self.wanted.exists():
            self.wanted.write_text(report.nodeid, encoding="utf-8")

    pytest_collectreport = pytest_runtest_logreport


def digest(*texts):
    """A short name for what texts say."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


class Verdicts:
    """Which test killed each mutant, kept in a file, for a campaign that goes on where another ended.

    A verdict stands until the changed file is edited, or the tests that gave it: of a mutant that died the file of
    the test that killed it, of one that survived every file of tests that know it.
    """

    def __init__(self, file):
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        self.entries = {entry["mutant"]: entry for entry in map(json.loads, lines)}
        self.kills = Counter(entry["killer"] for entry in self.entries.values())

    def find(self, mutant):
        """The entry of a mutant whose verdict stands; else None."""
        entry = self.entries.get(digest(mutant.name, mutant.apply()))
        return entry if entry and entry["judges"] == self.digest_of(entry["files"]) else None

    def killer_of(self, mutant):
        """The test that killed it, before the tests were edited."""
        return self.entries.get(digest(mutant.name, mutant.apply()), {}).get("killer")

    def add(self, mutant, killer, files):
        """The killer is None of a mutant that survived, and "" of one that ended every test, or its time."""
        files = [killer.partition("::")[0]] if killer else sorted(files)
        named = digest(mutant.name, mutant.apply())
        entry = {
            "mutant": named,
            "killer": killer,
            "files": files,
            "judges": self.digest_of(files),
            "what": str(mutant),
        }
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        self.entries[named] = entry
        self.kills[killer] += 1

    def digest_of(self, files):
        return digest(*(source_of(ROOT / file) if (ROOT / file).exists() else "" for file in files))


class AdapterTests:
    """Of the tests that know a file, those that run the changed line, on a copy of the installed adapter.

    Each run is a fork of this process, which has imported the framework and nothing that a mutant changes: to import
    a framework takes longer than to kill most mutants.
    """

    FIRST = 8  # tests that are run before the others: mostly they are enough

    def __init__(self, folder, kept=None):
        self.folder, self.site = folder, folder / "adapters"
        self.kept = kept or folder
        self.verdicts = Verdicts(self.kept / "verdicts.jsonl")
        for package in FRAMEWORKS:
            assert package not in sys.modules, f"{package} is imported already, so no mutant of it would be"
            installed = Path(find_spec(package).origin).parent
            shutil.copytree(installed, self.site / package, ignore=shutil.ignore_patterns("__pycache__"))
        self.known = {}  # of each file: its tests, with the seconds and the lines of each

    def run(self, tests, on, patience=600, plugin=lambda: None):
        """Whether tests pass in so many seconds of the processor."""
        assert "keras" not in sys.modules, "Keras is imported already, so each child would have one backend"
        gc.freeze()  # or each child goes through all that the parent holds, again and again
        child = os.fork()
        if child == 0:
            with suppress(BaseException):
                os.setsid()
                resource.setrlimit(resource.RLIMIT_CPU, (int(patience) + 1,) * 2)
                signal.alarm(60 + 8 * int(patience))  # who waits for ever takes no time of the processor
                for stream in (1, 2):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
                os.chdir(ROOT)
                os.environ |= {"AUTOCLIP_BACKEND": "native", "KERAS_BACKEND": on, "TF_CPP_MIN_LOG_LEVEL": "3"}
                os.environ |= {"PYTHONPATH": str(self.site), "PYTHONDONTWRITEBYTECODE": "1"}
                os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # they take longer than most tests
                sys.path.insert(0, str(self.site))
                sys.dont_write_bytecode = True
                options = ["-x", "-q", "-p", "no:cacheprovider", "-k", LONG]
                options += ["-p", "_hypothesis_pytestplugin", "--hypothesis-profile=hasty"]
                options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what was imported before
                os._exit(import_module("pytest").main([*options, *tests], [plugin()]))
            os._exit(1)
        _, status, _ = os.wait4(child, 0)
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        return status == 0

    def killer(self, tests, on, patience):
        """The test that fails, "" if none of them came to an end; None if all pass."""
        wanted = self.folder / "killer"
        wanted.unlink(missing_ok=True)
        if self.run(tests, on, patience, lambda: FirstFailure(wanted)):
            return None
        return wanted.read_text(encoding="utf-8") if wanted.exists() else ""

    def learn(self, file, kind, on):
        """What each test of a file runs."""
        if (file, on) not in self.known:
            sources = [source.read_text(encoding="utf-8") for source in sorted((self.site / kind).glob("*.py"))]
            wanted = self.kept / f"lines-{digest(file, on, source_of(ROOT / file), *sources)}.json"
            if not wanted.exists():
                assert self.run([file], on, plugin=lambda: LinesOfTests(self.site, wanted)), (
                    f"fails without a mutant: {file}, Keras on {on}"
                )
            learned = json.loads(wanted.read_text(encoding="utf-8"))
            self.known[file, on] = [(test, took, {*map(tuple, seen)}) for test, took, seen in learned]
        return self.known[file, on]

    def survives(self, mutant):
        try:
            compile(mutant.apply(), mutant.file.name, "exec")
        except SyntaxError:
            return None
        if entry := self.verdicts.find(mutant):
            return entry["killer"] is None
        for framework in FRAMEWORKS[mutant.kind].split():
            import_module(framework)
        name = mutant.file.relative_to(ADAPTERS).as_posix()
        judges = ADAPTERS_KNOWN_BY[name].split()
        on = "tensorflow" if judges == ["test_tensorflow"] else "torch"
        files = [f"tests/adapters/{test}.py" for test in judges]
        lines = {(name, line) for line in mutant.lines()}
        known = [each for file in files for each in self.learn(file, mutant.kind, on)]
        at_import = any(lines & seen for test, _, seen in known if not test)
        took = {test: seconds for test, seconds, seen in known if test and (at_import or lines & seen)}
        if not took and mutant.kind in ADAPTERS_ELSEWHERE:
            elsewhere = f"tests/adapters/{ADAPTERS_ELSEWHERE[mutant.kind]}.py"
            files, took = [*files, elsewhere], {elsewhere: 0.0}
        # What killed this mutant before, then what kills most in its time.
        before, kills = self.verdicts.killer_of(mutant), self.verdicts.kills
        tests = sorted(took, key=lambda test: (test != before, (0.1 + took[test]) / (1 + kills[test])))
        changed = self.site / mutant.file.relative_to(ADAPTERS)
        changed.write_text(mutant.apply(), encoding="utf-8")
        killer, patience = None, 60 + sum(seconds for _, seconds, _ in known)
        try:
            for some in (tests[: self.FIRST], tests[self.FIRST :]):
                if some and killer is None:
                    killer = self.killer(some, on, patience)
        finally:
            changed.write_text(source_of(mutant.file), encoding="utf-8")
        self.verdicts.add(mutant, killer, files)
        return killer is None


TESTS_OF = {"kernel": KernelTests, "core": CoreTests, "Numba": CoreTests}  # and of the adapters theirs


def campaign(count, seed=0, say=lambda line: None, under="", kept=None):
    """The mutants that were judged, and those of them that survived; what does not compile is no mutant.

    A folder keeps the verdicts on the adapters, for the next campaign.
    """
    judged, survived = [], []
    with tempfile.TemporaryDirectory() as folder:
        tests_of = cache(lambda tests: tests(Path(folder)))
        of_adapters = partial(AdapterTests, kept=kept)
        for mutant in mutants(count, seed, under):
            began = time.monotonic()
            verdict = tests_of(TESTS_OF.get(mutant.kind, of_adapters)).survives(mutant)
            if verdict is None:
                continue
            judged.append(mutant)
            survived += [mutant] if verdict else []
            say(f"{'SURVIVED' if verdict else 'killed'} in {time.monotonic() - began:.1f} s: {mutant}")
    return judged, survived


def reason_of(mutant):
    """Why no test can tell this mutant from the original; None if nobody has said."""
    return next((entry["why"] for entry in REGISTER["mutant"] if fits(entry, mutant)), None)


def report(judged, survived):
    """What was found, in lines: how many of each kind died, which survived and why."""
    for kind, count in Counter(mutant.kind for mutant in judged).items():
        yield f"{kind}: {count - sum(mutant.kind == kind for mutant in survived)} of {count} killed"
    yield f"all: {len(judged) - len(survived)} of {len(judged)} killed, survivors:"
    yield from (f"{mutant}\n    {reason_of(mutant) or 'NOT EXPLAINED'}" for mutant in survived)
    yield from (f"{m}\n    KILLED, but listed as equivalent" for m in judged if reason_of(m) and m not in survived)


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=220)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--under", default="", metavar="PATH", help="only of files whose names begin so")
    parser.add_argument(
        "--kept", type=Path, metavar="FOLDER", help="keep verdicts on the adapters in it, and go by them"
    )
    options = parser.parse_args()
    judged, survived = campaign(
        options.count, options.seed, lambda line: print(line, flush=True), options.under, options.kept
    )
    print("\n".join(report(judged, survived)))
    explained = [mutant for mutant in judged if reason_of(mutant)]
    return len(survived) > len(judged) / 10 or {*survived} != {*explained}


if __name__ == "__main__":
    sys.exit(main())
