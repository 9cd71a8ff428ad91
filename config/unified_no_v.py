# A competing reading of unified: no norm and no output vector after v.
heterogeneous = True
placement = "dual_norm"
v_placement = "input"
reparam = "or"
scale_decay = "input"
