"""Everything that the pages show is true: their programs run, their commands and their files exist.

    python   is a program of its own: it runs in an empty directory, and a warning is an error. One that joins a process
             group runs under torchrun, in two processes
    c        is one too: it compiles without a warning, runs with the kernel, and returns 0
    sh       is checked: every command is one that this file knows; its targets, extras and files exist
    text     is a drawing, or what a program has printed

A block of any other language fails.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (".", "autoclip_core", "adapters", "adapters/*", "csrc", "bench", "bench/*")
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for pattern in (*(f"{folder}/README.md" for folder in FOLDERS), "tests/RELIABILITY.md", ".github/*.md")
    for path in sorted(ROOT.glob(pattern))
}
every_page = pytest.mark.parametrize("page", PAGES)

LANGUAGES = {"python", "c", "sh", "text"}

FENCE = re.compile(r"^(?P<indent> *)```(?P<language>.*)\n(?P<code>(?:.*\n)*?)(?P=indent)```[ \t]*$", re.MULTILINE)


class Block(NamedTuple):
    language: str
    code: str
    line: int  # of its first line in the page
    page: str = "README.md"


def read_blocks(page):
    """Every fenced block of a page; ValueError if one cannot be tested."""
    blocks = []
    for match in FENCE.finditer(page):
        line = page.count("\n", 0, match.start("code")) + 1
        if match["language"] not in LANGUAGES:
            raise ValueError(f"line {line}: a block is one of {sorted(LANGUAGES)}, not {match['language']!r}")
        blocks.append(Block(match["language"], textwrap.dedent(match["code"]), line))
    # Any fence that the pattern above did not take: tildes, a quotation, a block that is not closed.
    if len(re.findall(r"^[ >]*(?:```|~~~)", page, re.MULTILINE)) != 2 * len(blocks):
        raise ValueError("there is a fence that is not opened and closed by three backticks on lines of their own")
    return blocks


BLOCKS = [block._replace(page=page) for page, text in PAGES.items() for block in read_blocks(text)]


TUTORIAL = "bench/tutorial/README.md"  # its programs use one another


def blocks_of(language):
    found = [block for block in BLOCKS if block.language == language and (language, block.page) != ("python", TUTORIAL)]
    return pytest.mark.parametrize("block", found, ids=lambda block: f"{block.page} {block.line}")


def run_python(block):
    program = compile("\n" * (block.line - 1) + block.code, ROOT / block.page, "exec")  # with the lines of the page
    exec(program, {"__name__": "__main__"})  # noqa: S102 - our own page


@pytest.fixture(scope="session")
def compiler(absent):
    return shutil.which(os.environ.get("CC", "cc")) or absent("needs a C compiler")


@pytest.fixture(scope="session")
def kernel(compiler, tmp_path_factory):
    """The object files of the kernel."""
    folder = tmp_path_factory.mktemp("kernel")
    sources = map(str, sorted((ROOT / "csrc/src").glob("*.c")))
    flags = ["-std=c11", "-O1", "-ffp-contract=off", f"-I{ROOT / 'csrc/include'}"]
    subprocess.run([compiler, *flags, "-c", *sources], cwd=folder, check=True)
    return sorted(map(str, folder.glob("*.o")))


@pytest.fixture
def run_c(compiler, kernel, tmp_path):
    """Compile and run a program."""

    def run(code):
        (tmp_path / "block.c").write_text(code, encoding="utf-8")
        flags = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-I{ROOT / 'csrc/include'}"]
        subprocess.run([compiler, *flags, "block.c", *kernel, "-pthread", "-o", "block"], cwd=tmp_path, check=True)
        subprocess.run(["./block"], cwd=tmp_path, check=True, timeout=60)

    return run


@blocks_of("python")
def test_python_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "init_process_group" in block.code:
        # A thread of gloo drops its last tensors when it comes to it, and aborts if the interpreter is gone by then.
        (tmp_path / "train.py").write_text(f"{block.code}\nimport time\ntime.sleep(1)\n", encoding="utf-8")
        torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", "--nproc-per-node=2", "train.py"]
        done = subprocess.run(torchrun, capture_output=True, text=True, check=False, timeout=600)
        assert done.returncode == 0, done.stderr
    else:
        run_python(block)


@blocks_of("c")
def test_c_block_compiles_and_runs(block, run_c):
    run_c(block.code)


def read_notebook(path):
    """Its cells, and what the code among them has shown: the text, and how many pictures."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.pop("outputs", [])]
    texts = ["".join(output["text"]) for output in outputs if output["output_type"] == "stream"]
    return cells, texts, sum("image/png" in output.get("data", {}) for output in outputs)


