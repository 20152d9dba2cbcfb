"""The table of `tools/mutants.py`: deliberate breaks of the numeric paths, and the tests that must notice each."""

from typing import NamedTuple

DIT = "tests/model/test_dit.py"
PACK = f"{DIT}::test_a_pack_equals_diffusers_on_each_sample_alone"
EPS = f"{DIT}::test_every_norm_has_the_eps_of_the_config"
ROUNDED = f"{DIT}::test_queries_and_keys_are_rounded_once_and_after_the_rotation"
SEEDS = f"{DIT}::test_every_seed_draws_other_weights"
COMPILED = "tests/parallel/test_compile.py"
STEP = "tests/train/test_step.py"
LOOP = "tests/train/test_loop.py"
LOSS = f"{STEP}::test_loss_and_every_gradient_equal_a_loop_over_diffusers"
RECORD = f"{LOOP}::test_a_record_is_of_all_steps_since_the_one_before"
GUIDED = "tests/sample/test_guidance.py::test_one_pack_equals_separate_calls"
PIPELINE = "tests/sample/test_generate.py::test_latents_and_frames_are_those_of_wan_pipeline"
EFFICIENT = "tests/model/test_attention.py::test_the_efficient_kernel"
ATTENDS = "tests/model/test_attention.py::test_equals_a_plain_loop_with_its_gradients"
SEQUENCE = "tests/model/test_sequence.py"
FLOW = "tests/objective/test_flow.py"
INPUTS = "tests/objective/test_inputs.py"
PLAIN_LOOP = "test_loss_and_gradient_are_those_of_a_plain_loop"
OPTIM = "tests/train/test_optim.py"
CLOCK = "tests/media/test_clock.py"
LAYOUT = "tests/layouts/test_layouts.py::test_a_layout_equals_one_process"
EXCHANGED = "tests/layouts/test_layouts.py::test_what_is_exchanged_grows_with_the_packs_only_where_it_must"


class Mutant(NamedTuple):
    """One break; `text` is in the file exactly once."""

    file: str
    text: str
    replacement: str
    tests: tuple[str, ...]
    same: str = ""  # why nothing can notice it


