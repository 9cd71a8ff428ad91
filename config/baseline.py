# Pre-Norm RMSNorm with one γ for each norm, decayed with everything else: what the paper improves on. These are the
# defaults. (nanoGPT's convention would be scale_decay = "none": see wd_none.py.)
scale_vectors = True
heterogeneous = False
placement = "input"
reparam = "direct"
scale_decay = "all"
