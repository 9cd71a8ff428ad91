"""The model as the paper writes it, with every strategy on activations: what the fold must equal."""

from contextlib import contextmanager

import torch.nn.functional as F

import model
from kernels import apply_rope, rms_norm


def attention(self, h, cos, sin, cache=None, weights=None):
    (B, T, _), c = h.shape, self.config
    q, k, v = (x.view(B, T, -1, c.d_head) for x in self.qkv(h))
    if self.qk_norm:
        whole = c.qkv_norm == "full"
        q, k = (rms_norm(x.flatten(2) if whole else x, c.norm_eps, s and s()).view(x.shape)
                for x, s in ((q, self.q_scale), (k, self.k_scale)))
    q, k, v = (x.transpose(1, 2) for x in (apply_rope(q, cos, sin), apply_rope(k, cos, sin), v))
    k, v = (x.repeat_interleave(c.n_head // c.n_kv_head, dim=1) for x in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return F.linear(y.transpose(1, 2).reshape(B, T, -1), self.o.to(h.dtype))


def ffn(self, h, route=None, weights=None):
    gate, up = self.gate_up(h, route)
    return (F.linear if route is None else route.linear)(F.silu(gate) * up, self.down.to(h.dtype))


def pre_norm(x, y, branches, eps):
    x = x if y is None else x + y
    return rms_norm(x, eps), x


def logits(self, h, W, V, G):
    return self.lm_head(h)[0]


@contextmanager
def as_written():
    """Inside it every model computes as the paper writes it."""
    ours = [(model.Attention, "forward", attention), (model.FFN, "forward", ffn), (model, "pre_norm", pre_norm),
            (model.GPT, "logits", logits)]
    before = [getattr(owner, name) for owner, name, _ in ours]
    for owner, name, function in ours:
        setattr(owner, name, function)
    try:
        yield
    finally:
        for (owner, name, _), function in zip(ours, before):
            setattr(owner, name, function)
