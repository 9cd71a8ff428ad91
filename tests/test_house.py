"""The house: who imports whom, and that each file says so."""

import ast
import re

import pytest
from conftest import ROOT

VERBS = {"train.py", "sample.py", "export.py", "ablate.py", "bench.py", "plot.py"}
FILES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
         for path in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py")] if path.name != "__init__.py"}


def imports(name):
    """Which of our files a file imports, wherever in it."""
    found = set()
    for node in ast.walk(FILES[name]):
        if isinstance(node, ast.ImportFrom):
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {other for other in FILES if other.removesuffix(".py").replace("/", ".") in found}


@pytest.mark.parametrize("name", sorted(FILES.keys() - VERBS - {"modeling_nanoscale.py"}))
def test_a_file_says_what_it_imports(name):
    """In its first lines: "Imports a.py and b.py."."""
    said = re.search(r"(?:Knows|Imports) ((?:[^.]|\.py)*)\.", ast.get_docstring(FILES[name]))
    names = set(re.findall(r"\w+\.py", said[1]))
    assert names == {other.rpartition("/")[2] for other in imports(name)}
    assert names or said[1] == "none of the other files"


def test_the_file_that_goes_with_exports_knows_none_of_ours():
    assert not imports("modeling_nanoscale.py")


def test_nothing_imports_a_verb_and_nothing_goes_round():
    above = {name: imports(name) for name in FILES}
    assert not any(known & VERBS for known in above.values())
    while above:
        lowest = {name for name, known in above.items() if not known & above.keys()}
        assert lowest, f"these import each other: {sorted(above)}"
        above = {name: known for name, known in above.items() if name not in lowest}
