# QK-norm with a γ per channel of every head, a control: DNP on q and k only.
attn_placement = "dual_norm"
v_placement = "input"
