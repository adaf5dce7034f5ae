#!/usr/bin/env bash
# Fine-tunes a CogVideoX text-to-video model, one process a GPU (DDP).
#
#   bash train_ddp_t2v.sh                                    with the values below
#   bash train_ddp_t2v.sh --learning_rate 5e-5 --rank 64     flags given here win over the lines below
#   NUM_PROCESSES=2 bash train_ddp_t2v.sh                    two processes instead of one a visible GPU
#   bash train_ddp_t2v.sh --dry_run                          checks everything, prints the plan, trains nothing
#
# Several machines, the same command on each (here the second of two), with the same paths on a shared disk:
#   NUM_MACHINES=2 MACHINE_RANK=1 MAIN_PROCESS_IP=10.0.0.1 bash train_ddp_t2v.sh
#
# `python train.py --help` explains every flag.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

MODEL_ARGS=(
    --model_path "THUDM/CogVideoX-5b"      # folder or hub id; also: CogVideoX-2b, CogVideoX1.5-5B
    --model_type "t2v"                      # must suit the checkpoint
    --training_type "lora"                  # lora: adapters, smallest memory; sft: all weights, several times as much
)

OUTPUT_ARGS=(
    --output_dir "outputs/t2v-lora"         # a new folder for every run; holds checkpoints, metrics.jsonl, videos
    --report_to "tensorboard"               # tensorboard, wandb, all or none; metrics.jsonl is written in any case
)

DATA_ARGS=(
    --data_root "data"                      # the data folder: the line files below and the clips they name
    --caption_column "prompts.txt"          # one caption a line
    --video_column "videos.txt"             # one clip a line, relative to the data folder
    --id_token ""                           # a rare word put before every caption; helps to bind a new concept
    --train_resolution "49x480x720"         # frames x height x width; 81x768x1360 for CogVideoX1.5-5B
                                            # several, "49x480x720" "49x720x480": each clip goes where most is kept
    --resize_mode "stretch"                 # crop: keep the aspect ratio of clips of another shape
    --clips_per_video 1                     # more: several samples of long clips, which do not overlap
    --skip_bad_samples false                # true: go on without clips that cannot be used, in place of stopping
    --caption_dropout 0.0                   # 0.1: keeps the model good without a prompt, at guidance above 1
)

TRAIN_ARGS=(
    --train_epochs 10                       # passes over the clips; --train_steps N counts optimizer updates instead
    --batch_size 1                          # samples a GPU; raise it only if memory is left over
    --gradient_accumulation_steps 1         # 2-8: a larger effective batch at the same memory; smoother, slower updates
    # --mixed_precision "bf16"              # default: fp16 for CogVideoX-2b on a GPU, bf16 for everything else
    --learning_rate 1e-4                    # try 5e-5 to 5e-4 for LoRA, 1e-5 to 2e-5 for sft
    --lr_scheduler "constant_with_warmup"   # cosine: goes to zero at the end, for runs of known length
    --lr_warmup_steps 100                   # updates until the full learning rate; fewer for short runs
    --optimizer "adamw"
    --weight_decay 1e-4
    --max_grad_norm 1.0                     # lower it if the loss jumps
    --gradient_checkpointing full           # selective: faster, for 2 GiB (2b) to 11 GiB (1.5) more; none: several times
                                            # the memory
    --offload_activations false             # true: what is kept waits in host memory; both true: fast and small
    # --vram_budget_gib 16                  # or auto: chooses these by what is predicted to fit; README, Less memory
    # --quantize_optimizer 8bit             # sft: 8-bit Adam and bf16 weights; --offload_optimizer: Adam on the host
    --seed 42                               # order of clips, noise, timesteps and first adapters
)

LORA_ARGS=(
    --rank 128                              # 64 or more for a new concept; the file and the memory grow with it
    # --lora_alpha 64                       # strength is alpha / rank; default: rank; rank/2 also works, 1 badly
    --target_modules to_q to_k to_v to_out.0
    --quantize_base "none"                  # int8: half the memory of the frozen weights, int4: a third; not exact
)

SYSTEM_ARGS=(
    --num_workers 4                         # processes that decode clips and read the cache; 0 on very small machines
    --pin_memory true
    --nccl_timeout 1800                     # seconds that processes wait for each other; raise it for huge datasets
)

CHECKPOINT_ARGS=(
    --checkpointing_steps 100               # updates between checkpoints; one is always made at the end
    --checkpointing_limit 3                 # checkpoints kept
    --resume_from_checkpoint latest         # goes on where a stopped run was; starts anew if there is none
)

VALIDATION_ARGS=(
    --do_validation false                   # true: sample videos and held-out loss; costs a few minutes each time
    --validation_dir "data/validation"      # a folder of the same form as the data folder
    --validation_steps 100                  # updates between validations
    --num_inference_steps 50                # of a validation video
)

# `accelerate launch`, without its stack trace when train.py ends with a sentence on what is wrong
exec python "$HERE/utils/commands/launch.py" --config_file "$HERE/configs/accelerate_ddp.yaml" "$HERE/train.py" \
    "${MODEL_ARGS[@]}" "${OUTPUT_ARGS[@]}" "${DATA_ARGS[@]}" "${TRAIN_ARGS[@]}" "${LORA_ARGS[@]}" \
    "${SYSTEM_ARGS[@]}" "${CHECKPOINT_ARGS[@]}" "${VALIDATION_ARGS[@]}" "$@"
