"""The house rules that a machine can check."""

import ast
import os
import re
import shutil
import subprocess
import tempfile

from harness import CCFIX, PYTHON, TOP, check, run_table

VISIBLE = {"ccfix.py", "test_ccfix.py", "README.md", "LICENSE"}
LONGEST = 60
ELSEWHERE = {"msvcrt", "winreg", "_winapi"}  # the standard library of other systems
MACHINE = re.compile(r"(?<![\w.$}~])/(work|root|farm)/")
IMPORTS = """
import ast, importlib.util, sys
tree = ast.parse(open(sys.argv[1], encoding="utf-8").read())
names = set()
for node in ast.walk(tree):
    if isinstance(node, ast.Import):
        names.update(alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        names.add("." * node.level + (node.module or ""))
for name in sorted(names):
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        found = None
    if not found:
        print(name)
"""


def source(name="ccfix.py"):
    with open(CCFIX if name == "ccfix.py" else os.path.join(TOP, name), encoding="utf-8") as f:
        return f.read()


def output(*command, **options):
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        universal_newlines=True,
        timeout=60,
        **options,
    )
    return done.returncode, done.stdout


def tracked():
    return output("git", "ls-files", cwd=TOP)[1].splitlines()


def visible_files():
    shown = {name for name in tracked() if not name.startswith(".")}
    check("four visible files", shown == VISIBLE, sorted(shown ^ VISIBLE))


def short_functions():
    functions = [
        n
        for n in ast.walk(ast.parse(source()))
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    lengths = {n.name: n.end_lineno - n.lineno + 1 for n in functions}
    check(
        "no function over %d lines" % LONGEST,
        not [n for n in lengths.values() if n > LONGEST],
        {name: length for name, length in lengths.items() if length > LONGEST},
    )


def finished_source():
    for word in ("TODO", "FIXME", "XXX", "NotImplemented"):
        check("ccfix.py has no %s" % word, word not in source())
    odd = sorted(set(c for c in source() if ord(c) > 126))
    check("ccfix.py is ASCII", not odd, odd)


def standard_library_only():
    version = output(PYTHON, "--version")[1].strip()
    code, missing = output(PYTHON, "-I", "-S", "-c", IMPORTS, CCFIX)
    check(
        "ccfix.py imports the standard library of %s only" % version,
        code == 0 and set(missing.split()) <= ELSEWHERE,
        missing,
    )


def stands_alone():
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(CCFIX, os.path.join(folder, "ccfix.py"))
        clean = {"PATH": os.environ["PATH"], "LC_ALL": "C", "PYTHONDONTWRITEBYTECODE": "1"}
        for args in (["ccfix.py", "--help"], ["-c", "import ccfix"]):
            code, text = output(PYTHON, "-W", "error", *args, cwd=folder, env=clean)
            check(
                "copied alone: %s" % " ".join(args),
                code == 0
                and "Warning" not in text
                and text.isascii()
                and bool(text) == ("--help" in args),
                text,
            )
        check(
            "and it leaves nothing behind", os.listdir(folder) == ["ccfix.py"], os.listdir(folder)
        )


def no_machine_paths():
    found = []
    for name in tracked():
        with open(os.path.join(TOP, name), encoding="utf-8", errors="replace") as f:
            found += ["%s: %s" % (name, line.strip()) for line in f if MACHINE.search(line)]
    check("no path of one machine in the tree", not found, "\n".join(found[:10]))


if __name__ == "__main__":
    run_table(
        [
            visible_files,
            short_functions,
            finished_source,
            standard_library_only,
            stands_alone,
            no_machine_paths,
        ]
    )
