# HG + DP (paper). Figure 5.
heterogeneous = True
placement = "dual"
