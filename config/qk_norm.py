# A control for unified: the baseline with a norm and its γ after q and k, none after v, gate and up.
attn_placement = "dual_norm"
v_placement = "input"
