"""The rules of the house, read from the sources.

Each test gathers what breaks its rule as "file:line what" and wants that list empty, so a failure reads as a
to-do list. docs/architecture.md says why the rules are as they are.
"""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("protocol", "dht", "compute", "node", "simnet")
MAY_IMPORT = {
    "protocol": (),
    "dht": ("protocol",),
    "compute": ("protocol",),
    "node": ("protocol", "dht", "compute"),
    "simnet": ("protocol", "dht", "compute", "node"),
}
"""Imports point one way: protocol <- dht, compute <- node <- simnet."""

LINES_MAX = 400
TEST_LINES_MAX = 500
"""A battery of tests for one thing may be longer than what it tests."""
FUNCTION_LINES_MAX = 70
PARAMETERS_MAX = 6
TENSOR_LIBRARIES = ("torch", "transformers", "numpy", "safetensors.torch")
TENSOR_SIDE = (
    "compute/model/",
    "compute/inline.py",
    "compute/worker_serve.py",
    "compute/train/app.py",
    "compute/train/apps/",
    "compute/train/diloco.py",
    "compute/train/flat.py",
)
"""What may hold tensors; everything else runs in the daemon, which starts without torch."""
ARRAY_SIDE = ("compute/collective/", "compute/train/")
"""What may use numpy in the daemon: it adds up others' numbers, and the first job that needs it loads it."""

REPLAYED = ("protocol/", "dht/", "compute/infer/")
"""What a simulated world replays from its seed: no clock, randomness or host state of its own."""
UNREPLAYABLE = (
    *(f"time.{name}" for name in ("time", "time_ns", "monotonic", "perf_counter", "sleep")),
    *(f"os.{name}" for name in ("urandom", "getrandom", "getpid")),
    *(
        f"random.{name}"
        for name in ("random", "randrange", "randint", "choice", "shuffle", "sample", "uniform")
    ),
    *(f"secrets.{name}" for name in ("token_bytes", "token_hex", "randbelow")),
    *(f"datetime.{name}" for name in ("now", "utcnow", "today")),
    "random.SystemRandom",
    "uuid.uuid1",
    "uuid.uuid4",
)


@dataclass(frozen=True)
class Source:
    path: str
    text: str
    tree: ast.Module

    @property
    def room(self) -> str:
        return self.path.split("/")[0]

    def at(self, node: ast.AST, what: str) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 1)} {what}"


@cache
def sources() -> tuple[Source, ...]:
    """Every module of the package: rooms and front door, generated ones left out."""
    found = []
    for path in python_files(*ROOMS, "src/mycel"):
        text = path.read_text(encoding="utf-8")
        found.append(Source(path.relative_to(ROOT).as_posix(), text, ast.parse(text, path.name)))
    return tuple(found)


@cache
def all_python() -> tuple[Path, ...]:
    """Every Python file of the project, tests and benchmarks included."""
    return python_files(*ROOMS, "src/mycel", "tests", "bench", "scripts", "examples")


def python_files(*folders: str) -> tuple[Path, ...]:
    """Python files under `folders`, without generated ones, foreign ones, and those behind links."""
    return tuple(
        Path(folder, name)
        for top in folders
        for folder, _, names in sorted(os.walk(ROOT / top))
        for name in sorted(names)
        if name.endswith(".py") and not name.endswith("_pb2.py") and "node_modules" not in folder
    )


