"""Where a process computes. One process takes the first GPU where there is one, else the CPU."""

import torch

from wanloom.config import UserError


def pick_device(name: str | None = None) -> torch.device:
    """The device of this process: the one asked for, or the first GPU (CUDA_VISIBLE_DEVICES hides some), or the CPU.

    Raises UserError when the one asked for is none, or cannot be used.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"The device '{name}' cannot be used: there is no GPU that torch can use. Leave --device out.")
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()  # "meta" is a device too, but nothing comes back from it
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without that device
        raise UserError(f"The device '{name}' cannot be used: {str(error).splitlines()[0]}") from error
    return device
