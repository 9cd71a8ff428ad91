# HG + DNP (paper). Figure 5.
heterogeneous = True
placement = "dual_norm"
