# A competing reading of unified: the γ before the LM head has the output role, so that IWD spares it.
heterogeneous = True
placement = "dual_norm"
reparam = "or"
scale_decay = "input"
final_norm_role = "output"
