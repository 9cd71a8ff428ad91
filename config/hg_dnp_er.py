# HG + DNP + ER (paper). Figure 5.
heterogeneous = True
placement = "dual_norm"
reparam = "er"
