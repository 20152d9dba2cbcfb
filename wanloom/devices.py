"""What a device may be called; known without torch, so that a slip is told at once."""

import re

from wanloom.errors import UserError

NAME = re.compile(r"cpu|(cuda|mps|xpu)(:\d{1,3})?")


def check_device_name(name: str) -> None:
    """Raises UserError for a name that no device has."""
    if not NAME.fullmatch(name):
        raise UserError(f"There is no device '{name}': give cpu, cuda, or one GPU such as cuda:1.")
