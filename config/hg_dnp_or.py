# HG + DNP + OR (paper): unified without IWD. Figure 5.
heterogeneous = True
placement = "dual_norm"
reparam = "or"