MUTANTS = (
    # ---- the model
    Mutant(
        "wanloom/model/dit.py",
        "y = modulate_norm(x, shift_attn, scale_attn, layout, self.eps)",
        "y = modulate_norm(x, shift_attn, scale_attn, layout, 1e-6)",
        (EPS,),
    ),
    Mutant(
        "wanloom/model/dit.py",
        "y = modulate_norm(x, shift_ffn, scale_ffn, layout, self.eps)",
        "y = modulate_norm(x, shift_ffn, scale_ffn, layout, 1e-6)",
        (EPS,),
    ),
    Mutant(
        "wanloom/model/dit.py",
        "y = modulate_norm(x, shift_ffn, scale_ffn, layout, self.eps)",
        "y = modulate_norm(x, shift_attn, scale_attn, layout, self.eps)",
        (PACK,),
    ),
    Mutant("wanloom/model/dit.py", "LayerNorm(config.dim, config.eps)", "LayerNorm(config.dim, 1e-6)", (EPS,)),
    Mutant(
        "wanloom/model/dit.py", "self.norm_q = RMSNorm(dim, config.eps)", "self.norm_q = RMSNorm(dim, 1e-6)", (EPS,)
    ),
    Mutant(
        "wanloom/model/dit.py", "self.norm_k = RMSNorm(dim, config.eps)", "self.norm_k = RMSNorm(dim, 1e-6)", (EPS,)
    ),
    Mutant(
        "wanloom/model/dit.py",
        "self.head(modulate_norm(x, shift, scale, layout, self.eps))",
        "self.head(modulate_norm(x, shift, scale, layout, 1e-6))",
        (EPS,),
    ),
    Mutant(
        "wanloom/model/dit.py",
        "q = self.norm_q(self.q(x)).unflatten",
        "q = self.norm_q(self.q(x)).to(x.dtype).unflatten",
        (ROUNDED,),
    ),
    Mutant(
        "wanloom/model/dit.py",
        "k = self.norm_k(self.k(context)).unflatten",
        "k = self.norm_k(self.k(context)).to(context.dtype).unflatten",
        (ROUNDED,),
    ),
    Mutant(
        "wanloom/model/dit.py",
        "add_gated(x, self.ffn(y), gate_ffn, layout)",
        "add_gated(x, -self.ffn(y), gate_ffn, layout)",
        (PACK,),
    ),
    Mutant(
        "wanloom/model/dit.py",
        "torch.cat([angles.cos(), angles.sin()], dim=1)",
        "torch.cat([angles.sin(), angles.cos()], dim=1)",
        (PACK,),
    ),
    Mutant("wanloom/model/dit.py", "angles = 1000.0 * sigma", "angles = 999.0 * sigma", (PACK,)),
    Mutant("wanloom/model/text.py", "bias.append(math.log(slots - length))", "bias.append(math.log(slots))", (PACK,)),
    Mutant("wanloom/model/init.py", "tuple(param.shape), (seed, ", "tuple(param.shape), (seed % 2, ", (SEEDS,)),
    Mutant(
        "wanloom/formats/published.py",
        '    ("eps", "eps", "eps"),\n',
        "",
        ("tests/formats/test_transformer.py::test_the_eps_of_a_file_reaches_every_norm",),
    ),
    Mutant(
        "wanloom/model/modulation.py",
        "scale, shape = scale + 1, x.shape[-1:]",
        "scale, shape = scale, x.shape[-1:]",
        (PACK,),
    ),
    Mutant(
        "wanloom/model/modulation.py",
        "F.layer_norm(x, shape, eps=eps) * spread(scale, layout)",
        "F.layer_norm(x, shape, eps=1e-6) * spread(scale, layout)",
        (f"{COMPILED}::test_a_compiled_pack_of_one_sample_equals_the_eager_one",),
    ),
    Mutant(
        "wanloom/model/modulation.py",
        "normed = F.layer_norm(part, shape, eps=eps)",
        "normed = F.layer_norm(part, shape, eps=1e-6)",
        (EPS,),
    ),
    Mutant(
        "wanloom/model/modulation.py",
        "F.layer_norm(part, shape, factor[0], offset[0], eps)",
        "F.layer_norm(part, shape, factor[0], offset[0], 1e-6)",
        (EPS,),
    ),
    Mutant(
        "wanloom/model/modulation.py",
        "part.unflatten(0, (count, size // count)).sum(1)",
        "part.unflatten(0, (count, size // count)).mean(1)",
        (f"{COMPILED}::test_gradients_of_rows_are_summed_by_sample",),
    ),
    Mutant(
        "wanloom/model/sequence.py",
        "torch.cat([grid_positions(grid) for grid in grids])",
        "torch.cat([grid_positions(grid) + (i > 0) for i, grid in enumerate(grids)])",
        (f"{SEQUENCE}::test_build_pack_starts_the_positions_of_each_sample_at_zero",),
    ),
    Mutant("wanloom/model/sequence.py", "x.permute(1, 2, 4, 0, 3, 5)", "x.permute(1, 2, 4, 0, 5, 3)", (PACK,)),
    Mutant(
        "wanloom/model/sequence.py", "device=positions.device) / dims", "device=positions.device) / head_dim", (PACK,)
    ),
    Mutant(
        "wanloom/model/sequence.py",
        "sign = 2 * torch.arange(2, device=x.device) - 1",
        "sign = 1 - 2 * torch.arange(2, device=x.device)",
        (f"{SEQUENCE}::test_rope_compiled_is_real_and_the_same",),
    ),
    # ---- attention
    Mutant(
        "wanloom/model/attention.py",
        'masked_fill(columns >= lens, float("-inf"))',
        "masked_fill(columns >= lens, -1.0)",
        (ATTENDS,),
    ),
    Mutant(
        "wanloom/model/kernels.py",
        'lse = F.pad(lse, (0, -q.shape[2] % LSE_BLOCK), value=float("inf"))',
        "lse = F.pad(lse, (0, -q.shape[2] % LSE_BLOCK), value=0.0)",
        (f"{EFFICIENT}_gets_its_log_sum_exp_in_whole_blocks_of_infinity",),
    ),
    Mutant(
        "wanloom/model/kernels.py",
        "return out, lse[:, :, : q.shape[2]]",
        "return out, lse",
        (f"{EFFICIENT}_gives_back_no_more_rows_than_queries",),
    ),
    Mutant(
        "wanloom/model/kernels.py",
        "(0, -keys % BIAS_BLOCK)",
        "(0, 0)",
        (f"{EFFICIENT}_gets_its_log_sum_exp_in_whole_blocks_of_infinity",),
    ),
    Mutant(
        "wanloom/model/kernels.py",
        "bias.to(q.dtype)[:, None, None].expand",
        "-bias.to(q.dtype)[:, None, None].expand",
        (ATTENDS,),
    ),
    # ---- sampling
    Mutant(
        "wanloom/sample/guidance.py",
        "return negative + guidance * (prompt - negative)",
        "return prompt + guidance * (prompt - negative)",
        (GUIDED,),
    ),
    Mutant(
        "wanloom/sample/guidance.py",
        "else noise, [*text, *negative]",
        "else noise, [*negative, *text]",
        ("tests/sample/test_guidance.py::test_kept_text_is_that_of_each_branch", GUIDED),
    ),
    Mutant(
        "wanloom/sample/guidance.py",
        "model.text_kv(share_at(branches, 1.0, mesh).pack)",
        "model.text_kv(share_at(branches, 0.0, mesh).pack)",
        (),
        same="the keys and values of the text are made of the text alone: the share's noise level is not read",
    ),
    Mutant(
        "wanloom/sample/generate.py",
        "negatives if mesh.data_rank else text, []",
        "text if mesh.data_rank else negatives, []",
        ("tests/layouts/test_generate_layouts.py",),
    ),
    Mutant(
        "wanloom/sample/generate.py",
        'draw_noise(shape, seed, "generate", 0)',
        'draw_noise(shape, seed % 2, "generate", 0)',
        ("tests/sample/test_generate.py::test_noise_depends_on_the_seed_alone",),
    ),
    Mutant(
        "wanloom/sample/prompts.py",
        '{"seed": seed + i, **values}',
        '{"seed": seed + i % 2, **values}',
        ("tests/sample/test_generate.py::test_each_prompt_has_the_next_seed_unless_its_line_has_one",),
    ),
    Mutant("wanloom/sample/solvers.py", "np.floor(levels * NUM_TIMESTEPS) / NUM_TIMESTEPS", "levels", (PIPELINE,)),
    Mutant(
        "wanloom/sample/solvers.py",
        "return self.shift * u / (1 + (self.shift - 1) * u)",
        "return self.shift * u / (1 + self.shift * u)",
        ("tests/sample/test_solvers.py",),
    ),
    Mutant(
        "wanloom/codecs/vae.py",
        "* self.std + self.mean",
        "* self.std - self.mean",
        ("tests/codecs/test_vae.py::test_decode_undoes_the_normalisation_and_clamps",),
    ),
    Mutant(
        "wanloom/codecs/vae.py",
        "/ 127.5 - 1",
        "/ 255",
        ("tests/codecs/test_vae.py::test_encode_is_the_normalised_posterior_mean",),
    ),
    # ---- the objective
    Mutant(
        "wanloom/objective/flow.py",
        "return (1 - sigma) * clean + sigma * noise, noise - clean",
        "return (1 - sigma) * clean + sigma * noise, clean - noise",
        (LOSS,),
    ),
    Mutant("wanloom/objective/flow.py", "return 1 + config.shift * sigma if", "return 1 + sigma if", (LOSS,)),
    Mutant("wanloom/objective/flow.py", "(sigma > 0).float()", "torch.ones_like(sigma)", (f"{FLOW}::{PLAIN_LOOP}",)),
    Mutant(
        "wanloom/objective/inputs.py",
        "[noisy_and_velocity(x, z, sigma) for",
        "[noisy_and_velocity(x, z, levels[-1][1]) for",
        (f"{INPUTS}::test_each_segment_is_noised_by_its_own_level",),
    ),
    Mutant(
        "wanloom/objective/flow.py",
        "return shift * u / (1 + (shift - 1) * u)",
        "return shift * u / (1 + shift * u)",
        (LOSS,),
    ),
    Mutant(
        "wanloom/objective/flow.py",
        "return (place + level) / num_samples",
        "return level",
        (f"{STEP}::test_stratified_levels_use_the_place_in_the_step",),
    ),
    Mutant(
        "wanloom/objective/flow.py",
        "shift *= math.sqrt(num_tokens / config.shift_tokens)",
        "shift *= num_tokens / config.shift_tokens",
        (f"{FLOW}::test_shift_grows_with_the_square_root_of_the_tokens",),
    ),
    # ---- a step
    Mutant(
        "wanloom/objective/inputs.py",
        "if u < objective.caption_dropout:",
        "if u < objective.caption_dropout and len(text) > 2:",
        (f"{INPUTS}::test_captions_of_every_length_are_dropped_as_often",),
    ),
    Mutant(
        "wanloom/train/step.py",
        "torch.distributed.all_reduce(totals)",
        "torch.distributed.all_reduce(totals[:1])",
        (f"{STEP}::test_the_loss_of_a_step_weighs_ranks_by_their_tokens",),
    ),
    Mutant(
        "wanloom/train/step.py",
        "num_elements=step.totals.num_tokens * objective.channels",
        "num_elements=sum(len(made.target) for made in inputs) * objective.channels",
        (f"{STEP}::test_the_loss_of_a_step_weighs_ranks_by_their_tokens",),
    ),
    Mutant("wanloom/train/step.py", ".clamp(max=1.0)", "", (f"{STEP}::test_clipping_scales_all_gradients_alike",)),
    Mutant("wanloom/train/step.py", "    sum_copies(trained.values(), mesh)\n", "", (f"{LAYOUT}[dp 2]",)),
    Mutant("wanloom/train/loop.py", "state.window.get(key, 0) + value", "value", (RECORD,)),
    Mutant("wanloom/train/loop.py", "sums, state.window = state.window, {}", "sums = state.window", (RECORD,)),
    Mutant(
        "wanloom/train/loop.py",
        "parts.ema.update(done)",
        "parts.ema.update(0)",
        (f"{LOOP}::test_the_average_follows_every_update",),
    ),
    Mutant(
        "wanloom/train/loop.py",
        "        if parts.ema is not None:\n            parts.ema.update(done)\n",
        "",
        (f"{LOOP}::test_the_average_follows_every_update",),
    ),
    Mutant(
        "wanloom/train/loop.py",
        "parts.optimizer.step(self._learning_rate(done))",
        "parts.optimizer.step(self._learning_rate(done + 1))",
        (f"{LOOP}::test_the_average_follows_every_update",),
    ),
    Mutant(
        "wanloom/train/loop.py",
        "> 60 * minutes",
        "> minutes",
        (f"{LOOP}::test_minutes_are_counted_from_the_last_save",),
    ),
    Mutant(
        "wanloom/train/loop.py",
        "    def _save(self) -> None:\n        self._saved = time.monotonic()\n",
        "    def _save(self) -> None:\n",
        (f"{LOOP}::test_minutes_are_counted_from_the_last_save",),
    ),
    Mutant("wanloom/train/ema.py", "(1 + count) / (10 + count)", "(2 + count) / (10 + count)", (OPTIM,)),
    Mutant("wanloom/train/optim.py", "if p.dim() == 2]", "if p.dim() >= 1]", (OPTIM,)),
    # ---- the data
    Mutant(
        "wanloom/data/packing.py",
        "left, best = room.pop(at)",
        "left, best = room.pop()",
        ("tests/data/test_packing.py::test_a_sample_goes_to_the_fullest_pack_that_has_room",),
    ),
    Mutant(
        "wanloom/data/order.py",
        r"\x1forder\x1f{source}\x1f{draw}",
        r"\x1forder\x1f{source}",
        ("tests/data/test_order.py",),
    ),
    Mutant(
        "wanloom/data/order.py",
        "below = n * self._sums[i - 1] // self._sums[i]",
        "below = (n + 1) * self._sums[i - 1] // self._sums[i]",
        ("tests/data/test_order.py",),
    ),
    Mutant(
        "wanloom/data/loader.py",
        "self._assemble(Step(step, own, self._plan.totals(packs)))",
        "self._assemble(Step(step, own, self._plan.totals(packs[self._rank :: self._plan.ranks])))",
        ("tests/data/test_loader.py::test_the_samples_of_a_step_do_not_depend_on_the_number_of_ranks",),
    ),
    Mutant(
        "wanloom/data/index.py",
        "np.maximum.at(self._ends, found,",
        "np.put(self._ends, found,",
        ("tests/data/test_index.py::test_mapped_columns_are_those_in_memory",),
    ),
    Mutant(
        "wanloom/media/image_colour.py",
        "values ** (1 / gamma)",
        "values**gamma",
        ("tests/media/test_image_colour.py::test_gamma_and_primaries_of_a_png",),
    ),
    Mutant(
        "wanloom/media/clock.py",
        "max(PAUSE, 2 * interval,",
        "max(PAUSE,",
        (f"{CLOCK}::test_a_picture_each_quarter_of_a_minute_is_no_jump",),
    ),
    Mutant(
        "wanloom/media/clock.py",
        "last, length = shown[-1]",
        "last, length = max(shown, key=sum)",
        (f"{CLOCK}::test_the_end_is_that_of_the_last_picture_shown",),
    ),
    # ---- many ranks
    Mutant(
        "wanloom/parallel/pipeline.py",
        "model.set_requires_all_reduce(is_last)",
        "model.set_requires_all_reduce(True)",
        (f"{EXCHANGED}[dp 2]",),
    ),
    Mutant("wanloom/parallel/params.py", "    dist.all_reduce(squares)\n", "", (f"{LAYOUT}[fsdp 2]",)),
    Mutant(
        "wanloom/parallel/fsdp.py",
        "module.set_gradient_divide_factor(1.0)",
        "module.set_gradient_divide_factor(2.0)",
        (f"{LAYOUT}[fsdp 2]",),
    ),
    Mutant(
        "wanloom/model/layers.py", "squares / self.dim + self.eps", "squares / self.dim + 1e-6", (f"{LAYOUT}[tp 2]",)
    ),
    Mutant(
        "wanloom/parallel/context.py",
        "out.mul_((lse - total).exp()",
        "out.mul_((total - lse).exp()",
        (f"{LAYOUT}[ring 2]",),
    ),
    Mutant(
        "wanloom/parallel/parts.py",
        "stream = _overlaps(filled.level_lens, start, start + width)",
        "stream = _overlaps(filled.level_lens[::-1], start, start + width)[::-1]",
        (f"{LAYOUT}[pp 2 x ring 2 x tp 2 with known frames]",),
    ),
    Mutant(
        "wanloom/parallel/parts.py", "return (*lens, last - filler)", "return (*lens, last)", (f"{LAYOUT}[ring 3]",)
    ),
    Mutant(
        "wanloom/evaluate/validation.py", "torch.distributed.all_reduce(sums)", "sums.mul_(1)", (f"{LAYOUT}[dp 2]",)
    ),
)
