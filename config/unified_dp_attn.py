# A competing reading of unified: DP in attention, DNP in the FFN.
heterogeneous = True
attn_placement = "dual"
ffn_placement = "dual_norm"
reparam = "or"
scale_decay = "input"
