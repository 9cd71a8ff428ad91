# HG + DNP + ER + IWD (paper). Figure 5.
heterogeneous = True
placement = "dual_norm"
reparam = "er"
scale_decay = "input"
