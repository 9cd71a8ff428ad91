# HG + DP + ER (paper). Figure 5.
heterogeneous = True
placement = "dual"
reparam = "er"
