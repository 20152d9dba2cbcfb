"""Make the tiny Wan pipeline that ships in wanloom/assets/tiny.

    python tools/build_tiny.py vae  --work build/tiny          # 35 minutes on 2 shared cores; goes on where stopped
    python tools/build_tiny.py text --work build/tiny          # a minute or two
    python tools/build_tiny.py pipeline --work build/tiny --out wanloom/assets/tiny

`vae` trains an AutoencoderKLWan of small widths on the clips of wanloom.demo.shapes: single frames first, then clips
of 17 frames in small cut-outs, then whole pictures of 9 to 49 frames, because a causal VAE that saw only short clips
falls apart on long ones. `text` makes a tokenizer and trains a UMT5 encoder to fill in masked words and to name, from
any one state, all words of its sentence. `pipeline` measures the latents' mean and standard deviation and writes the
diffusers layout.
Every draw comes from the seed and the step, so a run that is stopped and started again gives the same weights.
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanRMS_norm
from safetensors.torch import load_file, save_file
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from wanloom.demo import shapes
from wanloom.formats.transformer import load_dit, save_weights
from wanloom.model.dit import WanDiT
from wanloom.model.init import init_weights
from wanloom.variants import VARIANTS

SEED = 20210
HELD_OUT_SEED = 77
VAE_CONFIG = {
    "base_dim": 16,
    "z_dim": 16,
    "dim_mult": [1, 2, 3, 3],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
}
# (name, steps, clips per step, frames to choose from, side of the square cut from 64x64 pictures, learning rate)
STAGES = (
    ("frames", 700, 16, (1,), 64, 2e-3),
    ("short", 900, 8, (17,), 32, 1.2e-3),
    ("whole", 340, 4, (17, 17, 33, 17, 9, 17, 49, 17), 64, 4e-4),
)
SIDE = 64
KL_WEIGHT = 3e-5
# how `wanloom generate` samples it when nothing else is asked for: as the demo does
GENERATE = {"height": 64, "width": 64, "frames": 17, "steps": 20, "guidance": 2.0, "shift": 3.0}
SPACE = "\u2581"  # how sentencepiece writes the start of a word
FREQUENT = """
a an the and or of in on at to from with by for over under into out up down near behind front between through across
along around above below is are was be has have it its he she they his her their this that there one two three four
some many several while as then very slowly quickly gently
man woman boy girl child person people dog cat bird horse rabbit cow car bus train taxi bicycle boat plane road street
city house building room window door table chair tree flower grass field forest mountain river lake sea ocean beach
sky cloud sun moon star night day morning evening light shadow water fire snow rain wind stone sand glass wood metal
face hand arm leg head eye hair mouth suit hat shirt dress tie
red orange yellow green blue purple pink brown black white grey gray dark bright pale deep warm cold soft
big small large little long short tall wide narrow old young new round flat empty full fast slow
walks runs moves turns looks sits stands talks smiles jumps flies falls swims drives rides opens closes holds
walking running moving turning looking sitting standing talking smiling jumping flying falling driving
camera clip video film scene view shot close background foreground left right upwards downwards forward
animated cartoon blurred focus depth meadow traffic indoors outdoors
"""
VOCABULARY = sorted(
    set(FREQUENT.split())
    | {word.capitalize() for word in ("a", "an", "the", "on", "in", "something", "close", "city")}
    | set(shapes.COLORS)
    | set(shapes.SHAPES)
    | {word.strip(".,") for text in shapes.TEMPLATES for word in text.split() if "{" not in word}
)


def random_scene(rng: np.random.Generator, frames: int, side: int) -> np.ndarray:
    """Several shapes of any colour on a gradient: more than the demo shows, so that the VAE is not only good for it."""
    grid = np.mgrid[0:side, 0:side] + 0.5
    corners = rng.uniform(0, 255, (3, 3))
    ramp = (grid[0] / side)[..., None], (grid[1] / side)[..., None]
    picture = corners[0] + (corners[1] - corners[0]) * ramp[0] * 0.7 + (corners[2] - corners[0]) * ramp[1] * 0.7
    out = np.repeat(np.clip(picture, 0, 255)[None], frames, 0)
    for _ in range(rng.integers(1, 5)):
        radius = rng.uniform(0.08, 0.3) * side
        start, end = rng.uniform(0, side, 2), rng.uniform(0, side, 2)
        color, shape = rng.uniform(0, 255, 3), shapes.SHAPES[rng.integers(3)]
        for i in range(frames):
            centre = start + (end - start) * i / 48
            mask = shapes.coverage(shape, grid[0] - centre[0], grid[1] - centre[1], radius)[..., None]
            out[i] = out[i] * (1 - mask) + color * mask
    return np.round(out).astype(np.uint8)


def build_batch(step: int, count: int, frames: int, side: int, others: float) -> torch.Tensor:
    """Clips `(B, 3, F, side, side)` in [-1, 1], cut from pictures of SIDE; `others` of them are `random_scene`s."""
    rng = np.random.default_rng([SEED, step])
    clips = []
    for _ in range(count):
        if rng.random() < others:
            clip = random_scene(rng, frames, SIDE)
        else:
            scene = shapes.SCENES[rng.integers(len(shapes.SCENES))]
            start = 0 if frames > 1 else int(rng.integers(17))
            clip = shapes.render(scene, rng, max(frames, 17), SIDE, SIDE)[start : start + frames]
        moving = np.ptp(clip.astype(int), axis=(0, 3)) > 60  # cut around a pixel where something happens
        places = np.argwhere(moving) if moving.any() else np.argwhere(~moving)
        row, col = np.clip(places[rng.integers(len(places))] - rng.integers(0, side, 2), 0, SIDE - side)
        clips.append(clip[:, row : row + side, col : col + side])
    return to_model(np.stack(clips))


def to_model(clips: np.ndarray) -> torch.Tensor:
    """`(B, F, H, W, 3)` uint8 to `(B, 3, F, H, W)` in [-1, 1]."""
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float().div(127.5).sub(1)


def held_out(count: int, frames: int) -> torch.Tensor:
    """Demo clips of another seed, of all scenes in turn."""
    step = len(shapes.SCENES) // count if count < len(shapes.SCENES) else 1
    clips = [shapes.build_clip(HELD_OUT_SEED, i * step, shapes.SCENES, frames)[0] for i in range(count)]
    return to_model(np.stack(clips))


@torch.no_grad()
def psnr(vae: AutoencoderKLWan, clips: torch.Tensor) -> float:
    """Mean over clips of the PSNR in dB, for pictures in [0, 1], through the posterior mean."""
    values = []
    for clip in clips.split(4):
        back = vae.decode(vae.encode(clip).latent_dist.mode()).sample.clamp(-1, 1)
        error = ((back - clip) / 2).square().mean(dim=(1, 2, 3, 4))
        values.append(-10 * torch.log10(error))
    return torch.cat(values).mean().item()


def schedule() -> Iterator[tuple[int, int, int, int, float]]:
    """(step, clips, frames, side, learning rate) of every step; cosine inside each stage, with a warm-up."""
    step = 0
    for _, steps, count, lengths, side, lr in STAGES:
        for i in range(steps):
            warm = min(1.0, (i + 1) / 50)
            decay = 0.5 * (1 + math.cos(math.pi * i / steps)) * 0.95 + 0.05
            yield step, count, lengths[i % len(lengths)], side, lr * warm * decay
            step += 1


def quick_norm(self: WanRMS_norm, x: torch.Tensor) -> torch.Tensor:
    """WanRMS_norm's formula without the vector norm over a strided dimension, a quarter of a step on a CPU."""
    length = x.square().sum(1, keepdim=True).clamp_min(1e-24).rsqrt()
    return x * length * self.scale * self.gamma + self.bias


