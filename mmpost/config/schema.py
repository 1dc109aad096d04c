"""Every option as a pydantic model: name, type, default, one line of meaning.

Names follow transformers and TRL where a concept exists there. The YAML loader, the help text, the JSON Schema and
the Python API all read these classes; an option exists in exactly one place.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Settings(BaseModel):
    """Base of all sections: unknown keys are refused and assignments are checked."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class ModelSection(Settings):
    """Which weights, in which precision, and which parts of them train."""

    model_name_or_path: str = Field(
        "tiny-vlm", description="hub id, local folder, or tiny-* (built offline from the seed)"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: float32 on CPU and for full fine-tuning, bfloat16 for LoRA on CUDA"
    )
    attn_implementation: str = Field("sdpa", description="sdpa, eager or flash_attention_2")
    trust_remote_code: bool = Field(False, description="run code that comes with the checkpoint")
    adapter: str = Field("auto", description="modality adapter; auto follows the model type")
    freeze: list[Literal["vision_tower", "audio_tower", "projector", "language_model"]] = Field(
        ["vision_tower", "audio_tower"], description="parts that do not train under full fine-tuning"
    )
    trainable: list[str] = Field(
        [], description="parts of names of weights: of what model.freeze leaves, only these train; empty: all of it"
    )
    quantization: Literal["none", "nf4", "int8"] = Field(
        "none",
        description="frozen language-model weights in 4 bits (QLoRA) or 8; needs peft.kind=lora and bitsandbytes",
    )
    use_liger_kernel: bool = Field(False, description="fused CUDA kernels of liger-kernel, where it knows the model")
    gradient_checkpointing: bool = Field(False, description="recompute language-model activations to save memory")


class LoraSettings(Settings):
    """Low-rank adapters (peft)."""

    kind: Literal["lora"] = "lora"
    r: int = Field(16, ge=1, description="rank")
    lora_alpha: int = Field(32, ge=1, description="scale is lora_alpha / r")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the adapter")
    target_modules: str | list[str] = Field(
        "all-linear", description="all-linear means every linear layer of the language model, not the tower"
    )
    modules_to_save: list[str] | None = Field(None, description="further modules that train in full")


class FullSettings(Settings):
    """All weights train, except what model.freeze and model.trainable leave out."""

    kind: Literal["full"] = "full"


Peft = Annotated[LoraSettings | FullSettings, Field(discriminator="kind")]


class MediaSection(Settings):
    """Budgets for decoded media."""

    max_pixels: int | None = Field(
        None, ge=1, description="largest image in pixels; null: the checkpoint's limit, at most 1003520"
    )
    min_pixels: int | None = Field(None, ge=1, description="smallest image in pixels; null: the checkpoint's limit")
    fps: float = Field(2.0, gt=0, description="frames per second taken from videos")
    max_frames: int = Field(64, ge=1, description="most frames of one video; longer ones are sampled more sparsely")
    video_max_pixels: int = Field(602112, ge=1, description="larger video frames are shrunk to this many pixels")
    use_audio_in_video: bool = Field(
        False, description="Qwen2.5-Omni: hear the sound tracks of videos too, in turns with their frames"
    )
    sample_rate: int = Field(16000, ge=1000, le=768000, description="samples per second that sound is converted to")
    max_audio_seconds: float = Field(30.0, gt=0, description="longest sound; longer ones are refused, never cut")
    decoder: Literal["auto", "pyav", "torchcodec", "decord"] = Field(
        "auto", description="video back end; auto: the first that is proven to decode here"
    )
    decode_timeout: float = Field(30.0, gt=0, description="seconds until a decode is stopped")
    decode_processes: int = Field(
        0,
        ge=0,
        description="sounds and films decoded at once where many are read; 0: one per core, at most 4",
    )


class Source(Settings):
    """One data source."""

    path: str = Field(description="file, folder, or task:NAME")
    format: str = Field("auto", description="auto, messages, sharegpt, prompts, or another reader's name")
    split: str | None = Field(None, description="split of a task or data set")
    weight: float = Field(1.0, ge=0, description="share of the draws relative to the other sources")
    limit: int | None = Field(None, ge=1, description="use only the first rows")
    media_root: str | None = Field(None, description="folder that relative media paths start from")
    columns: dict[str, str] = Field({}, description="our column name: the file's column name")
    system: str | None = Field(None, description="system message put before rows that have none")
    name: str | None = Field(None, description="name in logs; default: the file's stem")


