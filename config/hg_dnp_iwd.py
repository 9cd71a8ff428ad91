# HG + DNP + IWD: unified without OR, the arm that the paper's figure 5 leaves out.
heterogeneous = True
placement = "dual_norm"
scale_decay = "input"
