"""
Every setting of a model and of a run: its type, range, default, and the comment that --help prints.

Imports configurator.py and does not load torch, so that --help and mistakes are answered at once.
"""

from dataclasses import dataclass, fields
from typing import Annotated, Literal

from configurator import LARGEST, Amount, ConfigError, Count, Fraction, Whole

FORMS = ("direct", "or", "er", "product", "zero_centred")
PLACEMENTS = ("input", "after", "dual", "dual_norm", "norm")
Beta = Annotated[float, 0.0, 0.999999]
Seed = Annotated[int, 0, 2**32 - 1]


@dataclass
class GPTConfig:
    """The model's settings. __post_init__ puts the actual value where 0, 'same' or 'auto' stands for a default."""

    # the model
    arch: Literal["llama", "gemma"] = "llama"  # gemma adds post-norms and QK-norm
    n_layer: Annotated[int, 1, 10000] = 4  # blocks
    n_head: Count = 4  # attention heads
    n_kv_head: Whole = 0  # heads of k and v (GQA); 0 is n_head
    d_head: Whole = 0  # channels of a head; 0 is n_embd / n_head
    n_embd: Count = 128  # width of the residual stream
    ffn_dim: Whole = 0  # width of the FFN; 0 is int(8 n_embd / 3)
    ffn_extra: Whole = 0  # channels added to ffn_dim, for a control with more parameters and no strategy
    vocab_size: Whole = 256  # rows of the embedding, at least the data's vocabulary; 0 is exactly that
    block_size: Count = 256  # tokens in a sequence
    tie_embeddings: bool = False  # the LM head and the token table are one matrix
    rope_theta: Annotated[float, 1.0, LARGEST] = 10000.0  # RoPE's base
    norm_eps: Amount = 1e-6  # inside the square root of every norm except DNP's, whose input may be small
    init_std: Amount = 0.0  # standard deviation of the initial matrices; 0 is 1/√fan_in of each
    embedding_std: Amount = 0.0  # that of the initial token table; 0 is 1, or the LM head's if tied
    # scale vectors
    scale_vectors: bool = True  # False fixes every γ to 1
    heterogeneous: bool = False  # HG: q, k, v, gate, up and the LM head each have their own γ
    placement: Literal[PLACEMENTS] = "input"  # after is AP, dual DP, dual_norm DNP, norm DNP without u
    attn_placement: Literal[("same", *PLACEMENTS)] = "same"  # placement in attention, if it differs
    v_placement: Literal[("same", *PLACEMENTS)] = "same"  # placement of v, if it differs from that of q and k
    ffn_placement: Literal[("same", *PLACEMENTS)] = "same"  # placement in the FFN, if it differs
    head_placement: Literal[("same", *PLACEMENTS)] = "same"  # placement of the LM head, if it differs [R]
    qk_norm: bool = False  # RMSNorm of q and k over each head, with a γ that the heads share; DNP's replaces it
    qkv_norm: Literal["head", "full"] = "head"  # what norms of q, k, v take the mean over
    reparam: Literal[FORMS] = "direct"  # how γ is parameterised: ScaleVector has the formulas
    final_norm_role: Literal["input", "output"] = "input"  # role of the γ before the LM head
    # mixture of experts
    n_experts: Annotated[int, 0, 65536] = 0  # SwiGLU experts in place of each FFN; 0 is a dense model
    experts_per_token: Count = 2  # experts that a token goes through
    expert_dim: Whole = 0  # width of an expert; 0 gives the FLOPs of a dense FFN of ffn_dim
    shared_dim: Whole = 0  # width of a shared expert that every token goes through; 0 is none
    router: Literal["softmax", "softmax_all", "sigmoid"] = "softmax"  # how the chosen experts are weighted: see MoE
    router_aux: Amount = 0.02  # weight of the load-balancing loss
    router_z: Amount = 0.001  # weight of the z-loss on router logits
    router_bias: Amount = 0.0  # balance by a bias that changes by this per step, such as 5e-3, with router_aux=0
    expert_scales: Literal["shared", "own"] = "shared"  # under HG: one γ for all experts' gates (ups), or one each [R]
    # numbers
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # activations; auto: bfloat16 where a GPU has it

    def __post_init__(self):
        if self.n_embd % self.n_head and not self.d_head:
            raise ConfigError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        self.d_head = self.d_head or self.n_embd // self.n_head
        if self.d_head % 2:
            raise ConfigError(f"d_head {self.d_head} is odd, and RoPE rotates pairs of channels")
        self.n_kv_head = self.n_kv_head or self.n_head
        if self.n_head % self.n_kv_head:
            raise ConfigError(f"n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}")
        # SwiGLU's three matrices, as many as 4·n_embd's two
        self.ffn_dim, self.ffn_extra = (self.ffn_dim or int(8 * self.n_embd / 3)) + self.ffn_extra, 0
        if self.n_experts:
            if self.experts_per_token > self.n_experts:
                raise ConfigError(f"experts_per_token {self.experts_per_token} is more than n_experts {self.n_experts}")
            # as many FLOPs per token as the dense FFN
            self.expert_dim = self.expert_dim or max(0, self.ffn_dim - self.shared_dim) // self.experts_per_token
            if not self.expert_dim:
                raise ConfigError(f"ffn_dim {self.ffn_dim} leaves no channel for an expert; set expert_dim")
        elif self.expert_dim or self.shared_dim:
            raise ConfigError("expert_dim and shared_dim need n_experts")
        self.attn_placement = self.placement if self.attn_placement == "same" else self.attn_placement
        self.v_placement = self.attn_placement if self.v_placement == "same" else self.v_placement
        self.ffn_placement = self.placement if self.ffn_placement == "same" else self.ffn_placement
        if self.head_placement == "same":  # a norm without a vector after it would fix the logits' size at 1
            bare = self.placement == "norm" or (self.placement == "dual_norm" and not self.scale_vectors)
            self.head_placement = "input" if bare else self.placement
        self.dtype = "float32" if self.dtype == "auto" else self.dtype