def imports_of(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Every imported module with its node; `from a import b` counts as a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node, node.module
            for alias in node.names:
                yield node, f"{node.module}.{alias.name}"


def is_under(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def dotted(node: ast.AST) -> str:
    """a.b.c of an attribute expression, "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def test_there_are_sources_to_judge() -> None:
    assert len(sources()) > 30
    assert {source.room for source in sources()} == {*ROOMS, "src"}


def test_imports_point_one_way() -> None:
    wrong = []
    for source in sources():
        if source.room == "src":
            continue
        allowed = (source.room, *MAY_IMPORT[source.room])
        for node, name in imports_of(source.tree):
            parts = name.split(".")
            target = parts[1] if parts[0] == "mycel" and len(parts) > 1 else ""
            if target in (*ROOMS, "cli") and target not in allowed:
                wrong.append(source.at(node, f"{source.room} may not import {name}"))
    assert not wrong, "\n" + "\n".join(wrong)


def test_layer_rule_notices_a_wrong_import() -> None:
    tree = ast.parse("def late():\n    from mycel.node import host\n")
    assert "mycel.node" in [name for _, name in imports_of(tree)]
    assert "node" not in MAY_IMPORT["protocol"]


def test_only_node_and_simnet_implement_the_network_seam() -> None:
    wrong = []
    for source in sources():
        if source.room in ("node", "simnet") or source.path == "protocol/network.py":
            continue
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ClassDef):
                methods = [item.name for item in node.body if isinstance(item, ast.AsyncFunctionDef)]
                if "dial" in methods and "listen" in methods:
                    wrong.append(source.at(node, f"{node.name} implements Network"))
    assert not wrong, "\n" + "\n".join(wrong)


def test_protocol_and_dht_hold_no_sockets() -> None:
    wrong = [
        source.at(node, name)
        for source in sources()
        if source.room in ("protocol", "dht")
        for node, name in imports_of(source.tree)
        if name.split(".")[0] in ("socket", "ssl", "select", "asyncio", "threading") or name == "trio.socket"
    ]
    assert not wrong, "\n" + "\n".join(wrong)


def test_daemon_side_imports_no_tensor_library() -> None:
    wrong = []
    for source in sources():
        if source.path.startswith(TENSOR_SIDE):
            continue
        is_array_side = source.path.startswith(ARRAY_SIDE)
        for node, name in imports_of(source.tree):
            if is_array_side and is_under(name, "numpy"):
                continue
            if any(is_under(name, library) for library in TENSOR_LIBRARIES):
                wrong.append(source.at(node, f"imports {name}"))
    assert not wrong, "\n" + "\n".join(wrong)


def test_only_node_reads_the_environment() -> None:
    wrong = []
    for source in sources():
        if source.room in ("node", "src"):
            continue
        reads = (node for node in ast.walk(source.tree) if dotted(node) in ("os.environ", "os.getenv"))
        wrong += [source.at(node, dotted(node)) for node in reads]
        for node, name in imports_of(source.tree):
            if name in ("os.environ", "os.getenv"):
                wrong.append(source.at(node, name))
    assert not wrong, "\n" + "\n".join(wrong)


def test_what_is_replayed_has_no_clock_or_randomness_of_its_own() -> None:
    wrong = []
    for source in sources():
        if not source.path.startswith(REPLAYED):
            continue
        for node in ast.walk(source.tree):
            name = dotted(node) if isinstance(node, ast.Attribute) else ""
            if any(name == banned or name.endswith("." + banned) for banned in UNREPLAYABLE):
                wrong.append(source.at(node, name))
        for node, name in imports_of(source.tree):
            if name in UNREPLAYABLE:
                wrong.append(source.at(node, name))
    assert not wrong, "\n" + "\n".join(wrong)


def test_nothing_is_unpickled_or_executed() -> None:
    modules = ("pickle", "marshal", "shelve", "dill", "cloudpickle", "jsonpickle", "code", "codeop")
    calls = ("eval", "exec", "compile", "torch.load", "__import__", "yaml.load", "numpy.load", "np.load")
    wrong = []
    for source in sources():
        for node, name in imports_of(source.tree):
            if name.split(".")[0] in modules:
                wrong.append(source.at(node, f"imports {name}"))
        called = (node for node in ast.walk(source.tree) if isinstance(node, ast.Call))
        wrong += [
            source.at(node, f"calls {dotted(node.func)}") for node in called if dotted(node.func) in calls
        ]
    assert not wrong, "\n" + "\n".join(wrong)


def test_every_broad_except_carries_a_reason() -> None:
    wrong = []
    for path in all_python():
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.ExceptHandler):
                continue
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = [dotted(kind) if kind is not None else "BaseException" for kind in kinds]
            reraises = any(isinstance(item, ast.Raise) and item.exc is None for item in node.body)
            broad = "Exception" in names or ("BaseException" in names and not reraises)
            if broad and not re.search(r"# boundary: \S", lines[node.lineno - 1]):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {lines[node.lineno - 1].strip()}")
    assert not wrong, "\n" + "\n".join(wrong)


def test_imports_are_absolute_and_by_full_name() -> None:
    bare = (*ROOMS, "tests", "docs", "examples", "bench")
    wrong = []
    for path in all_python():
        where = path.relative_to(ROOT)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        froms = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
        wrong += [f"{where}:{node.lineno} relative import" for node in froms if node.level]
        for node, name in imports_of(tree):
            if name.split(".")[0] in bare:
                wrong.append(f"{where}:{getattr(node, 'lineno', 1)} imports the bare name {name}")
    assert not wrong, "\n" + "\n".join(wrong)


def test_no_module_is_named_like_one_of_the_standard_library() -> None:
    wrong = [
        path.relative_to(ROOT).as_posix()
        for path in all_python()
        if path.stem in sys.stdlib_module_names and path.stem not in ("__init__", "__main__")
    ]
    assert not wrong, "\n" + "\n".join(wrong)


def test_files_and_functions_stay_small() -> None:
    wrong = []
    for path in all_python():
        where = path.relative_to(ROOT).as_posix()
        text = path.read_text(encoding="utf-8")
        count = len(text.splitlines())
        most = TEST_LINES_MAX if where.startswith("tests/") else LINES_MAX
        if count > most:
            wrong.append(f"{where} has {count} lines, at most {most}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > FUNCTION_LINES_MAX:
                    wrong.append(f"{where}:{node.lineno} {node.name} has {length} lines")
                count = parameters_of(node)
                if count > PARAMETERS_MAX and not where.startswith("tests/"):
                    wrong.append(f"{where}:{node.lineno} {node.name} has {count} parameters")
    assert not wrong, "\n" + "\n".join(wrong)


def parameters_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Parameters that a caller chooses: neither self nor trio's task_status."""
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    names = [argument.arg for argument in arguments]
    return len([name for name in names if name not in ("self", "cls", "task_status")])


def test_modules_begin_with_their_theory_of_operation() -> None:
    wrong = [source.path for source in sources() if not ast.get_docstring(source.tree)]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    "pattern", [r"/wo" + r"rk/", r"/ro" + r"ot/", r"/home/(?!mycel)\w", r"[A-Z]:\\\\Users"]
)
def test_no_path_of_somebodys_machine(pattern: str) -> None:
    texts = (".py", ".md", ".toml", ".txt", ".json", ".sh", ".js", ".mjs", ".yml", ".proto", "")
    skipped = (
        ".git",
        ".venv",
        "node_modules",
        ".hypothesis",
        "__pycache__",
        "build",
        "dist",
        ".cache",
        ".ci-cache",
    )
    wrong = []
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        if any(part in skipped or part.endswith((".egg-info", "_cache")) for part in parts):
            continue
        if (
            path.is_file()
            and not path.is_symlink()
            and path.suffix in texts
            and path.name != "package-lock.json"
        ):
            for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
                if re.search(pattern, line):
                    wrong.append(f"{path.relative_to(ROOT)}:{number} {line.strip()[:80]}")
    assert not wrong, "\n" + "\n".join(wrong)
