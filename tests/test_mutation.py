"""mutation.py: what it breaks, what it tries, and whether its lists are of what there is. The check itself is a part of
`make torture`.
"""

import ast
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import mutation
import pytest


TESTS = Path(__file__).parent


@pytest.mark.parametrize(
    "old, new",
    [
        ("return a + b", ["return a - b"]),
        ("return a - 2 * b", ["return a + 2 * b", "return a - 2 / b", "return a - 3 * b"]),
        ("return a < b", ["return a <= b"]),
        ("return a is None", ["return a is not None"]),
        ("return not a", ["return (a)"]),
        ("return a and b", ["return a or b", "return ((a))", "return ((b))"]),
        ("return a if b else None", ["return a if True else None", "return a if False else None"]),
        ("return [x for x in a if b]", ["return [x for x in a if True]", "return [x for x in a if False]"]),
        ("return a, b", ["return a"]),
        ("return a[b:]", ["return a[(b) + 1:]"]),
        ("return -1", ["return (1)", "return -2"]),
        ("return -math.inf", ["return (math.inf)", "return -0.0"]),
        ("return a.exp_().detach()", ["return (a.exp_())", "return (a).detach()"]),
        ("return torch.where(a, b, c)", ["return (b)", "return (c)"]),
        ("return torch.zeros(a)", ["return torch.ones(a)"]),
        ("return a(b, c)", ["return a(c, b)"]),
        ("return a(b=c)", ["return a()"]),
        ("a.b()", ["pass"]),
        ("a += b", ["a -= b", "pass"]),
        ("a = b", ["pass"]),
        ("d = a", []),  # without which there would be no d
        ("raise ValueError(a + b)", []),  # a message
        ('"""Adds 1 + 1."""', []),
    ],
)
def test_what_is_broken(old, new):
    head = b"def f(a, b, c):\n"
    mutants = list(mutation.Source(head + f"    {old}\n".encode()).mutants("small.py"))
    assert sorted(mutant.new for mutant in mutants) == sorted(new)
    for mutant in mutants:
        assert (mutant.file, mutant.function, mutant.line, mutant.old) == ("small.py", "f", 2, old)
        assert mutant.source() == head + f"    {mutant.new}\n".encode()


def test_mutants_are_called_the_same_wherever_their_line_is():
    source = b"def f(a, b):\n    a = a + b\n    return a * 2\n"
    here, there = (list(mutation.Source(before + source).mutants("small.py")) for before in (b"", b"import torch\n\n"))
    assert len({mutant.key for mutant in here}) == len(here)
    for a_line in (1, 2):
        samples = mutation.sample(here, a_line), mutation.sample(there, a_line)
        assert [mutant.key for mutant in samples[0]] == [mutant.key for mutant in samples[1]]
        assert [mutant.line for mutant in samples[0]] == [2] * a_line + [3] * a_line


def test_of_a_module_only_what_is_chosen_is_broken():
    source = mutation.Source(b"def f(a):\n    return -a\n\nclass A:\n    def f(self):\n        return not self\n")
    functions = {
        ((), ()): ["f", "A.f"],
        (("A",), ()): ["A.f"],
        (("A.f",), ()): ["A.f"],
        ((), ("A",)): ["f"],
        ((), ("f",)): ["A.f"],
    }
    for (only, never), expected in functions.items():
        target = mutation.Target("small.py", (), only, never)
        assert [mutant.function for mutant in source.mutants("small.py", target)] == expected, (only, never)


def test_survivors_are_mutants_and_have_a_reason():
    existing = {mutant.key for target in mutation.TARGETS for mutant in mutation.mutants_of(target)}
    for key, reason in mutation.known_survivors().items():
        assert key in existing, f"no mutant any more: {key}"
        assert reason.endswith("."), key


def test_tests_and_functions_of_the_targets_are_there():
    files = {test.partition("::")[0] for target in mutation.TARGETS for test in target.tests}
    parsed = {file: ast.parse((TESTS.parent / file).read_bytes()) for file in files}
    defined = {file: {getattr(node, "name", None) for node in tree.body} for file, tree in parsed.items()}
    for target in mutation.TARGETS:
        functions = {mutant.function for mutant in mutation.mutants_of(target)}
        for name in target.only:
            assert any(function == name or function.startswith(f"{name}.") for function in functions), name
        for test in target.tests:
            file, _, name = test.partition("::")
            assert not name or name.partition("[")[0] in defined[file], test


def test_what_no_test_notices_survives_and_what_one_notices_is_killed(tmp_path):
    files = {
        "small/__init__.py": "from .maths import larger",
        "small/maths.py": """
            def larger(a, b):
                if a > b:
                    return a + 0
                return b
            """,
        "tests/test_maths.py": """
            from small import larger
            def test_larger():
                assert larger(2, 3) == 3 and larger(5, 4) == 5 and larger(6, 6) == 6
            """,
        "tests/mutation_survivors.txt": """
            # Of equal numbers one is as large as the other.
            maths.py:larger: if a > b: => if a >= b:
            maths.py:larger: if a > b: => if True:
            """,
        "judge.py": f"""
            import sys
            from pathlib import Path
            sys.path.insert(0, {str(TESTS)!r})
            import mutation
            mutation.ROOT = Path(__file__).parent
            mutation.TESTS, mutation.PACKAGE = mutation.ROOT / "tests", mutation.ROOT / "small"
            mutation.SURVIVORS = mutation.TESTS / "mutation_survivors.txt"
            target = mutation.Target("maths.py", ("tests/test_maths.py",))
            mutation.TARGETS = (target,)
            sys.exit(mutation.judge({{target: mutation.mutants_of(target)}}, jobs=1))
            """,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(dedent(text))
    done = subprocess.run([sys.executable, tmp_path / "judge.py"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1].split() == ["maths.py", "5", "3", "0", "2"], done.stdout
    assert lines[3:] == [
        "killed, though it is said to survive: maths.py:3: maths.py:larger: if a > b: => if True:",
        "survived, for no known reason: maths.py:4: maths.py:larger: return a + 0 => return a - 0",
        "60.0% of 5 mutants killed, 2 not as expected",
    ]
