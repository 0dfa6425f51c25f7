"""The package can be imported where the modules of Unix are missing, as on Windows."""

import pkgutil

from processes import run

import gpt2ft

ON_ANOTHER_SYSTEM = """
import builtins, importlib, pkgutil, sys

UNIX = {"fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "syslog"}
whole = builtins.__import__

def found_by_libraries_alone(name, globals=None, locals=None, fromlist=(), level=0):
    if name.partition(".")[0] in UNIX and globals["__name__"].startswith("gpt2ft"):
        raise ModuleNotFoundError(f"{globals['__name__']} imports {name}", name=name)
    return whole(name, globals, locals, fromlist, level)

builtins.__import__ = found_by_libraries_alone
if len(sys.argv) > 1:
    exec(sys.argv[1], {"__name__": "gpt2ft.other"})
import gpt2ft
for module in pkgutil.walk_packages(gpt2ft.__path__, "gpt2ft."):
    if module.name != "gpt2ft.__main__":
        importlib.import_module(module.name)
        print(module.name)
"""


def test_no_module_needs_those_of_unix():
    imported = run(["python", "-c", ON_ANOTHER_SYSTEM]).stdout.split()
    assert imported == [
        module.name for module in pkgutil.walk_packages(gpt2ft.__path__, "gpt2ft.") if module.name != "gpt2ft.__main__"
    ]
    assert len(imported) > 80


def test_one_that_does_is_seen():
    said = run(["python", "-c", ON_ANOTHER_SYSTEM, "import fcntl"], code=1).stderr
    assert "gpt2ft.other imports fcntl" in said
