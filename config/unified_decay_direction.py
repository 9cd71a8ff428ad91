# A competing reading of unified: weight decay acts on OR's α too.
heterogeneous = True
placement = "dual_norm"
reparam = "or"
scale_decay = "input"
decay_direction = True