class DataSection(Settings):
    """What to train on and what to do with rows that do not fit."""

    train: list[Source] = Field([], description="training sources; a plain path is accepted")
    max_length: int = Field(4096, ge=8, description="longest row in tokens, media included")
    on_long: Literal["error", "drop"] = Field("error", description="rows longer than max_length; media are never cut")
    on_bad_row: Literal["error", "skip", "quarantine"] = Field(
        "error", description="faulty rows: stop, leave out, or leave out and write to bad_rows.jsonl"
    )
    max_bad_share: float = Field(0.05, ge=0, le=1, description="more faulty rows than this stop the run")
    verify: Literal["auto", "none", "exists", "decode"] = Field(
        "auto", description="media check before training; auto decodes up to 1000 files, else looks that they exist"
    )
    workers: int = Field(0, ge=0, description="processes that decode and tokenise ahead; 0 = in the training process")
    columns: dict[str, str] = Field({}, description="column names for every source; see Source.columns")
    media: MediaSection = Field(default_factory=MediaSection)

    @model_validator(mode="before")
    @classmethod
    def _paths_are_sources(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("train"), str):
            value = {**value, "train": [value["train"]]}
        if isinstance(value, dict) and isinstance(value.get("train"), list):
            items = [{"path": item} if isinstance(item, str) else item for item in value["train"]]
            value = {**value, "train": items}
        return value


class TrainSection(Settings):
    """Steps, optimiser, schedule, and what is written when."""

    output_dir: str | None = Field(None, description="run folder; default runs/COMMAND-DATE-TIME")
    overwrite: bool = Field(False, description="delete an earlier run in output_dir instead of continuing or refusing")
    max_steps: int | None = Field(None, ge=1, description="optimiser steps; overrides num_train_epochs")
    num_train_epochs: float = Field(1.0, gt=0, description="passes over the data")
    batch_size: int | None = Field(
        None, ge=1, description="rows per optimiser step over all processes; results then do not depend on their number"
    )
    per_device_train_batch_size: int = Field(8, ge=1, description="rows per forward pass on one device")
    tokens_per_pass: int | None = Field(
        None, ge=1, description="split forward passes above this many tokens; the step stays the same, memory shrinks"
    )
    gradient_accumulation_steps: int | None = Field(
        None, ge=1, description="forward passes per optimiser step; derived when batch_size is given"
    )
    learning_rate: float = Field(1e-5, gt=0, description="peak learning rate")
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = Field("cosine", description="after the warm-up")
    warmup_steps: float = Field(0.03, ge=0, description="steps of linear warm-up; below 1 a share of all steps")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW first moment")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW second moment")
    max_grad_norm: float = Field(1.0, ge=0, description="clip the gradient norm; 0 = never")
    bf16: bool | Literal["auto"] = Field("auto", description="bfloat16 autocast; auto: on CUDA")
    strategy: Literal["auto", "ddp", "fsdp2", "zero2", "zero3"] = Field(
        "auto", description="how processes share the model; auto: ddp while it fits a device, else fsdp2"
    )
    seed: int = Field(42, ge=0, description="seed of everything random")
    logging_steps: int = Field(10, ge=1, description="steps between lines of metrics.jsonl")
    save_steps: int = Field(500, ge=1, description="steps between checkpoints")
    save_total_limit: int = Field(2, ge=1, description="checkpoints kept")
    sample_steps: int = Field(50, ge=1, description="steps between written samples")
    loss_on: Literal["assistant", "last_assistant"] = Field("assistant", description="turns that train in SFT")


class KlSettings(Settings):
    """Penalty for leaving another model; null takes the preset's choice."""

    beta: float | None = Field(None, ge=0, description="weight of the penalty; 0 loads no other model")
    final_beta: float | None = Field(None, ge=0, description="weight at the end of the run, on a straight line")
    kl: Literal["k2", "k3", "rho_k3", "k1_reward", "k1"] | None = Field(
        None,
        description="k2, rho_k3 (off-policy): reverse KL; k3: GRPO paper; k1_reward: taken off the reward; k1: refused",
    )
    to: Literal["reference", "teacher"] | None = Field(None, description="the starting weights, or loss.teacher")


class MismatchSettings(Settings):
    """Weights for the distance between the policy that trains and the engine that samples."""

    correction: Literal["off", "token_tis", "seq_tis", "token_mask", "seq_mask", "geo_reject", "bypass"] | None = Field(
        None,
        description="tis cuts the weight, mask and reject drop; null: off with our own engine, else token_tis",
    )
    cap: float | None = Field(None, gt=0, description="upper limit of the weight; null: the usual one")
    low: float | None = Field(None, ge=0, description="lower limit of masks; null: the usual one")


class LossSection(Settings):
    """The parts of the estimator; null takes the preset's choice."""

    preset: str | None = Field(None, description="name in mmpost.algos or file.py:function; default: the command's own")
    args: dict[str, Any] = Field({}, description="constants of the preset, for example {cap: 3}")
    aggregate: Literal["token", "seq_mean", "const", "seq_sum", "micro_token"] | None = Field(
        None, description="what the sum over positions is divided by"
    )
    denominator: Literal["self", "one", "old", "seq", "capped", "behaviour"] | None = Field(
        None, description="reference measure of the policy ratio"
    )
    stabilise: (
        list[Literal["clip", "dual", "delta", "sapo", "vespo", "luffy", "offseq", "entropy_top", "clip_cov"]] | None
    ) = Field(None, description="masks and weights against large steps, in their order")
    epsilon: float | None = Field(None, ge=0, description="clip below 1 - epsilon")
    epsilon_high: float | None = Field(None, ge=0, description="clip above 1 + epsilon_high")
    advantage: (
        Literal["ones", "reward", "group", "group_nostd", "batch_std", "rloo", "global_stat", "norm_then_sum"] | None
    ) = Field(None, description="how rewards become credit")
    kl: KlSettings = Field(default_factory=KlSettings)
    mismatch: MismatchSettings = Field(default_factory=MismatchSettings)
    entropy_beta: float | None = Field(None, ge=0, description="weight of an entropy bonus on completions")
    teacher: str | None = Field(None, description="folder or hub id of a teacher, for presets that have one")


