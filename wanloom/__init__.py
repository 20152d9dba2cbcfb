"""wanloom trains, fine-tunes and samples the Wan video diffusion models."""

__version__ = "0.1.0"
