# A control for unified: the baseline with a norm after q and k, without a γ of its own.
attn_placement = "norm"
v_placement = "input"
