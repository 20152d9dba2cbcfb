"""Names of torch that it does not promise are in one file."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "wanloom"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "torch_private.py")


def is_private(path: str) -> bool:
    return any(part.startswith("_") and not part.endswith("__") for part in path.split("."))


def private_names(text: str) -> list[str]:
    """The private names of torch in a file: imported, or looked up in what is imported or follows from it."""
    tree = ast.parse(text)
    names: dict[str, str] = {}  # what a name of the file is in torch
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {(a.asname or a.name).split(".")[0]: a.name for a in node.names if a.name.split(".")[0] == "torch"}
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and ast.unparse(node.value).split(".")[0] in names:
            names |= {target.id: "torch" for target in node.targets if isinstance(target, ast.Name)}
    found = [name for name in names.values() if is_private(name)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            path = ast.unparse(node)
            found += [path] if path.split(".")[0] in names else []
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_other_file_has_a_private_name_of_torch(path):
    assert private_names(path.read_text()) == []


def test_the_check_of_private_names_can_fail():
    for text in (
        "from torch._inductor import config",
        "import torch._dynamo",
        "from torch.fx.experimental import _config as symbols",
        "import torch.distributed as dist\ndist.distributed_c10d._get_default_store()",
        "import torch\ndef f():\n    return torch.cpu._is_avx512_bf16_supported()",
        "import torch\naten = torch.ops.aten\naten._scaled_dot_product_flash_attention(1)",
    ):
        assert private_names(text) != [], text
    assert private_names("import torch\nself._x = torch.zeros(3).__len__()\nother._y") == []
    assert private_names((PACKAGE / "torch_private.py").read_text()) != []
