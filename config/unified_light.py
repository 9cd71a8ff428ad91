# Between unified and unified_free, ours: DNP in attention, which is unified's QK-norm, and DP in the FFN.
heterogeneous = True
attn_placement = "dual_norm"
ffn_placement = "dual"
reparam = "or"
scale_decay = "input"
