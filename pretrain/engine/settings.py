"""DeepSpeed's configuration, generated from ours, and the check of what a user passes on to it."""

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from pretrain.config.schema import DeepSpeedConfig

EXTRA_KEYS = (
    "zero_optimization", "data_types", "communication_data_type", "prescale_gradients", "gradient_predivide_factor",
    "wall_clock_breakdown", "memory_breakdown", "comms_logger", "flops_profiler",
)  # fmt: skip


def deepspeed_config(
    config: DeepSpeedConfig, global_batch: int, micro_batch: int, accumulation: int, grad_clip: float, precision: str
) -> dict:
    """The whole DeepSpeed configuration, generated; `deepspeed.extra` is merged in after its keys are checked."""
    generated = {
        "train_batch_size": global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": grad_clip,
        "zero_optimization": {"stage": config.stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": precision == "bf16"},
        "steps_per_print": None,
        # By default gradients are averaged over the ranks in bf16: with many ranks their sum loses what each one adds.
        "communication_data_type": "fp32",
        # It would wait for the device at every forward and every step; the journal has the speed.
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
    }
    if precision == "bf16" and config.stage:  # DeepSpeed would add the gradients of micro-batches in bf16
        generated["data_types"] = {"grad_accum_dtype": "fp32"}
    check_extra(config)
    for key, value in config.extra.items():
        generated[key] = {**generated[key], **value} if isinstance(generated.get(key), dict) else value
    return generated


def check_extra(config: DeepSpeedConfig) -> None:
    """DeepSpeed accepts unknown top-level keys in silence, so they are refused here."""
    for key in config.extra:
        if key not in EXTRA_KEYS:
            raise ValueError(f"deepspeed.extra.{key} is not passed on to DeepSpeed; these are: {', '.join(EXTRA_KEYS)}")
    zero = config.extra.get("zero_optimization", {})
    known = set(DeepSpeedZeroConfig.model_fields) - {"stage"}
    for key in zero:
        if key not in known:
            raise ValueError(f"deepspeed.extra.zero_optimization.{key}: DeepSpeed has no such setting; the stage is "
                             "chosen by deepspeed=zero0 ... zero3")  # fmt: skip
