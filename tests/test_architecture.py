"""The import rules of the project, read from the source of every module without importing any.

Two packages. `adapters` is the library; `service` is the server on top of it. In `service` imports run downward through
LAYERS.
"""

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("adapters", "service")

LAYERS: tuple[tuple[str, str, str], ...] = (
    ("nouns", "service", "slo errors core prefill"),
    ("policies", "service.rank", "policies"),
    ("settings", "service", "keys settings version log"),
    ("prediction", "service.rank", "latency_model ladder load prospect"),
    ("choice", "service.rank", "safety price latency_policy auto_rank quality_curve rank_policy"),
    ("bookkeeping", "service.engine", "prefix_hash blocks fair_queue scheduler step_costs"),
    ("kernels", "service.engine.native", "build prebuilt kernels block"),
    ("kernels for GPUs", "service.engine.cuda", "products device_ints lora_kernels lora_product attention_kernels"),
    ("tensors", "service.engine", "operators attention kv_cache sites adapted mixed lora merged merge_worker model"),
    ("blocks", "service.engine", "native_blocks compiled"),
    ("tokens", "service.engine", "filters random_numbers token_counts sampling vocabulary prompts stops text"),
    ("runner", "service.engine", "ticket runner model_check planner"),
    ("backends", "service.engine", "backend"),
    ("on a GPU", "service.engine.cuda", "paged_attention graphs backend"),
    ("engine", "service.engine", "backend_choice options observers readiness engine"),
    ("latency", "service.latency", "sweep cache start"),
    ("around the engine", "service.http", "error_table metrics scrapes limits tenants shadow tracing latencies"),
    ("a request's events", "service.http.generation", "stream tracking measurement"),
    ("adapters held", "service.http.adapters", "served_adapter registry following load_folder uploads calibration"),
    ("what all share", "service.http", "services not_served schemas"),
    ("adapters changed", "service.http.adapters", "changes schemas"),
    ("a request", "service.http.generation", "selection arrival fan_out token_limits choice submit served"),
    ("of TGI and LoRAX", "service.http.tgi", "tasks answers"),
    ("of OpenAI", "service.http.openai", "schemas answer_schemas tasks heading logprobs answers streams models"),
    (
        "asgi",
        "service.http.asgi",
        "validation_text refusals auth middleware request_log request_spans disconnect connection replica",
    ),
    ("routes", "service.http.routes", "common answering adapters quality ops pages generate openai vllm"),
    ("app", "service.http", "app server"),
    ("commands", "service", "allocator demo launch keys_command cli cluster"),
)
"""Lowest first. A module imports only from lower layers, or from modules that stand before it in its own."""

MAY_IMPORT = {
    "fastapi": ("service.http.app", "service.http.routes.*", "service.http.server", "service.launch", "service.cli"),
    "starlette": (
        "service.http.asgi.auth",
        "service.http.asgi.connection",
        "service.http.asgi.middleware",
        "service.http.asgi.refusals",
        "service.http.asgi.replica",
        "service.http.asgi.request_log",
        "service.http.asgi.request_spans",
        "service.http.asgi.disconnect",
        "service.http.app",
        "service.http.routes.*",
        "service.http.server",
        "service.cli",
    ),
    "opentelemetry": ("service.http.tracing",),
    "uvicorn": ("service.http.asgi.connection", "service.http.server", "service.cli"),
    "ray": ("service.cluster",),
    "triton": ("service.engine.cuda.*",),
    "peft": ("adapters.training.*", "adapters.evaluation.*", "adapters.paper.*", "adapters.demo.*"),
    "tests": (),
    "loadtests": (),
}
"""Who may import a third party, or what is not shipped; everyone else may not."""

WITHOUT_TORCH = (
    "service.errors",
    "service.core",
    "service.keys",
    "service.settings",
    "service.http.limits",
    "service.http.tenants",
    "service.engine.blocks",
    "service.engine.scheduler",
    "service.rank.policies",
    "service.rank.rank_policy",
    "service.http.generation.selection",
    "service.http.schemas",
    "service.http.metrics",
    "service.http.generation.stream",
    "service.rank.latency_model",
    "service.slo",
    "service.rank.quality_curve",
    "service.rank.latency_policy",
    "service.rank.auto_rank",
    "service.rank.load",
    "adapters.paper.plan",
    "adapters.paper.results",
    "adapters.paper.summary",
)
"""Neither these nor what they import may import torch, so that they are tested in milliseconds."""


