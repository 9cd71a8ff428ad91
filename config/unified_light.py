# Between unified and unified_free, ours: DNP in attention, where it is QK-norm, and DP in the FFN and on the LM head.
heterogeneous = True
placement = "dual"
attn_placement = "dual_norm"
reparam = "or"
scale_decay = "input"