@dataclass
class Settings(GPTConfig):
    """All settings, as they were typed."""

    # the optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: Muon on each hidden matrix, AdamW on the rest
    lr: Amount = 6e-3  # peak learning rate
    scale_lr_mult: Amount = 1.0  # learning rate of scale vectors, relative to lr
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"  # after the warm-up
    min_lr_frac: Fraction = 0.05  # where cosine ends, as a fraction of lr; wsd ends at 0
    warmup_steps: Whole = 100  # steps of linear warm-up
    decay_frac: Fraction = 0.2  # length of wsd's decay, as a fraction of max_steps
    shard_optimizer: bool = False  # ZeRO-1: each process keeps a part of the optimizer's state
    weight_decay: Amount = 0.1  # of matrices, embeddings, and the γ that scale_decay names
    scale_decay: Literal["input", "all", "none", "output", "all_but_head_u"] = "all"  # which γ decay; input is IWD
    decay_direction: bool = False  # decay or's α too: γ stays the same, α's effective learning rate rises [R]
    beta1: Beta = 0.9  # AdamW's
    beta2: Beta = 0.95  # AdamW's
    grad_clip: Amount = 1.0  # largest global gradient norm; 0 is no clipping
    # data and steps
    dataset: str = "pysrc"  # a folder under data/, or a path that contains a slash
    batch_tokens: Count = 2048  # tokens per optimizer step, over all processes
    micro_batch: Count = 16  # most sequences in one forward pass of one process
    max_steps: Count = 1000  # optimizer steps
    stop_at: Whole = 0  # stop here but keep the schedule of max_steps; --resume=True continues; 0 is off
    eval_interval: Count = 250  # steps between evaluations
    eval_tokens: Whole = 65536  # tokens of an evaluation, spread evenly over the validation split; 0 is all of it
    log_interval: Count = 10  # steps between rows of the log
    save_interval: Count = 250  # steps between checkpoints
    # the run
    init_from: str = ""  # start with the weights and shape in a folder by export.py or of a Hugging Face Llama
    seed: Seed = 1  # of the initial weights and the order of the data
    out_dir: str = ""  # the run's folder; empty is out/ and the names of the config files
    resume: Literal[False, True, "auto"] = False  # continue from out_dir's checkpoint; auto: if there is one
    overwrite: bool = False  # start over; a run in out_dir is moved to out_dir.1, or the next free number
    device: str = "auto"  # auto: cuda if available, else mps, else cpu
    compile: Literal["auto", True, False] = "auto"  # torch.compile; auto: on cuda
    kernels: Literal["auto", "torch"] = "auto"  # auto: Triton's on cuda; torch: plain PyTorch in their place
    dist_timeout: Annotated[float, 0.01, 1e6] = 10.0  # minutes that a process waits for another
    sample_tokens: Whole = 256  # length of the sample that is printed at the end
    wandb: str = ""  # Weights & Biases project that also gets the rows of log.csv; empty is none
    dry_run: bool = False  # only print the counts and the parameter groups

    def __post_init__(self):
        pass  # they stay as typed; gpt_config completes a copy


# What a resumed run may change. None of these changes what a step computes, beyond rounding; max_steps moves the end of
# the schedule.
FREE_ON_RESUME = {"micro_batch", "max_steps", "stop_at", "eval_interval", "log_interval", "save_interval", "out_dir",
                  "resume", "overwrite", "device", "dtype", "compile", "kernels", "sample_tokens", "shard_optimizer",
                  "dist_timeout", "dry_run", "wandb"}


def gpt_config(s, dtype="float32"):
    """The GPTConfig of settings s, with activations in dtype. Raises ConfigError if settings contradict each other."""
    return GPTConfig(**{**{f.name: getattr(s, f.name) for f in fields(GPTConfig)}, "dtype": dtype})


def batch_plan(s, world):
    """
    (sequences of one process, sequences of one micro-batch, micro-batches) of an optimizer step.

    batch_tokens is divided equally among `world` processes. Raises ConfigError if that is impossible.
    """
    share, rest = divmod(s.batch_tokens, s.block_size * world)
    if rest:
        raise ConfigError(f"batch_tokens {s.batch_tokens} is not divisible by block_size {s.block_size}"
                          + f" times {world} processes" * (world > 1))
    micro = min(s.micro_batch, share)
    if share % micro:
        raise ConfigError(f"batch_tokens {s.batch_tokens} is {share} sequences for each of {world} processes, "
                          f"which micro_batch {micro} does not divide")
    return share, micro, share // micro