@dataclass(frozen=True)
class Import:
    """One imported module, by its full dotted name; `typing_only` if only type checkers see it."""

    target: str
    typing_only: bool
    line: int


Tree = dict[str, list[Import]]
"""Every module of the packages with what it imports."""


def read_tree(root: Path) -> Tree:
    """The imports of every module of the packages under `root`."""
    files = {module_name(p, root): p for package in PACKAGES for p in sorted((root / package).rglob("*.py"))}
    tree: Tree = {}
    for name, path in files.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        found = walk(ast.parse(path.read_text(), str(path)), package, typing_only=False)
        tree[name] = [Import(resolve(i.target, files), i.typing_only, i.line) for i in found]
    return tree


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def walk(node: ast.AST, package: str, *, typing_only: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, typing_only, child.lineno)
        elif isinstance(child, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - child.level + 1] if child.level else []
            source = ".".join([*above, *([child.module] if child.module else [])])
            for alias in child.names:
                yield Import(f"{source}.{alias.name}", typing_only, child.lineno)
        elif isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for part, only in ((child.body, True), (child.orelse, typing_only)):
                for statement in part:
                    holder = ast.Module(body=[statement], type_ignores=[])
                    yield from walk(holder, package, typing_only=only)
        else:
            yield from walk(child, package, typing_only=typing_only)


def resolve(target: str, modules: Iterable[str]) -> str:
    """`service.core.Mode` is module service.core; a name of no module of ours stays as it is."""
    known = set(modules)
    name = target
    while name:
        if name in known:
            return name
        name = name.rpartition(".")[0]
    return target


def is_or_under(name: str, pattern: str) -> bool:
    """True if a dotted name is a package or inside it; with a star at its end, `pattern` is a prefix."""
    if pattern.endswith(".*"):
        pattern = pattern[:-2]
    elif pattern.endswith("*"):
        return name.startswith(pattern[:-1])
    return name == pattern or name.startswith(pattern + ".")


def breaches(tree: Tree) -> list[str]:
    """Every breach of the rules, in words."""
    return [
        *library_breaches(tree),
        *third_party_breaches(tree),
        *layer_breaches(tree),
        *torch_breaches(tree),
        *cycles(tree),
        *(f"{name}: say what is in it; no module is called utils" for name in tree if name.split(".")[-1] == "utils"),
    ]


def library_breaches(tree: Tree) -> Iterator[str]:
    for name, imports in tree.items():
        for i in imports:
            if is_or_under(name, "adapters") and is_or_under(i.target, "service"):
                yield f"{name}:{i.line} imports {i.target}: the library never imports the service"


def third_party_breaches(tree: Tree) -> Iterator[str]:
    for name, imports in tree.items():
        for i in imports:
            allowed = MAY_IMPORT.get(i.target.split(".")[0])
            if allowed is not None and not any(is_or_under(name, pattern) for pattern in allowed):
                yield f"{name}:{i.line} imports {i.target}: only {', '.join(allowed) or 'what is not shipped'} may"


def layer_breaches(tree: Tree) -> Iterator[str]:
    layer_of = {f"{folder}.{module}": layer for layer, folder, modules in LAYERS for module in modules.split()}
    folders = {folder for _, folder, _ in LAYERS}
    place = {name: number for number, name in enumerate(layer_of)}
    for name, imports in tree.items():
        own = service_module(name, folders)
        if own is None:
            continue
        if own not in place:
            yield f"{name} has no place in LAYERS of {Path(__file__).name}: add it to the layer it belongs to"
            continue
        for i in imports:
            target = service_module(i.target, folders)
            if target in place and place[target] > place[own]:
                yield f"{name}:{i.line} ({layer_of[own]}) imports {i.target} ({layer_of[target]}): imports run downward"


def service_module(name: str, folders: Iterable[str]) -> str | None:
    """`name` if it is a module of the service; None outside it and for its folders, which hold nothing themselves."""
    return name if is_or_under(name, "service") and name not in folders else None


def torch_breaches(tree: Tree) -> Iterator[str]:
    for name in WITHOUT_TORCH:
        trail = way_to_torch(name, tree, seen=set())
        if trail is not None:
            yield f"{name} imports torch by way of {' -> '.join(trail)}: it is tested without torch"