@torch.no_grad()
def inflate(vae: AutoencoderKLWan) -> None:
    """Make a VAE that has only seen single frames one that treats every frame of a clip as it treats those.

    Single frames train only the last tap in time of each causal convolution: the others become zero, and the
    convolutions that change the frame rate take the newest frame or repeat it.
    """
    for name, module in vae.named_modules():
        if isinstance(module, WanCausalConv3d) and module.kernel_size[0] == 3:
            if name.endswith("time_conv"):
                module.weight.zero_()
                module.bias.zero_()
                width = module.weight.shape[1]
                module.weight[:, :, 2, 0, 0] = torch.eye(width).repeat(module.weight.shape[0] // width, 1)
            else:
                module.weight[:, :, :2] = 0


def train_vae(work: Path) -> None:
    """Train and leave `vae.safetensors`; the state is kept every 50 steps."""
    torch.manual_seed(SEED)
    WanRMS_norm.forward = quick_norm
    vae = AutoencoderKLWan(**VAE_CONFIG)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    state_file, done = work / "vae_state.pt", 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
    total, began = sum(s[1] for s in STAGES), time.monotonic()
    for step, count, frames, side, lr in schedule():
        if step < done:
            continue
        if step == STAGES[0][1]:
            inflate(vae)
            print(f"inflated: held-out {psnr(vae, held_out(8, 17)):.2f} dB", flush=True)
        for group in optimizer.param_groups:
            group["lr"] = lr
        clips = build_batch(step, count, frames, side, others=0.15 if side < SIDE or frames == 1 else 0.05)
        posterior = vae.encode(clips).latent_dist
        generator = torch.Generator().manual_seed(SEED * 100_000 + step)
        sample = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        back = vae.decode(sample).sample
        error = F.mse_loss(back, clips) + 0.05 * F.l1_loss(back, clips)
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        optimizer.zero_grad()
        (error + KL_WEIGHT * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0 or step + 1 == total:
            clip_psnr = psnr(vae, held_out(8, 17)) if frames > 1 else psnr(vae, held_out(8, 17)[:, :, :1])
            print(
                f"step {step + 1}/{total} frames {frames} loss {error.item():.5f} kl {kl.item():.2f} "
                f"held-out {clip_psnr:.2f} dB {(time.monotonic() - began) / 60:.1f} min",
                flush=True,
            )
            temporary = state_file.with_suffix(".tmp")
            torch.save({"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, temporary)
            temporary.replace(state_file)
    save_file(vae.state_dict(), work / "vae.safetensors")


def build_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer that knows the words below and spells everything else in single characters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (SPACE, -4.0)]
    pieces += [(SPACE + word, -6.0) for word in VOCABULARY]
    pieces += [(char, -9.0) for char in map(chr, range(33, 127)) if char not in "<>"]
    pieces += [(char, -9.5) for char in "<>"]
    return T5Tokenizer(vocab=pieces, extra_ids=0, additional_special_tokens=[], model_max_length=512)


def sentence(rng: np.random.Generator) -> str:
    """A caption of the demo, or words in any order, so that captions of other kinds get useful states too."""
    if rng.random() < 0.5:
        scene = shapes.SCENES[rng.integers(len(shapes.SCENES))]
        return scene.caption(int(rng.integers(len(shapes.TEMPLATES))))
    return " ".join(rng.choice(VOCABULARY, rng.integers(1, 16)))


def train_text(work: Path) -> None:
    """Train and leave `text_encoder/` and `tokenizer/`; prints how many words one state still knows."""
    torch.manual_seed(SEED)
    tokenizer = build_tokenizer()
    config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    encoder = UMT5EncoderModel(config)
    name, bag = torch.nn.Linear(64, len(tokenizer)), torch.nn.Linear(64, len(tokenizer))
    parameters = [*encoder.parameters(), *name.parameters(), *bag.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=1e-3)
    steps, mask_id = 3000, tokenizer.unk_token_id
    for step in range(steps):
        rng = np.random.default_rng([SEED, 1, step])
        batch = tokenizer([sentence(rng) for _ in range(48)], padding=True, return_tensors="pt")
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        hidden = torch.from_numpy(rng.random(ids.shape) < 0.15) & mask
        states = encoder(input_ids=ids.masked_fill(hidden, mask_id), attention_mask=mask.long()).last_hidden_state
        words = torch.zeros(ids.shape[0], len(tokenizer)).scatter_(1, ids, 1.0)[:, None].expand(-1, ids.shape[1], -1)
        fill = F.cross_entropy(name(states)[mask], ids[mask])
        bag_loss = F.binary_cross_entropy_with_logits(bag(states)[mask], words[mask])
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 100) * (0.5 * (1 + math.cos(math.pi * step / steps)) + 0.01)
        optimizer.zero_grad()
        (fill + 20 * bag_loss).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % 500 == 0:
            found = ((bag(states)[mask] > 0) == (words[mask] > 0)).all(-1).float().mean()
            print(
                f"step {step + 1} fill {fill.item():.3f} bag {bag_loss.item():.4f} whole sentences {found:.3f}",
                flush=True,
            )
    encoder.eval().save_pretrained(work / "text_encoder")
    tokenizer.save_pretrained(work / "tokenizer")


def write_pipeline(work: Path, out: Path, transformer: Path | None) -> None:
    """Put the parts together in diffusers layout; without `transformer` its weights are random.

    VAE and transformer are stored in fp16 to keep the package small; they are loaded and run in fp32.
    """
    vae = AutoencoderKLWan(**VAE_CONFIG)
    vae.load_state_dict(load_file(work / "vae.safetensors"))
    clips = to_model(np.stack([shapes.build_clip(SEED, i, shapes.SCENES)[0] for i in range(144)]))
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mode() for part in clips.split(8)])
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    vae.register_to_config(latents_mean=rounded(mean), latents_std=rounded(std))
    print(f"held-out {psnr(vae, held_out(36, 17)):.2f} dB at 17 frames, {psnr(vae, held_out(4, 81)):.2f} dB at 81")
    print(f"latents std {rounded(std)}")
    dit = WanDiT(VARIANTS["tiny"].shape)
    if transformer is None:
        init_weights(dit, SEED)
    else:
        dit = load_dit(transformer)
    shutil.rmtree(work / "transformer", ignore_errors=True)
    save_weights(dit.state_dict(), dit.config, work / "transformer")
    shutil.rmtree(out, ignore_errors=True)
    WanPipeline(
        tokenizer=T5Tokenizer.from_pretrained(work / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(work / "text_encoder"),
        vae=vae.half(),
        transformer=WanTransformer3DModel.from_pretrained(work / "transformer").half(),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        ),
    ).save_pretrained(out)
    (out / "wanloom.json").write_text(json.dumps({"generate": GENERATE}, indent=2, sort_keys=True) + "\n")
    print(f"{sum(f.stat().st_size for f in out.rglob('*') if f.is_file()) / 1e6:.2f} MB in {out}")


def rounded(values: torch.Tensor) -> list[float]:
    """Four digits behind the point, as the published config has them."""
    return [round(value, 4) for value in values.tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("vae", "text", "pipeline"))
    parser.add_argument("--work", type=Path, default=Path("build/tiny"))
    parser.add_argument("--out", type=Path, default=Path("wanloom/assets/tiny"))
    parser.add_argument("--transformer", type=Path, help="for `pipeline`: a trained one, as wanloom convert writes it")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    if arguments.part == "vae":
        train_vae(arguments.work)
    elif arguments.part == "text":
        train_text(arguments.work)
    else:
        write_pipeline(arguments.work, arguments.out, arguments.transformer)


if __name__ == "__main__":
    main()
