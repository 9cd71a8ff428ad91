# A competing reading of unified: the norms of q, k and v over their whole width, not over each head.
heterogeneous = True
placement = "dual_norm"
qkv_norm = "full"
reparam = "or"
scale_decay = "input"
