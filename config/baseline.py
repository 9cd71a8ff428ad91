# Pre-Norm RMSNorm with one γ per norm, decayed like every other parameter: the paper's baseline. These are the
# defaults. (nanoGPT does not decay γ: see wd_none.py.)
scale_vectors = True
heterogeneous = False
placement = "input"
reparam = "direct"
scale_decay = "all"