def words_and_numbers(text):
    """Apart, and without layout: a training ends in other digits on another processor."""
    number = r"\d[\d,]*(?:\.\d+)?"
    words = " ".join(re.sub(number, "#", text).split())
    return words, [float(found.replace(",", "")) for found in re.findall(number, text)]


def assert_alike(one, other):
    (words, numbers), (other_words, other_numbers) = words_and_numbers(one), words_and_numbers(other)
    assert words == other_words
    assert numbers == pytest.approx(other_numbers, rel=0.5)


def test_tutorial_and_its_notebook_show_what_their_programs_do(tmp_path):
    command = [sys.executable, "-m", "bench.tutorial", "--out", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    shown = re.findall(r"results/tutorial/(\w+\.png)\)", PAGES[TUTORIAL])
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == sorted(shown)
    folders = (ROOT / "bench", tmp_path)
    (cells, texts, pictures), made = (read_notebook(folder / "tutorial/tutorial.ipynb") for folder in folders)
    assert (cells, pictures) == (made[0], made[2])
    assert pictures == len(shown)
    for one, other in zip(texts, made[1], strict=True):
        assert_alike(one, other)
    printed = [block.code for block in BLOCKS if (block.page, block.language) == (TUTORIAL, "text")]
    assert printed
    for text in printed:
        assert any(words_and_numbers(text)[0] == words_and_numbers(other)[0] for other in made[1])


# Commands.


def expect_make(arguments):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(" ".join(re.findall(r"^([\w. -]+):(?!=)", makefile, re.MULTILINE)).split())
    for argument in arguments:
        name, is_variable, _ = argument.partition("=")
        known = f"$({name})" in makefile if is_variable else name in targets
        assert known, f"the Makefile has no {name}"


def expect_pip(arguments):
    command, *requirements = arguments
    assert command == "install"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for requirement in requirements:
        match = re.fullmatch(r"(?:autoclip-core|\.)(?:\[([\w,]+)\])?", requirement)
        assert match, f"{requirement} is not what this project installs"
        assert set((match[1] or "").split(",")) <= {"", *extras}


def expect_python(arguments):
    if arguments[0] == "-m":
        path = arguments[1].replace(".", "/")
        places = [ROOT / folder / f"{path}{end}" for folder in (".", "adapters") for end in (".py", "/__main__.py")]
        known = any(place.is_file() for place in places) or arguments[1] in {"venv", "pip", "pytest"}
        assert known, f"there is no module {arguments[1]} to run"
        if arguments[1] == "pip":
            expect_pip(arguments[2:])
    else:
        assert (ROOT / arguments[0]).is_file(), f"there is no file {arguments[0]}"


def expect_cc(arguments):
    sources = [argument for argument in arguments if argument.endswith((".c", ".h"))]
    assert sources
    for source in sources:
        assert any(ROOT.glob(source)) or (ROOT / "csrc/examples" / source).is_file(), f"there is no {source}"


def expect_cmake(arguments):
    if "-S" in arguments:
        folder = arguments[arguments.index("-S") + 1]
        assert (ROOT / folder / "CMakeLists.txt").is_file(), f"CMake finds nothing in {folder}"
    else:
        assert arguments[0] in {"--build", "--install"}


def expect_autoclip(arguments):
    source = (ROOT / "autoclip_core/__main__.py").read_text(encoding="utf-8")
    for word in [arguments[0], *(argument for argument in arguments if argument.startswith("--"))]:
        assert f'"{word}"' in source, f"autoclip knows no {word}"


def expect_anything(arguments):
    pass


COMMANDS = {
    "make": expect_make,
    "pip": expect_pip,
    "python": expect_python,
    "python3": expect_python,
    "autoclip": expect_autoclip,
    "cc": expect_cc,
    "cmake": expect_cmake,
    "git": expect_anything,
    "torchrun": expect_anything,
    "apt-get": expect_anything,
    "cd": expect_anything,
    "ls": expect_anything,
    "mkdir": expect_anything,
    "xargs": expect_anything,
    "pkg-config": expect_anything,
}


def expect_commands(code):
    """Check each command of a shell block; AssertionError for one that is unknown or names what is not there."""
    for inner in re.findall(r"\$\(([^()]*)\)", code):
        expect_commands(inner)
    code = re.sub(r"\$\([^()]*\)", "inner", code.replace("\\\n", " "))
    for line in code.splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars="&|;()")
        words.whitespace_split = True
        command = []
        for word in [*words, ";"]:
            if not re.fullmatch(r"[&|;()]+", word):
                if command or "=" not in word:  # else: an assignment before the command
                    command.append(word)
            elif command:
                assert command[0] in COMMANDS, f"{command[0]} is no command that this page may name"
                COMMANDS[command[0]](command[1:])
                command = []


