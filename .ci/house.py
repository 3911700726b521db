"""The rules of the house that a machine can check: of the tree, of ccfix.py, and of the README."""

import ast
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tokenize

from harness import CCFIX, PYTHON, TOP, check, run_table

VISIBLE = {"ccfix.py", "test_ccfix.py", "README.md", "LICENSE"}
SECTIONS = "Vocabulary Errors Settings Providers Normalize Formats_out Tool_text Stream_in Refusals"
SECTIONS += " Upstream Store Proxy HTTP Page Demo Commands"
SECTIONS = [name.replace("_", " ") for name in SECTIONS.split()]
PURE = 9  # sections; bytes and dicts in, bytes and dicts out
IMPURE = "socket sqlite3 time print open threading select selectors ssl random sys subprocess"
LONGEST = 60  # lines of a function
WIDEST = 100  # columns
HEAVIEST = 264000
EXPLAINED = 18  # per cent of the lines that are comments or docstrings
ELSEWHERE = {"msvcrt", "winreg", "_winapi"}  # the standard library of other systems
MACHINE = re.compile(r"(?<![\w.$}~])/(work|root|farm)/")
LOST = """
import importlib.util, sys
for name in sys.argv[1:]:
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        found = None
    if not found:
        print(name)
"""


def read(name):
    path = CCFIX if name == "ccfix.py" else os.path.join(TOP, name)
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


SOURCE = read("ccfix.py")
TREE = ast.parse(SOURCE)
FUNCTIONS = [n for n in ast.walk(TREE) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


def output(*command, limit=60, **options):
    """(exit code, what it printed) of a command."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, universal_newlines=True, timeout=limit, **dict(pipes, **options))
    return done.returncode, done.stdout


def tracked():
    return output("git", "ls-files", cwd=TOP)[1].splitlines()


# The tree


def visible_files():
    shown = {name for name in tracked() if not name.startswith(".")}
    check("four visible files", shown == VISIBLE, sorted(shown ^ VISIBLE))


def narrow_lines():
    for name in [n for n in tracked() if n.endswith(".py")]:
        if os.path.exists(os.path.join(TOP, name)):
            lines = enumerate(read(name).splitlines(), 1)
            wide = ["%d: %d" % (number, len(line)) for number, line in lines if len(line) > WIDEST]
            check("%s: no line over %d columns" % (name, WIDEST), not wide, wide[:20])


def no_machine_paths():
    found = []
    for name in filter(os.path.exists, (os.path.join(TOP, name) for name in tracked())):
        found += [
            "%s: %s" % (name, l.strip()) for l in read(name).splitlines() if MACHINE.search(l)
        ]
    check("no path of one machine in the tree", not found, "\n".join(found[:10]))


# ccfix.py


def short_functions():
    lengths = {n.name: n.end_lineno - n.lineno + 1 for n in FUNCTIONS}
    long = {name: length for name, length in lengths.items() if length > LONGEST}
    check("no function over %d lines" % LONGEST, not long, long)


def finished_source():
    for word in ("TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented"):
        check("ccfix.py has no %s" % word, word not in SOURCE)
    check("ccfix.py is ASCII", SOURCE.isascii())


def weight_of(source):
    """(bytes of code, per cent of the lines that explain) of a Python source.

    Comments, docstrings, blank lines and indentation are not code, so that neither wrapping nor
    explaining counts against a file.
    """
    lines, explaining, ends = source.splitlines(), set(), {}
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            explaining.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    docstrings = set(explaining)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            number, column = token.start
            ends[number] = column
            if not lines[number - 1][:column].strip():
                explaining.add(number)
    parts = (line[: ends.get(n)] for n, line in enumerate(lines, 1) if n not in docstrings)
    return sum(len(part.strip().encode()) for part in parts), 100.0 * len(explaining) / len(lines)


def weight():
    code, explained = weight_of(SOURCE)
    check("at most %d bytes of code (%d)" % (HEAVIEST, code), code <= HEAVIEST)
    name = "at least %d %% of the lines explain (%.1f)" % (EXPLAINED, explained)
    check(name, explained >= EXPLAINED)


def sections():
    parts = re.split(r"\n# ={90,}\n# (\d+)  ([^\n:]+).*\n# ={90,}\n", SOURCE)
    numbers, names, texts = parts[1::3], parts[2::3], parts[3::3]
    wanted = [str(number) for number in range(1, len(SECTIONS) + 1)]
    check("%d sections, in order" % len(SECTIONS), numbers == wanted, numbers)
    check("each with its name", names == SECTIONS, names)
    for name, text in list(zip(names, texts))[:PURE]:
        used = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
        found = used & set(IMPURE.split())
        check("%s is pure" % name, not found and "urllib.request" not in text, found)


def top_level_names():
    for node in TREE.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                yield (alias.asname or alias.name).split(".")[0]
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in getattr(node, "targets", None) or [node.target]:
                yield from (part.id for part in ast.walk(target) if isinstance(part, ast.Name))


def locals_of(function):
    for node in ast.walk(function):
        if isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.name


def plain_locals():
    taken, shadows, underscores = set(top_level_names()) - {"_"}, set(), set()
    lambdas = [node for node in ast.walk(TREE) if isinstance(node, ast.Lambda)]
    for function in FUNCTIONS + lambdas:
        where = "%s (line %d)" % (getattr(function, "name", "lambda"), function.lineno)
        for name in locals_of(function):
            if name in taken:
                shadows.add("%s in %s" % (name, where))
            if name.endswith("_") and name.strip("_"):
                underscores.add("%s in %s" % (name, where))
    check("no local shadows a name of the module", not shadows, sorted(shadows))
    check("no local ends with an underscore", not underscores, sorted(underscores))


def standard_library_only():
    names = set()
    for node in ast.walk(TREE):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    version = output(PYTHON, "--version")[1].strip()
    code, lost = output(PYTHON, "-I", "-S", "-c", LOST, *sorted(names))
    good = code == 0 and set(lost.split()) <= ELSEWHERE
    check("ccfix.py imports the standard library of %s only" % version, good, lost)


def stands_alone():
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(CCFIX, os.path.join(folder, "ccfix.py"))
        clean = {"PATH": os.environ["PATH"], "LC_ALL": "C", "PYTHONDONTWRITEBYTECODE": "1"}
        for args in (["ccfix.py", "--help"], ["-c", "import ccfix"]):
            code, text = output(PYTHON, "-W", "error", *args, cwd=folder, env=clean)
            good = code == 0 and text.isascii() and bool(text) == ("--help" in args)
            check("copied alone: %s" % " ".join(args), good and "Warning" not in text, text)
        left = os.listdir(folder)
        check("and it leaves nothing behind", left == ["ccfix.py"], left)


# The README


def readme_is_true():
    """Its tables, commands, names and messages are those of the source: test_ccfix.py compares."""
    command = (sys.executable, os.path.join(TOP, "test_ccfix.py"), "TestReadme")
    code, text = output(*command, limit=120)
    check("the README's tables are current, and its words true", code == 0, text[-4000:])


if __name__ == "__main__":
    run_table(
        visible_files,
        narrow_lines,
        no_machine_paths,
        short_functions,
        finished_source,
        weight,
        sections,
        plain_locals,
        standard_library_only,
        stands_alone,
        readme_is_true,
    )
