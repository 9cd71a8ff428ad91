# unified on Gemma's norms; DNP takes QK-norm's place.
arch = "gemma"
heterogeneous = True
placement = "dual_norm"
reparam = "or"
scale_decay = "input"