@blocks_of("sh")
def test_sh_block_names_what_exists(block):
    expect_commands(block.code)


@every_page
def test_commands_in_the_text_exist(page):
    text = FENCE.sub("", PAGES[page])
    for command in re.findall(r"`((?:make|pip|python -m) [^`]+)`", text):
        expect_commands(command)


@every_page
def test_files_that_a_page_links_exist(page):
    targets = re.findall(r"\]\(([^)#\s]+)", FENCE.sub("", PAGES[page]))
    local = [target for target in targets if not re.match(r"https?:", target)]
    assert [target for target in local if not (ROOT / page).parent.joinpath(target).is_file()] == []


def test_first_page_links_every_other():
    targets = {(ROOT / target).resolve() for target in re.findall(r"\]\(([^)#\s]+)", PAGES["README.md"])}
    assert {page for page in PAGES if page != "README.md" and (ROOT / page).resolve() not in targets} == set()


def test_page_shows_each_way_of_use():
    assert {block.language for block in BLOCKS} >= {"python", "c", "sh"}
    assert {"make demo", "make test"} <= {line for block in BLOCKS for line in block.code.splitlines()}


# The tester, tested.


def page_of(language, code):
    return f"```{language}\n{code}\n```\n"


@pytest.mark.parametrize("language", ["", "rust", "Python", "console", "python title=x", "c "])
def test_reader_refuses_unknown_languages(language):
    with pytest.raises(ValueError, match="a block is one of"):
        read_blocks(page_of(language, "x"))


@pytest.mark.parametrize(
    "text",
    ["```python\nx = 1\n", "~~~python\nx = 1\n~~~\n", "> ```python\n> x = 1\n> ```\n", "```c\n1\n```\n```\n"],
)
def test_reader_refuses_fences_that_it_would_overlook(text):
    with pytest.raises(ValueError, match="there is a fence"):
        read_blocks(text)


def test_reader_finds_blocks_and_their_lines():
    text = (
        "words\n\n"
        + page_of("python", "a = 1")
        + "  - in a list:\n\n    ```c\n    int x;\n    ```\n"
        + page_of("sh", "")
    )
    assert [block[:3] for block in read_blocks(text)] == [
        ("python", "a = 1\n", 4),
        ("c", "int x;\n", 9),
        ("sh", "\n", 12),
    ]


def test_python_block_that_fails_shows_its_line():
    (block,) = read_blocks("one\ntwo\n" + page_of("python", "x = 1\nassert x == 2"))
    with pytest.raises(AssertionError) as caught:
        run_python(block)
    assert (caught.traceback[-1].path.name, caught.traceback[-1].lineno + 1) == ("README.md", 5)


def test_c_block_that_fails_is_noticed(run_c):
    run_c("#include <autoclip.h>\nint main(void) { return autoclip_abi_version() == 0; }\n")
    for code in ("int main(void) { return 1; }", "int main(void) { int unused; return 0; }", "int main("):
        with pytest.raises(subprocess.CalledProcessError):
            run_c(code)


@pytest.mark.parametrize(
    "line",
    [
        "make demo # a comment",
        'make demo DEMO="--help"',
        "python3 -m venv .venv && python -m autoclip_torch.demo --help",
        "pip install 'autoclip-core[torch,plot]'; pip install .",
        "A=1 make test \\\n  bench",
        "(cd csrc && cmake -S csrc -B build)",
        "cc embed.c $(pkg-config --cflags --libs autoclip) -o embed",
        "",
        "# only words",
    ],
)
def test_commands_that_exist_are_accepted(line):
    expect_commands(line)


@pytest.mark.parametrize(
    "line",
    [
        "make dmeo",
        "make demo && make all-of-it",
        "make demo NO_SUCH=1",
        "pip install autoclip",
        "pip install 'autoclip-core[jaxx]'",
        "python -m autoclip_torch.demos",
        "python no_such_file.py",
        "cmake -S src -B build",
        "cc no_such.c -o x",
        "sudo make test",
        "true; A=1 unknown",
    ],
)
def test_commands_that_do_not_exist_are_refused(line):
    with pytest.raises(AssertionError):
        expect_commands(line)


def test_tables_are_those_of_the_results():
    tables = [
        (page, *found)
        for page, text in PAGES.items()
        for found in re.findall(r"<!-- (bench/results/\S+) -->\n((?:\|.*\n)+)", text)
    ]
    assert tables
    for page, source, table in tables:
        assert table in (ROOT / source).read_text(encoding="utf-8"), f"{page}: the table from {source} is out of date"
