"""
Parameter groups by role, AdamW, Muon, and learning-rate schedules that are pure functions of the step.

Imports none of the other files.
"""

import math

import torch


def param_groups(named_roles, weight_decay, scale_decay, scale_lr_mult=1.0, decay_direction=False):
    """
    Groups for an optimizer, each with a 'name', 'params', 'weight_decay' and 'lr_mult'; there are no empty groups.

    named_roles: (name, parameter, role, decays) of every parameter, as GPT.named_roles yields them.
    scale_decay: the role of the scale vectors that decay: 'input', 'output', 'all' or 'none'; 'all_but_head_u' shows
    what the decay of the LM head's u does. Matrices and embeddings always decay. decay_direction: if a vector decays,
    so does α of OR, although that leaves γ unchanged.
    Raises AssertionError unless every parameter is in exactly one group.
    """
    named_roles = list(named_roles)
    groups = {}
    for name, p, role, decays in named_roles:
        is_scale = role in ("input", "output")
        if is_scale:
            named = scale_decay in (role, "all") or scale_decay == "all_but_head_u" and "lm_head.u." not in name
            decays = (decays or decay_direction) and named
        key = f"scale_{role}" if is_scale else role
        if not decays:
            key += "_no_decay"
        group = groups.setdefault(key, {"name": key, "params": [], "weight_decay": weight_decay if decays else 0.0,
                                        "lr_mult": scale_lr_mult if is_scale else 1.0})
        group["params"].append(p)
    grouped = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(grouped) == sorted({id(p) for _, p, _, _ in named_roles}), "a parameter is in no group or in two"
    return list(groups.values())


class StackedMuon(torch.optim.Optimizer):
    """
    torch.optim.Muon with match_rms_adamw, also for stacks of matrices (E, N, K), which it refuses: each matrix moves
    by its own momentum, orthogonalised by five Newton-Schulz iterations in bf16.
    """

    def __init__(self, params, lr, weight_decay=0.1, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
                momentum = self.state[p]["momentum_buffer"]
                momentum.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(p.grad.lerp(momentum, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape[-2:])))


def orthogonalise(g):
    """The orthogonal factor of each matrix of g, (..., N, K), in bf16; singular values end between 0.7 and 1.2."""
    x = g.bfloat16().flatten(0, -3) if g.dim() > 2 else g.bfloat16().unsqueeze(0)
    if tall := g.size(-2) > g.size(-1):
        x = x.mT
    # each matrix by its own norm: an expert with few tokens has a small gradient and gets an update of the same size
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.mT if tall else x).reshape(g.shape)


def make_optimizers(groups, optimizer, betas, shard=False):
    """
    A list of optimizers over groups: only AdamW, or Muon (Keller Jordan, 2024) for the hidden matrices and AdamW for
    the rest. Muon's updates are scaled by 0.2 √max(m, n) to the size of AdamW's (arXiv 2502.16982, as in the paper), so
    both share one learning rate and weight decay.

    shard: ZeRO-1 (arXiv 1910.02054). Each process of the default group keeps the optimizer state of a share of the
    parameters, updates those, and sends them to the others: the same updates with less memory.
    """
    hidden = [g for g in groups if optimizer == "muon" and g["name"] == "matrix"]
    rest = [g for g in groups if optimizer != "muon" or g["name"] != "matrix"]
    wanted = [(rest, torch.optim.AdamW, dict(lr=0.0, betas=betas, eps=1e-8, fused=True))]
    if any(p.dim() > 2 for g in hidden for p in g["params"]):  # experts
        wanted.append((hidden, StackedMuon, dict(lr=0.0)))
    elif hidden:
        wanted.append((hidden, torch.optim.Muon, dict(lr=0.0, adjust_lr_fn="match_rms_adamw")))
    if shard:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # half a second to import, and seldom needed
        return [ZeroRedundancyOptimizer(params, kind, **kw) for params, kind, kw in wanted]
    return [kind(params, **kw) for params, kind, kw in wanted]


def parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def expected_state(optimizer):
    """What its state is after a step: {number of a parameter: {name: a tensor of that shape, without memory}}."""
    names = ("step", "exp_avg", "exp_avg_sq") if "betas" in optimizer.defaults else ("momentum_buffer",)
    return {i: {name: torch.empty(() if name == "step" else p.shape, device="meta") for name in names}
            for i, p in enumerate(parameters(optimizer))}


def load_state(optimizer, state):
    """
    Go on with a state like expected_state's. Its tensors are copied, which load_state_dict does not do: they may be
    views of a file, which is about to be replaced.
    """
    local = getattr(optimizer, "optim", optimizer)  # a sharded one keeps its share in there
    mine = set(parameters(local))
    for i, p in enumerate(parameters(optimizer)):
        if p in mine:
            local.state[p] = {name: t.to(p.device, copy=True, memory_format=torch.contiguous_format)
                              for name, t in state[i].items()}


def gather_state(optimizers):
    """Bring a sharded state together on process 0, which then has all of it in state_dict(); every process calls."""
    for optimizer in optimizers:
        if hasattr(optimizer, "consolidate_state_dict"):
            optimizer.consolidate_state_dict(to=0)


def set_lr(optimizers, lr):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_mult"]


def update(model, optimizers, scaler, loss, stop=False, grad_clip=1.0, world=1):
    """
    Clip the gradients to grad_clip, if it is not 0, and step the optimizers. scaler: a GradScaler; in fp16, where it is
    enabled, a step whose gradients overflow is left out.

    Returns (read, whether the step was left out). read() waits for the device and returns the loss, the gradients' norm
    and whether any process wants to stop, equal on all processes.
    """
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    status, overflow = torch.stack((loss / world, norm / world, norm.new_tensor(float(bool(stop))))), False
    if world > 1:
        torch.distributed.all_reduce(status)
    if scaler.is_enabled():
        scaler.update()
        overflow = not math.isfinite(status[1]) and scaler.get_scale() >= 1
    for optimizer in () if overflow else optimizers:
        optimizer.step()
    model.zero_grad()
    if not status.is_cuda:
        return status.tolist, overflow
    copy, copied = status.to("cpu", non_blocking=True), torch.cuda.Event()
    copied.record()  # to wait only for this step, not for what the GPU is given later
    return lambda: copied.synchronize() or copy.tolist(), overflow


def lr_at(step, lr, schedule, warmup_steps, max_steps, min_lr_frac, decay_frac):
    """
    The learning rate of the update that makes step into step + 1, for step = 0 … max_steps − 1.

    Linear warm-up from lr/warmup_steps to lr. Then 'cosine' down to min_lr_frac · lr at max_steps; 'wsd' (arXiv
    2404.06395) holds lr and goes linearly to 0 over the last decay_frac of all steps; 'constant' holds it.
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if schedule == "cosine":
        low = lr * min_lr_frac
        done = (step - warmup_steps) / max(1, max_steps - warmup_steps)
        return low + 0.5 * (1 + math.cos(math.pi * min(1.0, done))) * (lr - low)
    if schedule == "wsd":
        left = (max_steps - step) / max(1.0, decay_frac * max_steps)
        return lr * min(1.0, max(0.0, left))
    return lr
