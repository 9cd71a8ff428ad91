# HG + DP + OR (paper). Figure 5.
heterogeneous = True
placement = "dual"
reparam = "or"
