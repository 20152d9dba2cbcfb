"""What a latent stands for is asked of the geometry: no file beside it computes with the VAE's factors."""

import ast
import re

import pytest
from sources import FILES, PACKAGE, nodes_of

FACTORS = {4, 8, 16, 48}  # of the VAEs of Wan: frames, pixels, channels
SIZE = re.compile(r"(?:\b|_)(?:heights?|widths?|frames|rows|cols|columns|sides?|channels)\b|\bshape\[")
KNOWN = ("codecs/", "variants.py", "geometry.py")
NAMES = {"channels", "latent_channels", "pixels"}


def is_factor(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) is int and node.value in FACTORS


def stray_factors(text: str) -> list[str]:
    """Products, quotients and remainders of a size and a factor, and channels that are a number."""
    found = []
    for node in nodes_of(text):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.FloorDiv | ast.Div | ast.Mod | ast.Mult):
            for number, other in ((node.right, node.left), (node.left, node.right)):
                if is_factor(number) and SIZE.search(ast.unparse(other)):
                    found.append(f"line {node.lineno}: {ast.unparse(node)}")
        if isinstance(node, ast.keyword) and node.arg in NAMES and is_factor(node.value):
            found.append(f"line {node.value.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if not str(path.relative_to(PACKAGE)).startswith(KNOWN)],
    ids=lambda p: str(p.relative_to(PACKAGE)),
)
def test_a_file_asks_for_the_geometry(path):
    assert stray_factors(path.read_text()) == []


@pytest.mark.parametrize(
    "text",
    [
        "latents = (frames - 1) // 4 + 1",
        "x = height // 8 * rows",
        "if clip.width % 16: pass",
        "f(4 * (num_frames - 1) + 1)",
        "shape = 8 * columns",
        "rows = latents.shape[-1] // 8",
        "Geometry(pixels=p, channels=16)",
    ],
)
def test_a_stray_factor_is_found(text):
    assert stray_factors(text) != []


def test_what_is_none_is_not_found():
    assert stray_factors("x = size // 8; y = batch * 4; z = height // geometry.pixels; w = frames[:16]") == []
