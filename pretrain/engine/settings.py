"""DeepSpeed's configuration, generated from ours, and the check of what a user passes on to it."""

from pretrain.config.schema import DeepSpeedConfig

BUCKET = (
    50_000_000  # elements reduced at a time, 200 MB in fp32; DeepSpeed's own 500 million buffer 2 GB, whatever trains
)
ZERO_KEYS = (  # how fast and in how much memory, never what is computed: tests/engine has each of them
    "reduce_bucket_size", "allgather_bucket_size", "overlap_comm", "reduce_scatter", "contiguous_gradients",
    "use_multi_rank_bucket_allreduce", "sub_group_size", "zero_hpz_partition_size", "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold", "stage3_model_persistence_threshold", "stage3_max_live_parameters",
    "stage3_max_reuse_distance", "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential",
)  # fmt: skip
EXTRA_KEYS = (
    "zero_optimization", "communication_data_type", "wall_clock_breakdown", "memory_breakdown", "comms_logger",
    "flops_profiler",
)  # fmt: skip


def deepspeed_config(
    config: DeepSpeedConfig, global_batch: int, micro_batch: int, accumulation: int, grad_clip: float, precision: str
) -> dict:
    """The whole DeepSpeed configuration, generated; `deepspeed.extra` is merged in after its keys are checked."""
    check_stage(config.stage, precision, accumulation)
    generated = {
        "train_batch_size": global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": grad_clip,
        "zero_optimization": {"stage": config.stage, "reduce_bucket_size": BUCKET},
        "zero_allow_untested_optimizer": True,
        # At stage 1 each gradient goes into the fp32 buffer once it is there, and is freed: else all live twice.
        "bf16": {"enabled": precision == "bf16", "immediate_grad_update": config.stage == 1},
        # A step whose gradients overflow is skipped and the scale halved; doubled after a thousand that do not.
        "fp16": {
            "enabled": precision == "fp16",
            "loss_scale": 0,
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 1,
        },
        "steps_per_print": None,
        # By default gradients are averaged over the ranks in bf16: with many ranks their sum loses what each one adds.
        "communication_data_type": "fp32",
        # It would wait for the device at every forward and every step; the journal has the speed.
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
    }
    if config.stage == 2:
        # Its gradients are reduced after every micro-batch, to be freed: during the rest of the backward pass, then. By
        # all-reduce, as it is set: to reduce them to their owners halves the bytes, but waits for the device each time.
        generated["zero_optimization"]["overlap_comm"] = True
    if precision != "fp32" and config.stage:  # DeepSpeed would add the gradients of micro-batches in those
        generated["data_types"] = {"grad_accum_dtype": "fp32"}
    check_extra(config)
    for key, value in config.extra.items():
        generated[key] = {**generated[key], **value} if isinstance(generated.get(key), dict) else value
    return generated


def bucket_of(config: DeepSpeedConfig) -> int:
    """Elements of a run's buckets of gradients."""
    return config.extra.get("zero_optimization", {}).get("reduce_bucket_size", BUCKET)


def check_stage(stage: int, precision: str, accumulation: int) -> None:
    """`ValueError` where the gradients of micro-batches would be added up in less than fp32, or vanish."""
    if stage == 0 and precision == "fp16":  # there DeepSpeed divides gradients by a scale that the loss never had
        raise ValueError("deepspeed=zero0 does not scale the loss, so that in fp16 gradients would vanish: take "
                         "deepspeed=zero1")  # fmt: skip
    if stage == 0 and precision == "bf16" and accumulation > 1:
        raise ValueError(f"deepspeed=zero0 would add up the gradients of {accumulation} micro-batches in {precision}: "
                         "take deepspeed=zero1, which adds them up in fp32 (a larger train.micro_batch_size or "
                         "train.precision=fp32 would do as well)")  # fmt: skip


def check_extra(config: DeepSpeedConfig) -> None:
    """Refuse what DeepSpeed would accept in silence, what has no effect, and what changes the results."""
    for key in config.extra:
        if key not in EXTRA_KEYS:
            raise ValueError(f"deepspeed.extra.{key} is not passed on to DeepSpeed; these are: {', '.join(EXTRA_KEYS)}")
    for key in config.extra.get("zero_optimization", {}):
        if key == "stage":
            raise ValueError(
                "deepspeed.extra.zero_optimization.stage: the stage is chosen by deepspeed=zero0 ... zero3"
            )
        if key not in ZERO_KEYS:
            raise ValueError(
                f"deepspeed.extra.zero_optimization.{key} is not passed on to DeepSpeed, as nothing tests here what it "
                f"does; these are: {', '.join(ZERO_KEYS)}"
            )
