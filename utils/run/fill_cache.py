"""Fills the latent cache before training, and leaves out samples that cannot be used."""

from __future__ import annotations

from functools import partial

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from dataset.latent_cache import LatentCache
from dataset.precompute import RankShard, precompute_clips, precompute_prompts
from utils.common.errors import UserError
from utils.common.filesystem import remove_stale_temporaries
from utils.common.heartbeat import HeartbeatBarrier
from utils.model import encoders
from utils.run.plan import RunPlan

BAD_SAMPLES_FILE = "bad_samples.txt"
# Whether clips are encoded in tiles -> error.
OUT_OF_MEMORY = {
    True: "The GPU ran out of memory while it encoded a clip in tiles. Free some of its memory, or use fewer frames or "
    "a smaller --train_resolution. Entries already encoded are kept.",
    False: "The GPU ran out of memory while it encoded a clip as whole pictures. Use --enable_tiling true, which takes "
    "less memory and encodes all clips anew, or free some memory: entries already encoded are kept.",
}


def fill_cache(processes: PartialState, heartbeat: HeartbeatBarrier, plan: RunPlan) -> RunPlan:
    """Encodes the missing entries; each process encodes its shard.

    Returns:
        The plan without unusable samples.

    Raises:
        UserError: some samples are unusable, and --skip_bad_samples is off. All other samples are encoded by then. Or
            the GPU runs out of memory while a clip is encoded.
    """
    args, device = plan.args, processes.device
    cache, shard = plan.cache, RankShard(processes.process_index, processes.num_processes)
    if processes.is_main_process:
        for cache_dir, known in plan.encoders.items():
            remove_stale_temporaries(cache_dir)
            LatentCache(cache_dir).add_encoders(known)
    load_prompt_encoder = partial(
        encoders.prompt_encoder,
        plan.model_dir,
        device,
        plan.spec.max_text_seq_length,
        args.memory.offload_text_encoder,
        args.model.variant,
    )
    load_pixel_encoders = partial(
        encoders.pixel_encoders,
        plan.model_dir,
        device,
        args.system.enable_slicing,
        plan.tiling,
        args.model.variant,
    )
    failed = precompute_prompts(cache, plan.prompts, load_prompt_encoder, shard, heartbeat.beat)
    try:
        failed |= precompute_clips(
            cache,
            plan.samples + plan.validation,
            plan.keys + plan.validation_keys,
            load_pixel_encoders,
            shard,
            args.system.num_workers,
            args.data.clip_timeout,
            heartbeat.beat,
        )
    except torch.OutOfMemoryError as error:
        raise UserError(OUT_OF_MEMORY[plan.tiling], on_every_rank=False) from error
    heartbeat.done("cache")
    heartbeat.wait_for_everyone("cache")
    for rank_failed in gather_object([failed]):
        failed |= rank_failed
    plan = plan.without(failed)
    report_bad_samples(plan, processes)
    return plan


def report_bad_samples(plan: RunPlan, processes: PartialState) -> None:
    """Lists unusable samples in a file and on the screen. Raises UserError if the run must not continue."""
    list_file = plan.args.output.output_dir / BAD_SAMPLES_FILE
    if processes.is_main_process:
        list_file.unlink(missing_ok=True)
        if plan.unusable:
            list_file.write_text("\n".join(plan.unusable) + "\n", encoding="utf-8", errors="backslashreplace")
    processes.wait_for_everyone()
    if plan.unusable and not plan.args.data.skip_bad_samples:
        raise UserError(
            [
                *plan.unusable,
                f"The samples above cannot be used; {list_file} lists them. All other samples are encoded and cached. "
                "Fix or remove these lines, or continue without them: --skip_bad_samples true.",
            ]
        )
    if plan.unusable:
        processes.print("\n".join([*plan.unusable, f"Continuing without these samples; {list_file} lists them."]))
    if not plan.samples:
        raise UserError("No sample is left to train on.")
