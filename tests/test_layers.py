"""Who imports whom: read from the source, every import at any depth of a function included."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "graft"

STAGES = (
    "data",
    "rollout",
    "segments",
    "grading",
    "critics",
    "credit",
    "objective",
    "update",
    "state",
    "report",
)
"""In the order in which a prompt meets them. A stage imports no later one."""

RECORDS = {"tree", "types", "kept", "errors", "section"}
"""What flows, what goes wrong, and the base of all settings: anybody may import them."""

MATHS = {"credit", "objective"}
"""Pure tensors."""

BELOW = {"kernels", "platform"}
"""Know no stage, and nothing of the run."""

LARGE = {"torch", "transformers", "peft", "safetensors", "gguf", "matplotlib", "datasets"}
"""Libraries that take their time to be imported."""


def modules() -> dict[str, Path]:
    """`a.b` -> file, relative to the package; a package itself by its folder's name."""
    return {
        ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
        for path in sorted(SOURCE.rglob("*.py"))
        if "new_task" not in path.parts  # a template that `graft init` copies
    }


def imports(path: Path, *, at_load: bool = False) -> set[str]:
    """Full names that a file imports; with `at_load` only those that importing it runs."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        late = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        )
        if not (at_load and late):
            waiting.extend(ast.iter_child_nodes(node))
    return found


MODULES = modules()

CREDITING = {"algorithm_settings", "credit", "crediting", "objective", "tree", "types"}
"""What turns scores into advantages, node by node, may import these."""

LIGHT_CRITICS = [f"critics.{name}" for name in ("settings", "equations", "judge", "grader", "function")]
"""The others sample, or hold a model of their own."""


def own_imports(name: str) -> set[str]:
    """The modules of graft that a module imports, without `graft.`: `update.packing`."""
    found = set()
    for full in imports(MODULES[name]):
        if full == "graft" or not full.startswith("graft."):
            continue
        inside = full.removeprefix("graft.")
        while inside not in MODULES and "." in inside:  # a name in a module, not a module
            inside = inside.rpartition(".")[0]
        found.add(inside)
    return found


def part(module: str) -> str:
    """`update.packing` -> `update`."""
    return module.partition(".")[0]


def of(*parts: str) -> list[str]:
    return [name for name in MODULES if part(name) in parts]


def test_the_source_was_read():
    assert len(MODULES) > 60
    assert own_imports("update.step") >= {"losses", "objective.reduce", "update.packing", "update.policy"}
    assert "torch" in imports(MODULES["update.step"])
    assert {part(name) for name in MODULES} >= {"data", "rollout", "grading", "update", "state", "report"}


@pytest.mark.parametrize("name", of(*MATHS))
def test_the_maths_knows_tensors_and_records_alone(name):
    assert {part(full) for full in imports(MODULES[name])} <= {
        *("torch", "jaxtyping", "graft"),
        *sys.stdlib_module_names,
    }
    allowed = {"tree", "types", part(name)}
    assert {part(other) for other in own_imports(name)} <= allowed


@pytest.mark.parametrize("name", of(*STAGES))
def test_a_stage_imports_no_later_one_and_nothing_above(name):
    earlier = set(STAGES[: STAGES.index(part(name)) + 1])
    allowed = earlier | RECORDS | BELOW
    if part(name) == "update":
        allowed |= {"losses"}  # which stands beside credit and objective
    assert {part(other) for other in own_imports(name)} <= allowed


@pytest.mark.parametrize("name", of(*BELOW))
def test_what_is_below_knows_no_stage(name):
    assert {part(other) for other in own_imports(name)} <= BELOW | {"types", "errors"}


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("errors", set()),
        ("types", set()),
        ("version", set()),
        ("kept", {"types", "errors"}),
        ("tree", {"types", "kept", "errors"}),
        ("section", set()),
        ("algorithm_parts", {"section"}),
        ("algorithm_rollouts", {"algorithm_parts", "critics", "section", "segments"}),
        (
            "algorithm_settings",
            {"algorithm_parts", "algorithm_rollouts", "critics", "section", "segments"},
        ),
        (
            "config",
            {"algorithm_parts", "algorithm_settings", "grading", "section"},
        ),  # a grader is checked with the settings
        ("config_file", {"algorithm_settings", "config", "errors", "section"}),
        ("graders", {"config", "data", "errors", "grading", "pull", "types"}),
        ("named_functions", {"config", "data", "errors", "graders", "grading"}),
        ("score_notes", {"algorithm_settings", "config", "critics", "graders", "grading"}),
        ("interrupt", set()),
        ("memory", {"errors"}),
        (
            "algorithms",
            {"crediting", "crediting_rollouts", "crediting_segments", "crediting_trees", "losses"},
        ),
        ("crediting", {"algorithm_settings", "credit", "objective", "tree", "types"}),
        ("crediting_facts", {"crediting", "types"}),
        ("crediting_segments", CREDITING | {"crediting_facts"}),
        ("crediting_trees", CREDITING | {"crediting_facts"}),
        (
            "crediting_rollouts",
            {"algorithm_rollouts", "credit", "crediting", "crediting_trees", "types"},
        ),
        ("losses", {"algorithm_parts", "algorithm_rollouts", "algorithm_settings", "credit", "objective"}),
        ("collect", {"tree", "types"}),
        ("pull", {"errors", "gguf_model"}),
        ("gguf_model", {"errors"}),
        ("model", {"errors", "gguf_model", "pull", "data"}),
        ("phases", {"algorithm_parts", "algorithm_settings", "config", "report"}),
        (
            "held_out_loss",
            {"algorithm_settings", "crediting", "losses", "objective", "tree", "types", "update"},
        ),
        ("evaluation", {"grading", "rollout", "tree", "types"}),
        (
            "step_records",
            {
                *("collect", "crediting", "evaluation", "objective"),
                *("report", "thoughts", "tree", "types", "update"),
            },
        ),
    ],
)
def test_modules_beside_the_stages(name, allowed):
    assert {part(other) for other in own_imports(name)} <= allowed


MANY = {
    "loop",
    "assemble",
    "runs",
    "thoughts",
    "drawing",
    "trainer",
    "trial",
    "api",
    "saved_runs",
    "step_records",
    "cli",
}
"""Those that put the stages together."""


def test_only_the_loop_and_what_is_above_it_know_many_stages():
    def stages_of(name: str) -> set[str]:
        return {part(other) for other in own_imports(name)} & set(STAGES) - {part(name)}

    many = {part(name) for name in MODULES if part(name) not in STAGES and len(stages_of(name)) > 2}
    assert "loop" in many
    assert many <= MANY


def test_nobody_below_imports_the_loop():
    above = {
        "loop",
        "assemble",
        "drawing",
        "measuring",
        "runs",
        "trainer",
        "trial",
        "trial_sampling",
        "trial_update",
        "api",
        "comparison",
        "cli",
    }
    for name in MODULES:
        if part(name) not in above | {"", "__main__"}:  # these hand out the public names and the command
            assert not {part(other) for other in own_imports(name)} & above, name


@pytest.mark.parametrize(
    "name",
    [
        *of("data", "segments", "grading"),
        *LIGHT_CRITICS,
        *sorted(RECORDS),
        "config",
        "config_file",
        "interrupt",
        "version",
    ],
)
def test_records_settings_and_rows_load_nothing_large(name):
    waiting, seen = [name], set()
    while waiting:
        current = waiting.pop()
        seen.add(current)
        outside = {part(full) for full in imports(MODULES[current], at_load=True)}
        assert not outside & LARGE, f"{name} imports {sorted(outside & LARGE)} by {current}"
        waiting.extend(own_imports(current) - seen)


def test_the_package_itself_is_light():
    code = "import sys, graft; print([m for m in ('torch', 'numpy', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
