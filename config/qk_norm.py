# QK-norm as Qwen3 and Gemma have it, a control: RMSNorm over each head of q and k, with one γ that the heads share.
qk_norm = True
