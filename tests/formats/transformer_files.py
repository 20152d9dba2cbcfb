"""Names of the files of a transformer as diffusers writes it."""

NAME = "diffusion_pytorch_model"
FILE = f"{NAME}.safetensors"
INDEX = f"{FILE}.index.json"
