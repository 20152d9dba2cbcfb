"""What several tests need: few threads, and a small random WanPipeline folder.

`tiny_pipeline` has random weights everywhere (no zero head, no identity latents statistics, no all-zero embedding), so
that a swapped, forgotten or wrongly scaled part shows. It is made once per test session and must not be written to.
"""

import os
import signal
import string
from pathlib import Path

import pytest
import torch

# the work is tiny: more threads only wait for each other, and one thread adds in one order
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)
# below nohup or in the background of a script these are ignored, and so in every process that a test starts
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

SEED = 1234
TEXT_DIM = 64
WORDS = """
a the of on in and is it its that across clip short shape form something red green blue yellow purple white circle
square triangle moves drifts slides travels going glides left right up down upwards downwards to dark background
painted slowly cat dog runs through snow
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is not said to be slow: `-m quick` is all that may run after every change."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent / "layouts"):
            item.add_marker("layouts")
        elif item.get_closest_marker("slow") is None:
            item.add_marker("quick")


@pytest.fixture(autouse=True)
def one_thread_afterwards():
    """Two threads add in another order, and tests of equal bits that come later would fail in the place of this one."""
    yield
    found = torch.get_num_threads()
    torch.set_num_threads(1)
    assert found == 1


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Matrices with gain 1, vectors near 1 (`.weight`, `.gamma`) or near 0 (biases), in the order of the names."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("gamma") or (parameter.dim() == 1 and name.endswith("weight")):
                parameter.copy_(1 + 0.1 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(0.05 * noise)
            elif "embed_tokens" in name or "shared" in name or "scale_shift_table" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)


def build_tokenizer():
    """A T5 tokenizer of whole words and single ASCII characters; other characters become `<unk>`."""
    from transformers import T5TokenizerFast

    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -4.0)]
    vocab += [(f"\u2581{word}", -5.0) for word in WORDS.split() if len(word) > 1]
    vocab += [(letter, -9.0) for letter in string.printable.strip()]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=512)


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a complete small WanPipeline in diffusers layout, all weights random; read-only by agreement."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = build_tokenizer()
    text_config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=96,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=True,  # pyright: ignore[reportCallIssue]  # which goes to the class below it
        dropout_rate=0.0,
    )
    text_encoder = UMT5EncoderModel(text_config).eval()
    statistics = torch.Generator().manual_seed(SEED)
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=16,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        latents_mean=(0.5 * torch.randn(16, generator=statistics)).tolist(),
        latents_std=(0.6 + torch.rand(16, generator=statistics)).tolist(),
    ).eval()
    transformer = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=16,
        out_channels=16,
        text_dim=TEXT_DIM,
        freq_dim=256,
        ffn_dim=256,
        num_layers=2,
        rope_max_seq_len=1024,
    ).eval()
    for number, module in enumerate((text_encoder, vae, transformer)):
        randomise(module, SEED + number)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )
    folder = tmp_path_factory.mktemp("pipeline") / "tiny"
    WanPipeline(tokenizer, text_encoder, vae, scheduler, transformer=transformer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def wan22_pipeline(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_pipeline`, with a VAE as TI2V-5B has it: 4x16x16 with 48 channels; read-only by agreement."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    statistics = torch.Generator().manual_seed(SEED)
    vae = AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=48,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=(0.5 * torch.randn(48, generator=statistics)).tolist(),
        latents_std=(0.6 + torch.rand(48, generator=statistics)).tolist(),
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    ).eval()
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=48,
        out_channels=48,
        text_dim=TEXT_DIM,
        freq_dim=256,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=64,
    ).eval()
    folder = tmp_path_factory.mktemp("wan22") / "tiny"
    folder.mkdir()
    for number, (name, module) in enumerate({"vae": vae, "transformer": transformer}.items()):
        randomise(module, SEED + number)
        module.save_pretrained(folder / name)
    for name in ("text_encoder", "tokenizer", "scheduler"):
        (folder / name).symlink_to(tiny_pipeline / name)
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A prepared folder of random latents (clips and images of three sizes, text_dim 8), and the latents by key."""
    from wanloom.data.tar import END, tar_pair
    from wanloom.files import write_atomic

    folder = tmp_path_factory.mktemp("prepared")
    generator = torch.Generator().manual_seed(SEED)
    latents = {}
    for split, count in (("train", 12), ("val", 3)):
        pairs = []
        for i in range(count):
            shape = ((16, 5, 8, 8), (16, 1, 8, 8), (16, 2, 4, 8))[i % 3]
            key = f"{split}-{i:03d}"
            latents[key] = torch.randn(shape, generator=generator).bfloat16()
            text = torch.randn(2 + i % 4, 8, generator=generator)
            tensors = {"latents": latents[key], "text": text}
            pairs.append(tar_pair(key, tensors, {"caption": f"clip {i}", "source": f"{i}.mp4"}))
        write_atomic(folder / split / "shard-000000.tar", [*pairs, END])
    return folder, latents