class GrpoSection(Settings):
    """Rollouts: how many, how long, how random."""

    num_generations: int = Field(8, ge=2, description="completions per prompt")
    prompts_per_step: int = Field(16, ge=1, description="prompts per rollout batch, over all processes")
    max_completion_length: int = Field(1024, ge=1, description="new tokens at most")
    temperature: float = Field(1.0, gt=0, description="sampling temperature; training uses the same")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling")
    num_iterations: int = Field(1, ge=1, description="passes over one rollout batch")
    mini_batches: int = Field(1, ge=1, description="optimiser steps per pass over one rollout batch")
    mask_truncated_completions: bool = Field(False, description="completions cut by length do not train")
    rollout_batch_size: int = Field(256, ge=1, description="completions decoded together on one device")
    shuffle_rewards: bool = Field(False, description="control experiment: permute rewards inside each group")


class VllmSettings(Settings):
    """Rollouts by vLLM."""

    vllm_mode: Literal["server", "colocate"] = Field(
        "server", description="server: vllm serve on other GPUs; colocate: in each training process, on its GPU"
    )
    host: str = Field("127.0.0.1", description="server: its address")
    port: int = Field(8000, ge=1, le=65535, description="server: its port")
    group_port: int = Field(51216, ge=1, le=65535, description="server: port for pushing weights")
    timeout: float = Field(600.0, gt=0, description="server: seconds for one request")
    start_timeout: float = Field(240.0, ge=0, description="server: seconds to wait until it is up")
    concurrency: int = Field(64, ge=1, description="server: requests under way at once per process")
    gpu_memory_utilization: float = Field(0.3, gt=0, lt=1, description="colocate: share of the GPU for vLLM")
    max_model_len: int | None = Field(None, ge=1, description="colocate: longest prompt and completion in tokens")
    sleep: bool = Field(True, description="colocate: free the memory of vLLM while the policy trains")


class RolloutSection(Settings):
    """Who samples the completions."""

    engine: Literal["native", "transformers", "vllm"] = Field(
        "native", description="native: the trainer's own decode loop; transformers: generate(); vllm"
    )
    cache: Literal["dynamic", "static"] = Field(
        "dynamic", description="native: keys and values grow with the completions, or have fixed shapes"
    )
    compile: bool | Literal["auto"] = Field(
        False, description="native, static: decode through torch.compile, on CUDA as CUDA graphs; auto: where it works"
    )
    vllm: VllmSettings = Field(default_factory=VllmSettings)


class RewardSpec(Settings):
    """One reward function."""

    name: str = Field(description="name in mmpost.rewards or file.py:function")
    weight: float = Field(1.0, description="factor in the weighted sum")
    args: dict[str, Any] = Field({}, description="keyword arguments of the function")
    on_error: Literal["raise", "null"] = Field("raise", description="null: the score does not apply, and is counted")
    timeout: float = Field(60.0, gt=0, description="seconds for one call over a step's completions")
    sources: list[str] = Field([], description="names of the data sources whose rows it scores; empty: all")

    @model_validator(mode="before")
    @classmethod
    def _name_is_enough(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class EvalSection(Settings):
    """Held-out evaluation during training."""

    tasks: list[str] = Field([], description="tasks evaluated every eval_steps and at the end")
    eval_steps: int | None = Field(None, ge=1, description="steps between evaluations; null: only at the end")
    limit: int | None = Field(None, ge=1, description="rows per task")
    per_device_eval_batch_size: int = Field(64, ge=1, description="prompts decoded together")
    max_new_tokens: int = Field(64, ge=1, description="new tokens at most")


class LogSection(Settings):
    """What is shown and kept."""

    run_name: str | None = Field(None, description="title of the report; default: the folder's name")
    samples: int = Field(8, ge=0, description="samples written every sample_steps")
    progress: Literal["auto", "live", "lines", "none"] = Field("auto", description="auto: live on a terminal")


class RunConfig(Settings):
    """Sections shared by every training command."""

    model: ModelSection = Field(default_factory=ModelSection)
    peft: Peft = Field(default_factory=FullSettings)
    data: DataSection = Field(default_factory=DataSection)
    train: TrainSection = Field(default_factory=TrainSection)
    loss: LossSection = Field(default_factory=LossSection)
    eval: EvalSection = Field(default_factory=EvalSection)
    log: LogSection = Field(default_factory=LogSection)
