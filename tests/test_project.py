"""The rules of the house, as tests: who may import what, and that importing is silent and light."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "visa_hf"
MODELING = sorted(path for path in (SOURCE / "modeling").glob("*.py") if path.name != "__init__.py")
ALLOWED_IN_MODELING = {"torch", "numpy", "PIL", "transformers", "huggingface_hub"} | set(sys.stdlib_module_names)


def imports_of(path: Path) -> list[tuple[ast.stmt, str, int]]:
    """Every import of a file: the statement, the module it names, the number of leading dots."""
    found: list[tuple[ast.stmt, str, int]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node, alias.name, 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node, node.module or "", node.level))
    return found


@pytest.mark.parametrize("path", MODELING, ids=lambda path: path.name)
def test_modeling_imports_only_what_a_hub_repository_has(path: Path) -> None:
    siblings = {sibling.stem for sibling in MODELING}
    for node, module, level in imports_of(path):
        where = f"{path.name}:{node.lineno}"
        if level:
            assert level == 1 and module in siblings, f"{where} must be `from .sibling import Name`"
        elif module.split(".")[0] == "av":
            assert path.name == "frame_source_visa.py", f"{where}: PyAV belongs in frame_source_visa.py"
        else:
            assert module.split(".")[0] in ALLOWED_IN_MODELING, f"{where} imports {module}"


@pytest.mark.parametrize("path", MODELING, ids=lambda path: path.name)
def test_no_line_of_modeling_looks_like_an_import_that_is_none(path: Path) -> None:
    """Transformers finds the files to copy by looking at lines, in docstrings too."""
    real = {node.lineno for node, _, level in imports_of(path) if level}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if re.match(r"\s*(from|import)\s+\.", line):
            assert number in real, f"{path.name}:{number}"


def test_data_sets_know_neither_model_nor_trainer() -> None:
    allowed = {
        "visa_hf",  # the package of the builders, by name
        "visa_hf.datasets_scripts",
        "visa_hf.rle",
        "visa_hf.yaml_files",
        "visa_hf.rendering",
        "visa_hf.modeling.frame_source_visa",
        "visa_hf.modeling.prompts_visa",
    }
    for path in (SOURCE / "datasets_scripts").glob("*.py"):
        for node, module, level in imports_of(path):
            is_ours = module.split(".")[0] == "visa_hf" and not module.startswith("visa_hf.datasets_scripts.")
            assert not is_ours or module in allowed, f"{path.name}:{node.lineno} imports {module}"
            assert level < 2, f"{path.name}:{node.lineno}"
            assert module.split(".")[0] not in ("transformers", "peft", "accelerate", "deepspeed"), path


def test_the_metrics_know_neither_model_nor_trainer() -> None:
    modules = {module for _, module, _ in imports_of(SOURCE / "evaluation" / "metrics.py")}
    assert not any(name.startswith(("visa_hf.modeling", "visa_hf.trainer", "transformers")) for name in modules)


def test_nobody_imports_the_command_line() -> None:
    for path in SOURCE.rglob("*.py"):
        modules = [module.split(".") for _, module, _ in imports_of(path)]
        assert path.name == "__main__.py" or all("cli" not in parts for parts in modules), path
        assert path.parent.name == "commands" or all("commands" not in parts for parts in modules), path


def test_import_is_silent_and_light() -> None:
    script = (
        "import sys, visa_hf\n"
        "heavy = {'datasets', 'evaluate', 'peft', 'deepspeed', 'av', 'cv2', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_exported_names_are_documented_names() -> None:
    import visa_hf

    documented = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = documented.split("## Public names")[1].split("\n## ")[0]
    assert set(visa_hf.__all__) == set(re.findall(r"^\| `(\w+)` \|", section, flags=re.M))
    for name in visa_hf.__all__:
        assert getattr(visa_hf, name).__doc__


def test_old_checkpoint_names_live_in_the_converter_only() -> None:
    old_names = re.compile(r"visual_model\.|vision_tower\.vision_tower|image_encoder\.|hidden_update|lora_A\.default")
    for path in SOURCE.rglob("*.py"):
        if path.name != "convert.py":
            assert not old_names.search(path.read_text(encoding="utf-8")), path
