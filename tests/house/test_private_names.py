"""Names of torch that it does not promise are in one file."""

import ast

import pytest
from sources import FILES, PACKAGE, nodes_of

OTHERS = [path for path in FILES if path.name != "torch_private.py"]


def is_private(path: str) -> bool:
    return any(part.startswith("_") and not part.endswith("__") for part in path.split("."))


def private_names(text: str) -> list[str]:
    """The private names of torch in a file: imported, or looked up in what is imported or follows from it."""
    names: dict[str, str] = {}  # what a name of the file is in torch
    for node in nodes_of(text):
        if isinstance(node, ast.Import):
            names |= {(a.asname or a.name).split(".")[0]: a.name for a in node.names if a.name.split(".")[0] == "torch"}
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in nodes_of(text):
        if isinstance(node, ast.Assign) and ast.unparse(node.value).split(".")[0] in names:
            names |= {target.id: "torch" for target in node.targets if isinstance(target, ast.Name)}
    found = [name for name in names.values() if is_private(name)]
    for node in nodes_of(text):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            path = ast.unparse(node)
            found += [path] if path.split(".")[0] in names else []
    return found


@pytest.mark.parametrize("path", OTHERS, ids=lambda p: str(p.relative_to(PACKAGE)))
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