def way_to_torch(name: str, tree: Tree, seen: set[str]) -> list[str] | None:
    if name.split(".")[0] in ("torch", "transformers", "safetensors"):
        return [name]
    if name in seen:
        return None
    seen.add(name)
    for target in run_time_imports(name, tree):
        trail = way_to_torch(target, tree, seen)
        if trail is not None:
            return [name, *trail]
    return None


def run_time_imports(name: str, tree: Tree) -> Iterator[str]:
    """What is imported when `name` is: its own imports, and the packages it is in."""
    parent = name.rpartition(".")[0]
    if parent in tree:
        yield parent
    yield from (i.target for i in tree.get(name, ()) if not i.typing_only)


def cycles(tree: Tree) -> Iterator[str]:
    """Import cycles among our modules, also those that a function closes; an import for type checkers alone closes none."""
    done: set[str] = set()
    path: list[str] = []

    def visit(name: str) -> Iterator[str]:
        if name in path:
            yield f"import cycle: {' -> '.join([*path[path.index(name) :], name])}"
            return
        if name in done:
            return
        path.append(name)
        for i in tree[name]:
            if i.target in tree and i.target != name and not i.typing_only:
                yield from visit(i.target)
        path.pop()
        done.add(name)

    for name in tree:
        yield from visit(name)


def test_the_project_keeps_its_import_rules() -> None:
    tree = read_tree(ROOT)
    assert tree, "no module was found"
    assert not breaches(tree), "\n" + "\n".join(breaches(tree))


@pytest.mark.parametrize(
    ("module", "source", "said"),
    [
        ("adapters.store", "from service.core import Mode", "adapters.store:1 imports service.core"),
        ("adapters.store", "import fastapi", "adapters.store:1 imports fastapi"),
        ("service.engine.engine", "from fastapi import FastAPI", "service.engine.engine:1 imports fastapi.FastAPI"),
        ("service.http.routes.ops", "import uvicorn.config", "service.http.routes.ops:1 imports uvicorn.config"),
        ("adapters.checkpoint", "def f():\n    import peft", "adapters.checkpoint:2 imports peft"),
        ("service.demo", "from tests.fake_engine import FakeEngine", "service.demo:1 imports tests.fake_engine"),
        ("service.engine.scheduler", "import torch", "service.engine.scheduler imports torch"),
        ("service.engine.scheduler", "from adapters import heavy", "service.engine.scheduler -> adapters.heavy -> torch"),
        ("service.engine.blocks", "from service.engine.engine import Engine", "service.engine.blocks:1 (bookkeeping) imports"),
        ("service.engine.lora", "from . import runner", "service.engine.lora:1 (tensors) imports service.engine.runner"),
        ("service.mystery", "", "service.mystery has no place in LAYERS"),
        ("adapters.one", "from adapters import two", "import cycle: adapters.one -> adapters.two -> adapters.one"),
        (
            "adapters.one",
            "def f():\n    from adapters import two",
            "import cycle: adapters.one -> adapters.two -> adapters.one",
        ),
        ("adapters.utils", "", "adapters.utils: say what is in it"),
    ],
)
def test_a_breach_is_found(tmp_path: Path, module: str, source: str, said: str) -> None:
    lay_out(tmp_path, {module: source})
    found = breaches(read_tree(tmp_path))
    assert any(said in breach for breach in found), found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("service.core", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        (
            "service.http.routes.generate",
            "from fastapi import APIRouter\nimport service.engine.engine",
        ),
        ("service.engine.engine", "import torch\nfrom service.engine.runner import Runner"),
        ("adapters.training.trainer", "import peft"),
        ("adapters.demo.recipe", "from peft import LoraConfig"),
    ],
)
def test_what_is_allowed_is_no_breach(tmp_path: Path, module: str, source: str) -> None:
    lay_out(tmp_path, {module: source})
    assert breaches(read_tree(tmp_path)) == []


def lay_out(root: Path, sources: dict[str, str]) -> None:
    """A small project that keeps the rules, and the given modules on top of it."""
    sound = {
        "adapters.__init__": "",
        "adapters.heavy": "import torch",
        "adapters.two": "import adapters.one",
        "adapters.one": "",
        "adapters.demo.__init__": "",
        "service.__init__": "",
        "service.engine.__init__": "",
        "service.http.__init__": "",
        "service.core": "",
        "service.engine.runner": "import torch",
        "service.engine.engine": "from service.engine.runner import Runner",
        **dict.fromkeys(WITHOUT_TORCH, ""),
    }
    for module, source in {**sound, **sources}.items():
        path = root.joinpath(*module.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
